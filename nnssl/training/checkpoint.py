"""The part of a checkpoint that nnU-Net does not know: method, random states, history, configuration,
versions."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import nnssl
from nnssl.training.randomness import rng_state

if TYPE_CHECKING:
    from nnssl.method import SemiMethod
    from nnssl.training.trainer import SemiTrainer


def atomic_save(checkpoint: dict[str, Any], filename: str) -> None:
    """torch.save to a temporary file, flushed to disk, then moved over `filename`: a crash leaves the old
    file whole."""
    temporary = filename + ".tmp"
    with open(temporary, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, filename)


def full_checkpoint(trainer: SemiTrainer) -> dict[str, Any]:
    """nnU-Net's checkpoint, and under `nnssl` everything beside it that an exact continuation needs.
    Collective under DDP."""
    return {
        "network_weights": trainer.network.state_dict(),
        "optimizer_state": trainer.optimizer.state_dict(),
        "grad_scaler_state": None if trainer.grad_scaler is None else trainer.grad_scaler.state_dict(),
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": _best_so_far(trainer),
        "current_epoch": trainer.current_epoch + 1,
        "init_args": trainer.my_init_kwargs,
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        "nnssl": _training_state(trainer),
    }


def _best_so_far(trainer: SemiTrainer) -> float | None:
    """nnU-Net writes the latest checkpoint before it compares its epoch with the best: a continued run would
    take a lesser one for new."""
    known = [*trainer.logger.get_value("ema_fg_dice", None), trainer._best_ema]
    return max((v for v in known if v is not None and v == v), default=None)


def _training_state(trainer: SemiTrainer) -> dict[str, Any]:
    return {
        "method": _without_deployed(trainer),
        "rng": from_all_ranks(rng_state()),
        # under DDP each rank has its own bank
        "buffers": from_all_ranks({k: v.cpu() for k, v in _own_buffers(trainer.method)})
        if trainer.is_ddp
        else [],
        "history": trainer.history.rows,
        "config": {
            "general": dataclasses.asdict(trainer.general),
            "method": dataclasses.asdict(trainer.method_config),
        },
        "versions": {"nnssl": nnssl.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def load_training_state(trainer: SemiTrainer, checkpoint: dict[str, Any], source: str) -> None:
    """Put a checkpoint, from `source`, back into an initialized trainer; random states are restored once the
    loaders have started."""
    if "nnssl" not in checkpoint:
        raise RuntimeError(
            f"{source} was not written by {type(trainer).__name__}: it has no key `nnssl`, so teachers and "
            f"banks could not be "
            "continued. Start from its weights with -pretrained_weights instead"
        )
    state = checkpoint["nnssl"]
    trainer.my_init_kwargs = checkpoint["init_args"]
    trainer.current_epoch = checkpoint["current_epoch"]
    trainer.logger.load_checkpoint(checkpoint["logging"])
    trainer._best_ema = checkpoint["_best_ema"]
    trainer.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
    trainer.network.load_state_dict(checkpoint["network_weights"])
    missing, unexpected = trainer.method.load_state_dict(state["method"], strict=False)
    missing = [k for k in missing if k not in _deployed_keys(trainer)]
    if missing or unexpected:
        raise RuntimeError(
            f"the checkpoint of {checkpoint['trainer_name']} (nnssl {state['versions']['nnssl']}) does not "
            f"fit this configuration: "
            f"missing {missing[:5]}, unexpected {list(unexpected)[:5]}. Continue with the plans file that "
            f"the run was started with"
        )
    restore_buffers(trainer.method, state.get("buffers", []))
    trainer.optimizer.load_state_dict(checkpoint["optimizer_state"])
    if trainer.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
    trainer.history.rows = list(state["history"])


def from_all_ranks(mine: Any) -> list[Any]:
    """What every rank has, in their order. Collective under DDP."""
    if not dist.is_available() or not dist.is_initialized():
        return [mine]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    return states


def _own_buffers(method: SemiMethod) -> list[tuple[str, Tensor]]:
    kept = method.state_dict().keys()
    return [(k, v) for k, v in method.named_buffers() if k in kept]


def restore_buffers(method: SemiMethod, buffers: list[dict[str, Tensor]]) -> None:
    """Put back what this rank had; a run continued on another number of GPUs keeps what the saving rank
    had."""
    if dist.is_available() and dist.is_initialized() and len(buffers) == dist.get_world_size():
        method.load_state_dict(buffers[dist.get_rank()], strict=False)


def _deployed_keys(trainer: SemiTrainer) -> set[str]:
    """Keys of the method's state that name the deployed network."""
    prefix = next(name for name, module in trainer.method.named_children() if module is trainer.network)
    return {f"{prefix}.{k}" for k in trainer.network.state_dict()}


def _without_deployed(trainer: SemiTrainer) -> dict[str, Any]:
    deployed = _deployed_keys(trainer)
    return {k: v for k, v in trainer.method.state_dict().items() if k not in deployed}
