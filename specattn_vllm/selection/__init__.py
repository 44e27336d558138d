"""From draft attention to the KV entries that verification reads: capture, choose, store by request slot, prune.

Nothing here knows vLLM's classes; the backend and the speculator translate.
"""
