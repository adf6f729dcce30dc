"""What predictions come to, by hand-computed and slow oracles; and the charts, pixel by pixel where it matters."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitssl.inspect.charts import CELL, INK, LINE, NAMED, TILE, confusion_chart, drawable, mistakes_sheet
from vitssl.inspect.results import calibration_error, class_table, confusion, weakest
from vitssl.probes.protocols import wilson


def slow_calibration(confidence: list[float], hits: list[bool], bins: int) -> float:
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (number == 0 and c == 0)]
        if inside:
            accuracy = sum(hits[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1, max_size=60), st.sampled_from([1, 8, 16]))
def test_calibration_by_a_slow_oracle(rows: list[tuple[int, bool]], bins: int):
    confidence, hits = [number / 1024 for number, _ in rows], [hit for _, hit in rows]
    found = calibration_error(torch.tensor(confidence, dtype=torch.float64), torch.tensor(hits), bins=bins)
    assert found == pytest.approx(slow_calibration(confidence, hits, bins), abs=1e-12)


def test_calibration_of_what_is_known():
    sure = torch.ones(10, dtype=torch.float64)
    assert calibration_error(sure, torch.ones(10, dtype=torch.bool)) == 0
    assert calibration_error(sure, torch.zeros(10, dtype=torch.bool)) == 1
    assert calibration_error(0.8 * sure, torch.arange(10) < 8) == pytest.approx(0, abs=1e-15)
    assert math.isnan(calibration_error(sure[:0], torch.zeros(0, dtype=torch.bool)))


LABELS, PREDICTED = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 1, 1, 1, 0, 3])


def test_confusion_counts():
    counts = confusion(LABELS, PREDICTED, 5)
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for label, predicted in zip(LABELS.tolist(), PREDICTED.tolist()):
        expected[label, predicted] += 1
    assert torch.equal(counts, expected)


def test_the_table_of_the_classes():
    rows = class_table(confusion(LABELS, PREDICTED, 5), ["cat", "dog", "none", "fox", "nil"])
    assert [row["class"] for row in rows] == ["cat", "dog", "fox"]
    cat, dog, fox = rows
    assert (cat["images"], cat["recall"], cat["precision"]) == (3, pytest.approx(1 / 3), 0.5)
    assert (cat["taken_for"], cat["times"]) == ("dog", 2) and (cat["low"], cat["high"]) == wilson(1 / 3, 3)
    assert (dog["recall"], dog["precision"], dog["taken_for"]) == (0.5, pytest.approx(1 / 3), "cat")
    assert (fox["recall"], fox["precision"], fox["taken_for"], fox["times"]) == (1.0, 1.0, None, 0)
    assert weakest(rows, 2) == "cat 33.3% (taken for dog), dog 50.0% (taken for cat)"
    (seen, only) = class_table(confusion(torch.tensor([0]), torch.tensor([1]), 2), ["a", "b"])
    assert (seen["precision"], only["recall"], only["low"], only["images"]) == (None, None, None, 0)
    assert weakest([only], 3) == ""


@pytest.mark.parametrize("num", [2, NAMED, NAMED + 1, 300])
def test_the_chart_shades_shares_of_rows(num: int):
    counts = torch.zeros(num, num, dtype=torch.int64)
    counts[0, 0], counts[1, 0], counts[1, 1] = 7, 30, 90
    pixels = confusion_chart(counts, [f"class {number}" for number in range(num)])
    assert pixels.dtype == torch.uint8 and pixels.shape[2] == 3
    cell = CELL if num <= NAMED else 1000 // num
    top, left = pixels.shape[0] - num * cell, pixels.shape[1] - num * cell
    assert top == left and (top > 2 * LINE) == (num <= NAMED)
    assert (pixels[:LINE, left:] < 160).any() and (pixels[top:, :LINE] < 160).any(), "which is the truth and which predicted"

    def corner(row: int, column: int) -> list[int]:
        return pixels[top + row * cell, left + column * cell].tolist()

    assert corner(0, 0) == list(INK) and corner(0, 1) == [255] * 3
    quarter = [round(255 + 0.5 * (ink - 255)) for ink in INK]
    assert np.abs(np.array(corner(1, 0)) - quarter).max() <= 1
    if num <= NAMED:
        assert (pixels[LINE:top, left:] < 128).any() and (pixels[top:, LINE:left] < 128).any(), "names stand beside and above"


def test_names_are_told_in_letters_that_can_be_drawn():
    """An accent goes, other letters are marked, and the number says which class it is."""
    assert drawable(["cat, 2", "avión", "cafe\u0301", "Stra\u00dfe", "\u732b", "a\tb"]) == [
        "cat, 2",
        "avion",
        "cafe",
        "#3 Stra?e",
        "#4 ?",
        "#5 a?b",
    ]
    counts = torch.tensor([[1, 0], [0, 1]])
    assert torch.equal(confusion_chart(counts, ["avión", "b"]), confusion_chart(counts, ["avion", "b"]))


@pytest.mark.parametrize("channels, size, number", [(3, (16, 16), 3), (1, (32, 20), 9), (6, (200, 150), 1)])
def test_mistakes_stand_where_they_belong(channels: int, size: tuple[int, int], number: int):
    images = [torch.rand(channels, *size, generator=torch.Generator().manual_seed(each)) for each in range(number)]
    pixels = mistakes_sheet(images, [f"true {each}\n-> a long name of a class {each}" for each in range(number)], columns=4)
    factor = -(-TILE // size[1])
    high, wide = pixels.shape[0] // -(-number // 4), pixels.shape[1] // min(number, 4)
    for each, image in enumerate(images):
        top, left = each // 4 * high, each % 4 * wide
        shown = pixels[top : top + size[0] * factor : factor, left : left + size[1] * factor : factor]
        expected = (image[:3] if channels >= 3 else image[:1].expand(3, -1, -1)) * 255
        assert torch.equal(shown, expected.round().to(torch.uint8).permute(1, 2, 0))
        assert (pixels[top + size[0] * factor : top + high, left : left + wide] < 128).any(), "a caption"


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a sheet needs at least one image"):
        mistakes_sheet([], [])
