"""Where the host waits for the device between a step's first backward and the optimizer.

torch warns at each operation for which it makes the host wait (set_sync_debug_mode; it does not see
all of them: not those that other libraries make). Beside the plugin's own count stands plain
Megatron's, in the same model.
"""

import os
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import megatron.core
import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.gpu_check.found import FAILED, MEASURED, NO_CUDA, OK, Found, Where, failed
from megatron_dr.mcore.gpu_check.model import CHECK, SMALL, Model
from megatron_dr.mcore.gpu_check.paths import BUFFERS, SAMPLES
from megatron_dr.mcore.gpu_check.start import start

_WORDS = "called a synchronizing"  # of torch's warning
# the packages' folders, with what a place is named from
_PACKAGES = {str(Path(file).parents[up]): name for file, up, name in (
    (__file__, 2, "megatron_dr"), (megatron.core.__file__, 0, "megatron/core"),
)}  # fmt: skip
_TOOL = str(Path(__file__).parent)
# solved at a step's end, these wait once, as their page says
_WAITS = ("cone of the model, 1 pass", "cone of the model, 2 passes")


class Waits:
    """Counts waits by place, `file:line`, from `begin` to `end`; a context manager."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> "Waits":
        self._stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = self._seen
        return self

    def __exit__(self, *exception: Any) -> None:
        self.end()
        self._stack.close()

    def begin(self) -> None:
        torch.cuda.set_sync_debug_mode("warn")

    def end(self) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def _seen(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if _WORDS in str(message):
            self.places[place(traceback.extract_stack()[:-1])] += 1


def place(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frame that is the plugin's (this tool's are not) or Megatron's, else of any."""
    for frame in reversed(stack):
        for folder, name in _PACKAGES.items():
            if frame.filename.startswith(folder + os.sep) and not frame.filename.startswith(_TOOL):
                return f"{name}{frame.filename.removeprefix(folder)}:{frame.lineno}"
    return f"{stack[-1].filename}:{stack[-1].lineno}"


def waits(where: Where) -> Iterator[Found]:
    """Both paths' waits: none may be the plugin's own, but where it says so."""
    arms: dict[str, DRConfig | None] = {"plain Megatron": None, **BUFFERS, **SAMPLES}
    if not where.cuda:
        yield from (Found(name, NO_CUDA) for name in arms)
        return
    start(where.device)
    model = Model(SMALL if where.small else CHECK, where.device, "local", "bf16")
    for name, dr in arms.items():
        try:
            yield _verdict(name, count(model, dr))
        except Exception as error:
            yield failed(name, error)


def count(model: Model, dr: DRConfig | None) -> Counter[str]:
    """Of one step, the third: by then nothing is made for the first time."""
    model.attach(dr)
    general = model.batches(1, model.sizes.general)
    target = model.batches(2, model.sizes.target)
    for _ in range(2):
        model.gradients(general, target)
        model.optimizer.step()
    found, begun = Waits(), False

    def first_backward(_: torch.Tensor) -> None:
        nonlocal begun
        if not begun:
            begun = True
            found.begin()

    model.watch = lambda output: output.register_hook(first_backward) and None
    try:
        with found:
            model.gradients(general, target)
        model.optimizer.step()
    finally:
        model.watch = lambda _: None
        model.attach(None)
    return found.places


def _verdict(name: str, places: Counter[str]) -> Found:
    own = {p: n for p, n in places.items() if p.startswith("megatron_dr/")}
    figures: dict[str, float | str] = {
        "waits": sum(places.values()), "of these in megatron_dr": sum(own.values()),
    }  # fmt: skip
    said = ", ".join(f"{p} x{n}" for p, n in sorted(places.items()))
    if name == "plain Megatron" or (own and name in _WAITS):
        return Found(name, MEASURED, figures, said)
    return Found(name, FAILED if own else OK, figures, said)
