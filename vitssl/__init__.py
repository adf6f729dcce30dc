"""vitssl: self-supervised pretraining of Vision Transformers, and what comes after it.

``vitssl.load_encoder(path)`` builds and fills an exported encoder; it is imported when it is asked for.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_encoder":
        from vitssl.train.export import load_encoder

        return load_encoder
    raise AttributeError(f"module 'vitssl' has no attribute {name!r}")
