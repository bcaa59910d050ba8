"""Key `agreement`: unlabeled terms count as far as they pull the student the way the labels do.

    c = max(0, running mean of cos(g_l, g_u))
    g_l, g_u  gradients of the weighted labeled and unlabeled terms on the student's last decoder stage,
              summed over all GPUs

c multiplies the weights of the unlabeled terms. It is measured at every tenth step, so that it costs little;
before the first measurement it is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnssl.method import SemiMethod

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
        self.mean, self.measurements = 0.0, 0

    @property
    def factor(self) -> float:
        """c, in [0, 1]."""
        return max(0.0, self.mean) if self.measurements else 1.0

    def weigh(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float], step: int, scale: float = 1.0
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
        return {k: w * self.factor if k in self.unlabeled else w for k, w in weights.items()}

    def measure(self, terms: Mapping[str, Tensor], weights: Mapping[str, float], scale: float = 1.0) -> None:
        """One more cosine into the running mean."""
        labeled = [scale * weights[k] * v for k, v in terms.items() if k not in self.unlabeled]
        unlabeled = [scale * weights[k] * v for k, v in terms.items() if k in self.unlabeled]
        g_l, g_u = self._gradient(labeled), self._gradient(unlabeled)
        norms = (g_l @ g_l).sqrt() * (g_u @ g_u).sqrt()
        cosine = float(g_l @ g_u / norms)  # NaN where a gradient is zero or not finite: nothing was measured
        if cosine == cosine:
            self.measurements += 1
            self.mean += (cosine - self.mean) / min(self.measurements, HORIZON)

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
        return {"mean": self.mean, "measurements": self.measurements}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.measurements = float(state["mean"]), int(state["measurements"])
