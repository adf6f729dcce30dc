"""``vitssl``: the tools around the two programs; ``vitssl TOOL --help`` says what each takes."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitssl.report import Report, program

if TYPE_CHECKING:
    from torch import Tensor

    from vitssl.interop.mae import Painter


def entry() -> int:
    """The console script."""
    return program(main, sys.argv[1:])


def main(argv: Sequence[str]) -> int:
    """Read a command line and run the tool it names. Nothing heavy is imported for ``--help``."""
    parser = argparse.ArgumentParser(prog="vitssl", description="Tools around python -m pretrain and python -m finetune.")
    tools = parser.add_subparsers(metavar="TOOL", required=True)
    index = tools.add_parser("index", help="index tar shards, so that training starts at once", description=_index.__doc__)
    index.add_argument("shards", nargs="+", help="a folder, a tar, a glob, a url or a brace pattern ('train-{000..099}.tar')")
    index.add_argument("--processes", type=int, help="shards scanned side by side (default: one per CPU, at most 16)")
    index.set_defaults(tool=_index)
    pack = tools.add_parser("pack", help="write balanced tar shards from any source", description=_pack.__doc__)
    pack.add_argument("source", help="what data.path takes: a folder of images, tars, a glob or a brace pattern")
    pack.add_argument("folder", type=Path, help="where the shards go, NAME-000000.tar and on")
    pack.add_argument("--name", default="train", help="first part of the shards' names (train)")
    pack.add_argument("--split", help="sub-folder of the source, or prefix of its shards")
    pack.add_argument("--shard-mib", type=float, default=256, help="size of a shard (256)")
    pack.add_argument("--short-side", type=int, help="shrink images to this many pixels on the short side, as JPEG")
    pack.add_argument("--max-side", type=int, help="shrink images to at most this many pixels on the long side, as JPEG")
    pack.add_argument("--quality", type=int, default=90, help="of the JPEG that a shrunk image becomes (90)")
    pack.add_argument("--seed", type=int, default=0, help="of the order of the samples (0)")
    pack.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    pack.add_argument("--perceptual", action="store_true", help="also report images that look alike (decodes every image)")
    pack.add_argument("--processes", type=int, help="shards written side by side (default: one per CPU)")
    pack.set_defaults(tool=_pack)
    check = tools.add_parser("check", help="look at every image: formats, sizes, damage, copies", description=_check.__doc__)
    check.add_argument("source", nargs="+", help="what data.path takes: a folder of images, tars, a glob or a brace pattern")
    check.add_argument("--split", help="sub-folder of the source, or prefix of its shards")
    check.add_argument("--channels", type=int, help="read .npy and multi-channel .tif as well, of this many channels")
    check.add_argument("--html", type=Path, help="write a page with a contact sheet as well")
    check.add_argument("--processes", type=int, help="processes that look side by side (default: one per CPU)")
    check.set_defaults(tool=_check)
    _add_ways(tools)
    arguments = parser.parse_args(argv)
    return arguments.tool(arguments)


def _add_ways(tools: argparse._SubParsersAction) -> None:
    """The two tools that carry weights in and out."""
    taken = tools.add_parser("import", help="make an encoder of a foreign checkpoint", description=_import.__doc__)
    taken.add_argument("source", help="a checkpoint's file, timm:TAG, timm:FOLDER, or hf:FOLDER as transformers saves it")
    taken.add_argument("folder", type=Path, help="where encoder.safetensors and encoder.json go")
    taken.add_argument("--format", help="of a file, such as mae, dinov2, beit or open_clip (default: recognised)")
    taken.add_argument("--heads", type=int, help="attention heads, where a file's width does not say them")
    taken.set_defaults(tool=_import)
    given = tools.add_parser("export", help="write an encoder or a classifier for others", description=_export.__doc__)
    given.add_argument("run", type=Path, help="a run's folder or an export's; a fine-tuned run gives its last classifier")
    given.add_argument("folder", type=Path, help="a new folder, as the Hugging Face hub has them")
    given.add_argument("--to", required=True, choices=("timm", "transformers", "onnx"), help="who is to read it")
    given.add_argument("--images", help="compare outputs on eight of these images too: what data.path takes")
    given.add_argument("--decoder", action="store_true", help="an MAE with its decoder, from a run, --to transformers")
    given.set_defaults(tool=_export)


def _index(arguments: argparse.Namespace) -> int:
    """Count the samples of tar shards and note where each lies, in a small file beside every shard."""
    from vitssl.data.manifest import index_shards
    from vitssl.data.sources import find_shards
    from vitssl.data.stores import Access

    report = Report()
    access = Access(index_budget=1 << 62)  # who says index means it
    shards = find_shards(arguments.shards, access)
    options = {"progress": report.waiting("indexing"), "processes": arguments.processes, "fresh": True}
    rows = index_shards(shards, access=access, **options).rows
    samples, unlabelled, ignored = (int(rows[name].sum()) for name in ("samples", "unlabelled", "ignored"))
    labels = "all labelled" if not unlabelled else "no labels" if unlabelled == samples else f"{unlabelled:,} without a label"
    report.pairs(
        f"{len(rows):,} shards, {int(rows['size'].sum()) / 2**30:,.2f} GiB",
        [
            ("samples", f"{samples:,}, {labels}"),
            ("in a shard", f"{int(rows['samples'].min()):,} to {int(rows['samples'].max()):,}"),
            ("ignored", f"{ignored:,} other members"),
        ],
    )
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    """Write balanced, shuffled tar shards with their index, and say what is there twice. Goes on where it was stopped."""
    from vitssl.data.pack import PackConfig, pack
    from vitssl.data.sources import open_source

    report = Report()
    config = PackConfig(
        name=arguments.name,
        shard_bytes=round(arguments.shard_mib * 2**20),
        short_side=arguments.short_side,
        max_side=arguments.max_side,
        quality=arguments.quality,
        seed=arguments.seed,
        shuffle=not arguments.no_shuffle,
        perceptual=arguments.perceptual,
    )
    source = open_source(arguments.source, split=arguments.split, progress=report.waiting("indexing"))
    processes = arguments.processes or os.cpu_count() or 1
    counts = pack(source, arguments.folder, config, processes=processes, progress=report.waiting("packing shards"))
    alike = f", {counts['alike']:,} pairs look alike" if config.perceptual else ""
    report.pairs(
        f"{counts['shards']:,} shards in {arguments.folder}",
        [
            (
                "samples",
                f"{counts['samples']:,} of {source.num_samples:,} ({counts['bad']:,} left out: {config.name}.bad.jsonl)",
            ),
            ("twice", f"{counts['duplicates']:,} images are exact copies of others{alike} ({config.name}.duplicates.jsonl)"),
            ("next", f"python -m pretrain CONFIG data.path={arguments.folder} data.split={arguments.name}"),
        ],
    )
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Decode every image once: what there is, what is damaged, what is twice. Exit code 1 where anything is damaged."""
    from vitssl.data.doctor import examine
    from vitssl.data.sources import open_source
    from vitssl.inspect.doctor import in_words, page

    report = Report()
    path = arguments.source[0] if len(arguments.source) == 1 else arguments.source
    source = open_source(path, split=arguments.split, progress=report.waiting("indexing"))
    processes = arguments.processes or os.cpu_count() or 1
    waiting = report.waiting("looking at images")
    found = examine(source, channels=arguments.channels, processes=processes, progress=waiting)
    rows = in_words(found)
    rows += [("ignored", f"{source.ignored:,} other files")] if source.ignored else []
    if arguments.html:
        arguments.html.write_text(page(source.name, found, source.classes))
        rows.append(("page", str(arguments.html)))
    report.pairs(source.name, rows)
    return 1 if found.damaged else 0


def _import(arguments: argparse.Namespace) -> int:
    """Read a checkpoint of another code and write it as an export, which python -m finetune and timm read."""
    from vitssl.errors import CheckpointError
    from vitssl.interop.source import import_weights
    from vitssl.train.export import encoder_facts, write_export

    if (arguments.folder / "encoder.safetensors").exists():
        raise CheckpointError(
            f"{arguments.folder} holds an encoder already and is left as it is; give the name of a new folder"
        )
    found = import_weights(arguments.source, format=arguments.format, heads=arguments.heads)
    facts = encoder_facts(found.encoder, found.section, **found.facts)
    weights = write_export(arguments.folder, "encoder", found.encoder.state(), facts)
    size, patch = ("x".join(map(str, each)) for each in (found.encoder.spec.image_size, found.encoder.spec.patch))
    rows = [(title, f"{count:,} tensors") for title, count in found.coverage]
    rows += [("left over", "0 tensors"), ("network", f"{found.section.name}, images of {size}, patches of {patch}")]
    rows += [("parity", f"outputs differ by {facts['parity']:.1e} of their size")] if "parity" in facts else []
    rows += [(title, facts[key]) for title, key in (("epsilon", "norm_epsilon"), ("rotations", "rotations")) if key in facts]
    rows += [("written", str(weights)), ("next", f"python -m finetune encoder={arguments.folder}")]
    Report().pairs(f"{arguments.source}, as {facts['format']} writes them", rows)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """Write an encoder or a classifier for timm, transformers or onnx, after its outputs were seen to be the same."""
    from importlib import import_module

    from vitssl.train.export import last_part, read_export

    path, part = last_part(arguments.run)
    state, facts = read_export(path, part)
    writer = getattr(import_module(f"vitssl.interop.{arguments.to}"), f"export_{arguments.to}")
    run = next((folder for folder in (path, *path.parents[:2]) if (folder / "config.yaml").is_file()), None)
    further: dict[str, Any] = {"images": _pictures(arguments.images, facts)} if arguments.images else {}
    further |= {"painter": _painter(arguments.run, arguments.to, facts)} if arguments.decoder else {}
    differs = writer(arguments.folder, state, facts, run=run, **further)
    rows = [(part, f"{path}, {len(state):,} tensors"), ("parity", f"outputs differ by {differs:.1e} of their size")]
    rows.append(("written", ", ".join(sorted(file.name for file in arguments.folder.iterdir()))))
    Report().pairs(f"{arguments.folder}, for {arguments.to}", rows)
    return 0


def _pictures(path: str, facts: Mapping[str, Any]) -> "Tensor":
    """Eight images of a source [8, C, H, W] as a network of ``facts`` takes them, normalised. Raises DataError."""
    from vitssl.data.augment import Normalize
    from vitssl.data.feed import evaluation_samples, share
    from vitssl.data.sources import open_source
    from vitssl.sections import DataConfig
    from vitssl.views import View

    report, num = Report(), len(facts["mean"])
    config, view = DataConfig(arrays=num not in (1, 3)), View(size=tuple(facts["image_size"]))
    source = open_source(path, progress=report.waiting("indexing"))
    batch = next(share(evaluation_samples(source, config, [view], channels=num, limit=8), tell=report.say))
    return Normalize(facts["mean"], facts["std"], channels=num)(batch.views[view])


def _painter(run: Path, to: str, facts: Mapping[str, Any]) -> "Painter":
    """The decoder of an MAE run, from its newest checkpoint. Raises CheckpointError: there is none, or one of another step."""
    from vitssl.config import build
    from vitssl.errors import CheckpointError
    from vitssl.interop.mae import Painter
    from vitssl.objectives.mae import MAE
    from vitssl.train.checkpoint import load_newest
    from vitssl.train.folder import begun_with

    if to != "transformers":
        raise CheckpointError(f"--decoder: {to} has no masked autoencoder; leave it out, or export --to transformers")
    saved, prefix = load_newest(run / "checkpoints", tell=Report().say), "objectives.mae.decoder."
    values = ((begun_with(run) or {}).get("objectives") or {}).get("mae")
    state = {name: tensor for name, tensor in saved.state.items() if name.startswith(prefix)} if saved else {}
    if values is None or not state:
        raise CheckpointError(f"{run} holds no checkpoint with an MAE decoder; give the folder of a run of objectives.mae")
    if saved.step != facts.get("step"):
        raise CheckpointError(
            f"{run}: its export is of step {facts.get('step')}, its newest checkpoint of step {saved.step}; let the run come to"
            " its end, by the same command again"
        )
    config = build(MAE.Config, values, where=str(run / "config.yaml"))
    if config.decoder.attention == "cross":
        raise CheckpointError("--decoder: transformers' ViTMAE has no decoder with attention=cross; leave it out")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return Painter(state, config.decoder.heads, config.mask_ratio, config.norm_pix)
