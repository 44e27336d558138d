"""The plugin's metrics on vLLM's `/metrics`.

snapshot   what a worker says of itself, as a file; loads neither torch nor vLLM
families   the metrics, and how each is made of a snapshot; the same
publish    in a worker: writes its snapshot, at most once a second
collect    in a server: reads the snapshots when it is asked for metrics
"""
