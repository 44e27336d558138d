"""specattn-vllm: speculative decoding decides which KV-cache entries are read.

Importing this package imports neither torch nor vLLM. vLLM finds the plugin through an entry point (`plugin.register`).
"""

__version__ = "0.1.0"
