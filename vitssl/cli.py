"""``vitssl``: the tools around the two programs; ``vitssl TOOL --help`` says what each takes."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vitssl.report import Report, program


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
    arguments = parser.parse_args(argv)
    return arguments.tool(arguments)


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
