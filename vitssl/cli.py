"""``vitssl``: the tools around the two programs; ``vitssl TOOL --help`` says what each takes."""

import argparse
import sys
from collections.abc import Sequence

from vitssl.report import Report, program


def entry() -> int:
    """The console script."""
    return program(main, sys.argv[1:])


def main(argv: Sequence[str]) -> int:
    """Read a command line and run the tool it names. Nothing heavy is imported for ``--help``."""
    parser = argparse.ArgumentParser(prog="vitssl", description="Tools around python -m pretrain and python -m finetune.")
    tools = parser.add_subparsers(metavar="TOOL", required=True)
    index = tools.add_parser("index", help="index tar shards, so that training starts at once", description=_index.__doc__)
    index.add_argument("shards", nargs="+", help="a folder, a tar, a glob or a brace pattern ('train-{000..099}.tar')")
    index.add_argument("--processes", type=int, help="shards scanned side by side (default: one per CPU, at most 16)")
    index.set_defaults(tool=_index)
    arguments = parser.parse_args(argv)
    return arguments.tool(arguments)


def _index(arguments: argparse.Namespace) -> int:
    """Count the samples of tar shards and note where each lies, in a small file beside every shard."""
    from vitssl.data.manifest import index_shards
    from vitssl.data.sources import find_shards

    report = Report()
    rows = index_shards(find_shards(arguments.shards), progress=report.waiting("indexing"), processes=arguments.processes).rows
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
