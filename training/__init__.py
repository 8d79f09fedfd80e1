"""The demo model: the world it is trained on, and its training. Not part of the pack that ComfyUI loads."""
