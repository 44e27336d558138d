"""The driver half: active only when kernels are interpreted and no CUDA device could run them."""

import os

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    @staticmethod
    def is_active() -> bool:
        # On a GPU machine a second active driver would disable Triton altogether.
        return os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()

    @classmethod
    def map_python_to_cpp_type(cls, ty: str) -> str:
        raise RuntimeError("the interpreter-only 'cpu' backend launches no compiled kernel")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise RuntimeError("kernels under Triton's interpreter have no meaningful time to benchmark")
