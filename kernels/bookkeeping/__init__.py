"""Small operations around a step: taking selections, counting, loading the inputs of a round."""
