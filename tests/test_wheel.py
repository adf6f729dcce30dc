"""The wheel holds the library alone: programs, configs and tests stay in the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "data", "*.egg-info", "build", "dist", "__pycache__")


def test_the_only_top_level_package_is_vitssl(tmp_path: Path):
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed here")
    copy, out = tmp_path / "checkout", tmp_path / "out"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    shutil.copytree(ROOT / "vitssl" / "data", copy / "vitssl" / "data", ignore=shutil.ignore_patterns("__pycache__"))
    out.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, f"setuptools {setuptools.__version__}: {done.stderr[-2000:]}"
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"vitssl", f"{wheel.name.split('-py3')[0]}.dist-info"}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "vitssl").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == ours
