"""`specattn calibrate`: the layer map of a pair of models, measured on text.

`command` is the command line, and `arguments` what it takes; `text` makes windows of token ids; `models` runs both
models and looks at their attention; `measure` goes over the windows, with `state` beside it for a run that is cut off.
What a draft layer is chosen by stands in `retained` (what the target keeps of its attention by that layer's choice) and
`similarity` (how alike both attend), and what is made of it in `paths` (which layer and head), `rounds` and `shares`
(how much each layer reads). `picture` draws it.
"""
