"""Finding the operations of a step for which the host would wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
}


class HostReads(TorchDispatchMode):
    """Context that lists (`found`) all operations, forward and backward, that read values of tensors on the
    host, or whose output's shape depends on them: item(), bool(tensor), nonzero, boolean indexing, copies to
    the CPU. Copies from CPU to CPU are none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) and i.device.type != "meta"
            for i in args[1]
        )
        to_host = (
            name == "_to_copy"
            and args[0].device.type != "cpu"
            and (kwargs or {}).get("device") == torch.device("cpu")
        )
        if by_mask or to_host or (name in READING and func._overloadname != "self_int"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
