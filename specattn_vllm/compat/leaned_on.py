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
STANDALONE = f"{GPU}.spec_decode.standalone_ar.speculator:StandaloneARSpeculator"
LEANED_ON = (
    # Patched in every process.
    "v1.attention.backends.registry:AttentionBackendEnum",
    "v1.attention.backends.registry:register_backend",
    "platforms.interface:Platform.get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)",
    "engine.arg_utils:EngineArgs.add_cli_args(parser)",
    "engine.arg_utils:EngineArgs.create_engine_config",
    "engine.arg_utils:EngineArgs.spec_model",
    "engine.arg_utils:EngineArgs.spec_method",
    "engine.arg_utils:EngineArgs.spec_tokens",
    "engine.arg_utils:EngineArgs.speculative_config",
    "engine.arg_utils:EngineArgs.additional_config",
    "engine.arg_utils:EngineArgs.attention_backend",
    "engine.arg_utils:EngineArgs.disable_log_stats",
    "config.attention:AttentionConfig.backend_per_kind",
    "v1.attention.selector:AttentionSelectorConfig.has_sliding_window",
    "v1.kv_cache_interface:KVCacheSpecKind.SLIDING_WINDOW",
    "sampling_params:SamplingParams._verify_args",
    "sampling_params:SamplingParams.extra_args",
    "sampling_params:SamplingParams.skip_reading_prefix_cache",
    "exceptions:VLLMValidationError",
    "v1.metrics.prometheus:get_prometheus_registry",
    "entrypoints.serve.instrumentator.metrics:get_prometheus_registry",
    # Patched or read in a worker.
    f"{GPU}.model_runner:GPUModelRunner.load_model",
    f"{GPU}.model_runner:GPUModelRunner._dummy_run",
    f"{GPU}.model_runner:GPUModelRunner.finish_requests(scheduler_output)",
    f"{GPU}.model_runner:GPUModelRunner.speculator",
    f"{GPU}.model_runner:GPUModelRunner.model_state",
    f"{GPU}.model_runner:GPUModelRunner.decode_query_len",
    f"{GPU}.model_states.interface:ModelState.add_request(req_index, new_req_data)",
    "v1.worker.worker_base:WorkerBase",
    "v1.core.sched.output:SchedulerOutput.scheduled_new_reqs",
    "v1.core.sched.output:SchedulerOutput.total_num_scheduled_tokens",
    "config.parallel:ParallelConfig.data_parallel_index",
    "v1.sample.ops.topk_topp_sampler:HAS_TRITON",
    # CUDA graphs.
    f"{GPU}.cudagraph_utils:BatchExecutionDescriptor.uniform_token_count",
    f"{GPU}.cudagraph_utils:CudaGraphManager.__init__(vllm_config, device, cudagraph_mode, decode_query_len)",
    f"{GPU}.cudagraph_utils:CudaGraphManager._init_candidates",
    f"{GPU}.cudagraph_utils:CudaGraphManager._capture_descs",
    f"{GPU}.cudagraph_utils:CudaGraphManager._capture_mem_samples",
    f"{GPU}.cudagraph_utils:CudaGraphManager.capture",
    f"{GPU}.cudagraph_utils:CudaGraphManager.dispatch(num_reqs, num_tokens, uniform_token_count)",
    f"{GPU}.cudagraph_utils:CudaGraphManager.graphs",
    f"{GPU}.cudagraph_utils:CudaGraphManager.needs_capture",
    f"{GPU}.cudagraph_utils:CudaGraphManager.run_fullgraph(desc)",
    f"{GPU}.cudagraph_utils:ModelCudaGraphManager.capture(model)",
    f"{GPU}.cudagraph_utils:ModelCudaGraphManager.run_fullgraph(desc)",
    # Steps and batches.
    "v1.attention.backend:CommonAttentionMetadata.req_idx",
    "v1.attention.backend:CommonAttentionMetadata.is_prefilling",
    "v1.attention.backend:CommonAttentionMetadata.query_start_loc_cpu",
    "v1.attention.backend:CommonAttentionMetadata.block_table_tensor",
    "v1.attention.backend:AttentionMetadataBuilder.build(common_prefix_len, common_attn_metadata, fast_build)",
    "v1.attention.backend:AttentionMetadataBuilder.supports_draft_decode_metadata_update",
    "v1.attention.backend:AttentionBackend.customize_spec(spec)",
    "v1.attention.backend:AttentionCGSupport.UNIFORM_BATCH",
    f"{GPU}.input_batch:InputBatch.make_dummy(num_reqs, num_tokens, input_buffers, max_query_len)",
    f"{GPU}.input_batch:InputBatch.idx_mapping",
    f"{GPU}.input_batch:InputBatch.idx_mapping_np",
    f"{GPU}.input_batch:InputBatch.is_prefilling_np",
    f"{GPU}.input_batch:InputBatch.num_draft_tokens_per_req",
    f"{GPU}.input_batch:InputBatch.num_scheduled_tokens",
    f"{GPU}.input_batch:InputBatch.seq_lens_cpu_upper_bound",
    f"{GPU}.input_batch:InputBuffers.__init__(max_num_reqs, max_num_tokens, device)",
    f"{GPU}.block_table:BlockTables.compute_slot_mappings",
    f"{GPU}.block_table:BlockTables.get_dummy_block_tables(num_reqs)",
    f"{GPU}.block_table:BlockTables.input_block_tables",
    f"{GPU}.attn_utils:build_slot_mappings_by_layer(slot_mappings, kv_cache_config)",
    "model_executor.layers.attention_layer_base:AttentionLayerBase",
    "forward_context:set_forward_context(attn_metadata, vllm_config, num_tokens, slot_mapping, skip_compiled)",
    # The base class of our speculators: the members that they override, call and read.
    f"{STANDALONE}.load_model(target_model)",
    f"{STANDALONE}.load_draft_model(target_model, target_attn_layer_names)",
    f"{STANDALONE}.set_attn(model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups)",
    f"{STANDALONE}.init_cudagraph_manager(cudagraph_mode)",
    f"{STANDALONE}.capture",
    f"{STANDALONE}.propose(input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, "
    "num_sampled, num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, dummy_run)",
    f"{STANDALONE}._build_attn_metadata(num_reqs, query_start_loc_np, step)",
    f"{STANDALONE}._build_uniform_attn_metadata(batch_desc, num_reqs, num_query_per_req, seq_lens_cpu_upper_bound, "
    "step)",
    f"{STANDALONE}._copy_request_inputs(num_reqs, idx_mapping, temperature, seeds, dummy_run)",
    f"{STANDALONE}._multi_step_decode(input_batch, num_rejected, num_reqs)",
    f"{STANDALONE}._run_model",
    f"{STANDALONE}.sample_draft",
    *(
        f"{STANDALONE}.{attribute}"
        for attribute in (
            "num_extra_query_per_req",
            "draft_attn_layer_names",
            "last_token_indices",
            "expanded_positions",
            "expanded_input_ids",
            "input_buffers",
            "block_tables",
            "draft_tokens",
            "draft_logits",
            "idx_mapping",
            "attn_cg_support",
            "dp_size",
            "draft_watermarker",
            "arange_gpu",
            "current_draft_step",
        )
    ),
)
"""'module:symbol', or 'module:symbol(arguments)': the arguments must exist, in this order."""


def missing(vllm: Path) -> list[str]:
    """Describes each entry of `LEANED_ON` that the vLLM in this folder does not have."""
    return [told for lean in LEANED_ON if (told := problem(lean, signature(vllm, lean))) is not None]


def remedy(vllm: Path, version: str) -> str | None:
    """Why the plugin cannot run on the vLLM in this folder, with the remedy; None if it can."""
    if not (lost := missing(vllm)):
        return None
    return (
        f"specattn-vllm needs parts that vLLM {version} does not have: {'; '.join(lost)}. Install a vLLM on which this "
        "version of the plugin was tested, or a newer specattn-vllm; or remove specattn-vllm (or leave 'specattn' out "
        "of VLLM_PLUGINS)"
    )


def signature(vllm: Path, lean: str) -> str | None:
    """The arguments of the function that an entry names, as 'a, b'; '' if it is no function, None if it is missing."""
    module, symbol, _ = _parts(lean)
    found = _find(vllm, module, symbol)
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return None if found is None else ""
    return ", ".join(a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs))


def problem(lean: str, found: str | None) -> str | None:
    """Describes what is missing for an entry, given the signature that was found; None if nothing is missing."""
    module, symbol, arguments = _parts(lean)
    name = f"vllm.{module}.{symbol}"
    if found is None:
        return name
    if arguments is None:
        return None
    wanted, named = arguments.split(", "), found.split(", ")
    if absent := [argument for argument in wanted if argument not in named]:
        return f"argument {', '.join(absent)} of {name}"
    if sorted(wanted, key=named.index) != wanted:
        return f"arguments of {name} in the order {arguments}"
    return None


def _parts(lean: str) -> tuple[str, str, str | None]:
    module, symbol, arguments = re.fullmatch(r"([\w.]+):([\w.]+)(?:\((.*)\))?", lean).groups()
    return module, symbol, arguments


@functools.cache
def _tree(vllm: Path, module: str) -> dict[str, ast.stmt] | None:
    """Name -> the top-level definition or import of a module; None if there is no such file."""
    path = vllm.joinpath(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    if not file.is_file():
        return None
    names: dict[str, ast.stmt] = {}
    for node in _statements(ast.parse(file.read_text(encoding="utf-8")).body):
        names.update(dict.fromkeys(_names(node), node))
    return names


def _statements(body: list[ast.stmt]):
    """The statements of a body, and those inside its `if` and `try` statements."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]


def _find(vllm: Path, module: str, symbol: str) -> ast.AST | None:
    names = _tree(vllm, module)
    first, _, member = symbol.partition(".")
    node = None if names is None else names.get(first)
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
        original = next(a.name for a in node.names if (a.asname or a.name) == first)
        return _find(vllm, node.module.removeprefix("vllm."), original + (f".{member}" if member else ""))
    if node is None or not member:
        return node
    return _member(vllm, module, node, member) if isinstance(node, ast.ClassDef) else None


def _member(vllm: Path, module: str, cls: ast.ClassDef, member: str) -> ast.AST | None:
    """A method, a field, or an attribute that some method sets, of a class or of its base classes."""
    for node in _statements(cls.body):
        if member in _names(node):
            return node
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == member:
            return node
    for base in cls.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(base, ast.Name) and (found := _find(vllm, module, f"{base.id}.{member}")) is not None:
            return found
    return None
