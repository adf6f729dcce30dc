"""Losses and their targets, as pure functions of tensors."""
