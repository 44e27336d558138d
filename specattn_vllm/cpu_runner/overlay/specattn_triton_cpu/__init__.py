"""A Triton backend named `cpu` that compiles nothing: it makes Triton's interpreter pass for a device.

vLLM's runner V2 is written in Triton and is only chosen where Triton lists a usable backend. Under
`TRITON_INTERPRET=1` kernels run in NumPy and never reach a compiler, so this backend only has to exist.
"""
