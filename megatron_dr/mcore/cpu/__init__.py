"""Run Megatron-Core and its training loop on a machine without a GPU: laptops, tests, CI.

`enable()` replaces the names through which Megatron assumes a CUDA device. The collectives (gloo),
the pipeline schedules, DDP, the optimizers and the checkpoints are Megatron's own and run for real.
It is explicit: only `enable()` switches it on (`--dr-device cpu`, or MEGATRON_DR_DEVICE=cpu).

Each replacement says who calls the name and, where the failure is silent, what goes wrong without.
"""

import argparse
import collections
import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dr.config import yaml_file
from megatron_dr.mcore.cpu import checkpoint

ENVIRONMENT_VARIABLE = "MEGATRON_DR_DEVICE"

# Megatron's flags that a machine without Transformer Engine, apex and CUDA needs.
CPU_FLAGS = tuple(
    """
    --transformer-impl local --distributed-backend gloo --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --attention-backend unfused
    --no-create-attention-mask-in-dataloader --num-workers 0 --rerun-mode disabled
    """.split()
)

_enabled = False


def is_enabled() -> bool:
    """Whether `enable()` ran in this process."""
    return _enabled


def enable_if_asked() -> None:
    """`enable()` if the command line, its --dr-config or the environment variable says cpu.

    Megatron's flags for the CPU are put first on the command line, so that the user's own win.
    """
    if (device(sys.argv[1:]) or os.environ.get(ENVIRONMENT_VARIABLE)) != "cpu":
        return
    enable()
    if tuple(sys.argv[1 : len(CPU_FLAGS) + 1]) != CPU_FLAGS:
        sys.argv[1:1] = CPU_FLAGS


def device(argv: Sequence[str]) -> str | None:
    """What a command line, or the file that it names, says before Megatron's parser reads it.

    What is wrong with the file is said where the whole of it is read (mcore/loop/config_file.py).
    """
    given, file = _given(argv, "--dr-device"), config_file(argv)
    if given is None and file is not None:
        with contextlib.suppress(ValueError):
            given = yaml_file.plain(yaml_file.read(Path(file))).get("device")
    return given


def config_file(argv: Sequence[str]) -> str | None:
    """The file of --dr-config on a command line."""
    return _given(argv, "--dr-config")


def _given(argv: Sequence[str], flag: str) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value", nargs="?")  # without a value: Megatron's parser says it
    found: str | None = parser.parse_known_args(argv)[0].value
    return found


def enable() -> None:
    """Replace Megatron's CUDA assumptions by the CPU; call it before Megatron is used. Idempotent.

    It sets TORCHDYNAMO_DISABLE=1: torch.compile asks the CUDA runtime for a stream.
    """
    global _enabled
    if _enabled:
        return
    _enabled = True
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # validate_args asks for it beside tensor or context parallelism; nothing reads it here
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch._dynamo.config.disable = True
    _replace_device()
    _replace_streams()
    _replace_factories()
    _replace_process_groups()
    _replace_random_state()
    _replace_moe()
    _replace_recompute()
    checkpoint.mend_loading()
    _replace_dataset_helpers()


def _replace_device() -> None:
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True  # initialize_megatron asserts it
    cuda.device_count = lambda: 1  # 0 skips model-parallel initialisation
    cuda.set_device = lambda device: None  # _initialize_distributed
    cuda.current_device = lambda: cpu  # everywhere in megatron.core
    cuda.synchronize = lambda *args, **kwargs: None  # batched p2p, timers, checkpoints
    cuda.empty_cache = lambda: None  # train loop, set_jit_fusion_options
    cuda.ipc_collect = lambda: None  # checkpoint writers
    # Argument validation and the fused kernels' gates.
    cuda.get_device_capability = lambda *args: (0, 0)
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(
        name="cpu", major=0, minor=0, multi_processor_count=1, total_memory=1, uuid="cpu"
    )
    cuda.get_device_name = lambda *args: "cpu"
    # Memory statistics: report_memory, training_log, dist_checkpointing.
    for name in ("allocated", "reserved"):
        for kind in ("memory", "max_memory"):
            setattr(cuda, f"{kind}_{name}", lambda *args, **kwargs: 0)
    cuda.reset_peak_memory_stats = lambda *args: None
    cuda.mem_get_info = lambda *args: (1, 1)
    cuda.memory_stats = lambda *args: collections.defaultdict(int)
    # The CUDA build's DataLoader asks for a device index when it pins memory.
    if hasattr(torch, "accelerator"):
        torch.accelerator.is_available = lambda: False
    # optimizers and clip_grads compare the type's name with torch.cuda.*Tensor
    tensor: Any = torch.Tensor
    original_type = tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, **kwargs)

    tensor.type = type_
    # rope_utils, get_batch, MoE dispatchers; module moves in get_model
    tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args: self  # type: ignore[method-assign]
    tensor.pin_memory = lambda self, *args: self


class _Stream:
    """A stream of a machine that has one queue: everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0
        self.device = torch.device("cpu")

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> "_Event":  # MoE dispatchers wait for it
        return _Event()

    def __getattr__(self, name: str) -> Callable[..., None]:  # wait_stream, record, ...
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _Event(_Stream):
    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True


def _replace_streams() -> None:
    """Schedules, DDP's start_grad_sync, MoE dispatchers and timers use streams and events."""
    stream = _Stream()
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args: stream
    cuda.set_stream = cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    cuda.stream = lambda *args: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None


def _replace_factories() -> None:
    """Literals `device="cuda"` in schedules, clip_grads, the optimizers and the causal mask."""
    # `with torch.device("meta")`, by which transformers loads a model, must know the originals:
    # without, rotary frequencies are left uninitialised
    torch.utils._device._device_constructors()

    def moved(value: Any) -> Any:
        is_cuda = isinstance(value, (str, torch.device)) and "cuda" in str(value)
        return torch.device("cpu") if is_cuda else value

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            kwargs = {name: moved(value) for name, value in kwargs.items()}
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return wrapped

    for name in ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "arange", "as_tensor",
                 "zeros_like", "ones_like", "empty_like", "randint", "linspace"):  # fmt: skip
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    original_to = tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs = {name: moved(value) for name, value in kwargs.items()}
        return original_to(self, *map(moved, args), **kwargs)

    tensor.to = to


def _replace_process_groups() -> None:
    """gloo refuses a CUDA device: _initialize_distributed and the timers pass one."""
    dist = torch.distributed
    original_init, original_barrier = dist.init_process_group, dist.barrier

    def init_process_group(*args: Any, device_id: Any = None, **kwargs: Any) -> None:
        original_init(*args, **kwargs)

    def barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return original_barrier(*args, **kwargs)

    dist.init_process_group, dist.barrier = init_process_group, barrier


def _replace_random_state() -> None:
    """Megatron keeps one generator state per parallel rank on the device.

    Without the last two replacements the failure is silent: torch's lazy call queues the set and
    never runs it, and the default stream ends up different on each tensor-parallel rank.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    cuda: Any = torch.cuda
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.manual_seed_all = lambda seed: None  # torch.manual_seed calls it after its own
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.random.get_rng_state = megatron_random._get_cuda_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = megatron_random._set_cuda_rng_state = cuda.set_rng_state


def _replace_moe() -> None:
    """Routers and token dispatchers: Transformer Engine's GEMM, and tensors that `is_cuda`."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # a NameError without Transformer Engine

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_host
    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _replace_recompute() -> None:
    """Selective recompute passes fp8=False, which Megatron reads as 'fp8 is on' (`is not None`)."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    original = CheckpointWithoutOutput.__init__

    def init(self: Any, fp8: Any = None) -> None:
        original(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = init


def _replace_dataset_helpers() -> None:
    """compile_helpers runs `make` in the wheel's folder, which has no Makefile, and exits.

    The helper is in the wheel already, compiled.
    """
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None
