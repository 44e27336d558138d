"""`specattn bench kernels`: single kernels, next to what else would do their work (docs/benchmarks.md)."""
