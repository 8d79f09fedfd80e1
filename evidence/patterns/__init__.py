"""World with repeated patterns that captions do not describe, its model, and a probe of the model's self-attention."""
