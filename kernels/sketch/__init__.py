"""A small copy of the keys in the cache, and what the target's queries choose by it.

``layout`` says where the copy lies, ``encode`` writes it, ``queries``, ``scores`` and ``pages`` choose. ``reference``
has the same operations in PyTorch.
"""
