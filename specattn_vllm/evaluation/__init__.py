"""`specattn eval`: what pruning costs in quality, measured in whole vLLM engines (docs/evaluation.md).

forcing.py    an engine made to walk through a given text: every hook into vLLM that this takes
drafted.py    the draft's logits, kept until the target's are there; acceptance.py what of the drafts would be accepted
scores.py     target logits to loss, KL and agreement with the dense run, whose distributions lie on disk
engine.py     one setting in one engine: the forced run, then a free one; requests.py how many run at a time
schema.py     a setting; job.py what is measured of it, results.py what was found, and the report, as JSON
settings.py   which settings are compared; texts.py on which documents
peers/        other work's selections in the place of ours, a file each; peer_options.py how a settings file names them
runner.py     an engine for each setting, one after the other, each in a process of its own
scan.py       what is searched before anything is chosen, in bytes
kept.py       what a setting keeps of a document, recorded over its forced run
report.py     the table, of columns.py; pictures.py the charts
page.py       `specattn report`: all of it as an HTML page
command.py    the command line, arguments.py what it takes; models.py where the two models are
"""
