"""Assembling the unlabeled stream from what nnU-Net planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnssl.data.loader import UnlabeledDataset, UnlabeledLoader, start_stream
from nnssl.data.unlabeled import ensure_unlabeled
from nnssl.data.views import ViewTransform, nonzero_channels


def world() -> tuple[int, int]:
    """(rank, number of processes) of this run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def prepare_unlabeled(
    plans_manager: Any, configuration: str, dataset_json: dict, hidden: Sequence[str], log: Callable[[str], None]
) -> list[str]:
    """Names of all unlabeled cases of this run, preprocessed where they were not: by rank 0, the others wait and find it done."""
    rank, size = world()
    cases: list[str] = []
    # a group of its own: nnU-Net's gives up waiting after 10 minutes, which preprocessing may well take
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if size > 1 else None
    for turn in range(size):
        if turn == rank:
            cases = ensure_unlabeled(plans_manager, configuration, dataset_json, hidden, log=log)
        if size > 1:
            dist.barrier(group)
    if not cases:
        raise RuntimeError(
            f"no unlabeled case for {plans_manager.dataset_name}: put scans into its folder imagesUn in nnUNet_raw (named like imagesTr), "
            "or hide labels with `nnssl split`; without either, use nnUNetTrainerSupervised"
        )
    log(f"{len(cases)} unlabeled cases, {len(hidden)} of them with hidden labels")
    return cases


def share_of_batch(total: int | None, labeled: int) -> int:
    """Unlabeled samples per step of this rank: as many as labeled ones, or its share of `total` over all ranks."""
    if total is None:
        return labeled
    rank, size = world()
    if total < size:
        raise ValueError(f'"unlabeled_batch_size" is {total}, at least one sample per GPU is needed, and there are {size}')
    return total // size + int(rank < total % size)


def unlabeled_stream(
    folder: str,
    cases: list[str],
    batch_size: int,
    configuration_manager: Any,
    label_manager: Any,
    geometry: tuple[Any, bool, Any, Any],
    num_strong: int,
    pin_memory: bool,
    seed: Sequence[int] | None,
) -> Any:
    """A running stream of unlabeled batches.

    Args:
        geometry: (rotation range, dummy 2D, initial patch size, mirror axes) as nnU-Net's trainer plans them for its own augmentation.
        seed: numbers that seed the background workers, the epoch among them, or a continued run would see the same patches again; None:
            unseeded.
    """
    rotation, dummy_2d, initial_patch_size, mirror_axes = geometry
    patch_size = configuration_manager.patch_size
    mask_channels = nonzero_channels(configuration_manager.use_mask_for_norm)
    views = ViewTransform(patch_size, rotation, mirror_axes, dummy_2d, num_strong, mask_channels)
    loader = UnlabeledLoader(UnlabeledDataset(folder, cases), batch_size, initial_patch_size, patch_size, label_manager, views)
    return start_stream(loader, get_allowed_n_proc_DA(), pin_memory, seed)
