"""CUDA without a GPU: shapes, dtypes and devices of a step as on a GPU, values of nothing.

Tensors are PyTorch's FakeTensors on the device `cuda`. Forward passes and updates run; backward passes do not
(autograd's engine asks for the device's queue)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nnssl
from nnssl.batch import SemiBatch, UnlabeledBatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

# operations whose kernels take one dtype only, and which of their arguments have it; the shape functions of
# some do not look
ONE_DTYPE = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "addmm": (0, 1, 2),
    "baddbmm": (0, 1, 2),
    "convolution": (0, 1, 2),
    "index_copy": (0, 3),
    "index_copy_": (0, 3),
    "index_add": (0, 3),
    "index_add_": (0, 3),
    "scatter": (0, 3),
    "scatter_": (0, 3),
    "index_put": (0, 2),
    "index_put_": (0, 2),
    "lerp": (0, 1),
    "lerp_": (0, 1),
}
# arithmetic that losses, banks and projectors do in float32; halves may be moved and compared
ARITHMETIC = {
    *("mm", "bmm", "mv", "addmm", "baddbmm", "add", "sub", "mul", "div", "sum", "mean", "cumsum", "prod"),
    *("exp", "log", "pow", "rsqrt", "sqrt", "reciprocal", "_softmax", "_log_softmax", "linalg_vector_norm"),
    *("logsumexp", "softplus", "sigmoid", "var_mean", "lerp", "convolution", "entr", "xlogy"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_trilinear3d", "upsample_bilinear2d"),
}
# the files and packages of networks, which autocast is meant for, and functions in which halves do no harm
PACKAGE = str(Path(nnssl.__file__).parent) + os.sep
NETWORKS = ("/dynamic_network_architectures/", PACKAGE + "networks", PACKAGE + "ssm")
IN_FLOAT32 = PACKAGE + os.path.join("networks", "heads.py")  # of the networks
# nnU-Net's own loss; a mean of eight neighbours
HARMLESS = ("supervised_loss", "gather_interpolated")
OF_NNUNET = PACKAGE + os.path.join("training", "ignore_label.py")
# their outputs' shapes depend on values, so the host waits for them
DYNAMIC = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal"}


class FakeCuda(TorchDispatchMode):
    """Context in which `cuda` is there. What makes the host wait for the device is listed in `waits`:

    item            item(), float(), int(), bool() of a tensor; it goes on with 0 or False, or 1.0
    tolist          tolist(); it goes on with a list of such values
    cpu             a copy to the CPU; it goes on with ones
    to cuda         a copy from the CPU that is not `non_blocking`, an index or a mask on the CPU among them
    nonzero, ...    operations whose output's shape depends on values; they raise

    Arithmetic in half precision that is no network's is listed in `halves`.

    Operations on CPU tensors alone are carried out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.halves: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> FakeCuda:
        self.waits.clear()
        self.halves.clear()
        for patch in (
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True),
            mock.patch.object(FakeTensor, "tolist", lambda x: self._tolist(x)),
        ):
            self._stack.enter_context(patch)
        self._stack.enter_context(self.fake)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._stack.close()

    def _tolist(self, tensor: Tensor) -> Any:
        self.waits.append("tolist")
        return torch.full(tensor.shape, _stand_in(tensor.dtype), dtype=tensor.dtype, device="cpu").tolist()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_cuda = [x for x in tensors if x.device.type == "cuda"]
        target = torch.device(kwargs.get("device") or (CUDA if on_cuda else CPU))
        if not on_cuda and target.type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.waits.append("item")
            return _stand_in(args[0].dtype)
        if name == "_to_copy" and target.type == "cpu":
            self.waits.append("cpu")
            with unset_fake_temporarily():
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        from_cpu = [x for x in tensors if x.device.type == "cpu"]
        copied = name in ("_to_copy", "copy_") and not (kwargs.get("non_blocking") or True in args[2:3])
        indexed = name in ("index", "index_put", "index_put_")
        if from_cpu and (copied or indexed):
            self.waits.append("to cuda")
            if indexed:  # as the kernel does: indices may be on either device
                args = (
                    args[0],
                    [self.tensor(i) if i is not None and i.device == CPU else i for i in args[1]],
                    *args[2:],
                )
        by_mask = indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in DYNAMIC or by_mask:
            self.waits.append(name)
        if name == "stack" and from_cpu:  # its shape function takes numbers on the CPU, its kernel does not
            raise RuntimeError("stack takes one device, found cuda and cpu")
        places = ONE_DTYPE.get(name, ())
        kinds = {args[i].dtype for i in places if i < len(args) and isinstance(args[i], Tensor)}
        if len(kinds) > 1 and not from_cpu:
            raise RuntimeError(f"{name} takes one dtype, found {', '.join(sorted(map(str, kinds)))}")
        out = func(*args, **kwargs)
        halved = getattr(out, "dtype", None) in (torch.float16, torch.bfloat16)
        if halved and name.rstrip("_") in ARITHMETIC and (place := _outside_of_networks()):
            self.halves.append(f"{name} in {place}")
        return out

    # what is moved

    def tensor(self, x: Tensor) -> Tensor:
        """A fake tensor on `cuda` of the same size, strides and dtype."""
        with self.fake:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)

    def module(self, module: nn.Module) -> None:
        """Put a module's parameters and buffers on `cuda`, in place; shared ones stay shared."""
        moved: dict[int, Tensor] = {}
        for m in module.modules():
            for name, p in m._parameters.items():
                if p is not None:
                    new = nn.Parameter(self.tensor(p.detach()), requires_grad=p.requires_grad)
                    m._parameters[name] = moved.setdefault(id(p), new)  # type: ignore[assignment]
            for name, b in m._buffers.items():
                if b is not None:
                    m._buffers[name] = moved.setdefault(id(b), self.tensor(b))

    def batch(self, batch: SemiBatch) -> SemiBatch:
        unlabeled = batch.unlabeled
        target = batch.target
        return SemiBatch(
            self.tensor(batch.labeled),
            [self.tensor(y) for y in target] if isinstance(target, list) else self.tensor(target),
            batch.labeled_cases,
            None
            if unlabeled is None
            else UnlabeledBatch(
                self.tensor(unlabeled.weak),
                tuple(self.tensor(s) for s in unlabeled.strong),
                unlabeled.cases,
            ),
        )


@contextmanager
def half_precision(dtype: torch.dtype) -> Iterator[None]:
    """The autocast of a training step on CUDA; to be entered within `FakeCuda`."""
    with torch.autocast("cuda", dtype=dtype, cache_enabled=False):
        yield


def _stand_in(dtype: torch.dtype) -> Any:
    return 1.0 if dtype.is_floating_point else False if dtype == torch.bool else 0


def _outside_of_networks() -> str:
    """Where the operation under way comes from; empty within networks and where halves do no harm."""
    frame = sys._getframe(1)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if (
            file == OF_NNUNET
            or function in HARMLESS
            or (any(n in file for n in NETWORKS) and file != IN_FLOAT32)
        ):
            return ""
        if file.startswith(PACKAGE):
            return f"{file.removeprefix(PACKAGE)}, {function}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
