"""vLLM's executor with Ray, on machines without GPUs, where vLLM refuses Ray ("current platform cpu does not support
ray"): a worker takes a slot in the place of a GPU. All else is vLLM's.

Ray imports this file by its name, in the process of the engine and in those of workers.
"""

from __future__ import annotations

import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

SLOT = "slot"
"""The resource of which a Ray node has as many as it takes workers."""

type(current_platform).ray_device_key = SLOT


class Worker(ray_executor_v2.RayWorkerProc):
    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), [0]


ray_executor_v2.RayWorkerProc = Worker


class Executor(ray_executor_v2.RayExecutorV2):
    """Of this file, so that a process that is given the class imports it."""
