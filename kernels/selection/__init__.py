"""From a draft's or a target's scores to what is read: mass, top-p, page tables."""
