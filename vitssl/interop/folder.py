"""A folder as the Hugging Face hub has them: written under another name, looked at, and only then given its own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vitssl.errors import CheckpointError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name ``folder`` when all went well and is removed otherwise.

    Raises CheckpointError where ``folder`` holds something already, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already and is left as it is; give the name of a new folder")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in unfinished.iterdir():  # safetensors lets nobody but the owner read
            file.chmod((unfinished / "README.md").stat().st_mode)
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{folder} could not be written: {reason}; free space or give another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
