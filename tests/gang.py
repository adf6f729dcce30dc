"""Real processes for tests: a few that stay, joined by gloo, and compute what they are sent.

They start once for the whole suite, from a server that has imported torch, and know functions by the names of their modules.
"""

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "vitssl.objectives.mixture"])


class Gang:
    """``num`` processes of one gloo group. Call it with a function of a module and its arguments: [answer of each]."""

    def __init__(self, num: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.num, pipes = num, [_CONTEXT.Pipe() for _ in range(num)]
        self._ends = [ours for ours, _ in pipes]
        self._members = [
            _CONTEXT.Process(target=_serve, args=(theirs, rank, num, port), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for member in self._members:
            member.start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for end in self._ends:
            end.send((function, arguments))
        answers = [end.recv() if end.poll(120) else "no answer in two minutes" for end in self._ends]
        for answer in answers:
            assert not isinstance(answer, str), answer
        return [answer for (answer,) in answers]

    def close(self) -> None:
        for member in self._members:
            member.kill()


def _serve(end: Any, rank: int, num: int, port: int) -> None:
    import torch
    import torch.distributed as td

    torch.set_num_threads(1)
    td.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num, timeout=timedelta(seconds=60)
    )
    while True:
        function, arguments = end.recv()
        try:
            answer = (_plain(function(*arguments)),)
        except Exception:
            answer = traceback.format_exc()
        end.send(answer)


def _plain(value: Any) -> Any:
    """Tensors as arrays: to share their memory, processes would have to keep files open."""
    if isinstance(value, Tensor):
        return value.detach().numpy()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
