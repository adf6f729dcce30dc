"""A folder as the Hugging Face hub has them: written under another name, looked at, and only then given its own.

Its ``README.md`` is the model card: recipe, data and numbers as far as the run recorded them, and a licence field to fill.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def write_card(
    folder: Path,
    facts: Mapping[str, Any],
    *,
    library: str,
    usage: str,
    differs: float,
    run: Path | None = None,
    notes: str = "",
) -> None:
    """``README.md``: what the model is, how it is loaded, how it was made, and what was measured.

    ``run``: the folder whose configuration and last probe are quoted.
    """
    task = "image-classification" if "classes" in facts else "image-feature-extraction"
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: {task}\nlicense: unknown  # fill in before it is published\n---",
        f"# {facts['architecture']}, {'a classifier' if 'classes' in facts else 'an encoder'}",
        f"```python\n{usage.strip()}\n```",
        "## What it takes\n\n" + "\n".join(f"* {key}: {value}" for key, value in _inputs(facts).items()),
        "## How it was made\n\n" + "\n".join(f"* {key}: {value}" for key, value in _origin(facts).items()),
    ]
    if run and (run / "config.yaml").is_file():
        parts.append(
            f"The configuration that it was trained with:\n\n```yaml\n{(run / 'config.yaml').read_text().strip()}\n```"
        )
    parts.append("## What was measured\n\n" + "\n".join(f"* {key}: {value}" for key, value in _numbers(facts, run).items()))
    parts.append(
        f"The outputs of this file equal those of the network it was made from to {differs:.1e} of their size. {notes}"
    )
    (folder / "README.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


def _inputs(facts: Mapping[str, Any]) -> dict[str, Any]:
    height, width = facts["image_size"]
    found = {
        "images": f"{len(facts['mean'])} channels, {height} x {width} pixels, in 0..1, less mean, divided by deviation",
        "mean": facts["mean"],
        "deviation": facts["std"],
        "pooling": {"mean": "mean over patches", "class": "class token"}[facts["pooling"]],
    }
    return found | ({"classes": f"{len(facts['classes']):,}"} if "classes" in facts else {})


def _origin(facts: Mapping[str, Any]) -> dict[str, Any]:
    names = {"method": "method", "format": "read from a checkpoint of", "run": "run", "step": "steps", "samples": "images seen"}
    return {word: facts[key] for key, word in names.items() if facts.get(key) is not None} or {"run": "not recorded"}


def _numbers(facts: Mapping[str, Any], run: Path | None) -> dict[str, Any]:
    """The last line of the run's probes, and what the export itself says."""
    found = {"top-1": f"{facts['top1']:.2%}"} if "top1" in facts else {}
    if run and (run / "probes.jsonl").is_file():
        lines = (run / "probes.jsonl").read_text().splitlines()
        last = json.loads(lines[-1]) if lines else {}
        found |= {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in last.items()}
    return found or {"numbers": "none recorded"}
