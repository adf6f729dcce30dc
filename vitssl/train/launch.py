"""Launch: from ``launch:`` in the config to a process group, an engine around the task, and one way to step it.

The only file that knows Accelerate and DeepSpeed. ``python -m``, ``torchrun -m`` and ``accelerate launch -m`` all arrive here:
the launcher says how many processes there are, our config says which engine; where the two disagree the run is refused.
"""

import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DeepSpeedPlugin, LoggerType, ProjectConfiguration
from torch import Tensor

from vitssl import dist, draws
from vitssl.errors import ConfigError
from vitssl.models.adapters.timm_vit import fuse_attention
from vitssl.schedule import Clock
from vitssl.sections import LaunchConfig, OptimConfig
from vitssl.task import Batch, Task
from vitssl.train.optim import MOMENTS, build_optimizer, clip_each, clip_modules
from vitssl.train.waiting import Waiting
from vitssl.views import purpose

# Deprecated in torch 2.15 for a name that older versions lack; Accelerate passes it on.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def choose_precision(config: LaunchConfig, device: str) -> str:
    """``auto`` is bf16 where the hardware multiplies bf16 (GPU, or CPU with AVX512-BF16 or AMX), else fp32."""
    if config.precision == "fp16" and device == "cpu":
        raise ConfigError(
            "launch.precision=fp16 needs a GPU: its loss scaling does not exist on the CPU; take bf16 or fp32, or"
            " launch.device=cuda"
        )
    if config.precision != "auto":
        return config.precision
    if device == "cuda":
        absent = not torch.cuda.is_available()
        return "bf16" if absent or torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def fuses_attention(device: str, precision: str) -> bool:
    """Whether torch's fused attention is used: its bf16 backward on a CPU takes 2 to 8 times as long (torch 2.15)."""
    return not (device == "cpu" and precision == "bf16")


class _Plugin(DeepSpeedPlugin):
    """Accelerate's plugin without its message to transformers, which would have to be installed for it."""

    def set_deepspeed_weakref(self) -> None:
        """Nobody here listens."""


class Engine:
    """A task, its optimiser and the processes that train it.

    ``kind`` is what really runs: ``single``, ``ddp`` or ``deepspeed``. Nothing but :meth:`forward`, :meth:`backward` and
    :meth:`step` touches the wrapped module.
    """

    def __init__(
        self,
        config: LaunchConfig,
        *,
        micro_batch: int,
        accumulation: int,
        clip: float | None,
        clip_by: Literal["global", "module", "parameter"] = "global",
        trackers: list[str],
        folder: Path,
    ) -> None:
        self.config, self.accumulation, self.clip, self.clip_by = config, accumulation, clip, clip_by
        device = dist.device_here(config.device, "launch.device=")
        self.precision = choose_precision(config, device)
        _refuse_conflicts(config, device, self.precision)
        zero = config.engine.startswith("zero")
        if zero:
            _prepare_deepspeed(device)
        options: dict[str, Any] = {
            "gradient_accumulation_steps": accumulation,
            "mixed_precision": "no" if zero or self.precision == "fp32" else self.precision,
            "log_with": _available(trackers) or None,
            "project_config": ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
        }
        if zero:
            stage = int(config.engine[-1])
            options["deepspeed_plugin"] = _Plugin(hf_ds_config=self._zero_config(stage, micro_batch))
        elif device == "cpu":
            options["cpu"] = True
        # evaluation may give processes unequal numbers of batches, so a forward must not broadcast buffers
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        if device == "cpu" and "LOCAL_RANK" in os.environ:
            options["kwargs_handlers"].append(InitProcessGroupKwargs(backend="gloo"))
        try:
            self.accelerator = Accelerator(**options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"launch: {str(error).splitlines()[0]}") from error
        self.device = self.accelerator.device
        self.kind = {"NO": "single", "DEEPSPEED": "deepspeed"}.get(self.accelerator.distributed_type.name, "ddp")

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser below Accelerate's and DeepSpeed's."""
        return self.wrapped.optimizer.optimizer if self.kind == "deepspeed" else self.optimizer.optimizer

    def prepare(self, task: Task, config: OptimConfig, *, lr: float, waits: Mapping[str, int] | None = None) -> None:
        """Switch on what ``launch:`` asks for, build the optimiser and wrap the task; from here on only the engine calls it.

        ``waits``: for how many steps at the beginning of the run the parameters of a rule keep their values.
        """
        for part in task.modules():
            if hasattr(part, "checkpointing"):
                part.checkpointing = self.config.checkpointing
            if self.config.compile and hasattr(part, "compile_blocks"):
                part.compile_blocks()
        if not fuses_attention(self.device.type, self.precision):
            fuse_attention(task, False)
        self.task, self.moments = task.to(self.device), MOMENTS[config.name]
        optimizer = build_optimizer(task, config, lr=lr, device=self.device, waits=waits)
        self.waiting = Waiting(optimizer)
        self.wrapped, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.named_parameters = {name: p for name, p in task.named_parameters() if p.requires_grad}

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients meet across processes only in the ``last``."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        quiet = nullcontext() if last or self.kind != "ddp" else self.accelerator.no_sync(self.wrapped)
        with quiet:
            yield

    def forward(self, batch: Batch | None, clock: Clock, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        """The task's own forward, through the wrapper and its autocast."""
        return self.wrapped(None if batch is None else batch.to(self.device), clock, **options)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of loss / accumulation; under DeepSpeed the last micro-batch also steps."""
        self.accelerator.backward(loss)

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies losses by before the backward pass."""
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

    def step(self, *, want_norm: bool) -> Tensor | float | None:
        """Clip, move the parameters, clear the gradients. Returns the global gradient norm before clipping if known."""
        if self.kind == "deepspeed":
            self.waiting.end_step(self.torch_optimizer)
            return self.wrapped.get_global_grad_norm()
        norm = None
        if self.clip is not None or want_norm:
            self.accelerator.unscale_gradients()
            parameters = {name: p for name, p in self.named_parameters.items() if p.grad is not None}
            gradients = {name: p.grad for name, p in parameters.items()}
            norm = torch.nn.utils.get_total_norm(gradients.values())
            if self.clip is not None and self.clip_by == "parameter":
                clip_each(list(gradients.values()), self.clip)
            elif self.clip is not None and self.clip_by == "module":
                clip_modules(gradients, self.clip)
            elif self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.clip, norm)
        self.optimizer.step()
        self.waiting.end_step(self.torch_optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def seed_step(self, clock: Clock, *parts: int) -> None:
        """Seed dropout, drop path and mixup by (seed, step, process) and ``parts``: exact on resume, and to be repeated."""
        torch.manual_seed(draws.fold(clock.seed, purpose("step"), clock.step, self.accelerator.process_index, *parts))

    def trackers(self, settings: dict[str, Any], *, step: int) -> list[Any]:
        """Start Accelerate's trackers, show them the settings, hand them over; TensorBoard forgets what follows ``step``."""
        if not self.accelerator.log_with:
            return []
        self.accelerator.init_trackers("vitssl", init_kwargs={"tensorboard": {"purge_step": step + 1}} if step else {})
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard" and self.main:
                text = "\n".join(f"    {key}: {value}" for key, value in settings.items())
                tracker.tracker.add_text("config", text, 0)
            elif self.main:
                tracker.store_init_configuration(settings)
        return self.accelerator.trackers

    def end(self, *, leave: bool = True) -> None:
        """Close trackers, and the process group unless this process has another run before it (``leave=False``)."""
        if leave:
            self.accelerator.end_training()
            return
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()
        AcceleratorState._reset_state()  # it refuses a second DeepSpeed configuration; the process group stays

    def _zero_config(self, stage: int, micro_batch: int) -> dict[str, Any]:
        """DeepSpeed's settings, each written out: its own defaults clip at 1.0 and turn teachers into bf16."""
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip or 0.0,
            "zero_optimization": {"stage": stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": self.precision != "fp32", "dtype": _AUTOCAST.get(self.precision, "bfloat16")},
            "steps_per_print": 2**31 - 1,
            "wall_clock_breakdown": False,
        }


def _available(trackers: list[str]) -> list[str]:
    """The trackers as they are, if all of them are there; Accelerate itself would leave out a missing one in silence."""
    known = [str(tracker.value) for tracker in LoggerType if tracker.value != "all"]
    installed = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for name in trackers:
        if name not in known:
            raise ConfigError(f"log.trackers: {name!r} is none of {', '.join(known)}")
        if name not in installed:
            raise ConfigError(f"log.trackers: {name} is not installed; pip install {name}, or take it out")
    return trackers


def _refuse_conflicts(config: LaunchConfig, device: str, precision: str) -> None:
    if config.engine.startswith("zero") and precision == "fp16":
        raise ConfigError(
            f"launch.precision=fp16 with launch.engine={config.engine}: DeepSpeed's loss scale would start anew at every"
            " continuation; take bf16, or launch.engine=ddp"
        )
    if config.engine.startswith("zero") and device == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            f"launch.device=cpu with launch.engine={config.engine}: DeepSpeed takes the GPU it sees; hide it with"
            " CUDA_VISIBLE_DEVICES= before the command, or take launch.engine=ddp"
        )

    def on(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("1", "true")

    if on("ACCELERATE_USE_DEEPSPEED") and not config.engine.startswith("zero"):
        raise ConfigError(f"accelerate launch asks for DeepSpeed but launch.engine={config.engine}; take launch.engine=zero2")
    if on("ACCELERATE_USE_FSDP"):
        raise ConfigError(f"accelerate launch asks for FSDP but launch.engine={config.engine}; launch without it")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise ConfigError(f"accelerate launch asks for {asked} but the run is {precision}; take launch.precision={asked}")


def _prepare_deepspeed(device: str) -> None:
    """What DeepSpeed reads from the environment before it is imported; one process gets a group of its own."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if "LOCAL_RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise ConfigError("launch.engine=zero* needs DeepSpeed: pip install deepspeed, or take launch.engine=ddp") from None
