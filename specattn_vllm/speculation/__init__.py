"""The draft side: speculators based on vLLM's, which capture attention or draft through a sparse cache."""
