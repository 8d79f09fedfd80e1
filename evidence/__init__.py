"""The evidence that the method works: drawn worlds with known motion, models trained on them, and tables of edits.

- `shapes/`: the world of the demo model that comes with the pack (demo/shapes.safetensors), and its classifier.
- `patterns/`: a world whose repeats can only be drawn by looking at the rest of the picture, for the next model.
- `drawing`, `scene`, `clip`, `chance`: shared by both worlds.
- `training/`: networks, recipe, captions and export, shared by both models.
- `tables/`: what docs/results.md reports, one module a table or family of tables.

Nothing here is part of the pack that ComfyUI loads.
"""
