"""vitssl: self-supervised pretraining of Vision Transformers, and what comes after it."""

__version__ = "0.1.0"
