"""Gaussian diffusion of label maps and its deterministic reversal.

    symbol      here                     shape
    x_0         clean label map, +-b     (B, K, S)     b = 1 as published; below, noise hides it earlier
                                                       (Chen, arXiv 2301.10972, input scaling)
    eps         starting noise           (B, K, S)
    tau         diffusion step           (B,) int64, 0 .. T - 1
    beta_tau    linear, 1e-4 .. 2e-2     (T,)          Ho et al., NeurIPS 2020, sec. 4
    abar_tau    prod_{s <= tau} (1 - beta_s)  (T,)     Ho et al., eq. 4
    x_tau       sqrt(abar) x_0 + sqrt(1 - abar) eps    Ho et al., eq. 4
    x0_hat      the network's estimate of x_0

The network predicts x_0 (as in segmentation diffusion models), so a DDIM step (Song et al., ICLR 2021, eq. 12
with eta = 0) is
    eps_hat = (x_tau - sqrt(abar_tau) x0_hat) / sqrt(1 - abar_tau)
    x_next  = sqrt(abar_next) x0_hat + sqrt(1 - abar_next) eps_hat
and the last step returns x0_hat itself (abar = 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class GaussianDiffusion(nn.Module):
    """Schedule, forward process and DDIM sampler.

    Args:
        steps: T, at least 1.
        beta_start: beta_0.
        beta_end: beta_{T-1}.
    """

    alphas_cumprod: Tensor

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> None:
        super().__init__()
        if steps < 1 or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"steps >= 1 and 0 < beta_start <= beta_end < 1 expected, found {steps}, {beta_start}, "
                f"{beta_end}"
            )
        self.steps = steps
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        # derived from the arguments: not part of a checkpoint
        self.register_buffer("alphas_cumprod", (1.0 - betas).cumprod(0).float(), persistent=False)

    def draw_steps(self, n: int, device: torch.device, power: float = 1.0) -> Tensor:
        """tau (n,) = floor(T u^(1 / power)), u uniform in [0, 1): above 1, high noise is drawn more often."""
        tau = (self.steps * torch.rand(n, device=device) ** (1 / power)).long()
        return tau.clamp_(max=self.steps - 1)  # float32 may round up to T

    def q_sample(self, x_0: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
        """x_tau (B, K, S) from x_0 and noise of the same shape. tau: (B,)."""
        abar = self._expand(tau, x_0)
        return abar.sqrt() * x_0 + (1.0 - abar).sqrt() * eps

    def ddim_step(self, x_tau: Tensor, x0_hat: Tensor, tau: int, tau_next: int) -> Tensor:
        """x at tau_next < tau; tau_next = -1 ends the chain and returns x0_hat."""
        if tau_next < 0:
            return x0_hat
        abar, abar_next = self.alphas_cumprod[tau], self.alphas_cumprod[tau_next]
        eps_hat = (x_tau - abar.sqrt() * x0_hat) / (1.0 - abar).sqrt()
        return abar_next.sqrt() * x0_hat + (1.0 - abar_next).sqrt() * eps_hat

    def trailing_steps(self, num_steps: int, start: float = 1.0) -> list[int]:
        """S steps from start * T - 1 downwards, evenly spaced from the end ("trailing", Lin et al., WACV
        2024, table 2).

        start = 1 for noise; below, for a chain that starts from a noised estimate of x_0.
        """
        first = start * self.steps
        if not 1 <= num_steps <= first <= self.steps:
            raise ValueError(
                f"the number of sampling steps must be in [1, {first:g}] and start in (0, 1], found "
                f"{num_steps} and {start}"
            )
        return [round(first - i * first / num_steps) - 1 for i in range(num_steps)]

    def ddim_sample(
        self, predict_x0: Callable[[Tensor, Tensor], Tensor], x: Tensor, taus: Sequence[int]
    ) -> Tensor:
        """x0_hat (B, K, S) after the deterministic steps `taus`, descending, e.g. from `trailing_steps`.

        Args:
            predict_x0: (x_tau, tau (B,)) -> x0_hat in [-b, b].
            x: x_tau at taus[0], (B, K, S): standard normal noise, or a noised estimate; injected, so that
                sampling can be repeated.
        """
        for tau, tau_next in zip(taus, [*taus[1:], -1], strict=True):
            x0_hat = predict_x0(x, torch.full((len(x),), tau, device=x.device, dtype=torch.long))
            x = self.ddim_step(x, x0_hat, tau, tau_next)
        return x

    def _expand(self, tau: Tensor, like: Tensor) -> Tensor:
        return self.alphas_cumprod[tau].view(-1, *[1] * (like.ndim - 1))
