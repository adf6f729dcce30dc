"""One name for weights from anywhere: an official checkpoint's file, ``timm:TAG`` or ``timm:FOLDER``, ``hf:FOLDER``."""

from pathlib import Path

from vitssl.errors import CheckpointError, UserError
from vitssl.interop.official import Imported, import_official


def is_foreign(source: str) -> bool:
    """Whether a name is one for :func:`import_weights`, and no export of ours (a folder, or a file beside its .json)."""
    path = Path(source)
    if source.partition(":")[0] in ("timm", "hf") or path.suffix in (".pth", ".pt", ".tar", ".bin"):
        return True
    ours = any((path.parent / name).is_file() for name in ("encoder.json", "classifier.json"))
    return path.suffix == ".safetensors" and path.is_file() and not ours


def named_weights(key: str, source: str) -> Imported:
    """As :func:`import_weights`, for a key of a config, which has no way to say what a file does not."""
    try:
        return import_weights(source)
    except UserError as error:
        advice = "; make an export of it first:  vitssl import  takes them" if "--" in str(error) else ""
        raise type(error)(f"{key}={source}: {error}{advice}") from error


def import_weights(source: str, *, format: str | None = None, heads: int | None = None) -> Imported:
    """The encoder that ``source`` names. ``format`` and ``heads`` are for official files, which may not say them.

    Raises CheckpointError in one line, also for weights that are no numbers.
    """
    found = _imported(source, format=format, heads=heads)
    if spoilt := [name for name, tensor in found.encoder.state().items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            f"{source}: {spoilt[0]} holds numbers that are not finite; the checkpoint is damaged, fetch it again"
        )
    return found


def _imported(source: str, *, format: str | None, heads: int | None) -> Imported:
    kind, _, rest = source.partition(":")
    if kind not in ("timm", "hf"):
        return import_official(Path(source), format=format, heads=heads)
    if format is not None or heads is not None:
        raise CheckpointError(f"{source}: says its format and heads itself; leave --format and --heads out")
    if kind == "timm":
        from vitssl.interop.timm import import_timm

        return import_timm(rest)
    from vitssl.interop.transformers import import_transformers

    return import_transformers(Path(rest))
