"""`specattn bench`: decoding speed of several engines side by side, servers under load, and single kernels
(docs/benchmarks.md).

grid.py     cells: requests at a time, and tokens of each (standard library only)
jobs.py     modes, and from what is asked for to one job per engine: exact vLLM arguments and environment
worker.py   one engine, in a process of its own, and how it is timed
schema.py   jobs, results and the report, as JSON
runner.py   starts workers, says what they do, and writes the report
report.py   the report as a table, plot.py as a picture
command.py  the command line
kernels/    single kernels (`specattn bench kernels`)
serve/      servers under load (`specattn bench serve`)
"""
