"""The sketch, a small copy of the keys in the cache, and the search by which queries choose tokens over it.

``layout`` defines the sketch's place in memory, ``encode`` writes it, and ``queries``, ``scores``, ``cuts`` and
``pages`` choose. ``reference`` has the same operations in PyTorch.
"""
