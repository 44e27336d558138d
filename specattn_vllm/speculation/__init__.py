"""The draft side: vLLM's speculator for a separate draft model, with its attention captured."""
