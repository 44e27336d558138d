"""vLLM's attention backend `SPECATTN`: the class it registers, its metadata builder, and the layer implementation."""
