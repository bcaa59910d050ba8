"""Key `gradient_checkpointing`: activations are computed again in the backward pass instead of kept.

A stage of an encoder or decoder then keeps its input alone. Losses and gradients stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(method: Any, which: str) -> int:
    """For the networks of a method that `which` names: none, second (all but the student), all. Returns how
    many stages there are in them."""
    networks = list(method.children()) if which != "none" else []
    chosen = [network for network in networks if which == "all" or network is not method.student]
    return sum(recompute_stages(network) for network in chosen)


def recompute_stages(network: nn.Module) -> int:
    """Let every stage of the planned encoders and decoders inside `network` compute anew what its backward
    pass needs; in place, returns how many. Networks without gradient keep nothing anyway."""
    found: dict[int, nn.Module] = {}
    for module in network.modules():
        stages = getattr(module, "stages", None)
        if isinstance(stages, (nn.Sequential, nn.ModuleList)):
            found |= {id(s): s for s in stages if any(p.requires_grad for p in s.parameters())}
    for stage in found.values():
        stage.forward = partial(_recomputed, stage.forward)
    return len(found)


def _recomputed(forward: Callable[..., Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)
