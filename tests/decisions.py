"""Holding the hard decisions of Diff-CL's step fixed: labels, masks and drawn voxels. A difference of
rounding that turns one of them is no longer one of rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nnssl.labels import LabelSpace
from nnssl.methods import diffcl

DECIDING = ("confidence_mask", "sample_members", "_sample_middle_share")


class Decisions:
    """Records what one training decides, and compares or replaces what another one does.

    flips: (place, entries that differ) of each decision of the other training that was another one.
    """

    def __init__(self) -> None:
        self.taken: list[tuple[Tensor, ...]] = []
        self.entries = 0
        self.flips: list[tuple[int, int]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        def record(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self.taken.append(tuple(x.clone() for x in found))
            self.entries += sum(x.numel() for x in found)
            return found

        with _seen(record):
            yield

    @contextmanager
    def compared(self, held: bool) -> Iterator[None]:
        """held: the recorded decisions count, not the training's own."""
        self.flips, places = [], iter(range(len(self.taken)))

        def compare(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            place = next(places)
            differ = sum(int((a != b).sum()) for a, b in zip(found, self.taken[place], strict=True))
            if differ:
                self.flips.append((place, differ))
            return self.taken[place] if held else found

        with _seen(compare):
            yield
        assert next(places, None) is None, "fewer decisions than recorded"


@contextmanager
def _seen(by: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> Iterator[None]:
    """Every decision goes through `by`."""

    def through(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            return by((found,))[0] if isinstance(found, torch.Tensor) else by(found)

        return wrapped

    with ExitStack() as stack:
        for owner, name in [*((diffcl, name) for name in DECIDING), (LabelSpace, "harden")]:
            stack.enter_context(mock.patch.object(owner, name, through(getattr(owner, name))))
        yield
