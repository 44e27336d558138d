"""`specattn eval`: what pruning costs in quality, measured in whole vLLM engines (docs/evaluation.md)."""
