"""`specattn report`: reports of evaluations and of speed as one HTML page."""
