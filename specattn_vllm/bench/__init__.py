"""`specattn bench`: decoding speed of several engines side by side, servers under load (`serve/`), and single kernels
(`kernels/`; docs/benchmarks.md)."""
