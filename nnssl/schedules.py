"""Ramps: pure functions from training progress t in [0, 1] to a factor in [0, 1]."""

from __future__ import annotations

import math


def gaussian_ramp(t: float, t_ramp: float) -> float:
    """exp(-5 (1 - min(t / t_ramp, 1))^2): from 0.0067 at t = 0 to 1 at t = t_ramp, constant after (Laine &
    Aila, ICLR 2017).

    Args:
        t: training progress, iteration / all iterations, in [0, 1].
        t_ramp: share of the training over which the factor rises; 0 means no ramp.
    """
    if t_ramp <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(t / t_ramp, 1.0)) ** 2)
