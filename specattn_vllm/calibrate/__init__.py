"""`specattn calibrate`: the layer map of a pair of models, measured on text.

`command` is the command line, and `runner` goes from its arguments to the map. `text` makes windows of token ids;
`models` runs both models and shows their attention; `similarity` compares it; `maps` chooses layers and heads; `state`
keeps what was measured in a run that is cut off. `uniform` writes the maps that need none of this.
"""
