"""From the scores of a draft model or target to the page tables that attention reads: mass, top-p, page tables."""
