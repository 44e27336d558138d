"""`specattn calibrate`: the layer map of a pair of models, measured on text.

`command` is the command line; `text` makes windows of token ids; `models` runs both models and looks at their
attention; `measure` goes over the windows, with `state` beside it for a run that is cut off. What is made of the
measurements stands in `similarity` and `paths` (which layer and head), `rounds` and `shares` (how much each layer
reads). `picture` draws it.
"""
