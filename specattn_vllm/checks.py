"""Start-up checks: they refuse what this plugin cannot serve, and say why, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from specattn_vllm import compat
from specattn_vllm.compat.names import resolve
from specattn_vllm.kernels.contracts import HEAD_SIZES
from specattn_vllm.layer_kinds import full_layers, has_windows, soft_cap, unsupported_attention
from specattn_vllm.options import KEY, OptionsError, SpecAttnOptions, refuse_misplaced

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


PARALLEL = {
    "pipeline_parallel_size": "the draft runs on the last rank only; use 1",
    "decode_context_parallel_size": "use 1",
    "prefill_context_parallel_size": "use 1",
}
"""Settings that must be 1, with the remedy."""


FP8_CACHES = ("fp8", "fp8_e4m3")
"""vLLM's names for e4m3 with one scale for a layer."""


class UnsupportedError(ValueError):
    """This backend cannot serve the engine's configuration. The message has one line per reason, with a remedy."""


def check(vllm_config: VllmConfig) -> None:
    """Raise OptionsError or UnsupportedError for an engine that cannot work with its configuration."""
    if compat.is_ours_in_part(vllm_config):
        raise UnsupportedError(
            "attention_config.backend_per_kind beside or instead of the specattn backend: draft and target need it in "
            "every layer; use --attention-backend specattn, and name another backend for sliding_window alone"
        )
    given = isinstance(vllm_config.additional_config, dict) and KEY in vllm_config.additional_config
    if not compat.is_ours(vllm_config):
        if given:
            chosen = vllm_config.attention_config.backend
            raise OptionsError(
                f"additional_config['{KEY}'] is set, but the attention backend is "
                f"{chosen.name if chosen else 'left to vLLM'}, so the options would do nothing: add "
                f"--attention-backend specattn, or remove them"
            )
        refuse_misplaced(vllm_config.additional_config, ours=False)
        return
    _take_what_the_checkpoint_says(vllm_config)
    options = SpecAttnOptions.from_vllm(vllm_config)
    reasons = [*_engine(vllm_config), *_connector(vllm_config, options.executor)]
    reasons += [*_models(vllm_config), *_speculation(vllm_config)]
    reasons += [*_soft_cap(vllm_config.model_config, options), *options.refusals(vllm_config)]
    if reasons:
        raise UnsupportedError("--attention-backend specattn cannot serve this:\n  " + "\n  ".join(reasons))
    resolve(options.kind.check)(vllm_config, options)


def _cache_scheme(model: ModelConfig) -> dict[str, Any]:
    """What a checkpoint of compressed-tensors says of its KV cache; empty: nothing."""
    quantization = getattr(model.hf_config, "quantization_config", None)
    return (quantization.get("kv_cache_scheme") or {}) if isinstance(quantization, dict) else {}


def _take_what_the_checkpoint_says(config: VllmConfig) -> None:
    """vLLM makes 'auto' to 'fp8' for such a checkpoint when it makes the first layer. Checks, sizes and executors come
    before that."""
    if config.cache_config.cache_dtype == "auto" and _cache_scheme(config.model_config):
        config.cache_config.cache_dtype = "fp8"


def _engine(config: VllmConfig) -> Iterator[str]:
    parallel, cache = config.parallel_config, config.cache_config
    if not config.use_v2_model_runner:
        remedy = 'on CPU, run  eval "$(specattn cpu-env)"  first' if _on_cpu() else "unset VLLM_USE_V2_MODEL_RUNNER"
        yield f"model runner V1: only V2 is supported; {remedy}, or turn off what made vLLM choose V1 (see its log)"
    for name, remedy in PARALLEL.items():
        if (size := getattr(parallel, name, 1)) > 1:
            yield f"{name} = {size}: {remedy}"
    model_dtype = str(config.model_config.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", model_dtype, *FP8_CACHES):
        yield (
            f"kv_cache_dtype = {cache.cache_dtype!r}: the cache must have the model's dtype, {model_dtype}, or that of "
            "8-bit floats, fp8 (e4m3, one scale for a layer); use 'auto' or 'fp8'"
        )
    if cache.cache_dtype.startswith("fp8") and _before_fp8():
        yield "kv_cache_dtype = 'fp8': GPUs older than Ada and Hopper have no such numbers; use 'auto'"
    if _cache_scheme(config.model_config).get("strategy") == "attn_head":
        yield (
            "the checkpoint's kv_cache_scheme has a scale for each head of the KV cache: use a checkpoint with one for "
            "each layer (strategy 'tensor')"
        )
    if cache.kv_cache_dtype_skip_layers:
        yield "kv_cache_dtype_skip_layers: all layers that select need caches of one type; remove it"
    if config.model_config.enable_sleep_mode:
        yield "--enable-sleep-mode: a server that wakes up from level 2 has lost the plugin's buffers; leave it out"
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    if parallel.enable_expert_parallel and ranks > 1 and _on_cpu():
        yield (
            "--enable-expert-parallel on a CPU: vLLM 0.32 ends in a segmentation fault there, with other backends too; "
            "leave it out"
        )
    if parallel.use_ubatching:
        yield "microbatches (enable_dbo, ubatch_size): selections are made for whole batches; turn them off"
    if cache.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill: remove it"


def _connector(config: VllmConfig, executor: str) -> Iterator[str]:
    transfer = config.kv_transfer_config
    if transfer is None:
        return
    name, more = transfer.kv_connector, transfer.kv_connector_extra_config
    tier = more.get("spec_name", "CPUOffloadingSpec")
    other = transfer.kv_connector_module_path or more.get("spec_module_path") or (tier != "CPUOffloadingSpec" and tier)
    if _on_cpu() and name != "ExampleConnector":
        yield (
            f"KV connector {name!r} on a CPU: vLLM's offloading copies what is in a GPU's memory; leave "
            "--kv-transfer-config and --kv-offloading-size out"
        )
    elif other or name not in compat.CONNECTORS:
        which = f"{name} of {other}" if other else name
        yield (
            f"KV connector {which!r}: the plugin was tried beside vLLM's OffloadingConnector to the CPU's memory, "
            "SimpleCPUOffloadConnector and ExampleConnector only; use --kv-offloading-size, with "
            "--kv-offloading-backend native, or leave --kv-transfer-config out"
        )
    elif name == "ExampleConnector" and (config.parallel_config.tensor_parallel_size > 1 or config.lora_config):
        yield (
            "KV connector 'ExampleConnector' with tensor parallelism or LoRA: its files have names of tokens alone, so "
            "ranks and adapters would read one another's; use --kv-offloading-size, or leave --kv-transfer-config out"
        )
    if config.model_config.is_hybrid:
        yield (
            "a KV connector beside layers of linear attention or Mamba was not tried; leave --kv-transfer-config and "
            "--kv-offloading-size out"
        )
    if executor == "xformers":
        yield (
            "a KV connector with executor 'xformers': it reads one layout of the cache, and vLLM's offloading takes "
            "another; use 'auto' or 'triton'"
        )


def _models(config: VllmConfig) -> Iterator[str]:
    models = {"target": config.model_config}
    spec = config.speculative_config
    # For n-gram drafting, vLLM sets draft_model_config to the target's config.
    if spec is not None and spec.draft_model_config not in (None, config.model_config):
        models["draft"] = spec.draft_model_config
    for side, model in models.items():
        if model.use_mla:
            yield f"{side}: multi-head latent attention (MLA) is not supported; use a model with MHA or GQA"
        if model.is_multimodal_model and model.supports_multimodal_inputs:
            yield f"{side}: multimodal inputs are not supported; use a text model, or --language-model-only"
        if model.is_encoder_decoder:
            yield f"{side}: encoder-decoder models are not supported"
        if model.is_attention_free or (side == "target" and model.is_hybrid and not full_layers(model, 1)):
            yield f"{side}: no layer has attention, so there is nothing to choose; serve it with vLLM's own backends"
        if side == "draft" and model.is_hybrid and spec.uses_draft_model():  # vLLM's other drafters run as they are
            yield (
                "draft: models with layers of linear attention or Mamba are not supported; use a draft model with full "
                "attention in every layer, another drafter, or none"
            )
        yield from _windows(side, model, config)
        if model.runner_type not in ("generate", "draft"):
            yield f"{side}: runner {model.runner_type!r} does not decode; use a generating model"
        if not model.use_mla and model.get_head_size() not in HEAD_SIZES:
            *sizes, last = HEAD_SIZES
            allowed = f"{', '.join(map(str, sizes))} and {last}"
            yield f"{side}: head size {model.get_head_size()} is not supported; {allowed} are"


def _windows(side: str, model: ModelConfig, config: VllmConfig) -> Iterator[str]:
    for what in unsupported_attention(model):
        yield (
            f"{side}: {what} are not supported; serve this model with vLLM's own backends (leave out "
            "--attention-backend specattn)"
        )
    if not has_windows(model):
        return
    if config.cache_config.cache_dtype in FP8_CACHES and _without_avx512():
        yield (
            f"{side}: layers with a sliding window are vLLM's own, and those read fp8 on CPUs with AVX-512 alone; use "
            "kv_cache_dtype = 'auto'"
        )
    if side == "draft":
        if config.speculative_config.uses_draft_model():  # vLLM's other drafters run as they are
            yield (
                "draft: sliding-window attention is not supported; use a draft model with full attention in every "
                "layer, another drafter, or none"
            )
    elif not full_layers(model, 1):
        yield (
            "target: every layer has a sliding window, so there is nothing to choose; serve this model with vLLM's own "
            "backends"
        )


def _soft_cap(target: ModelConfig, options: SpecAttnOptions) -> Iterator[str]:
    if soft_cap(target) is not None and options.executor == "xformers":
        yield "target: executor 'xformers' knows no soft cap on logits; use 'auto' or 'triton'"


def _speculation(config: VllmConfig) -> Iterator[str]:
    spec = config.speculative_config
    if spec is None:
        return
    modules = [] if config.lora_config is None else config.lora_config.target_modules or ["lm_head"]  # None: all
    if any(name.split(".")[-1] == "lm_head" for name in modules):
        yield (
            "LoRA on lm_head with speculation: runner V2 has one adapter for each request there, not for each row of a "
            "verification; name the modules of your adapters without it (--lora-target-modules q_proj k_proj ...), or "
            "serve without speculation"
        )
    if spec.uses_draft_model() and spec.draft_model_config.model != config.model_config.model:
        yield from _positions(config.model_config, spec.draft_model_config)
    if spec.parallel_drafting and spec.uses_draft_model():  # DFlash and DSpark always draft in parallel: allowed
        yield "parallel_drafting: selections need one draft step per token; turn it off"
    if spec.enable_adaptive_verification:
        yield "enable_adaptive_verification: turn it off"
    cache_dtype = config.cache_config.cache_dtype
    fp8 = cache_dtype.startswith("fp8")
    if spec.kv_cache_dtype not in (None, cache_dtype) and (fp8 or spec.kv_cache_dtype != "auto"):
        yield f"draft kv_cache_dtype = {spec.kv_cache_dtype!r}: draft and target must share one; remove it"
    # A type that is named holds for both; 'auto' becomes what the checkpoint of either says.
    if cache_dtype == "auto" and spec.draft_model_config is not None and _cache_scheme(spec.draft_model_config):
        yield (
            "draft: its checkpoint has an fp8 KV cache (kv_cache_scheme), and the target's is another: both must share "
            "one; name it (--kv-cache-dtype fp8, or bfloat16)"
        )
    target_tp, draft_tp = config.parallel_config.tensor_parallel_size, spec.draft_parallel_config.tensor_parallel_size
    if target_tp != draft_tp:
        yield f"draft_tensor_parallel_size = {draft_tp}: must equal the target's, {target_tp}"


def _positions(target: ModelConfig, draft: ModelConfig) -> Iterator[str]:
    """vLLM 0.32 would draft past the draft's last position. 0.33 cuts the target's length to the draft's, so what the
    user asked for counts too; without a length of the user's it warns by itself."""
    asked = max(target.max_model_len, target.original_max_model_len or 0)
    if draft.max_model_len < asked:
        yield (
            f"the draft model has {draft.max_model_len} positions, and contexts may have {asked} tokens: give "
            f"--max-model-len {draft.max_model_len}, or a draft model with more positions, another drafter, or none"
        )


def _before_fp8() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and not current_platform.has_device_capability(89)


def _without_avx512() -> bool:
    import torch

    return _on_cpu() and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()
