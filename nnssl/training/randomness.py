"""All random states of a run: seeding, saving, restoring."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # of this process's device
    }


def restore_rng(states: list[dict[str, Any]], rank: int = 0) -> None:
    """Restore what `rng_state` gave, one entry per rank. A run continued on more ranks than it had keeps
    fresh states there."""
    if rank >= len(states):
        return
    state = states[rank]
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and isinstance(state["cuda"], torch.Tensor):  # of a run on a GPU
        torch.cuda.set_rng_state(state["cuda"].cpu())
