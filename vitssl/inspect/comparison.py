"""Encoders beside each other: what protocols found on data sets, as lines of text and as one HTML page.

A line is a protocol (of kNN and few shots also its setting), a column an encoder, a cell the mean over seeds. The best of a
line is the largest accuracy; that the intervals of two overlap says that the choice between them may be chance.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vitssl.inspect import html
from vitssl.probes.protocols import wilson

TOGETHER = "mean over data sets"


@dataclass(frozen=True)
class Cell:
    """One number: ``mean`` over seeds, ``deviation`` between them (None: one), the 95 % ``interval`` over the drawing of the
    test images (None: no accuracy), and the setting it was found at."""

    mean: float
    deviation: float | None
    interval: tuple[float, float] | None
    setting: str
    seeds: int

    @property
    def in_words(self) -> str:
        """As short as a terminal needs it."""
        if self.interval is None and self.deviation is None:
            return f"{self.mean:.4g} ({self.setting})" if self.setting else f"{self.mean:.2%}"
        if self.deviation is not None:
            return f"{self.mean:.2%} +- {self.deviation:.2%}"
        return f"{self.mean:.2%} [{self.interval[0]:.2%}, {self.interval[1]:.2%}]"


Lines = dict[str, dict[str, Cell]]
"""By the name of a line and the encoder."""


def compared(rows: Sequence[Mapping[str, Any]]) -> dict[str, Lines]:
    """Rows of ``dataset``, ``encoder``, ``protocol``, ``setting``, ``value``, ``seed``, ``images`` (0: no accuracy) -> cells.

    In the order of the rows; where there are several data sets, their mean comes last (:data:`TOGETHER`): over lines of
    accuracies that all of them have, of encoders that all of them have.
    """
    found: dict[str, dict[str, dict[str, list[Mapping[str, Any]]]]] = {}
    for row in rows:
        line = f"{row['protocol']} {row['setting']}" if row["protocol"] in ("fewshot", "knn") else row["protocol"]
        found.setdefault(row["dataset"], {}).setdefault(line, {}).setdefault(row["encoder"], []).append(row)
    sets = {
        name: {line: {encoder: _cell(own) for encoder, own in cells.items()} for line, cells in lines.items()}
        for name, lines in found.items()
    }
    return sets | ({TOGETHER: _together(list(sets.values()))} if len(sets) > 1 else {})


def in_lines(lines: Lines) -> list[tuple[str, str]]:
    """(line, its cells side by side), with a line of the encoders first where there are several."""
    encoders = _encoders([lines])
    head = [("", "   ".join(f"{title[-24:]:>24}" for title in titles(encoders)))] if len(encoders) > 1 else []
    return head + [
        (name, "   ".join(f"{cells[each].in_words if each in cells else '':>24}" for each in encoders))
        for name, cells in lines.items()
    ]


def comparison_page(sets: Mapping[str, Lines], facts: Mapping[str, Any]) -> str:
    """One page: a table for each data set, then what the numbers are of.

    ``facts``: ``date`` and ``command``; ``datasets`` {name: [(what, value)]}, ``encoders`` {name: [(what, value)]},
    ``settings`` [(what, value)], ``protocols`` [(name, what it is)].
    """
    parts = [f"<p class=dim>{escape(facts['date'])}</p>"]
    for name, lines in sets.items():
        if name != TOGETHER:
            told = "<br>".join(f"{escape(what)} {escape(value)}" for what, value in facts["datasets"][name])
            parts += [f"<h2>{escape(name)}</h2>", f"<p class=dim>{told}</p>"]
        else:
            parts += [f"<h2>{TOGETHER}</h2>", "<p class=dim>each counts the same; what any of them lacks is left out</p>"]
        parts.append(_grid(lines))
    parts.append(
        "<p class=dim>Top-1 accuracy on the test images: the mean over seeds, +- their deviation, and the 95 % interval"
        " (Wilson) over the drawing of the test images. The best of a line is bold; where intervals overlap it may be chance."
        " Settings were chosen on a tenth of the training images.</p>"
    )
    for name, rows in facts["encoders"].items():
        parts += [f"<h2>{escape(name)}</h2>", html.pairs(rows)]
    parts += ["<h2>Protocols</h2>", html.pairs(facts["protocols"])]
    parts += ["<h2>Settings</h2>", html.pairs(facts["settings"])]
    parts += ["<h2>Command</h2>", f"<pre>{escape(facts['command'])}</pre>"]
    return html.page("Frozen encoders, judged", parts)


def titles(encoders: Sequence[str]) -> list[str]:
    """What encoders are called in columns: the last part of a path, behind what stands before a colon, or as many parts of it
    as tell one from the others."""
    found = []
    for num in range(1, 1 + max((len(Path(each).parts) for each in encoders), default=0)):
        places = [each.rpartition(":") for each in encoders]
        found = [f"{kind}{colon}{'/'.join(Path(rest).parts[-num:])}" for kind, colon, rest in places]
        if len(set(found)) == len(encoders):
            break
    return found


def _grid(lines: Lines) -> str:
    encoders = _encoders([lines])
    header = ["", *map(escape, titles(encoders))]
    rows = [[escape(name), *(_cell_html(cells.get(each), name) for each in encoders)] for name, cells in lines.items()]
    return html.grid(header, rows, best=[_best(encoders, cells) for cells in lines.values()])


def _best(encoders: Sequence[str], cells: Mapping[str, Cell]) -> list[int]:
    """The columns of the largest accuracy; none where there is nothing to compare, or it is no accuracy."""
    accuracies = {each: cell.mean for each, cell in cells.items() if cell.interval is not None or not cell.setting}
    best = max(accuracies.values(), default=0.0)
    return [1 + encoders.index(each) for each, mean in accuracies.items() if mean == best] if len(accuracies) > 1 else []


def _cell_html(cell: Cell | None, line: str) -> str:
    if cell is None:
        return ""
    setting = "" if line.endswith(cell.setting) else f"<small>{escape(cell.setting)}</small>"
    if cell.interval is None:
        return f"{cell.mean:.4g}{setting}" if cell.setting else f"{100 * cell.mean:.1f} %"
    spread = "" if cell.deviation is None else f" <span class=dim>&plusmn; {100 * cell.deviation:.1f}</span>"
    low, high = cell.interval
    return f"{100 * cell.mean:.1f} %{spread}<small>{100 * low:.1f} to {100 * high:.1f}</small>{setting}"


def _cell(rows: Sequence[Mapping[str, Any]]) -> Cell:
    values, images = [row["value"] for row in rows], rows[0]["images"]
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Cell(mean, deviation, wilson(mean, images) if images else None, rows[0]["setting"], len(values))


def _together(sets: Sequence[Lines]) -> Lines:
    encoders = [each for each in _encoders(sets) if all(each in _encoders([lines]) for lines in sets)]
    found: Lines = {}
    for name in sets[0]:
        cells = [lines.get(name, {}) for lines in sets]
        for encoder in encoders:
            if all(encoder in own and own[encoder].interval is not None for own in cells):
                mean = statistics.fmean(own[encoder].mean for own in cells)
                found.setdefault(name, {})[encoder] = Cell(mean, None, None, "", len(cells))
    return found


def _encoders(sets: Sequence[Lines]) -> list[str]:
    return list(dict.fromkeys(encoder for lines in sets for cells in lines.values() for encoder in cells))
