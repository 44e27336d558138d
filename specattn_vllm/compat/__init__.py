"""The only folder that patches vLLM. The docstring of each patch says why it exists and when it can be removed.

`start.py` has the patches of every vLLM process; `worker.py`, `graphs.py` and `filled.py` those of a process that runs
the model. They are written for vLLM 0.32 and 0.33. `leaned_on.py` lists what is patched, and what is used without a
patch. It checks that vLLM has these before anything is patched.
"""

from specattn_vllm.compat.filled import CONNECTORS as CONNECTORS
from specattn_vllm.compat.filled import after_filled as after_filled
from specattn_vllm.compat.graphs import capture_twice as capture_twice
from specattn_vllm.compat.names import is_our_layer as is_our_layer
from specattn_vllm.compat.names import is_ours as is_ours
from specattn_vllm.compat.names import is_ours_in_part as is_ours_in_part
from specattn_vllm.compat.start import (
    add_cli_aliases,
    check_engine_config,
    check_request,
    register_backend,
    select_backend,
    serve_metrics,
)
from specattn_vllm.compat.start import serve_parser as serve_parser
from specattn_vllm.compat.worker import add_worker_method, attach_to_runner, choose_speculator
from specattn_vllm.compat.worker import at_first_request as at_first_request
from specattn_vllm.compat.worker import count_rounds as count_rounds
from specattn_vllm.compat.worker import is_warm_up as is_warm_up
from specattn_vllm.compat.worker import mark_dummy_runs as mark_dummy_runs
from specattn_vllm.compat.worker import name_rows as name_rows
from specattn_vllm.compat.worker import prepare_cpu_worker as prepare_cpu_worker
from specattn_vllm.compat.worker import stock_speculator as stock_speculator
from specattn_vllm.compat.worker import watch_new_requests as watch_new_requests
from specattn_vllm.compat.worker import watch_steps as watch_steps
from specattn_vllm.compat.worker import without_adapters as without_adapters


def apply_all() -> None:
    """Apply the patches that every vLLM process needs. A second time has no effect."""
    register_backend()
    choose_speculator()
    select_backend()
    add_cli_aliases()
    check_engine_config()
    check_request()
    attach_to_runner()
    add_worker_method()
    serve_metrics()
