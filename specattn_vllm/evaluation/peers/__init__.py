"""Other work's selections in the place of ours, for comparison: same text, positions, rows and accounting.

A peer attends for the rows that verify, in plain PyTorch over the paged cache, in engines without graphs; prompts stay
dense. As with our methods, one selection serves all K + 1 rows of a verification, is made of the tokens before them
(the prefix), and the rows read each other besides, causally. Whatever chooses per query in its paper chooses here by
the mean over the rows, and over the query heads of a KV head, of a distribution, since that is what is read together.

A peer is three things:

1. its options, in `peer_options.py`, with `scan_share`: bytes that it reads of what it searches (`scan.py`);
2. a file here, with a function (options, Rows, logits of full attention) -> Chosen, as `rows.py` has them;
3. its line in `attend.SELECT`.

quest.py       pages by their least and largest keys
mean_std.py    pages by the mean and the standard deviation of their keys; pages.py what both have
channels.py    tokens by a few channels of their keys
oracle.py      tokens by the target's own attention
attend.py      puts a peer into an engine, and attends to what it chose
"""
