"""Training code shared by both worlds: networks, recipe, tokenizer and export."""
