"""What is watched during pretraining: the loss on images held out, their reconstructions, and a probe of the features."""

from vitssl.data.feed import evaluation_samples, open_configured, share
from vitssl.inspect.pictures import save_sheet, sheet
from vitssl.probes.knn import knn_accuracy
from vitssl.schedule import Clock
from vitssl.train.evaluate import evaluate
from vitssl.train.features import extract
from vitssl.train.loop import Event
from vitssl.train.session import Session
from vitssl.views import View


def watch(session: Session) -> list[Event]:
    """The events of a run: held-out loss and pictures, and a probe where labelled images are named for one."""
    events = [heldout(session)]
    if session.config.probe.bank.path is not None:
        events.append(probe(session))
    return events


def heldout(session: Session) -> Event:
    """The loss of the same images under the same crops and masks, and pictures of the first of them.

    Where the config names no held-out images, training images stand in, and the numbers are called ``fixed_train``.
    """
    config, engine, report = session.config, session.engine, session.report
    own = config.heldout.path is not None
    name = "heldout" if own else "fixed_train"
    source = open_configured(config.heldout, key="heldout") if own else session.source
    samples = evaluation_samples(
        source, engine.task.views, seed=config.seed, channels=config.encoder.channels, limit=config.heldout.samples
    )

    def act(step: int) -> None:
        values = {f"{name}/{key}": value for key, value in evaluate(engine, share(samples), seed=config.seed).items()}
        report.scalars(values, step)
        report.rows("probes.jsonl", [{"step": step, **values}])
        report.say(f"step {step:,}  {name} loss {values[f'{name}/loss']:.4f}")
        if engine.main and config.heldout.pictures:
            batch = samples.__getitems__(range(min(config.heldout.pictures, len(samples)))).to(engine.device)
            pictures = engine.task.pictures(batch, Clock(step=0, total=1, samples=0, seed=config.seed))
            if pictures is not None:
                save_sheet(session.folder / "pictures" / f"step_{step:08}.png", sheet(pictures))
                report.images("reconstructions", sheet(pictures)[None].numpy(), step)

    return Event(every=session.steps(config.heldout.every), act=act)


def probe(session: Session) -> Event:
    """Weighted kNN of frozen features: the bank's labelled images vote on the queries'."""
    config, engine, report = session.config, session.engine, session.report
    spec = engine.task.encoder.spec
    resize = round(min(spec.image_size) / config.probe.crop_pct)
    view = View(size=spec.image_size, resize=resize, interpolation="bicubic")

    def labelled(part: str):
        section = getattr(config.probe, part)
        limit = getattr(config.probe, f"{part}_samples")
        source = open_configured(section, key=f"probe.{part}")
        return evaluation_samples(source, [view], channels=spec.channels, labels=True, limit=limit)

    bank, queries = labelled("bank"), labelled("queries")

    def act(step: int) -> None:
        pooling = config.pooling
        accuracy = knn_accuracy(
            *extract(engine, share(bank), pooling=pooling),
            *extract(engine, share(queries), pooling=pooling),
            k=config.probe.k,
            temperature=config.probe.temperature,
        )
        report.scalars({"probe/knn": accuracy}, step)
        report.rows(
            "probes.jsonl", [{"step": step, "knn": accuracy, "k": config.probe.k, "bank": len(bank), "queries": len(queries)}]
        )
        report.say(
            f"step {step:,}  kNN-{config.probe.k} {accuracy:.1%} ({len(bank):,} labelled images vote on {len(queries):,})"
        )

    return Event(every=session.steps(config.probe.every), act=act)
