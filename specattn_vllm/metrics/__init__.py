"""The plugin's metrics on vLLM's `/metrics`.

snapshot   the counts of one worker as a file; loads neither torch nor vLLM
families   the metrics, and how each is made from a snapshot; loads neither torch nor vLLM
publish    in a worker: writes its snapshot, at most once per second
collect    in a server: reads the snapshots when metrics are requested
"""
