"""The private parts of vLLM that the plugin depends on. At start-up, before any patch, we check that they exist.

vLLM's files are parsed, not imported. So the check takes a fraction of a second, needs no GPU, and can check any vLLM
version whose files are available.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

GPU = "v1.worker.gpu"
_PARTS = {
    # Patched in every process.
    "v1.attention.backends.registry:": "AttentionBackendEnum register_backend",
    "platforms.interface:Platform.": "get_attn_backend_cls(selected_backend,attn_selector_config,num_heads)",
    "engine.arg_utils:EngineArgs.": "add_cli_args(parser) create_engine_config spec_model spec_method spec_tokens "
    "speculative_config additional_config attention_backend disable_log_stats",
    "config.attention:AttentionConfig.": "backend_per_kind",
    "v1.attention.selector:AttentionSelectorConfig.": "has_sliding_window",
    "v1.kv_cache_interface:KVCacheSpecKind.": "SLIDING_WINDOW",
    "sampling_params:SamplingParams.": "_verify_args extra_args skip_reading_prefix_cache",
    "exceptions:": "VLLMValidationError",
    "v1.metrics.prometheus:": "get_prometheus_registry",
    "entrypoints.serve.instrumentator.metrics:": "get_prometheus_registry",
    # Patched or read in a worker.
    f"{GPU}.model_runner:GPUModelRunner.": "load_model _dummy_run finish_requests(scheduler_output) speculator "
    "model_state decode_query_len max_num_tokens lora_config "
    "maybe_select_dummy_loras(lora_config,num_scheduled_tokens) initialize_kv_cache kv_connector kv_cache_config "
    "update_requests(scheduler_output)",
    f"{GPU}.kv_connector:ActiveKVConnector.": "pre_forward(scheduler_output) kv_connector",
    "v1.core.sched.output:NewRequestData.": "num_computed_tokens block_ids",
    f"{GPU}.model_states.interface:ModelState.": "add_request(req_index,new_req_data)",
    f"{GPU}.model_states.mamba_hybrid:": "build_attn_metadata(req_idx)",
    f"{GPU}.model_states.mamba_hybrid:MambaHybridModelState.": "prepare_attn(input_batch)",
    f"{GPU}.model_states.mamba_hybrid:MambaHybridAttnMetadata.": "get_extra_common_attn_kwargs(kv_cache_group_id,"
    "num_reqs)",
    "v1.worker.utils:AttentionGroup.": "backend",
    "model_executor.layers.mamba.abstract:": "MambaBase",
    "v1.worker.worker_base:": "WorkerBase",
    "v1.core.sched.output:SchedulerOutput.": "scheduled_new_reqs total_num_scheduled_tokens kv_cache_block_copies",
    "config.parallel:ParallelConfig.": "data_parallel_index",
    "v1.sample.ops.topk_topp_sampler:": "HAS_TRITON",
    # CUDA graphs.
    f"{GPU}.cudagraph_utils:BatchExecutionDescriptor.": "uniform_token_count",
    f"{GPU}.cudagraph_utils:CudaGraphManager.": "__init__(vllm_config,device,cudagraph_mode,decode_query_len) "
    "_init_candidates _capture_descs _capture_mem_samples capture dispatch(num_reqs,num_tokens,uniform_token_count) "
    "graphs needs_capture run_fullgraph(desc)",
    f"{GPU}.cudagraph_utils:ModelCudaGraphManager.": "capture(model) run_fullgraph(desc)",
    # Steps and batches.
    "v1.attention.backend:CommonAttentionMetadata.": "req_idx is_prefilling query_start_loc_cpu block_table_tensor",
    "v1.attention.backend:AttentionMetadataBuilder.": "build(common_prefix_len,common_attn_metadata,fast_build) "
    "supports_draft_decode_metadata_update",
    "v1.attention.backend:AttentionBackend.": "customize_spec(spec)",
    "v1.attention.backend:AttentionCGSupport.": "UNIFORM_BATCH",
    f"{GPU}.input_batch:InputBatch.": "make_dummy(num_reqs,num_tokens,input_buffers,max_query_len) idx_mapping "
    "idx_mapping_np is_prefilling_np num_draft_tokens_per_req num_scheduled_tokens seq_lens_cpu_upper_bound",
    f"{GPU}.input_batch:InputBuffers.": "__init__(max_num_reqs,max_num_tokens,device)",
    f"{GPU}.block_table:BlockTables.": "compute_slot_mappings get_dummy_block_tables(num_reqs) input_block_tables",
    f"{GPU}.attn_utils:": "build_slot_mappings_by_layer(slot_mappings,kv_cache_config)",
    "model_executor.layers.attention_layer_base:": "AttentionLayerBase",
    "forward_context:": "set_forward_context(attn_metadata,vllm_config,num_tokens,slot_mapping,skip_compiled)",
    # The base class of our speculators: the members that they override, call and read.
    f"{GPU}.spec_decode.standalone_ar.speculator:StandaloneARSpeculator.": "load_model(target_model) "
    "load_draft_model(target_model,target_attn_layer_names) "
    "set_attn(model_state,kv_cache_config,block_tables,target_input_buffers,target_attn_groups) "
    "init_cudagraph_manager(cudagraph_mode) capture propose(input_batch,attn_metadata,slot_mappings,"
    "last_hidden_states,aux_hidden_states,num_sampled,num_rejected,last_sampled,next_prefill_tokens,temperature,seeds,"
    "dummy_run) _build_attn_metadata(num_reqs,query_start_loc_np,step) "
    "_build_uniform_attn_metadata(batch_desc,num_reqs,num_query_per_req,seq_lens_cpu_upper_bound,step) "
    "_copy_request_inputs(num_reqs,idx_mapping,temperature,seeds,dummy_run) "
    "_multi_step_decode(input_batch,num_rejected,num_reqs) _run_model sample_draft num_extra_query_per_req "
    "draft_attn_layer_names last_token_indices expanded_positions expanded_input_ids input_buffers block_tables "
    "draft_tokens draft_logits idx_mapping attn_cg_support dp_size draft_watermarker arange_gpu current_draft_step",
}
"""Module and class -> the parts of it, with the arguments of functions that must exist, in this order."""
LEANED_ON = tuple(owner + part for owner, parts in _PARTS.items() for part in parts.split())
"""'module:symbol', or 'module:symbol(arguments)'."""


def remedy(vllm: Path, version: str) -> str | None:
    """Why the plugin cannot run on the vLLM in this folder, with the remedy; None if it can."""
    lost = [told for lean in LEANED_ON if (told := problem(lean, signature(vllm, lean))) is not None]
    if not lost:
        return None
    return (
        f"specattn-vllm needs parts that vLLM {version} does not have: {'; '.join(lost)}. Install a vLLM on which this "
        "version of the plugin was tested, or a newer specattn-vllm; or remove specattn-vllm (or leave 'specattn' out "
        "of VLLM_PLUGINS)"
    )


def signature(vllm: Path, lean: str) -> str | None:
    """The arguments of the function that an entry names, as 'a, b'; '' if it is no function, None if it is missing."""
    found = _find(vllm, *lean.partition("(")[0].split(":"))
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return None if found is None else ""
    return ", ".join(a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs))


def problem(lean: str, found: str | None) -> str | None:
    """Describes what is missing for an entry, given the signature that was found; None if nothing is missing."""
    symbol, _, arguments = lean.rstrip(")").partition("(")
    name = f"vllm.{symbol.replace(':', '.')}"
    if found is None:
        return name
    wanted, named = [a for a in re.split(", ?", arguments) if a], found.split(", ")
    if absent := [argument for argument in wanted if argument not in named]:
        return f"argument {', '.join(absent)} of {name}"
    if sorted(wanted, key=named.index) != wanted:
        return f"arguments of {name} in the order {', '.join(wanted)}"
    return None


@functools.cache
def _tree(vllm: Path, module: str) -> list[ast.stmt]:
    """The statements of a module; none if there is no such file."""
    path = vllm.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((ast.parse(file.read_text(encoding="utf-8")).body for file in files if file.is_file()), [])


def _defined(body: list[ast.stmt], name: str) -> ast.stmt | None:
    """The statement of a body, or inside its `if` and `try` statements, that defines or imports a name."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            if (found := _defined([*node.body, *node.orelse], name)) is not None:
                return found
        elif name in _names(node):
            return node
    return None


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]


def _find(vllm: Path, module: str, symbol: str) -> ast.AST | None:
    """What defines a name of a module; or a method, a field, or an attribute that some method sets, of a class of the
    module or of its base classes."""
    first, _, member = symbol.partition(".")
    node = _defined(_tree(vllm, module), first)
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
        original = next(a.name for a in node.names if (a.asname or a.name) == first)
        return _find(vllm, node.module.removeprefix("vllm."), original + (f".{member}" if member else ""))
    if not member:
        return node
    if not isinstance(node, ast.ClassDef):
        return None
    if (found := _defined(node.body, member)) is not None:
        return found
    attributes = (part for part in ast.walk(node) if isinstance(part, ast.Attribute) and part.attr == member)
    if (stored := next((part for part in attributes if isinstance(part.ctx, ast.Store)), None)) is not None:
        return stored
    bases = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    above = (_find(vllm, module, f"{base.id}.{member}") for base in bases if isinstance(base, ast.Name))
    return next((found for found in above if found is not None), None)
