"""The world of the demo model: flat shapes on plain, cloudy or tiled grounds, the model's training, its classifier."""
