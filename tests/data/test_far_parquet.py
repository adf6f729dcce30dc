"""Parquet files on a web server or in an object store: the same samples as on a disk, a row group about once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from webserver import WebServer, serving

from vitssl.data.loader import batches
from vitssl.data.order import Order
from vitssl.data.samples import Samples
from vitssl.data.sources import open_source
from vitssl.errors import DataError
from vitssl.views import View

pa = pytest.importorskip("pyarrow", reason="the extra vitssl[hub] is not installed here")
pq = pytest.importorskip("pyarrow.parquet", reason="the extra vitssl[hub] is not installed here")
sources_parquet = pytest.importorskip("vitssl.data.sources.parquet", reason="the extra vitssl[hub] is not installed here")

VIEW = View(size=(8, 8), scale=(0.3, 1.0))


@pytest.fixture
def folder(parquet: Callable, tmp_path: Path) -> Path:
    """Two files of 24 and 7 rows, in row groups of ten."""
    parquet("d/train-0.parquet"), parquet("d/train-1.parquet", num=7, first=24)
    return tmp_path / "d"


@pytest.fixture
def web(folder: Path) -> Iterator[WebServer]:
    with serving(folder) as server:
        yield server


@pytest.mark.parametrize("ranges", [True, False])
def test_the_same_samples_as_on_a_disk(folder: Path, ranges: bool) -> None:
    near = open_source(folder)
    with serving(folder, ranges=ranges) as server:
        far = open_source(f"{server.url}/train-{{0,1}}.parquet?signature=1")
        assert far.fingerprint == near.fingerprint and far.chunks.tolist() == near.chunks.tolist() and far.by_chunk
        assert far.classes == near.classes and (far.label_array() == near.label_array()).all()
        (a, b) = (source.read(range(31)) for source in (far, near))
        assert [raw._replace(where="") for raw in a] == [raw._replace(where="") for raw in b]
        assert a[30].where == f"{server.url}/train-1.parquet: row 6" and not any(raw.problem for raw in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_group_is_read_about_once(web: WebServer, folder: Path, workers: int) -> None:
    far, near = open_source(f"{web.url}/train-{{0,1}}.parquet"), open_source(folder)
    web.requests.clear()
    order = Order(near.chunks, seed=1, lanes=2, window=4)
    options = {"start": 0, "stop": 30, "batch_size": 10, "micro_batch": 10}
    mine = list(batches(Samples(far, order, [VIEW], seed=0), workers=workers, **options))
    theirs = list(batches(Samples(near, order, [VIEW], seed=0), workers=0, **options))
    assert [batch.keys for batch in mine] == [batch.keys for batch in theirs]
    assert all((a.views[VIEW] == b.views[VIEW]).all() for a, b in zip(mine, theirs, strict=True))
    groups = {said for _, said in web.requests}
    assert len(web.requests) <= 2 * 3 * (len(far.chunks) + 2), "image, path and label of each, and footers"
    assert len(groups) <= 3 * len(far.chunks) + 2


def test_trouble(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    source = open_source(f"{web.url}/train-{{0,1}}.parquet")
    web.faults = {"train-1.parquet": ["always 503"]}
    raws = source.read(range(31))
    assert all(raw.image for raw in raws[:24]) and all(raw.passing and "status 503" in raw.problem for raw in raws[24:])
    with pytest.raises(DataError, match=r"train-9\.parquet: is not there"):
        open_source(f"{web.url}/train-9.parquet")


def test_a_footer_that_says_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: Callable) -> None:
    """A column of one image again and again is stored once: far fewer bytes in the file than in memory."""
    image = encoded(0)
    pq.write_table(pa.table({"image": [image] * 5000}), tmp_path / "same.parquet")
    source = open_source(tmp_path / "same.parquet")
    assert source.read([4999])[0].image == image, "which is nothing bad"
    monkeypatch.setattr(sources_parquet, "_SLACK", 1000)
    (raw,) = open_source(tmp_path / "same.parquet").read([0])
    assert "row group 0 has more than" in raw.problem and not raw.image and not raw.passing


@pytest.mark.parametrize("statistics", [True, False])
def test_labels_beyond_all_classes(tmp_path: Path, encoded: Callable, statistics: bool) -> None:
    table = pa.table({"image": [encoded(0)] * 2, "label": pa.array([1, 2**63 + 5], pa.uint64())})
    pq.write_table(table, tmp_path / "p.parquet", write_statistics=statistics)
    with pytest.raises(DataError, match=r"p\.parquet: .*9223372036854775813") as raised:
        open_source(tmp_path / "p.parquet").label_array()
    assert "\n" not in str(raised.value)
