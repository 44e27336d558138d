"""Triton kernels and their PyTorch references. Imports neither: CPU users have no Triton, and tools no torch.

``from specattn_vllm.kernels import reference`` or ``from specattn_vllm.kernels.top_p import select_top_p``.
"""
