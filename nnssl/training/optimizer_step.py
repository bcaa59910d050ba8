"""Backward pass and optimizer step: scaling, clipping, and what happens to a loss that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MAX_GRADIENT_NORM = 12.0  # nnU-Net
LOWEST_SCALE = 2.0**-14  # nnU-Net's scaler starts at 2^16 and halves: the search for a scale ends long before


class OptimizationStep:
    """Takes steps of one optimizer and counts those it had to skip.

    A step whose loss (or, without loss scaling, whose gradient) is not finite changes no weight. `patience`
    such steps in a row raise RuntimeError: the last checkpoint is then the last good one. So does a gradient
    that is not finite at any scale of the loss.

    Args:
        optimizer: over all networks and heads.
        networks: parameters of every network and head; each is clipped to nnU-Net's norm on its own, so that
            a large gradient in one does not shrink the others' steps. What else the optimizer moves has one
            norm together.
        scaler: nnU-Net's GradScaler, None on other devices than CUDA.
        amp: float16 (on CUDA only, as nnU-Net), bfloat16 (on CPU too: one with matrix units trains twice as
            fast) or float32.
        device: where the networks are.
        patience: non-finite steps in a row that end the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        amp: str,
        device: torch.device,
        patience: int,
        networks: Sequence[Iterable[nn.Parameter]] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler if amp == "float16" else None
        self.amp, self.device, self.patience = amp, device, patience
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        chosen = [[p for p in network if p.requires_grad] for network in networks or []]
        of_networks = {id(p) for network in chosen for p in network}
        chosen.append([p for p in everything if id(p) not in of_networks])
        self.networks = [network for network in chosen if network]
        self.skipped = self.skipped_in_a_row = 0
        self.values: list[float] = []
        self._scale = 0.0

    def precision(self) -> str:
        """What the forward pass really runs in."""
        half = self.amp == "float16" and self.device.type == "cuda"
        brain = self.amp == "bfloat16" and self.device.type in ("cuda", "cpu")
        return self.amp if half or brain else "float32"

    def autocast(self) -> Any:
        """The context of the forward pass.

        Without autocast's cache of cast weights: PyTorch releases before the end of 2025 (its issue 158232)
        fill it in passes without gradient too (the student's pseudo-labels), and the pass with gradient then
        takes these copies, which lead to no weight.
        """
        precision = self.precision()
        if precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, precision), cache_enabled=False)

    def loss_scale(self) -> float:
        """What the scaler multiplied the last loss with, so that nothing need be read back for it."""
        if self.scaler is None:
            return 1.0
        return self._scale or float(self.scaler.get_scale())  # before the first step the device has none

    def take(self, loss: Tensor, logged: Sequence[Tensor] = (), resting: Iterable[nn.Parameter] = ()) -> bool:
        """Backward, clip, step. Returns False for a step that changed no weight; every rank decides alike.

        The host waits for the device once, after the backward pass: to learn whether loss and gradients are
        finite, and the scalars `logged`, which are then in `values`. Parameters `resting` stay as they are,
        whatever their gradient: weight decay and momentum would move them.
        """
        finite = torch.isfinite(loss.detach()).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for p in resting:
            p.grad = None
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        # the norm of no gradient at all would be a zero on the host
        moved = [network for network in self.networks if any(p.grad is not None for p in network)]
        norms = torch.stack([nn.utils.clip_grad_norm_(p, MAX_GRADIENT_NORM) for p in moved])
        gradients = torch.isfinite(norms).all().float()
        scale = finite if self.scaler is None else self.scaler.scale(torch.ones_like(finite))
        loss_is_finite, gradients_are_finite, self._scale, *self.values = read(
            finite, gradients, scale, *logged
        )
        if not loss_is_finite or not (gradients_are_finite or self.scaler):
            self._skip()
            return False
        self.skipped_in_a_row = 0
        if gradients_are_finite:
            self.optimizer.step()
        elif self._scale < LOWEST_SCALE:  # above, it is the ordinary search for a scale
            raise RuntimeError(
                f"the loss was finite, but at no scale down to {self._scale:g} its gradient: no step changes "
                "a weight any more, and the checkpoints in the output folder are the last good ones. Set "
                '"amp" to bfloat16 or float32 under "nnssl" in the plans file, then resume with --c'
            )
        if self.scaler is not None:
            self.scaler.update()
        return bool(gradients_are_finite)

    def _skip(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.patience:
            raise RuntimeError(
                f"the loss was not finite in {self.skipped_in_a_row} steps in a row; they changed no "
                "weight, and the checkpoints in "
                'the output folder are the last good ones. Lower "initial_lr" or set "amp" to bfloat16 or '
                'float32 under "nnssl" in '
                "the plans file, check the images, then resume with --c"
            )


def read(*scalars: Tensor) -> list[float]:
    """Their values on the host, by one copy for which it waits."""
    values: list[float] = torch.stack([x.detach().float() for x in scalars]).tolist()
    return values


def reached(loss: Tensor) -> set[int]:
    """`id` of every parameter that the graph of `loss` leads to."""
    found, seen, left = set(), set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:  # where a gradient is accumulated
            found.add(id(variable))
        left += [following for following, _ in node.next_functions]
    return found
