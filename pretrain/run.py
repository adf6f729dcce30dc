"""Pretraining, from the config to an exported encoder: which decisions are made, and in which order."""

import json
from pathlib import Path

from pretrain.config import PretrainConfig
from pretrain.health import Health, Rollback
from pretrain.probing import nearest
from pretrain.start import Start
from pretrain.teacher import Taught
from pretrain.watch import Watched, watch
from vitssl import dist, objectives
from vitssl.command import Command
from vitssl.data.bench import bench_data
from vitssl.data.feed import open_configured
from vitssl.data.sources import Source
from vitssl.data.transforms import check_channels
from vitssl.errors import ConfigError
from vitssl.models.encoder import Encoder
from vitssl.models.plain import PlainMAE
from vitssl.objectives.mixture import Mixture
from vitssl.report import Report
from vitssl.train.bench import bench_step, step_rate
from vitssl.train.export import encoder_facts, write_export
from vitssl.train.folder import run_folder
from vitssl.train.loop import Event
from vitssl.train.planning import outline
from vitssl.train.session import Session, begin_session, show_plan


def run(config: PretrainConfig, command: Command) -> int:
    """The program after its command line. Returns the exit code."""
    report = Report(None if command.flags else run_folder(config), active=dist.rank() == 0)

    taught = Taught.open(config)

    def build() -> Mixture:
        return build_task(config, taught)

    start = None if "--bench" in command.flags else Start.open(config)
    if start is not None:  # what cannot be is refused before anything is written, also by --plan
        start.require_fit(outline(build).encoder, config.encoder)
    if taught is not None and not command.flags:
        taught.tell(outline(build).encoder.spec, report)
        taught.refuse_another(run_folder(config))
    said: list[str] = []
    watched: list[Watched] = []

    def open_data(report: Report) -> Source:
        source = open_configured(config.data, key="data", progress=report.waiting("preparing data"))
        watched.append(Watched.open(config))
        return source

    def fill(task: Mixture) -> None:
        if start is not None:
            said.extend(start.fill(task.encoder, config))
            task.restart()

    if command.flags.get("--bench") == "data":
        source = open_configured(config.data, key="data", progress=report.waiting("preparing data"))
        options = {"channels": config.encoder.channels, "device": dist.choose_device(config.launch.device)}
        bench_data(source, config.data, outline(build).views, **options, report=report, step_rate=step_rate(config, build_task))
    elif "--bench" in command.flags:
        bench_step(config, build_task, plain_mae, report)
    elif "--plan" in command.flags:
        show_plan(config, build, open_data, report)
    else:
        while session := begin_session(config, build, open_data, report, fill=fill):
            if taught is not None and session.engine.main:
                taught.note(session.folder)
            for line in said:
                report.say(line, style="yellow" if line.startswith("warning") else None)
            try:
                train(session, watched, command)
            except Rollback:
                session.engine.end(leave=False)
                session = None  # and with it networks and moments, before others are made
                said.clear()
                watched.clear()
                continue
            session.engine.end()
            break
    return 0


def train(session: Session, watched: list[Watched], command: Command) -> None:
    """From the first step to the last, or to where it is told to stop. Raises Rollback, and TrainingError after an alarm."""
    config = session.config
    health = Health(session) if config.health.on_alarm != "off" else None
    # the export comes before the last checkpoint: whatever kills the run, one that counts as finished has its export
    events = [*watch(session, *watched), Event(every=session.plan.steps, act=lambda step: export(session))]
    events = [health.event(), *events] if health else events
    reached = session.fit(session.engine.task.views, channels=config.encoder.channels, events=events)
    if health:
        health.refuse(reached)
    if reached < session.plan.steps:
        session.tell_stopped(reached, command.typed("pretrain", launched=dist.world() > 1))
    else:
        finish(session)


def build_task(config: PretrainConfig, taught: Taught | None = None) -> Mixture:
    """Encoder and objectives, freshly initialised; a teacher that the config names is loaded where it is not given."""
    taught = taught or Taught.open(config)
    teacher = None if taught is None else taught.teacher
    check_channels(config.encoder.channels, arrays=config.data.arrays)
    encoder = Encoder.create(config.encoder.name, **config.encoder.model_dump(exclude={"name"}))
    encoder.spec.refuse_pooling(config.pooling)
    parts = {name: objectives.create(name, own, encoder.spec, teacher=teacher) for name, own in config.objectives.items()}
    statistics = {"mean": config.data.mean, "std": config.data.std}
    optim = config.optim
    rates = {"layer_decay": optim.layer_decay or 1.0, "patch_lr": optim.patch_lr, "decay": optim.decay}
    return Mixture(encoder, parts, momentum=config.teacher.schedule, waits=config.head_warmup, **rates, **statistics)


def plain_mae(task: Mixture) -> PlainMAE:
    """The yardstick of ``--bench step``: the same shapes, written plainly. Raises ConfigError for other methods."""
    if list(task.objectives) != ["mae"]:
        raise ConfigError(f"--bench step compares MAE with a plain MAE, and this config has {', '.join(task.objectives)}")
    mae, decoder = task.objectives["mae"], task.objectives["mae"].config.decoder
    for key, plain in {"attention": "self", "positions": "sincos"}.items():
        if (other := getattr(decoder, key)) != plain:
            raise ConfigError(
                f"--bench step: the plain MAE has no objectives.mae.decoder.{key}={other}; compare it with {plain}"
            )
    return PlainMAE(task.encoder.spec, num_keep=mae.num_keep, **decoder.sizes)


def export(session: Session) -> None:
    """Write the encoder, and beside it what it is, for timm and for fine-tuning."""
    config, plan, encoder = session.config, session.plan, session.engine.task.judged
    if session.engine.main:
        facts = encoder_facts(
            encoder,
            config.encoder,
            mean=list(config.data.mean),
            std=list(config.data.std),
            pooling=config.pooling,
            method="+".join(config.objectives),
            run=str(session.folder),
            step=plan.steps,
            samples=plan.steps * plan.batch_size,
        )
        write_export(session.folder / "export", "encoder", encoder.state(), facts)


def finish(session: Session) -> None:
    """Say what was made, where it lies, and what comes next."""
    config, plan, report, folder = session.config, session.plan, session.report, session.folder
    report.rest()
    rows = [
        ("encoder", f"{folder / 'export' / 'encoder.safetensors'}, a plain timm state; encoder.json beside it says of what")
    ]
    rows += probes_in_words(folder)
    rows += [("pictures", str(folder / "pictures"))] if (folder / "pictures").exists() else []
    rows += [("curves", f"tensorboard --logdir {folder}")] if config.log.trackers else []
    rows += [("next", f"python -m finetune encoder={folder / 'export'}")]
    report.pairs(f"pretrained {plan.epochs:,.4g} epochs of {plan.samples:,} images, without labels", rows)


def probes_in_words(folder: Path) -> list[tuple[str, str]]:
    """The neighbours of a run's probes and its drift, first to last."""
    path = folder / "probes.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = []
    if neighbours := next(filter(None, (nearest(row, "knn", 20) for row in found)), None):
        key = f"knn_{neighbours}"
        probes = [row for row in found if key in row]
        ends = {row["step"]: f"{row[key]:.1%} at step {row['step']:,}" for row in (probes[0], probes[-1])}
        pixels = [f"raw pixels {row[f'pixels_{key}']:.1%}" for row in found if f"pixels_{key}" in row]
        lines.append((f"kNN-{neighbours}", ", ".join([" -> ".join(ends.values()), *pixels[:1]])))
    if moved := [row for row in found if row.get("cka") is not None]:
        text = f"CKA {moved[-1]['cka']:.3f} with the weights it started from, on {moved[-1]['queries']:,} images"
        lines.append(("drift", text))
    return lines
