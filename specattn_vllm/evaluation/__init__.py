"""`specattn eval`: what pruning costs in quality, measured in whole vLLM engines (docs/evaluation.md).

forcing.py    an engine made to walk through a given text: every hook into vLLM that this takes
scores.py     target logits to loss, KL and agreement with the dense run, whose distributions lie on disk
engine.py     one setting in one engine: the forced run, then a free one
"""
