"""``python -m finetune.evaluate``: frozen encoders, features kept in files, protocols over them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.evaluate import PROTOCOLS, EvaluateConfig, main
from vitssl.cli import main as tools
from vitssl.config import build
from vitssl.data.feed import evaluation_samples
from vitssl.data.sources import Subset, open_source
from vitssl.errors import CheckpointError, ConfigError, DataError
from vitssl.probes import protocols
from vitssl.probes.knn import knn_accuracy
from vitssl.sections import DataConfig
from vitssl.train import frozen
from vitssl.train.export import load_encoder
from vitssl.train.frozen import Extraction, extracted, frozen_features
from vitssl.train.layers import KINDS, Feature
from vitssl.views import View


@pytest.fixture
def argv(exported, data: Path, tmp_path: Path) -> list[str]:
    sets = [f"data.path={data}", "data.split=train", f"test.path={data}", "test.split=test"]
    return [*sets, f"encoder={exported.folder}", f"features={tmp_path}/features", f"out={tmp_path}/rows.json", "device=cpu"]


def rows(tmp_path: Path) -> list[dict]:
    return json.loads((tmp_path / "rows.json").read_text())


def test_the_list_of_protocols_is_the_librarys() -> None:
    assert set(PROTOCOLS) == set(protocols.PROTOCOLS)
    assert build(EvaluateConfig, {"protocol": "all"}, where="here").protocol == [*PROTOCOLS]
    with pytest.raises(ConfigError, match=r"protocol='knnn': knnn is no protocol; take some of knn, "):
        build(EvaluateConfig, {"protocol": "knnn"}, where="here")


def test_every_protocol_from_one_extraction(argv: list[str], exported, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoders = f"encoder=[{exported.folder},random:{exported.folder}]"
    assert main([*(word for word in argv if "encoder=" not in word), "protocol=all", encoders, "seeds=2"]) == 0
    found, out = rows(tmp_path), capsys.readouterr().out
    assert {row["encoder"] for row in found} == {str(exported.folder), f"random:{exported.folder}"}
    assert {row["protocol"] for row in found} == {*PROTOCOLS, "rankme", "alpha_req"} - {"spectrum"}
    assert all(row["interval"][0] <= row["value"] <= row["interval"][1] for row in found if row["interval"])
    assert out.count("to look at") == 4 and "knn k=10" in out and "fewshot 1 shots" in out
    assert main([*argv, "protocol=knn"]) == 0
    assert "to look at" not in capsys.readouterr().out, "they are there"


def test_features_are_the_encoders(exported, data: Path, tmp_path: Path) -> None:
    """Of each kind, against a forward of one image at a time; then kNN against the rows."""
    encoder, facts = load_encoder(exported.folder)
    source, view = open_source(data, split="train"), View(size=encoder.spec.image_size, resize=20)
    how = Extraction(view, facts["mean"], facts["std"], batch_size=7)
    kinds = [kind for kind in KINDS if encoder.spec.class_token or not kind.startswith("class")]
    found, used = frozen_features(encoder, source, DataConfig(), how, kinds, folder=tmp_path, tell=lambda text: None)
    assert used.tolist() == list(range(60))
    samples = evaluation_samples(source, DataConfig(), [view], channels=3)
    for number in (0, 17, 59):
        images = samples[number].views[view].double() / 255
        images = (images - torch.tensor(facts["mean"])[:, None, None]) / torch.tensor(facts["std"])[:, None, None]
        with torch.no_grad():
            tokens = encoder(images.float(), last_blocks=min(4, encoder.spec.depth))
            for kind in kinds:
                expected = Feature(kind).of(encoder, tokens)[0].numpy()
                np.testing.assert_allclose(found[kind][number], expected, atol=2e-3 if kind == "patches" else 1e-5)
    labels, features = torch.from_numpy(source.label_array()), torch.from_numpy(np.array(found["mean"]))
    assert knn_accuracy(features, labels, features, labels, k=1) == 1.0


def test_a_stopped_extraction_goes_on(exported, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, facts = load_encoder(exported.folder)
    source, view = open_source(data, split="train"), View(size=encoder.spec.image_size, resize=20)
    how, told, seen = Extraction(view, facts["mean"], facts["std"], batch_size=8), [], []
    monkeypatch.setattr(frozen, "_FLUSH", 1)
    forward = type(encoder).forward

    def die(self, images, **options):
        seen.append(len(images))
        if sum(seen) > 30:
            raise KeyboardInterrupt
        return forward(self, images, **options)

    options = {"folder": tmp_path, "tell": told.append}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(encoder), "forward", die)
        frozen_features(encoder, source, DataConfig(), how, ["mean"], **options)
    found, _ = frozen_features(encoder, source, DataConfig(), how, ["mean"], **options)
    assert "36 to look at, 24 in" in told[-1]
    whole, _ = frozen_features(encoder, source, DataConfig(), how, ["mean"], **options | {"folder": tmp_path / "other"})
    np.testing.assert_allclose(found["mean"], whole["mean"], atol=1e-6)
    other, _ = frozen_features(encoder, Subset(source, range(10)), DataConfig(), how, ["mean"], **options)
    assert len(other["mean"]) == 10 and len({path.name for path in tmp_path.iterdir() if path.is_dir()}) == 3


def test_several_data_sets(argv: list[str], exported, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A block and a table for each, their mean after them, all in one page; alone each gives the same numbers."""
    assert main([*argv, "protocol=[knn,spectrum]"]) == 0
    alone = [row["value"] for row in rows(tmp_path)]
    own = f"data: {{path: {data}, split: train}}, test: {{path: {data}, split: test}}"
    words = [word for word in argv if not word.startswith(("data.", "test.", "out="))]
    out = f"out=[{tmp_path}/rows.json,{tmp_path}/table.html]"
    capsys.readouterr()
    assert main([*words, "protocol=[knn,spectrum]", f"datasets={{one: {{{own}}}, two: {{{own}}}}}", out]) == 0
    found, told = rows(tmp_path), capsys.readouterr().out
    for name in ("one", "two"):
        assert [row["value"] for row in found if row["dataset"] == name] == alone and f"{name}: accuracy on" in told
    page = (tmp_path / "table.html").read_text()
    assert "mean over data sets: accuracy" in told and "<h2>mean over data sets</h2>" in page
    assert found[0]["weights"] in page and "train-0.tar" in page and "python -m finetune.evaluate" in page
    with pytest.raises(ConfigError, match="datasets, and data or test beside it, are both given; put each set"):
        main([*argv, f"datasets={{one: {{{own}}}}}"])
    with pytest.raises(ConfigError, match=r"out=.*table.pdf ends neither in .json \(every row\) nor in .html"):
        main([*words, f"out={tmp_path}/table.pdf"])
    with pytest.raises(ConfigError, match=r"datasets.one.data.path: has no value"):
        main([*words, f"datasets={{one: {{test: {{path: {data}}}}}}}"])


def test_images_that_cannot_be_used_are_left_out(exported, tmp_path: Path, picture: Callable) -> None:
    (tmp_path / "photos/a").mkdir(parents=True)
    encoder, facts = load_encoder(exported.folder)
    for number in range(6):
        (tmp_path / f"photos/a/{number}.jpg").write_bytes(picture(number) if number != 3 else b"no picture")
    how, told = Extraction(View(size=encoder.spec.image_size), facts["mean"], facts["std"]), []
    options = {"folder": tmp_path / "features", "tell": told.append}
    for _ in range(2):
        _, used = frozen_features(encoder, open_source(tmp_path / "photos"), DataConfig(), how, ["mean"], **options)
        assert used.tolist() == [0, 1, 2, 4, 5]
    assert len(told) == 4 and told[3].startswith("1 images of") and "left out; the first:" in told[3], "told by every run"
    (tmp_path / "photos/a/3.jpg").write_bytes(picture(3))
    _, used = frozen_features(encoder, open_source(tmp_path / "photos"), DataConfig(), how, ["mean"], **options)
    assert used.tolist() == list(range(6))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/0.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of 1 images can be used"):
        frozen_features(encoder, open_source(tmp_path / "bad"), DataConfig(), how, ["mean"], **options)


def test_kept_features_are_of_these_files_and_this_network(exported, tmp_path: Path, picture: Callable) -> None:
    """What has the same names but other pixels, heads or decoding is looked at anew, and damaged files are no features."""
    encoder, facts = load_encoder(exported.folder)
    how = Extraction(View(size=encoder.spec.image_size), facts["mean"], facts["std"])
    for folder, first in (("train", 0), ("test", 4)):
        (tmp_path / folder / "a").mkdir(parents=True)
        for number in range(4):
            (tmp_path / folder / f"a/{number}.jpg").write_bytes(picture(first + number))

    def features(folder: str, *, heads: int = 1, exif: bool = False) -> tuple[np.ndarray, int]:
        told = []
        network = load_encoder(exported.folder)[0]
        if heads > 1:
            network.arguments = network.arguments | {"num_heads": heads}
        options = {"folder": tmp_path / "features", "tell": told.append}
        source, config = open_source(tmp_path / folder), DataConfig(exif=exif)
        found, _ = frozen_features(network, source, config, how, ["mean"], **options)
        return np.array(found["mean"]), len(told)

    train, _ = features("train")
    test, told = features("test")
    assert told == 1 and not np.array_equal(train, test)
    assert features("train")[1] == 0 and features("train", heads=4)[1] == 1 and features("train", exif=True)[1] == 1
    (tmp_path / "train/a/0.jpg").write_bytes(picture(9))
    changed, told = features("train")
    assert told == 1 and not np.array_equal(changed[0], train[0]) and np.array_equal(changed[1:], train[1:])
    for damage in (lambda file: file.unlink(), lambda file: os.truncate(file, file.stat().st_size // 2)):
        for file in (tmp_path / "features").glob("*/mean.npy"):
            damage(file)
        again, told = features("train")
        assert told == 1 and np.array_equal(again, changed)
    network = load_encoder(exported.folder)[0]
    with torch.no_grad():
        network.vit.norm.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"makes no finite numbers of a/0\.jpg"):
        options = {"folder": tmp_path / "features", "tell": print}
        frozen_features(network, open_source(tmp_path / "train"), DataConfig(), how, ["mean"], **options)


def test_crops_are_functions_of_the_image(exported, data: Path, tmp_path: Path) -> None:
    """Each number its own crop, the same for one image alone, in a resumed extraction and on the second of two processes."""
    encoder, facts = load_encoder(exported.folder)
    source = open_source(data, split="train")
    views = [View(size=encoder.spec.image_size, scale=(0.08, 1.0), flip=0.5, copy=number) for number in range(2)]
    found = []
    for number, view in enumerate(views):
        how = Extraction(view, facts["mean"], facts["std"], batch_size=7)
        options = {"folder": tmp_path / "kept", "tell": lambda text: None}
        files, _ = frozen_features(encoder, source, DataConfig(), how, ["mean"], **options)
        found.append(np.array(files["mean"]))
        (flags,) = (tmp_path / "kept").glob("*/mean.done.npy")
        marks = np.lib.format.open_memmap(flags, mode="r+")
        marks[17:41] = 0  # as if it had been stopped
        marks.flush()
        files["mean"][17:41] = 0
        again, _ = frozen_features(encoder, source, DataConfig(), how, ["mean"], **options)
        np.testing.assert_allclose(again["mean"], found[number], atol=1e-6)
        shutil.rmtree(tmp_path / "kept")
        samples = evaluation_samples(source, DataConfig(), [view], channels=3)
        second = extracted(encoder, source, DataConfig(), how, [Feature("mean")], positions=np.arange(1, 60, 2))
        rows = {int(place): row for batch, own in second for place, row in zip(batch.positions, own[Feature("mean")])}
        for place in (1, 33, 59):
            np.testing.assert_allclose(rows[place], found[number][place], atol=1e-6)
            pixels = samples[place].views[view].float() / 255
            with torch.no_grad():
                images = (pixels - torch.tensor(facts["mean"])[:, None, None]) / torch.tensor(facts["std"])[:, None, None]
                np.testing.assert_allclose(encoder(images).pool("mean")[0], found[number][place], atol=1e-5)
    assert np.abs(found[0] - found[1]).max(axis=1).min() > 1e-4, "no image is cropped twice alike"


def test_crops_in_the_table(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*argv, "protocol=[knn,linear_moco_v3]", "seeds=1"]
    assert main([*words, "crops=1"]) == 0
    knn, linear = [row for row in rows(tmp_path) if row["protocol"] == "knn"], rows(tmp_path)[-1]
    assert main([*words, "crops=3"]) == 0
    assert capsys.readouterr().out.count("to look at") == 2 + 3, "the centre crops are there"
    assert [row for row in rows(tmp_path) if row["protocol"] == "knn"] == knn, "crops are for linear heads"
    assert rows(tmp_path)[-1]["setting"] == f"{linear['setting']}, 3 crops"
    assert main([*argv, "protocol=knn", "crops=4"]) == 0
    assert "to look at" not in capsys.readouterr().out, "nobody asks for the fourth"


def test_two_processes_extract_the_same(argv: list[str], tmp_path: Path, start: Callable) -> None:
    assert main([*argv, "protocol=[knn,fewshot]"]) == 0
    alone = rows(tmp_path)
    shutil.rmtree(tmp_path / "features")
    ran = start("finetune.evaluate", tmp_path, *argv, "protocol=[knn,fewshot]", processes=2).ok()
    assert rows(tmp_path) == alone and ran.out.count("knn k=10") == 1


def test_weights_from_elsewhere(argv: list[str], exported, tmp_path: Path) -> None:
    """An export that went to timm's own layout is judged the same."""
    assert main([*argv, "protocol=knn"]) == 0
    own = [row["value"] for row in rows(tmp_path)]
    assert tools(["export", str(exported.folder), str(tmp_path / "hub"), "--to", "timm"]) == 0
    foreign = [*(word for word in argv if "encoder=" not in word), f"encoder=timm:{tmp_path}/hub", "protocol=knn"]
    assert main(foreign) == 0 and [row["value"] for row in rows(tmp_path)] == own
    assert main([*foreign, "image_size=32"]) == 0, "positions are resampled"
    bigger = [row["value"] for row in rows(tmp_path)]
    assert main([*argv, "protocol=knn", "image_size=32"]) == 0 and [row["value"] for row in rows(tmp_path)] == bigger


def test_refusals(argv: list[str], tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^device=cuda: torch sees no GPU here; take device=auto"):
        main([*(word for word in argv if not word.startswith("device=")), "device=cuda", "protocol=knn"])
    with pytest.raises(CheckpointError, match=r"nowhere.* does not exist"):
        main([word for word in argv if not word.startswith("encoder=")] + [f"encoder={tmp_path}/nowhere"])
    with pytest.raises(DataError, match=r"test: .*nothing is there"):
        main([word for word in argv if not word.startswith("test.")] + [f"test.path={data}/none-*.tar"])
    for empty in ("protocol=[]", "encoder=[]"):
        with pytest.raises(ConfigError, match=rf"{empty[:-3]}.*is empty"):
            main([word for word in argv if not word.startswith("encoder=")] + [empty])
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ConfigError, match=r"out=.*page\.html: is a folder; give the name of a file"):
        main([*argv[:-2], f"out={tmp_path}/page.html", argv[-1]])
    for setting in ("repeats=3", "ledger=true", f"quarantine={tmp_path}/stray.jsonl"):
        with pytest.raises(ConfigError, match=rf"^data\.{setting.partition('=')[0]}: is about training, and here every"):
            main([*argv, f"data.{setting}"])
    mixed = f"data.sources=[{{path: {data}, weight: 2}}, {{path: {data}}}]"
    with pytest.raises(ConfigError, match=r"^data\.sources: weight: is about training"):
        main([word for word in argv if not word.startswith("data.")] + [mixed])
    stray = tmp_path / "stray.csv"
    stray.write_text("path,label\n" + "".join(f"{tmp_path}/{number}.jpg,{number * 10_000}\n" for number in range(3)))
    (tmp_path / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="has 3 different labels, and one is 20,000; number classes from 0 on"):
        main([word for word in argv if not word.startswith("data.")] + [f"data.path={stray}"])
