"""Method 'sketch': the target's own queries choose the KV entries that they read, over a small copy of its keys.

``step.Sketch`` belongs to the engine, ``layer.LayerSketch`` to one layer. ``attach`` joins both to a loaded model, and
``centre`` measures the mean key that is subtracted from all keys.
"""
