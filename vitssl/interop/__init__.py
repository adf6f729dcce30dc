"""Ways in and out: weights of official codes, of timm and of transformers, read and written with parity checks."""
