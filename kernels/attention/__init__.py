"""Attention over a paged cache: of draft steps, whose scores stay behind, and over a list of pages."""
