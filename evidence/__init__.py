"""Measurements of the method: drawn worlds with known motion, models trained on them, and tables of results.

- `shapes/`: the world of the demo model that comes with the pack (demo/shapes.safetensors), and its classifier.
- `patterns/`: a world of repeated patterns that captions do not describe, so that a model needs self-attention to draw
  them; for the next demo model.
- `drawing`, `scene`, `clip`, `chance`, `classifier`: shared by both worlds.
- `training/`: networks, recipe, captions and export, shared by both models.
- `tables/`: the tables of docs/results.md, one module per table or family of tables.

ComfyUI does not load this package.
"""
