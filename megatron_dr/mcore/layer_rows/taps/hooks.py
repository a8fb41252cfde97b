"""How taps get onto a layer and off it again, and how they write a parameter's gradient.

A hook on a parameter runs before Megatron's own accumulates its gradient, and replaces it.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

Undo = Callable[[], Any]


def trained(module: torch.nn.Module, observer: Any) -> dict[str, torch.nn.Parameter]:
    """The module's own parameters that the observer covers."""
    own = module.named_parameters(recurse=False)
    return {name: parameter for name, parameter in own if observer.covers(parameter)}


def put(owner: Any, name: str, method: Callable[..., Any]) -> Undo:
    """A method of one object, in front of its class's."""
    setattr(owner, name, method)
    return lambda: owner.__dict__.pop(name)


def watch(owner: Any, name: str, observer: Any, observe: Callable[..., None]) -> Undo:
    """In a step, `observe(x, dy)` when the backward has the gradient of a method's output.

    Args:
        observe: x is the method's first argument; dy is of its output, or of the first of several.
    """
    stock = getattr(owner, name)

    def method(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = stock(x, *args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out
        if observer.active and y.requires_grad:
            y.register_hook(functools.partial(observe, x.detach()))
        return out

    return put(owner, name, method)


class Written:
    """Gradients that taps found in a backward, in the place of autograd's."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._found: dict[int, torch.Tensor] = {}
        hooks = [p.register_hook(functools.partial(self._take, id(p))) for p in parameters]
        self.undo: list[Undo] = [hook.remove for hook in hooks]

    def put(self, parameter: torch.nn.Parameter, grad: torch.Tensor | None) -> None:
        """None: no gradient now."""
        found = torch.zeros_like(parameter) if grad is None else grad.to(parameter.dtype)
        self._found[id(parameter)] = found

    def _take(self, number: int, grad: torch.Tensor) -> torch.Tensor:
        return self._found.pop(number, grad)
