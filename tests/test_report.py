"""What a person reads: plain lines or a redrawn one on a real terminal, files, trackers, and errors as one line."""

import errno
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from vitssl import report as module
from vitssl.errors import CheckpointError, ConfigError, DataError, TrainingError, UserError
from vitssl.report import Report, duration, program

ROOT = Path(__file__).parents[1]
LINE = "step 50/1,880  eta 4m10s  loss 0.4821  grad 0.0533  lr 0.0015  1,234 images/s  wait 13% [b]x[/b]"
RUN = f"""
import time
from vitssl.errors import DataError
from vitssl.report import Report, program
def main(argv):
    report = Report()
    report.progress(1, 3, {LINE!r})
    report.progress(2, 3, {LINE!r}.replace("50", "51"))
    report.say("something happened")
    raise KIND("the [bold]disk[/bold] is gone")
raise SystemExit(program(main, []))
"""


FIXABLE = RUN.replace("KIND", "DataError")


def on_terminal(code: str, *, columns: int) -> tuple[str, int]:
    """Everything a program writes to a real terminal of this width, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm"}
    )
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 65536):
            written += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return written.decode(), process.wait()


@pytest.mark.parametrize("columns, bar", [(80, False), (160, True)])
def test_a_terminal_shows_one_redrawn_line(columns: int, bar: bool):
    written, code = on_terminal(FIXABLE, columns=columns)
    assert code == 2
    assert ("━" in re.sub(r"\x1b\[2K.*?\x1b\[2K", "", written, count=1)) == bar
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "wait 13% [b]x[/b]" in shown.replace("\r\n", " ").replace("  ", " ")  # whole, also on a narrow terminal
    assert "\x1b[2K" in written  # redrawn in place
    assert written.index("something happened") < written.rindex("step 51")  # said above the line, which goes on below
    assert written.rindex("\x1b[?25h") < written.index("error: ")  # the line is left, the cursor back, before the error
    assert shown.rstrip().splitlines()[-1] == "error: the [bold]disk[/bold] is gone"


def test_long_lines_are_folded_between_words_and_commands_stay_whole():
    words = " ".join(["one two three four five six seven eight nine ten"] * 4)
    command = "python -m pretrain " + "x" * 100
    code = f"from vitssl.report import Report; report = Report(); words = {words!r}\n"
    code += f"report.pairs('t', [('name', words), ('next', {command!r})])\nreport.say(words)"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_terminal(code, columns=60)[0]).replace("\r", "").split("\n")
    assert shown[0] == "t" and shown[1].startswith("  name  one two") and f"  next  {command}" in shown
    rows, said = shown[1 : shown.index(f"  next  {command}")], shown[shown.index(f"  next  {command}") + 1 :]
    assert len(rows) > 3 and all(line.startswith(" " * 8) for line in rows[1:]) and max(map(len, rows + said)) <= 60
    assert " ".join(rows).split() == ["name", *words.split()] and " ".join(said).split() == words.split()


def test_a_trace_stands_below_the_line_too():
    written, code = on_terminal(RUN.replace("KIND", "ValueError"), columns=80)
    assert code == 1
    assert written.rindex("\x1b[?25h") < written.index("Traceback")


def test_elsewhere_lines_are_plain():
    done = subprocess.run([sys.executable, "-c", FIXABLE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.splitlines() == [LINE, LINE.replace("50", "51"), "something happened"]
    assert done.stderr == "error: the [bold]disk[/bold] is gone\n"


def test_a_run_keeps_what_was_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    report = Report(tmp_path)
    report.say("a [red]line[/red]", style="yellow")
    report.pairs("title", [("a", "1"), ("long", "2")])
    report.progress(1, 2, "step 1/2")
    text = "a [red]line[/red]\ntitle\n  a     1\n  long  2\nstep 1/2\n"
    assert (tmp_path / "log.txt").read_text() == capsys.readouterr().out == text
    report.rows("metrics.jsonl", [{"step": 1, "loss": 0.5}, {"step": 2}])
    report.rows("metrics.jsonl", [])
    report.rows("metrics.jsonl", iter([{"step": 3}]))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2}, {"step": 3}]


def test_nothing_is_written_where_there_is_no_run_yet(tmp_path: Path):
    Report(tmp_path / "later").say("early")
    assert list(tmp_path.iterdir()) == []


class Tracker:
    def __init__(self, name: str):
        self.name, self.seen = name, []

    def log(self, values, step):
        self.seen.append((values, step))


class Painter(Tracker):
    def log_images(self, values, step, **options):
        self.seen.append((values, step, options))


def test_trackers_get_numbers_and_those_that_can_pictures():
    report, plain, board, other = Report(), Tracker("csv"), Painter("tensorboard"), Painter("wandb")
    report.trackers = [plain, board, other]
    report.scalars({"loss": 1.0}, 3)
    report.images("sheets", "pixels", 4)
    assert plain.seen == [({"loss": 1.0}, 3)]
    assert board.seen[1:] == [({"sheets": "pixels"}, 4, {"dataformats": "NHWC"})]
    assert other.seen[1:] == [({"sheets": "pixels"}, 4, {})]


def test_other_processes_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture):
    report, tracker = Report(tmp_path, active=False), Painter("tensorboard")
    report.trackers = [tracker]
    report.say("x")
    report.pairs("x", [("a", "b")])
    report.progress(1, 2, "x")
    report.rows("x.jsonl", [{}])
    report.scalars({}, 1)
    report.images("x", None, 1)
    report.waiting("x")(1, 2)
    assert (capsys.readouterr().out, list(tmp_path.iterdir()), tracker.seen) == ("", [], [])


def test_waiting_tells_each_tenth_once(capsys: pytest.CaptureFixture):
    tell = Report().waiting("indexing")
    for done in range(201):
        tell(done, 200)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"indexing {done}/200" for done in range(0, 201, 20)]


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, CheckpointError, TrainingError])
def test_what_a_user_can_fix_is_one_line_and_2(kind: type[UserError], capsys: pytest.CaptureFixture):
    def main(argv):
        raise kind(f"{argv[0]}: is wrong; " + "long " * 40 + "end")

    assert program(main, ["key=1"]) == 2
    assert capsys.readouterr().err == "error: key=1: is wrong; " + "long " * 40 + "end\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name, where", [("/runs/x/log.txt", "/runs/x/log.txt"), (None, "the run's folder")])
def test_a_full_disk_is_one_line_too(number: int, name: str | None, where: str, capsys: pytest.CaptureFixture):
    def main(argv):
        raise OSError(number, os.strerror(number), name)

    assert program(main, []) == 2
    assert capsys.readouterr().err.startswith(f"error: no space left on the device while writing {where}; free some and run")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EEXIST])
def test_a_path_that_cannot_be_used_is_named(number: int, capsys: pytest.CaptureFixture):
    def main(argv):
        raise OSError(number, os.strerror(number), "/some/where")

    assert program(main, []) == 2
    assert capsys.readouterr().err.startswith(f"error: /some/where: {os.strerror(number)}; name a path that can be used")


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EACCES, "no"), AssertionError("ours")])
def test_everything_else_shows_its_trace(error: Exception):
    def main(argv):
        raise error

    with pytest.raises(type(error)) as caught:
        program(main, [])
    assert caught.value is error


@pytest.mark.parametrize("result, code", [(None, 0), (0, 0), (3, 3)])
def test_a_program_returns_its_exit_code(result: int | None, code: int):
    assert program(lambda argv: result, []) == code


def test_interrupted(capsys: pytest.CaptureFixture):
    def main(argv):
        raise KeyboardInterrupt

    assert program(main, []) == 130
    assert capsys.readouterr().err.startswith("interrupted: the same command goes on")


def test_other_processes_leave_the_first_one_time_to_say_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")

    def main(argv):
        raise DataError("my share is damaged")

    assert program(main, []) == 2
    assert waited == [module.PATIENCE] and "process 3: my share is damaged\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (75, "1m15s"),
        (3599.7, "1h00m"),
        (7320, "2h02m"),
        (86_399, "23h59m"),
        (90_000, "1d01h"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text
