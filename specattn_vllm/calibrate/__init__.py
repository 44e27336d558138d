"""`specattn calibrate`: the layer map of a pair of models, measured on text.

`command` is the command line; `runner` makes the map from its arguments. `text` makes windows of token ids; `models`
runs both models and passes on their attention; `similarity` compares it; `maps` chooses layers and heads; `state` saves
the measurements of an interrupted run. `uniform` writes the uniform maps, which need no measurement.
"""
