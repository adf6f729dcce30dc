"""``python -m finetune.embed``: features in files, the same bit for bit however many processes wrote them and were killed."""

import io
import json
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import save_file

from finetune.embed import EmbedConfig, main
from finetune.embedding import prepare
from finetune.encoders import open_encoder
from vitssl.config import build, load
from vitssl.data.featurewrite import require_format
from vitssl.data.feed import evaluation_samples
from vitssl.data.sources import open_source
from vitssl.errors import ConfigError, DataError
from vitssl.interop.ours import create
from vitssl.report import Report
from vitssl.sections import DataConfig
from vitssl.train import embedding
from vitssl.train.export import load_encoder
from vitssl.train.frozen import frozen_features

FORMATS = ("parquet", "npy", "webdataset")
DIE = """
import os, signal
from vitssl.train import embedding
write = embedding._write_json
def dying(path, value):
    write(path, value)
    if path.name == "00002.json":
        os.kill(os.getpid(), signal.SIGKILL)
embedding._write_json = dying
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes have that are started here: sums of floats depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def argv(exported, data: Path) -> list[str]:
    where = [f"encoder={exported.folder}", f"data.path={data}", "data.split=train", "data.workers=0"]
    return [*where, "batch_size=4", "rows=7", "device=cpu"]  # 60 images in 8 pieces


def about(folder: Path) -> dict:
    return json.loads((folder / "about.json").read_text())


def table(folder: Path) -> dict[str, np.ndarray]:
    columns = pq.read_table(sorted(folder.glob("part-*.parquet"))).to_pydict()
    return {name: np.array(values) for name, values in columns.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_killed_and_continued_on_two_processes(form: str, argv: list[str], tmp_path: Path, start: Callable) -> None:
    argv = [*argv, "kind=[mean,patches]", f"format={form}"]
    assert main([*argv, f"out={tmp_path}/whole"]) == 0
    words = ["finetune.embed", tmp_path, *argv, f"out={tmp_path}/killed"]
    assert start(*words, trap=DIE).wait().codes == [-signal.SIGKILL]
    assert not (tmp_path / "killed/about.json").exists()
    assert "going on: 24 of 60 images" in start(*words, processes=2).ok().out
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == names and len(names) == {"npy": 5}.get(form, 9)
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("kinds", ["mean", "[mean,patches]"])
def test_stopped_while_files_get_their_names(
    kinds: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*argv, f"kind={kinds}", "format=npy"]
    assert main([*words, f"out={tmp_path}/whole"]) == 0
    write = embedding._write_json

    def stop(path: Path, value: object) -> None:
        if path.name == "about.json":
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(embedding, "_write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        main([*words, f"out={tmp_path}/stopped"])
    monkeypatch.setattr(embedding, "_write_json", write)
    assert main([*words, f"out={tmp_path}/stopped"]) == 0
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "stopped" / file.name).read_bytes() == file.read_bytes(), file.name


def test_every_format_holds_the_same(argv: list[str], exported, data: Path, tmp_path: Path) -> None:
    """And that is what evaluate keeps, with keys and labels of the source."""
    for form in FORMATS:
        assert main([*argv, "kind=[mean,patches]", f"format={form}", f"out={tmp_path}/{form}"]) == 0
    columns = table(tmp_path / "parquet")
    source = open_source(data, split="train")
    keys = [raw.key for raw in source.read(range(60))]
    assert columns["key"].tolist() == keys == (tmp_path / "npy/keys.txt").read_text().splitlines()
    assert columns["label"].tolist() == source.label_array().tolist() == np.load(tmp_path / "npy/labels.npy").tolist()
    embedding, _ = prepare(load(EmbedConfig, None, argv), Report(active=False))
    how, options = embedding.how, {"folder": tmp_path / "kept", "tell": lambda text: None}
    kept, _ = frozen_features(embedding.encoder, source, DataConfig(), how, ["mean", "patches"], **options)
    samples = {}
    for path in sorted((tmp_path / "webdataset").glob("*.tar")):
        with tarfile.open(path) as tar:
            samples |= {member.name: tar.extractfile(member).read() for member in tar}
    for name, shape in (("mean", (60, 24)), ("patches", (60, 16, 24))):
        array = np.load(tmp_path / f"npy/features_{name}.npy", mmap_mode="r")
        assert array.shape == shape and array.dtype == np.float32
        np.testing.assert_array_equal(array, columns[f"features_{name}"].astype(np.float32))
        np.testing.assert_array_equal(array.astype(kept[name].dtype), kept[name])
        for number in (0, 33, 59):
            np.testing.assert_array_equal(np.load(io.BytesIO(samples[f"{number:012}.{name}.npy"])), array[number])
    assert samples["000000000033.cls"] == str(columns["label"][33]).encode() and len(samples) == 4 * 60
    assert samples["000000000033.txt"].decode() == keys[33]
    assert about(tmp_path / "npy")["shapes"] == {"mean": [24], "patches": [16, 24]}


def test_any_layer_is_that_of_timm(argv: list[str], exported, data: Path, tmp_path: Path) -> None:
    """With the final norm and without, against a hook on the block of the model that two lines of timm load."""
    words = [*argv, "kind=[class,mean,patches]", "layer=[1,2,last]", "format=npy", "image_size=24"]
    for norm in ("true", "false"):
        assert main([*words, f"norm={norm}", f"out={tmp_path}/{norm}"]) == 0
    encoder, facts = load_encoder(exported.folder, image_size=24)
    model = timm.create_model(facts["architecture"], **facts["arguments"] | {"img_size": [24, 24]}).eval()
    model.load_state_dict(encoder.state(), strict=True)
    outputs: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda block, args, out, number=number: outputs.__setitem__(number, out))
    embedding, _ = prepare(load(EmbedConfig, None, words), Report(active=False))
    view = embedding.how.view
    samples = evaluation_samples(open_source(data, split="train"), DataConfig(), [view], channels=3)
    images = samples.__getitems__(range(60)).views[view] / 255
    with torch.no_grad():
        model((images - torch.tensor(facts["mean"])[:, None, None]) / torch.tensor(facts["std"])[:, None, None])
        for norm, suffix in (("true", ""), ("false", "_raw")):
            for layer, name in ((1, "_layer1"), (2, "_layer2"), (2, "")):
                tokens = model.norm(outputs[layer]) if norm == "true" else outputs[layer]
                expected = {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1), "patches": tokens[:, 1:]}
                for kind, values in expected.items():
                    found = np.load(tmp_path / f"{norm}/features_{kind}{name}{suffix}.npy")
                    np.testing.assert_allclose(found, values.numpy(), atol=1e-5, err_msg=f"{kind} {name} {norm}")
        ratio = float(model.norm(outputs[1]).std() / outputs[1].std())
    assert abs(ratio - 1) > 0.05, "the norm is to be seen"


def test_images_that_cannot_be_used(exported, tmp_path: Path, picture: Callable, capsys: pytest.CaptureFixture) -> None:
    """Left out of tables and tars, not a number in arrays; counted, told, listed; without labels there are none."""
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / f"photos/{number}.v1.jpg").write_bytes(picture(number) if number not in (3, 4, 5) else b"no picture")
    words = [f"encoder={exported.folder}", f"data.path={tmp_path}/photos", "device=cpu", "batch_size=2", "rows=2"]
    for form in FORMATS:
        for _ in range(2):  # the second finds it finished
            assert main([*words, f"format={form}", f"out={tmp_path}/{form}", "dtype=fp16"]) == 0
            out = capsys.readouterr().out
            assert "3 images of" in out and "left out; the first:" in out and "3.v1.jpg: is no image" in out
            assert "features of 3 of 6 images" in out
        found = about(tmp_path / form)
        assert (found["images"], found["rows"]) == (6, 3) and [each["key"] for each in found["left_out"]] == [
            f"{number}.v1.jpg" for number in (3, 4, 5)
        ]
    columns, array = table(tmp_path / "parquet"), np.load(tmp_path / "npy/features.npy")
    assert set(columns) == {"key", "features"} and columns["key"].tolist() == [f"{number}.v1.jpg" for number in range(3)]
    assert array.dtype == np.float16 and np.isnan(array[3:]).all() and not (tmp_path / "npy/labels.npy").exists()
    np.testing.assert_array_equal(columns["features"].astype(np.float16), array[:3])
    assert (tmp_path / "npy/keys.txt").read_text().splitlines()[5] == "5.v1.jpg"
    with tarfile.open(tmp_path / "webdataset/part-00001.tar") as tar:
        assert tar.getnames() == ["000000000002.npy", "000000000002.txt"]


def test_bench(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*argv[1:], "encoder=random:vit_tiny_patch16_224", "image_size=32", "--bench"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    ratios = {"ratio", "ratio of processor time", "loading share"}
    assert set(said) == {"extraction", "bare forward", "loading"} | ratios and all(said[name] > 0 for name in said)


def test_refusals(argv: list[str], exported, tmp_path: Path, picture: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    out = f"out={tmp_path}/out"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wrong, message in (
        (["out=null"], "out: has no value; name a new folder"),
        (["kind=cls"], r"kind='cls': takes some of class, mean, patches"),
        (["layer=first"], "layer='first': takes last, or numbers of blocks"),
        (["layer=3"], "layer=3: the encoder has 2 blocks; take 1 to 2, or last"),
        (["data.repeats=2"], "data.repeats: is about training, and here every image is looked at once; leave it out"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([*argv, *([] if wrong[0].startswith("out") else [out]), *wrong])
    with pytest.raises(ConfigError, match=r"^device=cuda: torch sees no GPU here; take device=auto"):
        main([*argv[:-1], "device=cuda", out])
    assert main([*argv, out]) == 0
    with pytest.raises(ConfigError, match=r"out=.*: was begun with other settings: dtype float32 \(now float16\)"):
        main([*argv, out, "dtype=fp16"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files; name a new folder"):
        main([*argv, f"out={tmp_path}/full"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="format=parquet needs pyarrow"):
        require_format("parquet")
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / f"photos/{number}.jpg").write_bytes(picture(number))
    config = build(EmbedConfig, {"encoder": str(exported.folder), "format": "npy", "device": "cpu"}, where="here")
    config = config.model_copy(update={"data": DataConfig(path=str(tmp_path / "photos"), workers=0), "out": tmp_path / "net"})
    embedding, _ = prepare(config, Report(active=False))
    told = {"tell": lambda text: None, "progress": lambda done, total: None, "facts": {}}
    (tmp_path / "photos/2.jpg").unlink()  # as what a server withholds
    with pytest.raises(DataError, match=r"1 of 4 images cannot be had now .*max_bad_fraction=0.01; mend that"):
        embedding.write(**told)
    found = replace(embedding, config=embedding.config.model_copy(update={"max_bad_fraction": 1.0})).write(**told)
    assert found["rows"] == 3
    with torch.no_grad():
        embedding.encoder.vit.norm.weight.mul_(1e6)
    narrow = replace(embedding, output=replace(embedding.output, half=True, folder=tmp_path / "narrow"))
    with pytest.raises(ConfigError, match=r"dtype=fp16: mean reaches [\d,]+, and fp16 ends at 65,504; take fp32"):
        replace(narrow, config=embedding.config.model_copy(update={"max_bad_fraction": 1.0})).write(**told)
    for number in (0, 1, 3):
        (tmp_path / f"photos/{number}.jpg").write_bytes(b"no picture")
    none = replace(embedding, config=DataConfig(max_bad_fraction=1.0), output=replace(narrow.output, folder=tmp_path / "none"))
    with pytest.raises(DataError, match="none of 4 images can be used; see"):
        none.write(**told)


def test_encoders_by_any_name(exported, tmp_path: Path) -> None:
    """An official file ends as an export may, and is told from it by the words that are not beside it; all at any size."""
    official, _, _ = open_encoder("random:vit_tiny_patch16_224", image_size=32)
    save_file({f"model.{name}": tensor for name, tensor in official.state().items()}, tmp_path / "mae.safetensors")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = official.eval()(images).patches
        for size in (None, 48):
            found, facts, section = open_encoder(str(tmp_path / "mae.safetensors"), image_size=size)
            assert found.spec.image_size == ((size or 32),) * 2 == tuple(create(section).spec.image_size)
            assert facts["pooling"] == "mean"
            if size is None:
                torch.testing.assert_close(found.eval()(images).patches, expected)
        found, _, section = open_encoder(str(exported.folder / "export/encoder.safetensors"), image_size=24)
        assert found.spec.image_size == (24, 24) == tuple(create(section).spec.image_size)
