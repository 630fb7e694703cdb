"""The network of a pipeline: the calls that its blocks make of it, and another in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """A call of a pipeline's network.

    Attributes:
        network: what was called.
        args, kwargs: with what.
    """

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def x_t(self) -> Tensor:
        """The first of its inputs (B, *); a list of images (C, 1, H, W) as (B, C, H, W)."""
        found = self.args[0] if self.args else self.kwargs[self._first]
        return torch.stack(found).squeeze(2) if isinstance(found, list) else found

    def again(self, x_t: Tensor) -> Tensor:
        """Its output (B, *) for another x_t of the same shape, or for other first tokens (B, L, C)."""
        own: Any = self.args[0] if self.args else self.kwargs[self._first]
        other: Any = x_t.to(self.x_t.dtype)
        if isinstance(own, list):
            other = list(other.unsqueeze(2))
        elif x_t.ndim == 3:
            other = torch.cat([other, own[:, x_t.shape[1] :]], dim=1)
        args, kwargs = ((other, *self.args[1:]), self.kwargs) if self.args else ((), {**self.kwargs, self._first: other})
        output = self.network(*args, **kwargs)[0]
        return torch.stack(list(output)).squeeze(2) if isinstance(own, list) else output[:, : x_t.shape[1]]

    @property
    def _first(self) -> str:
        names = inspect.signature(type(self.network).forward).parameters
        return next(name for name in names if name in self.kwargs)


def swapped(network: nn.Module, guide: nn.Module, restore: Callable[[], None]) -> Callable[[], None]:
    """Has the next call of a network answered by another; returns what undoes it."""
    ours, theirs = (getattr(getattr(each, "config", None), "in_channels", None) for each in (guide, network))
    if ours != theirs:
        raise ValueError(f"guide_model reads {ours} channels, and the pipeline's network {theirs}.")
    had = vars(network).get("forward")

    def answer(*args: Any, **kwargs: Any) -> Any:
        restore()  # also where the network then fails
        return guide(*args, **kwargs)

    def undo() -> None:
        del network.forward  # type: ignore[attr-defined]
        if had is not None:
            network.forward = had  # type: ignore[method-assign]

    network.forward = answer  # type: ignore[method-assign]
    return undo
