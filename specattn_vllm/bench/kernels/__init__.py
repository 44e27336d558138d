"""`specattn bench kernels`: single kernels, next to what else would do their work (docs/benchmarks.md).

command.py  the command line, the table and the JSON
rows.py     what is measured: a function a row, which makes the inputs and says how many bytes have to move
inputs.py   caches, requests and selections; sketch.py what a layer of method `sketch` hands to each kernel
"""
