"""`specattn eval`: what pruning costs in quality, measured in whole vLLM engines (docs/evaluation.md).

forcing.py    an engine made to walk through a given text: every hook into vLLM that this takes
acceptance.py what of the drafts would be accepted along the text
scores.py     target logits to loss, KL and agreement with the dense run, whose distributions lie on disk
engine.py     one setting in one engine: the forced run, then a free one
schema.py     a setting; job.py what is measured of it, results.py what was found, and the report, as JSON
settings.py   which settings are compared; texts.py on which documents
baselines.py  other work's selections in the place of ours
runner.py     an engine for each setting, in a process of its own
scan.py       what is searched before anything is chosen, in bytes
figures.py    what was found as figures with intervals; report.py as tables
command.py    the command line; models.py where the two models are
"""
