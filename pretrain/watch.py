"""What is watched during pretraining: the loss on images held out, their reconstructions, and a probe of the features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config import PretrainConfig
from vitssl import dist
from vitssl.data.feed import evaluation_samples, open_configured, share
from vitssl.data.samples import Samples
from vitssl.data.sources import Source, label_like
from vitssl.inspect.pictures import save_sheet, sheet
from vitssl.probes.knn import knn_accuracy
from vitssl.probes.linear import ridge_accuracy
from vitssl.schedule import Clock
from vitssl.train.evaluate import evaluate
from vitssl.train.features import extract
from vitssl.train.loop import Event
from vitssl.train.session import Session
from vitssl.views import View


@dataclass(frozen=True)
class Watched:
    """The images that are looked at on the way: held out, and a probe's bank and queries; None where none are named."""

    heldout: Source | None
    bank: Source | None
    queries: Source | None

    @classmethod
    def open(cls, config: PretrainConfig) -> "Watched":
        """Before anything is written. Raises ConfigError and DataError: missing, unlabelled, or of other classes."""
        heldout = open_configured(config.heldout, key="heldout") if config.heldout.path is not None else None
        if config.probe.bank.path is None and config.probe.queries.path is None:
            return cls(heldout, None, None)
        bank = open_configured(config.probe.bank, key="probe.bank")
        return cls(heldout, bank, label_like(open_configured(config.probe.queries, key="probe.queries"), bank))


def watch(session: Session, watched: Watched) -> list[Event]:
    """The events of a run: held-out loss and pictures, and a probe where labelled images are named for one."""
    events = [heldout(session, watched.heldout)]
    if watched.bank is not None:
        probe = Probe(session, watched)
        if session.start == 0:
            probe.baselines()
        events.append(probe.event())
    return events


def heldout(session: Session, source: Source | None) -> Event:
    """The loss of the same images under the same crops and masks, and pictures of the first of them.

    Where the config names no held-out images, training images stand in, and the numbers are called ``fixed_train``.
    """
    config, engine, report = session.config, session.engine, session.report
    name = "fixed_train" if source is None else "heldout"
    samples = evaluation_samples(
        source or session.source,
        config.data,
        engine.task.views,
        seed=config.seed,
        channels=config.encoder.channels,
        limit=config.heldout.samples,
    )

    def act(step: int) -> None:
        found = evaluate(engine, share(samples, tell=report.say), seed=config.seed)
        values = {f"{name}/{key}": value for key, value in found.items()}
        report.scalars(values, step)
        report.rows("probes.jsonl", [{"step": step, **values}])
        report.say(f"step {step:,}  {name} loss {values[f'{name}/loss']:.4f}")
        if engine.main and config.heldout.pictures:
            batch = samples.__getitems__(range(min(config.heldout.pictures, len(samples)))).to(engine.device)
            clock = Clock(step=0, total=1, samples=0, seed=config.seed)
            pictures = engine.task.pictures(batch, clock) if len(batch) else None
            if pictures is not None:
                save_sheet(session.folder / "pictures" / f"step_{step:08}.png", sheet(pictures))
                report.images("reconstructions", sheet(pictures)[None].numpy(), step)

    return Event(every=session.steps(config.heldout.every), act=act)


class Probe:
    """Frozen features of labelled images: a bank that votes (kNN) or fits (ridge), and queries that are judged."""

    def __init__(self, session: Session, watched: Watched) -> None:
        self.session, self.watched = session, watched
        self.bank, self.queries = self._samples(*session.engine.task.encoder.spec.image_size)

    def _samples(self, height: int, width: int) -> list[Samples]:
        """Bank and queries, as images of this size."""
        spec, config = self.session.engine.task.encoder.spec, self.session.config
        view = View(size=(height, width), resize=round(min(height, width) / config.probe.crop_pct))
        options = {"channels": spec.channels, "labels": True}
        return [
            evaluation_samples(self.watched.bank, config.data, [view], limit=config.probe.bank_samples, **options),
            evaluation_samples(self.watched.queries, config.data, [view], limit=config.probe.queries_samples, **options),
        ]

    def event(self) -> Event:
        """The probe as something the loop does."""
        return Event(every=self.session.steps(self.session.config.probe.every), act=self.act)

    def act(self, step: int) -> None:
        """Judge the encoder as it is after ``step``."""
        engine, pooling = self.session.engine, self.session.config.pooling
        bank, queries = (
            extract(engine, share(samples, tell=self.session.report.say), pooling=pooling)
            for samples in (self.bank, self.queries)
        )
        self._judge(step, "", *bank, *queries)

    def baselines(self) -> None:
        """What any encoder has to beat: itself before training, and the pixels themselves (of images of at most 32 x 32)."""
        self.act(0)
        small = self._samples(*(min(side, 32) for side in self.session.engine.task.encoder.spec.image_size))
        self._judge(0, "pixels_", *self._pixels(small[0]), *self._pixels(small[1]))

    def _judge(self, step: int, name: str, *features_and_labels: Tensor) -> None:
        report, config = self.session.report, self.session.config.probe
        values = {
            f"{name}knn": knn_accuracy(*features_and_labels, k=config.k, temperature=config.temperature),
            f"{name}ridge": ridge_accuracy(*features_and_labels),
        }
        report.scalars({f"probe/{key}": value for key, value in values.items()}, step)
        report.rows("probes.jsonl", [{"step": step, **values, "bank": len(self.bank), "queries": len(self.queries)}])
        before = "the weights it starts from" if self.session.config.init.weights else "random initialisation"
        what = "raw pixels" if name else before if step == 0 else "encoder"
        report.say(
            f"step {step:,}  {what}: kNN-{config.k} {values[f'{name}knn']:.1%}, ridge {values[f'{name}ridge']:.1%}"
            f" ({len(self.bank):,} labelled images judge {len(self.queries):,})"
        )

    def _pixels(self, samples: Samples) -> tuple[Tensor, Tensor]:
        (view,), device = samples.views, self.session.engine.device
        size = samples.channels * view.size[0] * view.size[1]
        rows = [(torch.zeros(0, size, dtype=torch.uint8), *2 * [torch.zeros(0, dtype=torch.int64)])]
        rows += [(b.views[view].flatten(1), b.labels, b.positions) for b in share(samples, tell=lambda text: None)]
        pixels, labels, positions = (dist.gather_rows(torch.cat(parts).to(device)) for parts in zip(*rows, strict=True))
        order = torch.argsort(positions)
        return pixels[order].float() - pixels.float().mean(), labels[order]
