"""`specattn bench`: decoding speed of several engines side by side (docs/benchmarks.md), and of single kernels.

grid.py       what is asked for: cells, modes, options, and their parsers (standard library only)
jobs.py       from what is asked for to one job per engine: exact vLLM arguments and environment
worker.py     one engine, in a process of its own
timing.py     from the times of single steps to a decoding speed
schema.py     jobs, results and the report, as JSON
runner.py     starts workers one after the other, watches them, and writes the report
report.py     the report as Markdown and on a terminal; plot.py as a picture
command.py    the command line, with arguments.py
kernels/      single kernels (`specattn bench kernels`)
"""
