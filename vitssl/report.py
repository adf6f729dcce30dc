"""Everything a person reads: the console line, log.txt, metrics.jsonl, trackers, and errors as one line.

The only module that prints. On a terminal one line at the bottom is redrawn; elsewhere each report is a plain line. torch is
not imported here: tensors reach this file as numbers.
"""

import errno
import json
import math
import os
import sys
import textwrap
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from vitssl.errors import UserError

_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
PATIENCE = 3.0  # seconds that a later process waits for its launcher to end it before it tells its error
KEPT = 1000  # rows of each file, to look back at
WIDE = 120  # columns of a terminal that has room for a bar beside the text

_bars: list[Progress] = []  # on the screen now; stopped before an error is shown below them


class Report:
    """One per process; only the main process's is ``active``, the others swallow what they are given.

    ``trackers`` are Accelerate's: anything with ``log(values, step=)`` and, where it can, ``log_images``.
    """

    def __init__(self, folder: Path | None = None, *, active: bool = True) -> None:
        self.active, self.folder, self.trackers = active, folder, []
        self.console = Console(highlight=False, soft_wrap=True, quiet=not active)
        self._bar: Progress | None = None
        self._row = None
        self.recent: dict[str, deque[dict[str, Any]]] = defaultdict(lambda: deque(maxlen=KEPT))

    def say(self, text: str = "", *, style: str | None = None) -> None:
        """A line for the person, kept in log.txt."""
        if not self.active:
            return
        self.console.print(Text(self._folded(text), style=style or ""))
        self._append("log.txt", text)

    def pairs(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """A two-column table under a title, kept in log.txt."""
        if not self.active:
            return
        rows = list(rows)
        width = max((len(name) for name, _ in rows), default=0)
        self.console.print(Text(title, style="bold"))
        for name, value in rows:
            self.console.print(Text.assemble((f"  {name:<{width}}  ", "dim"), self._folded(value, indent=width + 4)))
        self._append("log.txt", "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]))

    def progress(self, done: int, total: int, text: str) -> None:
        """The state of the work: one redrawn line with a bar on a terminal, a plain line elsewhere."""
        if not self.active:
            return
        self._append("log.txt", text)
        if not self.console.is_terminal:
            self.console.print(Text(text))
            return
        if self._bar is None:
            words = TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold"))
            columns = [BarColumn(bar_width=16)] if self.console.width >= WIDE else []
            self._bar = Progress(*columns, words, console=self.console)
            self._bar.start()
            _bars.append(self._bar)
            self._row = self._bar.add_task("", total=total)
        self._bar.update(self._row, completed=done, total=total, description=text)

    def waiting(self, what: str) -> Callable[..., None]:
        """A ``progress(done, total)`` callback for work before the run; on plain output one line each tenth.

        ``note=...`` is said once, before it goes on.
        """
        told = [-1]

        def tell(done: int, total: int, *, note: str = "") -> None:
            if note:
                self.say(note)
            tenth = 10 * done // max(1, total)
            if self.active and (self.console.is_terminal or tenth > told[0]):
                told[0] = tenth
                self.progress(done, total, f"{what} {done:,}/{total:,}")
            if done >= total:
                self.rest()

        return tell

    def rest(self) -> None:
        """Leave the progress line as it stands and go on below it."""
        if self._bar is not None:
            _bars.remove(self._bar)
            self._bar.stop()
            self._bar = None

    def rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to ``name`` (a .jsonl file of the run); a number that is none is written as null, as JSON has it.

        The newest are kept in ``recent``, on every process.
        """
        rows = list(rows)
        self.recent[name].extend(rows)
        if self.active and (lines := [json.dumps(_strict(row), allow_nan=False) for row in rows]):
            self._append(name, "\n".join(lines))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers for the trackers."""
        for tracker in self.trackers if self.active else ():
            tracker.log(values, step=step)

    def images(self, name: str, pictures: Any, step: int) -> None:
        """[n, height, width, 3] uint8 pictures for every tracker that can show them."""
        for tracker in self.trackers if self.active else ():
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pictures}, step=step, **layout)

    def _folded(self, text: str, *, indent: int = 0) -> str:
        """Text for a terminal, folded between words; a command stays whole, to be copied."""
        room = self.console.width - indent
        if not self.console.is_terminal or room < 20 or len(text) <= room or "-m " in text:
            return text
        return textwrap.fill(
            text, room + indent, initial_indent=" " * indent, subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False,
        )[indent:]  # fmt: skip

    def _append(self, name: str, text: str) -> None:
        if self.folder is not None and self.folder.exists():
            with open(self.folder / name, "a") as file:
                file.write(text + "\n")


def program(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a program: what a user can fix is one line on stderr and exit code 2; anything else is ours and shows its trace."""
    # Threads that wait for their team spin for some microseconds, then sleep. libgomp's own default spins for long: beside
    # loader processes on few cores a spinning thread holds the core its team waits for, and a step takes up to nine times as
    # long; sleeping at once costs a third on small models. OpenMP reads this when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    try:
        return main(argv) or 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where, what = error.filename or "the run's folder", "no space left on the device"
            what = error.strerror.lower() if error.errno == errno.EFBIG else what
            message = f"{what} while writing {where}; free some and run the same command to go on"
        elif error.errno in _UNUSABLE and error.filename:
            message = f"{error.filename}: {error.strerror}; name a path that can be used, or mend its permissions"
        else:
            raise
    except KeyboardInterrupt:
        _tell("interrupted", "the same command goes on from the last checkpoint, if one was written")
        return 130
    finally:
        _leave_bars()
    return _refuse(message)  # here the error is gone, and with it the frames that held loaders and their processes


def _refuse(message: str) -> int:
    process = int(os.environ.get("RANK", 0))
    if process:  # what the first process says too is read once: its launcher ends this one meanwhile
        time.sleep(PATIENCE)
    _tell("error" if not process else f"error in process {process}", message)
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_available() and distributed.is_initialized():
        # Processes that met an error leave a group that is still open. Taking an interpreter down beside the group's threads
        # ends one time in ten in an abort, whose code would hide ours.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
    return 2


def _strict(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}


def _leave_bars() -> None:
    while _bars:
        _bars.pop().stop()


def _tell(kind: str, message: str) -> None:
    _leave_bars()
    sys.stdout.flush()
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble((f"{kind}: ", "bold red"), message))


def show(text: str) -> None:
    """Plain text for a person outside any run, such as ``--help``."""
    Console(highlight=False, soft_wrap=True).print(Text(text))


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``; hours and days for longer ones."""
    seconds = round(seconds)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"
