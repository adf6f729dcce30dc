"""``python -m tests.soak --minutes 30``: whether the data engine holds its memory and its descriptors while all goes wrong.

Loader processes read shards from a web server that is busy, stalls and cuts bodies, through a small disk cache, with repeats
and with images that do not decode; beside it a folder of local shards is evaluated again and again. Every half a minute the
memory and the open files of all processes are noted. It fails where the last quarter needs more than the second.
"""

import argparse
import io
import multiprocessing
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from tests.webserver import serving
from vitssl.config import build
from vitssl.data.feed import evaluation_samples, share, training_samples
from vitssl.data.layout import choose_layouts
from vitssl.data.loader import batches
from vitssl.data.sources import open_source
from vitssl.data.stores import Access, http
from vitssl.sections import DataConfig
from vitssl.views import View

VIEW = View((64, 64), scale=(0.2, 1.0), flip=0.5)
FAULTS = ("fine", "fine", "fine", "503", "cut", "says more", "stall inside")
GROWTH = 1.10  # last quarter over second, of medians


def write(folder: Path, *, shards: int, samples: int) -> None:
    """Shards of noisy pictures of many sizes, one in two hundred of them damaged."""
    draw = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"s-{shard:03}.tar", "w") as tar:
            for number in range(samples):
                coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                size = tuple(draw.integers(60, 300, 2).tolist())
                Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
                content = buffer.getvalue() if draw.random() > 0.005 else buffer.getvalue()[:300]
                info = tarfile.TarInfo(f"{shard:03}{number:05}.jpg")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def serve(folder: Path, port: Connection) -> None:
    """A server in a process of its own, for which about every third request goes wrong."""
    draw = random.Random(0)
    with serving(folder) as server:
        port.send(server.url)
        while True:
            time.sleep(0.05)
            with server.lock:
                if len(server.faults.setdefault("", [])) < 5:
                    server.faults[""].append(draw.choice(FAULTS))
                del server.requests[:], server.authorizations[:]


def proportional(pid: int) -> int:
    """Bytes of a process, what it shares with others divided among them: the sum is what all of them take."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def measure(server: int) -> dict[str, int]:
    """Of this process and its children, without the server's."""
    children = map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    found = [os.getpid(), *(child for child in children if child != server)]
    return {
        "processes": len(found),
        "memory": sum(map(proportional, found)),
        "files": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in found),
    }


def soak(folder: Path, *, minutes: float, workers: int) -> int:
    for name in ("far", "near"):
        (folder / name).mkdir()
    write(folder / "far", shards=12, samples=400)
    write(folder / "near", shards=2, samples=200)
    http.HttpStore.__init__.__kwdefaults__.update(wait=0.02, timeout=1.0)
    settings = {"repeats": 2, "memory": 0.01, "lanes": 4, "max_bad_fraction": 1.0}
    config, rows, images, bad = build(DataConfig, settings, where="soak"), [], 0, 0
    end, due = time.monotonic() + 60 * minutes, time.monotonic() + 30
    mine, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(folder / "far", theirs))
    server.start()
    try:
        access = Access(cache=folder / "cache", cache_bytes=20_000_000)
        source, local = open_source(f"{mine.recv()}/s-{{000..011}}.tar", access=access), open_source(folder / "near")
        layouts = choose_layouts(source, config)
        samples = training_samples(source, config, [VIEW], seed=0, layouts=layouts, channels=3, batch_size=64)
        looked_at = evaluation_samples(local, config, [VIEW], channels=3)
        while time.monotonic() < end:
            feed = batches(samples, start=images, stop=None, batch_size=64, micro_batch=64, workers=workers)
            for batch in feed:
                images, bad = images + len(batch), bad + len(batch.bad)
                if time.monotonic() > due:
                    rows.append(measure(server.pid))
                    print(f"{len(rows) / 2:5.1f} min  {images:>10,} images  {bad:>7,} bad  {in_words(rows[-1])}", flush=True)
                    due += 30
                    break  # and start again with new loader processes, from where it stands
            feed.close()
            for _ in share(looked_at, tell=lambda text: None):
                pass
    finally:
        server.kill()
    size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    print(f"disk cache {size / 1e6:.1f} MB of 20")
    return judge(rows, size)


def in_words(row: dict[str, int]) -> str:
    return f"{row['processes']} processes  {row['memory'] / 2**20:7.1f} MiB  {row['files']} open files"


def judge(rows: list[dict[str, int]], cached: int) -> int:
    """0 where the last quarter is like the second (the first warms up)."""
    quarter = max(1, len(rows) // 4)
    early, late = rows[quarter : 2 * quarter] or rows, rows[-quarter:]
    failed = cached > 21_000_000
    for name, factor in (("memory", GROWTH), ("files", GROWTH), ("processes", 1.0)):
        before, after = (statistics.median(row[name] for row in part) for part in (early, late))
        worse = after > factor * before
        failed = failed or worse
        print(f"{name}: {before:,.0f} in the second quarter, {after:,.0f} in the last{', GROWS' if worse else ''}")
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["VITSSL_CACHE"] = f"{temporary}/index"
        sys.exit(soak(Path(temporary), minutes=arguments.minutes, workers=arguments.workers))
