from __future__ import annotations

import numpy as np
import torch

from nnssl.training.randomness import restore_rng, rng_state, seed_everything


def test_random_states_are_restored() -> None:
    seed_everything(3)
    state = rng_state()
    drawn = (torch.rand(2).tolist(), np.random.rand(2).tolist())
    restore_rng([state])
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == drawn
    restore_rng([state], rank=1)  # a rank that did not exist then: nothing happens
