"""Triton kernels and their PyTorch references. This module imports neither, because CPU users may have no Triton, and
tools no torch.

``from specattn_vllm.kernels import reference`` or ``from specattn_vllm.kernels.selection.top_p import select_top_p``.
"""
