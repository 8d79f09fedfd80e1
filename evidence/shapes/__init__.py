"""World of the demo model: flat shapes on plain, cloudy or tiled grounds; training of the model; classifier."""
