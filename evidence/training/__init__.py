"""What the trainings of both worlds share: networks, recipe, captions as tokens, and the exported file."""
