"""Gives the target's pruned layers an audit, where the options ask for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from specattn_vllm.selection.audit import Audit, Floor

if TYPE_CHECKING:
    from specattn_vllm.speculation.rounds import RoundSpeculator

logger = init_logger("vllm.specattn")


def prepare_audit(speculator: RoundSpeculator) -> Audit | None:
    """The audit of an engine whose selection is prepared, buffers included; None without a share."""
    options = speculator.options
    pruner = speculator.selection.pruner
    if not options.audit_share:
        return None
    layers = get_layers_from_vllm_config(speculator.vllm_config, AttentionLayerBase)
    names = list(pruner.layer_sources)
    impls = {name: layers[name].impl for name in names}
    floor = None
    if options.audit_floor is not None:
        floor = Floor(speculator.selection.store, options.audit_floor, options.audit_dense_rounds)
    audit = Audit(
        speculator.operations,
        speculator.counters,
        layers=names,
        num_heads=impls[names[0]].num_heads,
        num_kv_heads=impls[names[0]].num_kv_heads,
        max_num_reqs=speculator.max_num_reqs,
        share=options.audit_share,
        device=speculator.device,
        floor=floor,
    )
    pruner.audit = audit
    for name, impl in impls.items():
        impl.audit = audit.of_layer(name)
    speculator.reporter.more.append(audit.line)
    logger.warning(
        "specattn: audit_share = %s: each verification reads all keys once more in so many of its (layer, request) "
        "pairs, which takes time; set it to 0 to measure speed",
        options.audit_share,
    )
    if floor is not None:
        logger.info(
            "specattn: audit_floor: a request whose audited pairs retain less than %s on average reads everything in "
            "its next %d verifications",
            floor.retained,
            floor.verifications,
        )
    return audit
