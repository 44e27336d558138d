"""From draft attention to the KV entries that verification reads: capture, choose, store by request slot, prune.

Nothing in this folder knows vLLM's classes; the backend and the speculator translate between both.
"""
