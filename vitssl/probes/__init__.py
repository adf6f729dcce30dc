"""Frozen-feature protocols: feature tensors in, numbers out. The same code judges online and offline."""
