"""Log lines that describe an engine once its parts are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from specattn_vllm import layer_map
from specattn_vllm.layer_map import LayerMap

if TYPE_CHECKING:
    from specattn_vllm.methods.by_draft import ByDraftOptions
    from specattn_vllm.speculation.rounds import RoundSpeculator

logger = init_logger("vllm.specattn")

LARGE = 4 * 2**30  # above this many bytes of buffers, the log says how to reduce them


def sizes(nbytes: dict[str, int]) -> str:
    return ", ".join(f"{what} {size / 2**20:.1f} MiB" for what, size in nbytes.items())


def announce_buffers(speculator: RoundSpeculator, nbytes: dict[str, int]) -> None:
    """Log the sizes of the buffers, and a remedy if they are large."""
    logger.info(
        "specattn: executor=%s, buffers %.1f MiB (%s), allocated before vLLM measures the memory for the KV cache",
        speculator.operations.label or speculator.operations.name,
        sum(nbytes.values()) / 2**20,
        sizes(nbytes),
    )
    if sum(nbytes.values()) > LARGE:
        logger.warning(
            "specattn: its buffers take %.1f GiB from the KV cache, because they are sized for max_num_seqs = %d "
            "requests of max_model_len = %d tokens: lower either to what you need",
            sum(nbytes.values()) / 2**30,
            speculator.max_num_reqs,
            speculator.max_model_len,
        )


def announce(
    options: ByDraftOptions, found: LayerMap, readers: str, speculator: RoundSpeculator, nbytes: dict[str, int]
) -> None:
    """Log the whole description of an engine whose target reads through a layer map. readers: who reads a selection."""
    announce_buffers(speculator, nbytes)
    if speculator.crossover_tokens:
        logger.info(
            "specattn: batches of fewer than %d context tokens are dense, in drafting and in verification",
            speculator.crossover_tokens,
        )
    pairs = " ".join("-" if i is None else str(i) for i in found.layers)
    logger.warning(
        "specattn: method '%s' is APPROXIMATE: verification reads a selection of the KV cache, so the output is not "
        "the target model's own. For lossless speculation set method='dense'.",
        options.method,
    )
    if options.preset is not None:
        values = {name: getattr(options, name) for name in options.kind.paper}
        text = ", ".join(f"{name}={value}" for name, value in values.items())
        logger.info("specattn: preset '%s' (explicit options take precedence): %s", options.preset, text)
    logger.info(
        "specattn: %s, combine=%s, selections %s, draft layer per target layer [%s] ('-' is dense)",
        options.amount_of("the draft's attention"),
        options.combine,
        readers,
        pairs,
    )
    best, *_ = options.kind.maps
    if not found.calibrated:
        logger.warning(
            "specattn: layer map '%s' is uniform, not calibrated for this pair of models: expect worse quality at the "
            "same KV read. Make a map and set layer_map to it: specattn calibrate --target %s --draft %s --method %s "
            "--text FILES --out map.json",
            options.layer_map or layer_map.shipped_file(found) or layer_map.UNIFORM,
            speculator.vllm_config.model_config.model,
            speculator.vllm_config.speculative_config.draft_model_config.model,
            best,
        )
    if options.kind.map_rank(found.method):
        logger.warning(
            "specattn: the layer map has no heads, so the KV heads of target and draft are paired by proportion, which "
            "is not calibrated: expect worse quality at the same KV read. Set layer_map to a map for method '%s' to "
            "silence this.",
            options.method,
        )
