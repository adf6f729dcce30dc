"""Frozen features judged on the way: by the protocols that ``python -m finetune.evaluate`` judges an export by.

The same code on the same images gives the same numbers; only the features come through the engine, from the network that
trains.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pretrain.drift import Drift
from vitssl import dist
from vitssl.data.feed import evaluation_samples, share
from vitssl.data.samples import Samples
from vitssl.data.sources import Source
from vitssl.probes.protocols import Judged, Split, judge
from vitssl.train.features import extract
from vitssl.train.session import Session
from vitssl.views import View

_PIXELS = ("knn", "ridge")  # what raw pixels are judged by: they are many, and few shots of them take long
_WORDS = {"ridge": "ridge", "logistic": "logistic", "linear_mae": "linear (MAE)", "linear_moco_v3": "linear (MoCo v3)"}


class Probe:
    """A bank of labelled images that protocols learn from, and queries that they judge."""

    def __init__(self, session: Session, bank: Source, queries: Source, drift: Drift | None) -> None:
        self.session, self.sources, self.drift = session, (bank, queries), drift
        self.bank, self.queries = self._samples(*session.engine.task.encoder.spec.image_size)

    def _samples(self, height: int, width: int) -> list[Samples]:
        """Bank and queries, as images of this size."""
        spec, config = self.session.engine.task.encoder.spec, self.session.config
        view = View(size=(height, width), resize=round(min(height, width) / config.probe.crop_pct))
        limits = config.probe.bank_samples, config.probe.queries_samples
        return [
            evaluation_samples(source, config.data, [view], limit=limit, channels=spec.channels, labels=True)
            for source, limit in zip(self.sources, limits, strict=True)
        ]

    def act(self, step: int) -> None:
        """Judge the encoder as it is after ``step``."""
        engine, config = self.session.engine, self.session.config
        splits = [
            _split(extract(engine, share(samples, tell=self.session.report.say), pooling=config.pooling))
            for samples in (self.bank, self.queries)
        ]
        moved = self.drift.measure(step, splits[1].features["pooled"], self.sources[1], self.queries) if self.drift else {}
        before = "the weights it starts from" if config.init.weights else "random initialisation"
        self._judge(step, before if step == 0 else "encoder", *splits, protocols=config.probe.protocols, further=moved)

    def baselines(self) -> None:
        """What any encoder has to beat: itself before training, and the pixels themselves (of images of at most 32 x 32)."""
        self.act(0)
        if protocols := [name for name in self.session.config.probe.protocols if name in _PIXELS]:
            small = self._samples(*(min(side, 32) for side in self.session.engine.task.encoder.spec.image_size))
            splits = [_split(self._pixels(samples)) for samples in small]
            self._judge(0, "raw pixels", *splits, protocols=protocols, prefix="pixels_")

    def _judge(
        self,
        step: int,
        what: str,
        bank: Split,
        queries: Split,
        *,
        protocols: Sequence[str],
        prefix: str = "",
        further: Mapping[str, float] | None = None,
    ) -> None:
        """On the first process alone: what it says is one row, the trackers' numbers, and a line."""
        report = self.session.report
        if not self.session.engine.main:
            return
        values = by_name(
            row for name in protocols for row in judge(name, bank, queries, seeds=self.session.config.probe.seeds)
        ) | dict(further or {})
        named = {f"{prefix}{key}": value for key, value in values.items()}
        report.scalars({f"probe/{key}": value for key, value in named.items()}, step)
        report.rows("probes.jsonl", [{"step": step, **named, "bank": len(bank.labels), "queries": len(queries.labels)}])
        images = f"{len(bank.labels):,} labelled images judge {len(queries.labels):,}"
        report.say(f"step {step:,}  {what}: {in_words(values)} ({images})")

    def _pixels(self, samples: Samples) -> tuple[Tensor, Tensor]:
        (view,), device = samples.views, self.session.engine.device
        size = samples.channels * view.size[0] * view.size[1]
        rows = [(torch.zeros(0, size, dtype=torch.uint8), *2 * [torch.zeros(0, dtype=torch.int64)])]
        rows += [(b.views[view].flatten(1), b.labels, b.positions) for b in share(samples, tell=lambda text: None)]
        pixels, labels, positions = (dist.gather_rows(torch.cat(parts).to(device)) for parts in zip(*rows, strict=True))
        order = torch.argsort(positions)
        return pixels[order].float() - pixels.float().mean(), labels[order]


def by_name(rows: Iterable[Judged]) -> dict[str, float]:
    """{``knn_20``, ``fewshot_5``, ``ridge``, ``rankme``, ...: value}, means over seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        number = "".join(filter(str.isdigit, row.setting)) if row.protocol in ("knn", "fewshot") else ""
        found[f"{row.protocol}_{number}" if number else row.protocol].append(row.value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def nearest(values: Mapping[str, float], protocol: str, wanted: int) -> int | None:
    """Of the numbers that a protocol was judged at (neighbours, shots), the one next to ``wanted``."""
    numbers = [int(name.rpartition("_")[2]) for name in values if name.startswith(f"{protocol}_")]
    return min(numbers, key=lambda number: abs(number - wanted), default=None)


def in_words(values: Mapping[str, float]) -> str:
    """One line of what was found: kNN of 20 neighbours and 5 shots stand for the others."""
    parts = [f"kNN-{k} {values[f'knn_{k}']:.1%}" for k in [nearest(values, "knn", 20)] if k]
    parts += [f"{shots} shots {values[f'fewshot_{shots}']:.1%}" for shots in [nearest(values, "fewshot", 5)] if shots]
    parts += [f"{words} {values[name]:.1%}" for name, words in _WORDS.items() if name in values]
    parts += [f"RankMe {values['rankme']:.1f}, alpha {values['alpha_req']:.2f}"] if "rankme" in values else []
    parts += [f"CKA {values['cka']:.3f}"] if "cka" in values else []
    return ", ".join(parts)


def _split(features_and_labels: tuple[Tensor, Tensor]) -> Split:
    features, labels = features_and_labels
    return Split({"pooled": features}, labels)
