"""Masks: which patches a model may see. Pure functions of uniform noise."""
