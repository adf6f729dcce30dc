"""A process that has imported the programs once and forks itself for every run a test asks for.

So each run in these tests is a real process (signals, exit codes, process groups) without the five seconds of imports. It reads
one JSON request a line: ``{"start": {...}}`` -> ``{"pid": n}``, ``{"wait": pid, "timeout": s}`` -> ``{"code": n | null}``.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback


def serve() -> None:
    for module in (
        "pretrain.run",
        "finetune.run",
        "finetune.judging",
        "finetune.embedding",
        "torchvision.transforms",
        "timm.data",
    ):
        importlib.import_module(module)
    reply({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            reply({"pid": start(**request["start"])})
        else:
            reply({"code": wait(request["wait"], request["timeout"])})


def reply(answer: dict) -> None:
    print(json.dumps(answer), flush=True)


def start(program: str, argv: list[str], env: dict[str, str], cwd: str, out: str, err: str, trap: str | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(cwd)
        os.environ.update(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test suite in the background has it ignored
        for number, (path, mode) in enumerate([(os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (err, os.O_WRONLY)]):
            os.dup2(os.open(path, mode | os.O_CREAT | os.O_APPEND), number)
        sys.argv = [f"{program}/__main__.py", *argv]
        if trap:
            exec(trap, {})
        from vitssl import report

        report.PATIENCE = 0.0
        module = program if "." in program else f"{program}.__main__"
        code = report.program(importlib.import_module(module).main, argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, timeout: float) -> int | None:
    """The exit code, negative for a signal; None where the process still runs after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.01)


if __name__ == "__main__":
    serve()
