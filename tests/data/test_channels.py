"""Arrays on their way through sources, samples, the doctor and the packer: what is one, and what it stands beside."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from vitssl.data.bench import bench_data
from vitssl.data.doctor import examine
from vitssl.data.feed import evaluation_samples, training_samples
from vitssl.data.layout import choose_layouts
from vitssl.data.loader import batches
from vitssl.data.pack import PackConfig, pack
from vitssl.data.sources import open_source
from vitssl.errors import ConfigError, DataError
from vitssl.inspect.doctor import in_words, page
from vitssl.report import Report
from vitssl.sections import DataConfig
from vitssl.views import View

VIEW = View((8, 8), scale=(0.3, 1.0), flip=0.5)
NUM = 12


def array(number: int) -> np.ndarray:
    """uint8 [10, 12, 6] that no other number has."""
    return np.random.default_rng(number).integers(0, 256, (10, 12, 6), dtype=np.uint8)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tif(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, planarconfig="contig", photometric="minisblack", compression="lzw")
    return buffer.getvalue()


@pytest.fixture
def kept(tmp_path: Path, write_tar: Callable) -> Callable[..., str]:
    """``kept(place)``: the arrays 0 to 11 in two classes, in a tar, a folder or a list; each fourth is a TIFF of 16 bits."""

    def keep(place: str) -> str:
        files = {
            f"{'ab'[number % 2]}/{number:02}.{'npy' if number % 4 else 'tif'}":
                npy(array(number).transpose(2, 0, 1)) if number % 4 else tif(array(number).astype(np.uint16) * 256)
            for number in range(NUM)
        }  # fmt: skip
        if place == "tar":
            labels = {f"{name.partition('.')[0]}.cls": str("ab".index(name[0])).encode() for name in files}
            return write_tar(tmp_path / "s.tar", files | labels)
        for name, content in files.items():
            (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "folder" / name).write_bytes(content)
        if place == "list":
            rows = "".join(f"folder/{name},{name[0]}\n" for name in sorted(files))
            (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
            return str(tmp_path / "list.csv")
        for name in files:  # of a folder either kind alone: beside pictures, which .tif are, .npy files are passed over
            if name.endswith(".tif"):
                (tmp_path / "folder" / name).with_suffix(".npy").write_bytes(npy(array(int(name[2:4]))))
                (tmp_path / "folder" / name).unlink()
        return str(tmp_path / "folder")

    return keep


@pytest.mark.parametrize(("place", "workers"), [*itertools.product(["tar", "folder", "list"], [0, 1])])
def test_views_of_arrays_from_every_place(kept: Callable, place: str, workers: int) -> None:
    source, config = open_source(kept(place)), DataConfig(arrays=True)
    assert source.num_samples == NUM and source.label_array() is not None
    whole = View((10, 12))
    samples = evaluation_samples(source, config, [whole], channels=6, labels=True)
    found = samples.__getitems__(range(NUM))
    numbers = [int(key.rpartition("/")[2][:2]) for key in found.keys]
    assert sorted(numbers) == list(range(NUM)) and found.labels.tolist() == [number % 2 for number in numbers]
    for number, image in zip(numbers, found.views[whole].numpy(), strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), array(number))
    layouts = choose_layouts(source, config)
    training = training_samples(source, config, [VIEW], seed=0, layouts=layouts, channels=6)
    (batch,) = batches(training, start=0, stop=NUM, batch_size=NUM, micro_batch=NUM, workers=workers)
    assert batch.views[VIEW].shape == (NUM, 6, 8, 8) and not batch.bad


@pytest.mark.parametrize("workers", [0, 1])
def test_an_array_of_other_channels_is_replaced_and_told(kept: Callable, workers: int) -> None:
    path = Path(kept("folder"))
    (path / "a/00.npy").write_bytes(npy(array(0)[:, :, :5]))
    source, config = open_source(path), DataConfig(arrays=True)
    samples = training_samples(source, config, [VIEW], seed=0, layouts=choose_layouts(source, config), channels=6)
    (batch,) = batches(samples, start=0, stop=NUM, batch_size=NUM, micro_batch=NUM, workers=workers)
    ((bad),) = batch.bad
    assert len(batch) == NUM and "a/00.npy: is an array [10, 12, 5], and encoder.channels is 6" in bad.reason


@pytest.mark.parametrize("place", ["tar", "folder"])
def test_without_the_option_nothing_is_guessed(kept: Callable, place: str) -> None:
    source = open_source(kept(place))
    samples = training_samples(source, DataConfig(), [VIEW], seed=0, layouts=choose_layouts(source, DataConfig()), channels=3)
    with pytest.raises(DataError, match=r"set data\.arrays=true .*; nor do ten others of .*: look at the data"):
        samples.__getitems__(range(4))


def test_beside_a_picture_an_array_is_not_the_image(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    tar = write_tar(tmp_path / "s.tar", {"0.npy": npy(array(0)), "0.png": encoded(0), "1.npy": npy(array(1))})
    assert [raw.image for raw in open_source(tar).read([0, 1])] == [encoded(0), npy(array(1))]
    for name, content in {"a/0.png": encoded(0), "a/0.npy": npy(array(0)), "all.npy": npy(array(1))}.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    photos = open_source(tmp_path / "photos")
    assert (photos.num_samples, photos.ignored, photos.classes) == (1, 2, ("a",))
    (tmp_path / "counts.npy").write_bytes(npy(array(0)))
    assert open_source(tmp_path).num_samples == 2, "nor does one make a folder of shards a folder of images"


@pytest.mark.parametrize("place", ["tar", "folder"])
def test_the_doctor_counts_every_channel(kept: Callable, place: str) -> None:
    source = open_source(kept(place))
    found = examine(source, channels=6)
    values = np.stack([array(number) for number in range(NUM)]).reshape(-1, 6) / 255
    assert np.allclose(found.mean, values.mean(axis=0), atol=1e-12) and np.allclose(found.std, values.std(axis=0), atol=1e-9)
    kinds = ({"NPY": 9, "TIFF": 3}, {"uint8": 9, "uint16": 3}) if place == "tar" else ({"NPY": 12}, {"uint8": 12})
    assert (found.formats, found.modes) == kinds and not found.damaged
    assert dict(in_words(found))["statistics"].count(",") == 10 and "data:image/png" in page("p", found, source.classes)


def test_the_doctor_without_channels_names_the_option(kept: Callable) -> None:
    found = examine(open_source(kept("tar")))
    assert len(found.damaged) == NUM and found.mean == [0.0]
    assert all("(for vitssl check: --channels)" in reason for _, reason in found.damaged)
    assert len(examine(open_source(kept("folder")), channels=2).damaged) == NUM


def test_packing_copies_arrays_as_they_are(kept: Callable, tmp_path: Path) -> None:
    source = open_source(kept("tar"))
    assert pack(source, tmp_path / "out", PackConfig(), processes=1)["bad"] == 0
    packed = open_source(tmp_path / "out", split="train")
    assert sorted(raw.image for raw in packed.read(range(NUM))) == sorted(raw.image for raw in source.read(range(NUM)))
    assert len(examine(packed, channels=6).damaged) == 0


@pytest.mark.parametrize("asked", [{"short_side": 5}, {"max_side": 5}, {"perceptual": True}])
def test_packing_resizes_and_compares_pictures_only(kept: Callable, tmp_path: Path, asked: dict) -> None:
    message = r"\.npy .*is an array, and pictures alone are resized .*; without --short-side, --max-side and --percept"
    with pytest.raises(ConfigError, match=message):
        pack(open_source(kept("tar")), tmp_path / "out", PackConfig(**asked))
    assert not (tmp_path / "out").exists()


def test_packing_tells_where_no_image_can_be_resized(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tif").write_bytes(tif(array(0)))
    with pytest.raises(
        DataError, match=r"none of its 1 images can be used; the first: .*0\.tif: is no TIFF of a plain picture"
    ):
        pack(open_source(tmp_path / "in"), tmp_path / "out", PackConfig(short_side=5))


def test_bytes_of_a_table_are_known_by_what_they_are(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [npy(array(0)), tif(array(1))]}), tmp_path / "p.parquet")
    source = open_source(tmp_path / "p.parquet")
    pack(source, tmp_path / "out", PackConfig(shuffle=False))
    packed = open_source(tmp_path / "out", split="train")
    assert [raw.where.split(" (byte")[0].rpartition(".")[2] for raw in packed.read([0, 1])] == ["npy", "tiff"]


def test_the_bench_measures_arrays_alone(kept: Callable, capsys: pytest.CaptureFixture) -> None:
    source, config = open_source(kept("tar")), DataConfig(arrays=True, workers=0)
    row = bench_data(source, config, [VIEW], channels=6, device="cpu", report=Report(), seconds=0.05)
    assert row["ours_per_core"] > 0 and not [key for key in row if "torchvision" in key or "webdataset" in key]
    assert "a core" in capsys.readouterr().out
