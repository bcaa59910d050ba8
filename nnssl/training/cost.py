"""What a training step costs, predicted from the plan: nothing is computed, and no data are read.

Two steps of the trainer run on PyTorch's fake tensors, which have shapes but no values. A ledger sees every
operation, forward and backward, and keeps account of the storage that is alive, of the floating-point
operations of convolutions and matrix products, and of the bytes that pass through memory.

The prediction is of tensors alone. On a GPU, cuDNN's workspaces, fragmentation and the CUDA context come on
top (`CARD_OVERHEAD`); on a CPU, the copies that oneDNN's convolutions make of their operands (`scratch`).
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GIB = 2**30
CARDS = (4, 6, 8, 10, 11, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB that are sold
CARD_OVERHEAD = 0.75 * GIB  # of a card: CUDA context, kernels, cuDNN's workspaces
FRAGMENTATION = 1.10  # PyTorch's allocator reserves more than it hands out
CONVOLUTIONS = ("convolution", "convolution_backward")


@dataclass(frozen=True)
class Cost:
    """Of one training step.

    parameters   bytes of networks, heads, copies and banks
    fixed        bytes that stay from step to step: those, the optimizer's state
    peak         most bytes alive at once in a step, the fixed ones and the batch among them
    flops        floating-point operations of convolutions and matrix products
    moved        bytes that operations read and write
    """

    parameters: int
    fixed: int
    peak: int
    flops: int
    moved: int

    @property
    def card(self) -> float:
        """Bytes of a GPU's memory that the step is expected to need."""
        return FRAGMENTATION * self.peak + CARD_OVERHEAD

    @property
    def smallest_card(self) -> int | None:
        """GB of the smallest card that is sold and large enough; None: there is none."""
        return next((size for size in CARDS if self.card <= size * GIB), None)


class Ledger(TorchDispatchMode):
    """Context that keeps account of what operations cost.

    scratch   bytes that a convolution on this device needs beside its operands, as a share of them
    """

    def __init__(self, scratch: float = 0.0) -> None:
        super().__init__()
        self.scratch = scratch
        self.live = self.peak = self.flops = self.moved = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def restart(self) -> None:
        """Begin a new account of what is alive."""
        self.peak, self.flops, self.moved = self.live, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return _stand_in(args[0].dtype)
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in outputs:
            self._note(x)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        scratch = 0
        if name in CONVOLUTIONS and self.scratch:
            scratch = int(self.scratch * sum(map(_bytes, inputs[:3] + outputs)))
        self.peak = max(self.peak, self.live + scratch)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        if func._schema.is_mutable or not func.is_view:
            self.moved += sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        return result

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _stand_in(dtype: torch.dtype) -> Any:
    """A value where one is read: true, or one, so that a loss is finite and counts are not empty."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def predict(
    trainer: type,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    device: str = "cuda",
    at: float = 0.5,
    **changes: Any,
) -> Cost:
    """The cost of a step of `trainer`.

    Args:
        trainer: a subclass of SemiTrainer.
        plans: content of the plans file; its key `nnssl` counts.
        configuration: of the plan.
        dataset_json: content of dataset.json.
        device: `cuda` or `cpu`: decides on autocast and on the memory of convolutions.
        at: progress of the training; at half of it all terms count in nearly all methods.
        changes: of general keys of `nnssl`, for "what if".
    """
    ledger = Ledger(SCRATCH if device == "cpu" else 0.0)
    with FakeTensorMode(), ledger, _readable():
        rehearsal = Rehearsal(trainer, plans, configuration, dataset_json, device, at, **changes)
        parameters = sum(map(_bytes, {*rehearsal.method.parameters(), *rehearsal.method.buffers()}))
        rehearsal.step()
        fixed = ledger.live - rehearsal.batch_bytes()
        ledger.restart()
        rehearsal.step()
    return Cost(parameters, fixed, ledger.peak, ledger.flops, ledger.moved)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Fake tensors can be read, as ones, and copied with their modules; nothing of them is kept after."""
    from nnssl.networks import hf_mamba

    def tolist(x: Tensor) -> Any:
        return np.full(tuple(x.shape), _stand_in(x.dtype)).tolist()

    with (
        mock.patch.object(FakeTensor, "tolist", tolist),
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True),
        mock.patch.object(hf_mamba, "_kept_fourier_basis", hf_mamba._fourier_basis),
    ):
        yield


class Rehearsal:
    """A trainer without data, its folders out of the way, and steps on a batch of the planned shape."""

    def __init__(
        self,
        trainer: type,
        plans: Mapping[str, Any],
        configuration: str,
        dataset_json: Mapping[str, Any],
        device: str,
        at: float,
        **changes: Any,
    ) -> None:
        section = {**plans.get("nnssl", {}), **changes}
        content = {**plans, "nnssl": section, "continue_training": False}
        self.trainer = _without_data(trainer, content, configuration, dict(dataset_json))
        self.method = self.trainer.method
        if device == "cuda":
            amp = self.trainer.general.amp
            on = amp != "float32"
            dtype = getattr(torch, amp) if on else torch.bfloat16
            self.trainer.step.autocast = lambda: torch.autocast("cpu", dtype, on, cache_enabled=False)
        self.trainer.current_epoch = int(at * self.trainer.num_epochs)
        self.batch = self._batch()

    def step(self) -> None:
        self.trainer.train_step(self.batch)

    def batch_bytes(self) -> int:
        return sum(_bytes(x) for x in tree_leaves(self.batch) if isinstance(x, Tensor))

    def _batch(self) -> dict[str, Any]:
        t = self.trainer
        patch, channels, labels = t.configuration_manager.patch_size, t.num_input_channels, t.label_manager
        maps = 1
        if labels.has_regions:
            maps = len(labels.foreground_regions) + (labels.ignore_label is not None)
        scales = t._get_deep_supervision_scales() or [[1] * len(patch)]
        grids = [[round(n * s) for n, s in zip(patch, scale, strict=True)] for scale in scales]
        target = [torch.zeros(t.batch_size, maps, *grid, dtype=torch.int16) for grid in grids]
        names = [f"case_{i}" for i in range(t.batch_size)]
        batch = {
            "data": torch.zeros(t.batch_size, channels, *patch),
            "target": target if t.enable_deep_supervision else target[0],
            "keys": names,
        }
        if t.method_class.needs_unlabeled:
            n = t.general.unlabeled_batch_size or t.batch_size
            views = [torch.zeros(n, channels, *patch) for _ in range(1 + t.method.num_strong_views)]
            batch["unlabeled"] = {
                "weak": views[0],
                "strong": views[1:],
                "keys": [f"scan_{i}" for i in range(n)],
            }
        return batch


def _without_data(
    trainer: type, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]
) -> Any:
    """The trainer, built on the CPU. nnU-Net makes its folder at once: below a temporary one."""
    count = max(2, int(dataset_json.get("numTraining", 2)))

    class Alone(trainer):  # type: ignore[misc, valid-type]
        def _cases(self) -> tuple[list[str], list[str]]:
            return [f"case_{i}" for i in range(count)], [f"scan_{i}" for i in range(count)]

        def mirror_axes(self) -> tuple[int, ...]:
            return tuple(range(len(self.configuration_manager.patch_size)))

    Alone.__name__ = trainer.__name__
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"nnUNet_results": folder, "nnUNet_preprocessed": folder}),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(Alone, "print_to_log_file", lambda *args, **kwargs: None),
        mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),  # fake ones cannot move
    ):
        built: Any = Alone(plans, configuration, 0, dataset_json, torch.device("cpu"))
        built.build()
    built._forward = built.method
    built.method.make_copies()
    built.method.train()
    return built


# of a convolution's operands and results: oneDNN's copies in its own layout
SCRATCH = 0.0
