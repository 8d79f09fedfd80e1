"""The small model that comes with the pack: its weights, its card, its clip, and the autoencoder that is its own."""
