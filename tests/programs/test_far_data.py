"""Training on shards that lie on a web server: the same run as from a disk, also when the server fails for a while."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import refused
from webserver import serving

from vitssl.data import ledger

QUICK = "from vitssl.data.stores import http; http.HttpStore.__init__.__kwdefaults__.update(tries=2, wait=0.01)"
SETTINGS = [
    "heldout.every=100",
    "data.ledger=true",
    "checkpoint.every=5",
    "checkpoint.keep_last=9",
    "data.max_bad_fraction=0.5",
]


def far(url: str) -> list[str]:
    return [f"data.path={url}/train-{{0..2}}.tar", "data.split=null"]


@pytest.mark.parametrize(("processes", "workers", "status"), [(1, 0, 403), (1, 2, 503), (2, 1, 404)])
def test_a_server_that_fails_for_a_while(
    pretrain: Callable, data: Path, tmp_path: Path, processes: int, workers: int, status: int
) -> None:
    """One shard is not to be had from step 9 on. Killed after step 15, the run goes on with a server that is well: what was
    decided is followed, and the end is that of a run that was never stopped."""
    options = {"processes": processes, "trap": QUICK}
    with serving(data) as server:
        pretrain(tmp_path / "well", *far(server.url), *SETTINGS, f"data.workers={workers}", **options).ok()
        server.faults = {"train-1.tar": [f"always {status}"]}
        ill = pretrain(tmp_path / "ill", *far(server.url), *SETTINGS, f"data.workers={workers}", **options).ok()
        rows = ill.rows("quarantine.jsonl")
        assert len(rows) >= 40 and all(row["passing"] and f"status {status}" in row["reason"] for row in rows)
        server.faults = {}
        for step in (10, 15, 20):
            for path in (ill.folder / f"checkpoints/step_{step:08}").iterdir():
                path.unlink()
            (ill.folder / f"checkpoints/step_{step:08}").rmdir()
        losses = ill.losses()
        again = pretrain(tmp_path / "ill", *far(server.url), *SETTINGS, "data.workers=1", **options).ok()
        assert "from step 5" in again.out and again.losses() == losses
        assert [row | {"step": 0} for row in again.rows("quarantine.jsonl")] == [row | {"step": 0} for row in rows]
        other = pretrain(
            tmp_path / "other", *far(server.url), *SETTINGS, f"data.quarantine={ill.folder}/quarantine.jsonl", trap=QUICK
        )
        assert other.ok().losses() == pytest.approx(losses, rel=1e-5)


def test_machines_that_know_different_things(pretrain: Callable, data: Path, tmp_path: Path) -> None:
    """Of shards that are only counted chunks are cut by a guess: all processes follow the first one's."""
    guess = "import os; from vitssl.data.sources import shards; shards.default_chunk = lambda *_: 3 + int(os.environ['RANK'])"
    with serving(data) as server:
        run = pretrain(tmp_path / "run", *far(server.url), "data.ledger=true", processes=2, trap=f"{QUICK}; {guess}").ok()
    keys = [key for position, key in ledger.read(run.folder / "ledger") if position < 60]
    assert len(keys) == len(set(keys)) == 60
    assert json.loads((run.folder / "plan.json").read_text())["layouts"] == [[1, 1024, 3]]


def test_secrets_in_a_config(pretrain: Callable, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", "data.path=s3://bucket/a.tar", "data.storage={aws_secret_access_key: hush}")
    refused(run, "data.storage.aws_secret_access_key", "no place for secrets")
    assert "hush" not in run.err


def test_signed_urls(pretrain: Callable, data: Path, tmp_path: Path) -> None:
    """A signature is written nowhere, what was made under it counts for the next one, and the next one is no other run."""
    env, secret = {"VITSSL_CACHE": str(tmp_path / "cache")}, "hush"
    (tmp_path / "web").mkdir()
    for path in data.glob("*.tar"):
        shutil.copy(path, tmp_path / "web")

    def argv(signature: str) -> list[str]:
        return [f"data.path={server.url}/train-{{0..2}}.tar?sig={signature}&v=1", "data.split=null", *SETTINGS]

    with serving(tmp_path / "web") as server:
        run = pretrain(tmp_path / "run", *argv(secret), "length=10", env=env).ok()
        for path in (path for path in tmp_path.rglob("*") if path.is_file()):
            assert secret.encode() not in path.read_bytes(), path
        assert secret not in run.out + run.err and "train-{0..2}.tar?v=1" in (run.folder / "config.yaml").read_text()
        server.requests.clear()
        again = pretrain(tmp_path / "run", *argv("another"), "length=20", env=env).ok()
        assert "from step 10" in again.out and len(again.losses()) == 20
        assert all(said for path, said in server.requests if path.endswith(".tar")), "nothing is indexed again"
        bad = pretrain(tmp_path / "bad", *argv(f"{secret}-{{0..2"), env=env)
        refused(bad, "braces do not match", "write ranges")
        assert secret not in bad.err


def test_a_server_that_is_not_there(pretrain: Callable, tmp_path: Path) -> None:
    run = pretrain(tmp_path / "run", *far("http://127.0.0.1:9"), trap=QUICK)
    refused(run, "http://127.0.0.1:9/", "cannot be reached", "look at the network and the server")


def test_a_budget(pretrain: Callable, data: Path, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    for path in data.glob("*.tar"):
        shutil.copy(path, tmp_path / "web")  # without what indexing left beside them
    with serving(tmp_path / "web") as server:
        argv = [*far(server.url), "data.index_budget=1e-6"]
        run = pretrain(tmp_path / "run", *argv, env={"VITSSL_CACHE": str(tmp_path / "cache")})
        refused(run, "3 shards have no index yet", "data.index_budget is 1e-06 GB", "vitssl index")
        run = pretrain(tmp_path / "run", *far(server.url), "length=2", env={"VITSSL_CACHE": str(tmp_path / "cache")}).ok()
        assert "indexing reads 0.00 GB of remote shards, this once" in run.out
