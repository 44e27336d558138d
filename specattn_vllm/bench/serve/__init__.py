"""`specattn bench serve`: servers under load, stock vLLM's and this plugin's, as `vllm bench serve` sees them
(docs/benchmarks.md).

command.py  the command line
traffic.py  what is asked of each server: lengths, rates, goodput (standard library only)
prompts.py  the requests, the same for every server, in files that `vllm bench serve` reads
jobs.py     from what is asked for to one job per server: exact arguments of `vllm serve`, and environment
worker.py   one server, in a process group of its own, and the rounds of requests that it is sent
server.py   `vllm serve` as a process; client.py `vllm bench serve` as one
words.py    a tokenizer for models with random weights
schema.py   jobs, results and the report, as JSON
runner.py   starts workers, and says what they do
report.py   the report as a table
"""
