"""Encoders beside each other: means over seeds and data sets, the best of a line, and a page that needs nothing else."""

import re
import statistics

import pytest

from vitssl.inspect.comparison import TOGETHER, compared, comparison_page, in_lines, titles
from vitssl.probes.protocols import wilson


def row(
    dataset: str, encoder: str, protocol: str, value: float, *, seed: int = 0, images: int = 100, setting: str = "lr 1"
) -> dict:
    own = {"dataset": dataset, "encoder": encoder, "protocol": protocol, "setting": setting, "value": value}
    return own | {"seed": seed, "images": images}


ROWS = [
    *(row("pets", "runs/a", "linear_mae", value, seed=seed) for seed, value in enumerate((0.5, 0.6, 0.7))),
    *(row("pets", "random:runs/a", "linear_mae", 0.25, seed=seed) for seed in range(3)),
    row("pets", "runs/a", "knn", 0.5, setting="k=10"),
    row("pets", "random:runs/a", "knn", 0.5, setting="k=10"),
    row("pets", "runs/a", "rankme", 30.0, images=0, setting="of 64"),
    row("pets", "random:runs/a", "rankme", 99.0, images=0, setting="of 64"),
    row("cars", "runs/a", "linear_mae", 0.2, images=40),
    row("cars", "random:runs/a", "linear_mae", 0.3, images=40),
    row("cars", "runs/a", "knn", 0.5, images=40, setting="k=20"),
]  # fmt: skip


def test_cells_are_means_over_seeds_and_sets() -> None:
    sets = compared(ROWS)
    cell = sets["pets"]["linear_mae"]["runs/a"]
    assert cell.mean == pytest.approx(0.6) and cell.deviation == pytest.approx(statistics.stdev([0.5, 0.6, 0.7]))
    assert cell.interval == pytest.approx(wilson(0.6, 100)) and cell.seeds == 3
    assert sets["cars"]["linear_mae"]["runs/a"].deviation is None
    assert sets["cars"]["linear_mae"]["runs/a"].interval == pytest.approx(wilson(0.2, 40))
    assert list(sets) == ["pets", "cars", TOGETHER] and list(sets[TOGETHER]) == ["linear_mae"], "what all sets have"
    assert sets[TOGETHER]["linear_mae"]["runs/a"].mean == pytest.approx((0.6 + 0.2) / 2)
    assert list(compared(ROWS[:10])) == ["pets"]


@pytest.mark.parametrize(
    "encoders, called",
    [
        (["runs/a", "random:runs/a", "timm:vit_tiny"], ["a", "random:a", "timm:vit_tiny"]),
        (["runs/a/export", "runs/b/export"], ["a/export", "b/export"]),
        (["x/a", "/y/x/a"], ["x/a", "y/x/a"]),
        (["runs/a"], ["a"]),
    ],
)
def test_columns_can_be_told_apart(encoders: list[str], called: list[str]) -> None:
    assert titles(encoders) == called


def test_lines_of_text() -> None:
    head, linear, knn, rankme = in_lines(compared(ROWS)["pets"])
    assert head[1].split() == ["a", "random:a"] and linear[1].split()[:3] == ["60.00%", "+-", "10.00%"]
    assert knn[0] == "knn k=10" and knn[1].startswith("50.00% [40.38%, 59.62%]".rjust(24)) and "30 (of 64)" in rankme[1]
    assert len(in_lines(compared([ROWS[0]])["pets"])) == 1, "one encoder needs no head"


def test_the_page() -> None:
    facts = {
        "date": "2026-11-21",
        "command": "python -m finetune.evaluate 'a<b'",
        "datasets": {"pets": [("train", "100 images")], "cars": [("train", "40 images")]},
        "encoders": {"runs/a": [("weights", "abc")], "random:runs/a": [("weights", "def")]},
        "protocols": [("knn", "DINO & others")],
        "settings": [("seeds", "3")],
    }
    page = comparison_page(compared(ROWS), facts)
    marked = {(row.split("<td>")[1].partition("<")[0], row.count("class=best")) for row in page.split("<tr>") if "<td>" in row}
    assert {("linear_mae", 1), ("knn k=10", 2), ("rankme", 0)} <= marked, "ties are all best, and no rank is an accuracy"
    assert "60.0 %" in page and "50.2 to 69.1" in page and "&plusmn; 10.0" in page and "40.0 %" in page
    assert "a&lt;b" in page and "DINO &amp; others" in page and "abc" in page and "width=device-width" in page
    assert not re.search(r"<script|https?://|@import|src=", page), "nothing from outside"
