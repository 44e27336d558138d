"""`specattn bench serve`: servers under load, stock vLLM's and this plugin's, as `vllm bench serve` sees them
(docs/benchmarks.md)."""
