"""Attention over a paged cache: draft attention, which also stores scores, and sparse attention over a page table."""
