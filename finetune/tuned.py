"""``protocol=finetune``: what an encoder comes to when all of it is trained, by the real program in runs of its own.

Each seed is a run of ``python -m finetune``, in processes of their own, as many as evaluate has, in a folder below ``features``
that is named by the weights, the data and the settings; so it is continued where it was stopped, and done once. The recipe is
short: twenty epochs of AdamW with layer decay, random crops and flips. Settings are not searched.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.config import FinetuneConfig
from finetune.evaluate import FINETUNE, EvaluateConfig, SetConfig
from finetune.seeds import seeded
from vitssl import dist
from vitssl.config import build, dump
from vitssl.data.sources import Source, stamp
from vitssl.errors import ConfigError, DataError
from vitssl.models.encoder import Encoder
from vitssl.probes.protocols import Judged
from vitssl.report import Report
from vitssl.sections import EncoderConfig, SourceConfig
from vitssl.train.export import encoder_facts, write_export
from vitssl.train.folder import run_folder
from vitssl.train.frozen import network

SOURCE = "the whole network, trained by python -m finetune; the recipe is in the folder of features"
RECIPE: dict[str, Any] = {
    "length": "20ep",
    "batch_size": 64,
    "smoothing": 0.1,
    "optim": {"base_lr": 1e-3, "warmup": "10%", "betas": [0.9, 0.999], "layer_decay": 0.75},
    "test": {"every": "100%"},
    "log": {"trackers": []},
}
# what evaluate decides
OURS = ("encoder", "weights", "run", "seed", "seeds", "data", "init", "image_size", "labels", "labelled", "shots")


class Judging(NamedTuple):
    """An encoder that is judged."""

    name: str
    encoder: Encoder
    facts: dict[str, Any]
    section: EncoderConfig
    pooling: str
    weights: str  # its hash


class Labelled(NamedTuple):
    """A data set that encoders are judged on."""

    name: str
    config: SetConfig
    train: Source
    test: Source


def settings_of(config: EvaluateConfig) -> dict[str, Any]:
    """The recipe with what ``finetune:`` replaces. Raises ConfigError for what evaluate decides itself, and for what
    ``python -m finetune`` would refuse.
    """
    given = config.finetune
    test = given["test"] if isinstance(given.get("test"), dict) else {}
    taken = [key for key in given if key in OURS] + [f"test.{key}" for key in test if key in SourceConfig.model_fields]
    head = given["head"] if isinstance(given.get("head"), dict) else {}
    if "pooling" in head:
        raise ConfigError(f"finetune.head.pooling={head['pooling']}: is not given here; set pooling= for all protocols alike")
    if taken:
        raise ConfigError(f"finetune.{taken[0]}: is not given here; evaluate sets it from its own data, encoders and seeds")
    launch = {"precision": config.precision, "device": config.device}
    values = _merged(_merged(RECIPE, {"launch": launch, "test": {"crop_pct": config.crop_pct}}), given)
    build(FinetuneConfig, values, where="finetune")
    return values


def finetuned(own: Labelled, each: Judging, config: EvaluateConfig, report: Report) -> list[tuple[Judged, int]]:
    """(accuracy after the last step, images it was measured on) of every seed, on the first process; all take part."""
    values = _merged(settings_of(config), {"head": {"pooling": each.pooling}})
    values = _merged(values, {"data": own.config.data.model_dump(mode="json"), "test": own.config.test.model_dump(mode="json")})
    sets = [[source.fingerprint, stamp(source)] for source in (own.train, own.test)]
    said = [each.weights, *network(each.encoder), list(each.facts["mean"]), list(each.facts["std"]), sets, values]
    key = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = config.features / FINETUNE / key
    if dist.rank() == 0 and not (folder / "encoder" / "encoder.json").exists():
        told = {"mean": list(each.facts["mean"]), "std": list(each.facts["std"]), "pooling": each.pooling, "run": each.name}
        facts = encoder_facts(each.encoder, each.section, **told)
        write_export(folder / "encoder", "encoder", each.encoder.state(), facts)
    run = {"encoder": str(folder / "encoder"), "seeds": config.seeds, "run": {"dir": str(folder), "name": "run"}}
    settings = build(FinetuneConfig, _merged(values, run), where="finetune")
    places = [run_folder(seeded(settings, seed)) for seed in range(config.seeds)]
    missing = [place for place in places if _result(place) is None]
    if dist.gather_lists([len(missing)])[0]:  # the first process's word
        report.say(f"{len(missing)} runs in {folder}, which keep their logs")
        if dist.rank() == 0:
            (folder / "run.yaml").write_text(dump(settings if config.seeds > 1 else seeded(settings, 0)))
        dist.barrier()
        _run(folder / "run.yaml", missing or places)
    dist.barrier()
    if dist.rank() > 0:  # another machine may not have the files
        return []
    results, setting = [_result(place) for place in places], f"{settings.length}, lr {settings.optim.base_lr:g}"
    assert None not in results, f"{folder} ended well and measured nothing"
    return [(Judged(FINETUNE, setting, own["top1"], seed), own["images"]) for seed, own in enumerate(results)]


def _run(config: Path, places: Sequence[Path]) -> None:
    """``python -m finetune CONFIG`` here, beside those that the other processes start. Raises DataError where it fails."""
    home = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
    if dist.world() > 1:  # a meeting place of their own, which no agent of torchrun keeps
        env |= {"MASTER_PORT": dist.first_said(_free_port()), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    ran = subprocess.run(
        [sys.executable, "-m", "finetune", str(config)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if ran.returncode:
        said = " ".join(ran.stderr.strip().splitlines()[-1:])
        raise DataError(
            f"protocol=finetune ended with code {ran.returncode} ({said}); its log is {places[0] / 'log.txt'}, and"
            " the same command goes on"
        )


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def _result(place: Path) -> dict[str, Any] | None:
    """What a finished run measured at its end."""
    path = place / "results" / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _merged(values: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``other`` over ``values``, section by section."""
    both = {key: _merged(values[key], other[key]) for key in values.keys() & other.keys() if isinstance(other[key], dict)}
    return values | other | both
