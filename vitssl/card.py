"""The model card, ``README.md`` of every export: recipe, data and numbers as the run recorded them, and a licence to fill in.

Its head is what the Hugging Face hub reads.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_card(
    folder: Path,
    facts: Mapping[str, Any],
    *,
    library: str,
    usage: str,
    differs: float | None = None,
    run: Path | None = None,
    notes: str = "",
) -> None:
    """``README.md``: what the model is, how it is loaded, how it was made, and what was measured.

    ``run``: the folder whose configuration and probe are quoted; ``differs``: how far its outputs are from those of the
    network that it was made from, relative to their size.
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
    if differs is not None:
        notes = f"The outputs of this file equal those of the network it was made from to {differs:.1e} of their size. {notes}"
    parts.append(notes)
    (folder / "README.md").write_text("\n\n".join(part.strip() for part in parts if part) + "\n")


def _inputs(facts: Mapping[str, Any]) -> dict[str, Any]:
    height, width = facts["image_size"]
    found = {
        "images": f"{len(facts['mean'])} channels, {height} x {width} pixels, in 0..1, less mean, divided by deviation",
        "mean": facts["mean"],
        "deviation": facts["std"],
        "pooling": {"mean": "mean over patches", "class": "class token"}[facts["pooling"]],
    }
    if "crop_pct" in facts:
        height, width = facts.get("tested_size", facts["image_size"])
        found["judged"] = f"at {height} x {width} pixels, the central {facts['crop_pct']:.1%} of the shorter side"
    how = ", of which an image may have several: a sigmoid for each" if facts.get("labels") == "several" else ""
    return found | ({"classes": f"{len(facts['classes']):,}{how}"} if "classes" in facts else {})


def _origin(facts: Mapping[str, Any]) -> dict[str, Any]:
    names = {"method": "method", "format": "read from a checkpoint of", "run": "run", "step": "steps", "samples": "images seen"}
    return {word: facts[key] for key, word in names.items() if facts.get(key) is not None} or {"run": "not recorded"}


def _numbers(facts: Mapping[str, Any], run: Path | None) -> dict[str, Any]:
    """What the run's probes say of the export's step, or else of the last one before it, and what the export itself says."""
    found = {"top-1": f"{facts['top1']:.2%}"} if "top1" in facts else {}
    if run and (run / "probes.jsonl").is_file():
        lines = (run / "probes.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row.get("step", 0) <= facts.get("step", math.inf)]
        last = rows[-1] if rows else {}
        found |= {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in last.items()}
    return found or {"numbers": "none recorded"}
