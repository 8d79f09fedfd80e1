"""The drawn world with patterns, the model trained on it, and the checks that the model uses its self-attention."""
