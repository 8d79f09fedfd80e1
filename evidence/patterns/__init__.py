"""A world with repeated patterns that captions do not describe, the model trained on it, and what it looks at."""
