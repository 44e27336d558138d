"""Method 'sketch': the target's own queries choose what they read, over a small copy of its keys.

``step.Sketch`` is the engine's, ``layer.LayerSketch`` one layer's; ``attach`` joins them to a loaded model, and
``centre`` measures what is subtracted from the keys.
"""
