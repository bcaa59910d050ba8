"""Key `agreement`: unlabeled terms count as far as they pull the student the way the labels do.

    c = max(0, cos(m_l, m_u)),   m <- m + (g / |g| - m) / min(measurements, 20)
    g_l, g_u  gradients of the weighted labeled and unlabeled terms on the student's last decoder stage,
              summed over all GPUs

The directions are averaged before they are compared: single batches are so noisy that their cosines are near
0 whatever the terms agree on.
c multiplies the weights of the unlabeled terms. It is measured at every tenth step, so that it costs little;
before the first measurement it is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nnssl.method import SemiMethod
from nnssl.training.optimizer_step import read

EVERY = 10  # steps between measurements
HORIZON = 20  # measurements that the running mean covers


class Agreement:
    """The running cosine of one run; `state_dict` is part of the checkpoint.

    Raises ValueError where the method has no term to compare or to weigh.
    """

    def __init__(self, method: SemiMethod) -> None:
        self.method = method
        self.parameters = list(method.student.decoder.stages[-1].parameters())
        names = method.weights(0.5)
        self.unlabeled = {name for name in names if method.is_unlabeled(name)}
        if not self.unlabeled or self.unlabeled == names.keys():
            raise ValueError(
                f'"agreement" compares labeled with unlabeled terms, and {method.name} has '
                f"{', '.join(sorted(names))} alone: set it to false"
            )
        self.directions: Tensor | None = None  # m_l and m_u
        self.cosine, self.measurements = 1.0, 0

    @property
    def factor(self) -> float:
        """c, in [0, 1]."""
        return max(0.0, self.cosine)

    def weigh(
        self,
        terms: Mapping[str, Tensor],
        weights: Mapping[str, float],
        step: int,
        scale: float = 1.0,
    ) -> dict[str, float]:
        """The weights with c in them; measures c first where it is due.

        Args:
            terms: losses of this step, before the backward pass.
            weights: lambda_k, the same keys.
            step: of the run, from 0.
            scale: of the losses, against underflow of float16 gradients.
        """
        if step % EVERY == 0 and any(weights[k] for k in self.unlabeled):
            self.measure(terms, weights, scale)
        return self.applied(weights)

    def applied(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights with c, as last measured, in those of unlabeled terms."""
        return {k: w * self.factor if k in self.unlabeled else w for k, w in weights.items()}

    def measure(self, terms: Mapping[str, Tensor], weights: Mapping[str, float], scale: float = 1.0) -> None:
        """One more pair of directions into the running means."""
        labeled = [scale * weights[k] * v for k, v in terms.items() if k not in self.unlabeled]
        unlabeled = [scale * weights[k] * v for k, v in terms.items() if k in self.unlabeled]
        found = torch.stack([self._gradient(labeled), self._gradient(unlabeled)])
        found = found / found.norm(dim=1, keepdim=True)
        old = torch.zeros_like(found) if self.directions is None else self.directions
        directions = old + (found - old) / min(self.measurements + 1, HORIZON)
        finite, cosine = read(found.isfinite().all(), cosine_similarity(directions[0], directions[1], dim=0))
        if not finite:  # a gradient that is zero or not finite says nothing
            return
        self.measurements += 1
        self.directions, self.cosine = directions, cosine

    def _gradient(self, losses: list[Tensor]) -> Tensor:
        found = torch.autograd.grad(
            torch.stack(losses).sum(),
            self.parameters,
            retain_graph=True,
            allow_unused=True,
        )
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).float().flatten()
                for g, p in zip(found, self.parameters, strict=True)
            ]
        )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        return flat

    def state_dict(self) -> dict[str, Any]:
        directions = None if self.directions is None else self.directions.cpu()
        return {"directions": directions, "cosine": self.cosine, "measurements": self.measurements}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        directions = state["directions"]
        self.directions = None if directions is None else directions.to(self.parameters[0].device)
        self.cosine, self.measurements = float(state["cosine"]), int(state["measurements"])
