"""What a command of the shell prints: ``pipe:gsutil cat gs://...``, webdataset's way. Only for users who switched it on."""

import subprocess
from typing import BinaryIO

from vitssl.data.stores.base import NoRanges, Passing, Stat, shown
from vitssl.errors import ConfigError


class PipeStore:
    """The output of a command, which is run once for all of it."""

    def stat(self, url: str) -> Stat:
        """Unknown before it has run."""
        return Stat(-1, "", ranges=False)

    def read(self, url: str, offset: int, length: int, *, size: int | None = None) -> bytes:
        """A pipe has no parts."""
        raise NoRanges(f"{shown(url)}: has no parts")

    def fetch(self, url: str, file: BinaryIO, *, size: int | None = None) -> None:
        """Run it; how much it prints is its own affair. Raises Passing with what it said where it fails."""
        command = url.partition(":")[2]
        run = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        if run.returncode:
            said = run.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
            raise Passing(f"{shown(url)}: the command failed with code {run.returncode} ({said}); try it in a shell")

    def find(self, pattern: str) -> list[str]:
        """A command cannot be listed."""
        raise ConfigError(
            f"{shown(pattern)!r}: a command cannot be a folder or a glob; write one for each shard, or a range in braces"
        )
