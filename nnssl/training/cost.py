"""What a training step costs: memory predicted from the plan, seconds by a short trial on the device. No data
are read.

Two steps of the trainer run on PyTorch's fake tensors, which have shapes but no values. A ledger sees every
operation, forward and backward, and keeps account of the storage that is alive, of the floating-point
operations of convolutions and matrix products, and of the bytes that pass through memory.

The prediction is of tensors alone. On a GPU, cuDNN's workspaces, the allocator's reserve and the CUDA context
come on top (`CARD_OVERHEAD`, `FRAGMENTATION`): assumed, not measured.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import statistics
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nnssl.data.streams import share_of_batch
from nnssl.losses import correlation
from nnssl.networks import hf_mamba
from nnssl.ssm import dual, ssd
from nnssl.training.randomness import restore_rng, rng_state
from nnssl.training.tensorboard import SILENT

GIB = 2**30
CARDS = (4, 6, 8, 10, 11, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB that are sold
CARD_OVERHEAD = 0.75 * GIB  # of a card: CUDA context, kernels, cuDNN's workspaces
FRAGMENTATION = 1.10  # PyTorch's allocator reserves more than it hands out
TRIAL_SECONDS, TRIAL_STEPS = 20.0, 5  # a trial ends after either
PHASES = (0.5, 0.9)  # progress of a training at which one step or another does all that a method does
# keys of nnssl that make a step smaller, by what they cost
SAVINGS: dict[str, dict[str, Any]] = {
    '"gradient_checkpointing": "second"': {"gradient_checkpointing": "second"},
    '"gradient_checkpointing": "all"': {"gradient_checkpointing": "all"},
    '"unlabeled_batch_size": 1 and "gradient_checkpointing": "all"': {
        "unlabeled_batch_size": 1,
        "gradient_checkpointing": "all",
    },
}


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


@dataclass(frozen=True)
class Trial:
    """Steps of a trainer on a device, measured.

    seconds      of one step at the plan's patch size
    steps        how many were timed, after one that was not
    patch_size   that was tried
    share        its voxels, as a share of the plan's patch; where it is not 1, `seconds` is scaled by it
    memory       most bytes that a GPU reserved, at that patch size; 0 on a CPU
    schedule     steps of the whole training
    """

    seconds: float
    steps: int
    patch_size: tuple[int, ...]
    share: float
    memory: int
    schedule: int


def describe(on_card: Cost, supervised: Cost, on_cpu: Cost | None = None) -> str:
    """One line: memory on a GPU and the card for it, time; memory on a CPU where that is what there is."""
    card = on_card.smallest_card
    size = f"a card of {card} GB" if card else "more than any card has"
    line = (
        f"a step is predicted to need {on_card.card / GIB:.1f} GiB of a GPU "
        f"({on_card.peak / GIB:.1f} of tensors), {size}, "
        f"and to take {on_card.flops / supervised.flops:.1f} times as long as a supervised one "
        f"({supervised.flops / 1e12:.3g} TFLOP)"
    )
    return line + (f"; on the CPU {on_cpu.peak / GIB:.1f} GiB" if on_cpu else "")


def predicted_memory(trainer: Any) -> str:
    """What the steps of this run will need, in words. Random states are kept."""
    plans = deepcopy(trainer.plans_manager.plans)
    plans["configurations"][trainer.configuration_name]["batch_size"] = trainer.batch_size  # of this rank
    changes, wanted = {}, trainer.general.unlabeled_batch_size
    if wanted is not None:
        changes["unlabeled_batch_size"] = share_of_batch(wanted, trainer.batch_size)
    device, states = "cuda" if trainer.device.type == "cuda" else "cpu", [rng_state()]
    try:
        with mock.patch.object(dist, "is_initialized", lambda: False):  # alone on this rank
            cost = predict(
                type(trainer), plans, trainer.configuration_name, trainer.dataset_json, device, **changes
            )
    except Exception as error:  # a training does not end for it
        return f"not predicted ({type(error).__name__}: {' '.join(str(error).split())})"
    finally:
        restore_rng(states, 0)
    if device != "cuda":
        return f"{cost.peak / GIB:.2f} GiB of tensors predicted"
    there = torch.cuda.get_device_properties(trainer.device).total_memory
    return (
        f"{cost.card / GIB:.1f} GiB of the GPU predicted, {cost.peak / GIB:.1f} of it tensors; "
        f"it has {there / GIB:.1f}"
    )


class Ledger(TorchDispatchMode):
    """Context that keeps account of what operations cost.

    live    bytes of all storage that operations made and that still exists; peak: the most there was
    flops   floating-point operations of convolutions and matrix products
    moved   bytes that operations read and write
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.moved = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def restart(self) -> None:
        """Begin a new account, of what is alive."""
        gc.collect()
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
        self.peak = max(self.peak, self.live)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        if not func.is_view:
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
    **changes: Any,
) -> Cost:
    """The cost of a step of `trainer`: of the one in `PHASES` that needs most memory.

    Args:
        trainer: a subclass of SemiTrainer.
        plans: content of the plans file; its key `nnssl` counts.
        configuration: of the plan.
        dataset_json: content of dataset.json.
        device: `cuda` or `cpu`: decides on autocast and on what depends on the device.
        changes: of general keys of `nnssl`, for "what if".
    """
    ledger, found = Ledger(), []
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # copies of fake tensors warn
        if device == "cuda":
            stack.enter_context(_as_on_cuda())
        for context in (FakeTensorMode(), ledger, _readable()):
            stack.enter_context(context)
        rehearsal = Rehearsal(trainer, plans, configuration, dataset_json, device, **changes)
        parameters = sum(map(_bytes, {*rehearsal.method.parameters(), *rehearsal.method.buffers()}))
        rehearsal.step(PHASES[0])  # makes the optimizer's state
        ledger.restart()
        fixed = ledger.live - rehearsal.batch_bytes()
        for at in PHASES:
            ledger.restart()
            rehearsal.step(at)
            found.append(Cost(parameters, fixed, ledger.peak, ledger.flops, ledger.moved))
    return max(found, key=lambda cost: cost.peak)


def try_steps(
    trainer: type,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    device: str,
    limit: float = TRIAL_SECONDS,
) -> Trial:
    """A trial of `trainer` on this device, uncompiled. Arguments as in `predict`.

    limit: seconds that two steps of the whole patch may be expected to take; else half the patch is all.
    """
    patch_size, half = halved(plans, configuration)
    found = _timed(trainer, half, configuration, dataset_json, device, limit)
    share = math.prod(found.patch_size) / math.prod(patch_size)
    if share < 1 and 2 * found.seconds / share <= limit:
        return _timed(trainer, plans, configuration, dataset_json, device, limit)
    return replace(found, seconds=found.seconds / share, share=share)


def halved(plans: Mapping[str, Any], configuration: str) -> tuple[list[int], dict[str, Any]]:
    """The patch size of the configuration, and the plan with it halved as far as the network allows."""
    known = PlansManager(dict(plans)).get_configuration(configuration)
    factors = [math.prod(axis) for axis in zip(*known.pool_op_kernel_sizes, strict=True)]
    half = [
        n // f * f if n < 4 * f else n // 2 // f * f for n, f in zip(known.patch_size, factors, strict=True)
    ]
    smaller = {**known.configuration, "patch_size": half}
    return list(known.patch_size), {
        **plans,
        "configurations": {**plans["configurations"], configuration: smaller},
    }


def _timed(
    trainer: type,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    device: str,
    limit: float,
) -> Trial:
    on_gpu = device == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    with mock.patch.dict(os.environ, {"nnUNet_compile": "f"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rehearsal = Rehearsal(trainer, plans, configuration, dataset_json, device, real=True)
        rehearsal.step()  # the first one allocates
        seconds: list[float] = []
        while not seconds or (len(seconds) < TRIAL_STEPS and sum(seconds) < limit):
            begun = now()
            rehearsal.step()
            seconds.append(now() - begun)
    whole = rehearsal.trainer
    return Trial(
        statistics.median(seconds),
        len(seconds),
        tuple(whole.configuration_manager.patch_size),
        1.0,
        torch.cuda.max_memory_reserved() if on_gpu else 0,
        whole.num_epochs * whole.num_iterations_per_epoch,
    )


class _FloatOnCuda(TorchFunctionMode):
    """Functions that autocast runs in float32 on CUDA, but in half precision on a CPU."""

    functions = frozenset(
        {
            *(torch.softmax, F.softmax, Tensor.softmax, torch.log_softmax, F.log_softmax, Tensor.log_softmax),
            *(F.cross_entropy, F.nll_loss, F.layer_norm, F.cosine_similarity, torch.cdist, F.normalize),
            *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt),
            *(torch.sum, Tensor.sum, torch.prod, Tensor.prod, torch.cumsum, Tensor.cumsum),
            *(torch.norm, Tensor.norm, torch.linalg.vector_norm, F.softplus),
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.functions and torch.is_autocast_enabled("cpu"):
            half = (torch.float16, torch.bfloat16)
            args = [x.float() if isinstance(x, Tensor) and x.dtype in half else x for x in args]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[None]:
    """What the code and autocast do on CUDA, though the tensors are on the CPU."""
    with (
        mock.patch.object(dual, "FEWEST_LINES", {}),
        mock.patch.object(dual, "BLOCK", {}),
        mock.patch.object(ssd, "SEGMENT_TOKENS", {}),
        mock.patch.object(correlation, "CHUNK", {}),
        _FloatOnCuda(),
    ):
        yield


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Fake tensors can be read, as ones, and copied with their modules; nothing of them is kept after."""

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
        real: bool = False,
        **changes: Any,
    ) -> None:
        """real: on this device, else as on it, for fake tensors. Others as in `predict`."""
        section = {**plans.get("nnssl", {}), **changes}
        content = {**plans, "nnssl": section, "continue_training": False}
        place = torch.device(device if real else "cpu")
        self.trainer = _without_data(trainer, content, configuration, dict(dataset_json), place, real)
        self.method = self.trainer.method
        if device == "cuda" and not real:
            amp = self.trainer.general.amp
            on = amp != "float32"
            dtype = getattr(torch, amp) if on else torch.bfloat16
            self.trainer.step.autocast = lambda: torch.autocast("cpu", dtype, on, cache_enabled=False)
        self.batch = self._batch()

    def step(self, at: float = PHASES[0]) -> None:
        """One step at this progress of the training."""
        self.trainer.current_epoch = int(at * self.trainer.num_epochs)
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
        cases, scans = t._cases()
        batch: dict[str, Any] = {
            "data": torch.zeros(t.batch_size, channels, *patch),
            "target": target if t.enable_deep_supervision else target[0],
            "keys": [cases[i % len(cases)] for i in range(t.batch_size)],
        }
        if t.method_class.needs_unlabeled:
            n = t.general.unlabeled_batch_size or t.batch_size
            views = [torch.zeros(n, channels, *patch) for _ in range(1 + t.method.num_strong_views)]
            batch["unlabeled"] = {
                "weak": views[0],
                "strong": views[1:],
                "keys": [scans[i % len(scans)] for i in range(n)],
            }
        return batch


def _without_data(
    trainer: type,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    device: torch.device,
    real: bool,
) -> Any:
    """The trainer, built. nnU-Net makes its folder at once: below a temporary one."""
    count = max(2, int(dataset_json.get("numTraining", 2)))

    class Alone(trainer):
        def _cases(self) -> tuple[list[str], list[str]]:
            return [f"case_{i}" for i in range(count)], [f"scan_{i}" for i in range(count)]

        def mirror_axes(self) -> tuple[int, ...]:
            return tuple(range(len(self.configuration_manager.patch_size)))

    Alone.__name__ = trainer.__name__
    move = nn.Module.to if real else lambda module, *args, **kwargs: module  # fake ones cannot
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"nnUNet_results": folder, "nnUNet_preprocessed": folder, **SILENT}),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(Alone, "print_to_log_file", lambda *args, **kwargs: None),
        mock.patch.object(nn.Module, "to", move),
    ):
        built: Any = Alone(plans, configuration, 0, dataset_json, device)
        built.build()
    built._forward = built.method
    built.method.make_copies()
    built.method.train()
    return built
