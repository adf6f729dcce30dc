"""What is watched during pretraining: the loss on images held out, their reconstructions, and a probe of the features."""

from dataclasses import dataclass

from pretrain.config import PretrainConfig
from pretrain.drift import Drift, unlabelled_drift
from pretrain.probing import Probe
from vitssl.data.feed import evaluation_samples, open_configured, share
from vitssl.data.sources import Source, label_like
from vitssl.inspect.pictures import save_sheet, sheet
from vitssl.schedule import Clock
from vitssl.train.evaluate import evaluate
from vitssl.train.loop import Event
from vitssl.train.session import Session


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
    """The events of a run: held-out loss and pictures, a probe where labelled images are named for one, and drift."""
    drift = Drift(session) if session.config.init.weights else None
    events = [heldout(session, watched.heldout)]
    if watched.bank is not None:
        probe = Probe(session, watched.bank, watched.queries, drift)
        if session.start == 0:
            probe.baselines()
        events.append(Event(every=session.steps(session.config.probe.every), act=probe.act))
    elif drift is not None:
        events.append(unlabelled_drift(session, drift, watched.heldout or session.source))
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
