"""Two streams: nnU-Net's own labeled loader, untouched, beside one for scans without labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import blosc2
import numpy as np
import torch
import torch.distributed as dist
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits

from nnssl.data.intact import Checked
from nnssl.data.unlabeled import ensure_unlabeled, target_of
from nnssl.data.views import RepeatableMorphology, RepeatableRemoval, ViewTransform, nonzero_channels
from nnssl.errors import told_line


class UnlabeledDataset:
    """Preprocessed scans without labels: `<case>.b2nd` (C, D, H, W) float32 and `<case>_seg.b2nd`, the
    nonzero mask (1, D, H, W).

    Args:
        folder: the `..._unlabeled` folder; its files hold no label by construction.
        identifiers: case names.
        previous: in a cascade the folder of the previous stage's segmentations, `<case>.b2nd` (D, H, W).
    """

    def __init__(self, folder: str, identifiers: list[str], previous: str | None = None) -> None:
        self.source_folder = folder
        self.identifiers = sorted(identifiers)
        self.previous = previous
        self.checked = Checked(folder)

    def load_case(self, identifier: str) -> tuple[Any, Any, Any]:
        """Image, mask and the previous stage's segmentation (None without one) as lazily read arrays."""
        self.checked(identifier)
        previous = None if self.previous is None else open_array(self.previous, identifier)
        return (
            open_array(self.source_folder, identifier),
            open_array(self.source_folder, identifier + "_seg"),
            previous,
        )


def open_array(folder: str, name: str) -> Any:
    """`folder`/`name`.b2nd, read lazily."""
    mmap = {} if os.name == "nt" else {"mmap_mode": "r"}
    return blosc2.open(
        urlpath=os.path.join(folder, name + ".b2nd"), mode="r", dparams={"nthreads": 1}, **mmap
    )


class UnlabeledLoader(nnUNetDataLoader):
    """Random patches of unlabeled scans in weak and strong views.

    Position and padding are nnU-Net's (its `get_bbox`, never forced onto foreground); volumes smaller than
    the patch are padded.

    Args:
        data: unlabeled cases.
        batch_size: U.
        initial_patch_size: size cut out, large enough to rotate and scale within.
        patch_size: size of the views.
        label_manager: nnU-Net's; only the base class asks for it.
        views: image, mask -> weak, strong views.
    """

    def __init__(
        self,
        data: UnlabeledDataset,
        batch_size: int,
        initial_patch_size: Any,
        patch_size: Any,
        label_manager: LabelManager,
        views: ViewTransform,
    ) -> None:
        super().__init__(data, batch_size, initial_patch_size, patch_size, label_manager)
        self.indices = np.array(data.identifiers)  # NumPy would make an array of a list for every draw
        self.has_ignore = False  # there are no annotated regions to prefer
        self.views = views

    def generate_train_batch(self) -> dict:
        """{"weak": (U, C, S), "strong": [(U, C, S)] * K, "keys": U case names}."""
        cases = self.get_indices()
        weak, strong = [], []
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            for case in cases:
                image, nonzero, previous = self._data.load_case(case)
                lower, upper = self.get_bbox(image.shape[1:], False, None)
                box = [[a, b] for a, b in zip(lower, upper, strict=True)]
                patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
                segmentation = torch.from_numpy(crop_and_pad_nd(nonzero, box, -1)).to(torch.int16)
                if previous is not None:
                    cropped = crop_and_pad_nd(previous, box, -1, cast_cropped_to=np.int16)
                    segmentation = torch.cat([segmentation, torch.from_numpy(cropped)[None]])
                if self.patch_size_was_2d:
                    patch, segmentation = patch[:, 0], segmentation[:, 0]
                w, s = self.views(patch, segmentation)
                weak.append(w)
                strong.append(s)
        return {
            "weak": torch.stack(weak),
            "strong": [torch.stack(view) for view in zip(*strong, strict=True)],
            "keys": list(cases),
        }


class TwoStreams:
    """Iterator over nnU-Net's labeled batches, each with an unlabeled batch under `unlabeled`."""

    def __init__(self, labeled: Any, unlabeled: Any) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled

    def __iter__(self) -> TwoStreams:
        return self

    def __next__(self) -> dict:
        return {**next(self.labeled), "unlabeled": next(self.unlabeled)}

    def _finish(self) -> None:
        for stream in (self.labeled, self.unlabeled):
            if isinstance(stream, NonDetMultiThreadedAugmenter):
                stream._finish()


def start_stream(
    loader: UnlabeledLoader, num_processes: int, pin_memory: bool, seed: Sequence[int] | None = None
) -> Any:
    """Run a loader as nnU-Net does: in this process (num_processes = 0) or in background workers. Draws one
    batch to start them."""
    stream: Any
    if num_processes == 0:
        stream = SingleThreadedAugmenter(loader, None)
    else:
        stream = NonDetMultiThreadedAugmenter(
            loader,
            None,
            num_processes,
            num_cached=max(6, num_processes // 2),
            seeds=worker_seeds(seed, num_processes),
            pin_memory=pin_memory,
            wait_time=0.002,
        )
    next(stream)
    return stream


def make_repeatable(loader: nnUNetDataLoader) -> None:
    """Take out of nnU-Net's augmentation what depends on more than the random state: the choice between blur
    by convolution and by FFT, by timing; in a cascade the order of the labels, by all draws before."""
    pending, seen = [loader.transforms], set()
    while pending:
        transform = pending.pop()
        if transform is None or id(transform) in seen:
            continue
        seen.add(id(transform))
        if isinstance(transform, GaussianBlurTransform):
            transform.benchmark = False
        for cls in (RepeatableMorphology, RepeatableRemoval):
            if type(transform) is cls.__base__:
                transform.__class__ = cls  # it adds no attribute
        pending.extend(getattr(transform, "transforms", ()))
        pending.append(getattr(transform, "transform", None))


def worker_seeds(seed: Sequence[int] | None, num_processes: int) -> list[int]:
    """One seed per background worker: numpy's and torch's generators there would else start equal in all of
    them (torch) or unseeded."""
    return [
        int(s)
        for s in np.random.SeedSequence(None if seed is None else list(seed)).generate_state(num_processes)
    ]


def world() -> tuple[int, int]:
    """(rank, number of processes) of this run."""
    return (
        (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    )


def patient_group() -> Any:
    """A group of all processes that waits for days; None where there is one process."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7)) if world()[1] > 1 else None


def wait_for_all() -> None:
    """Until every process is here."""
    if (group := patient_group()) is not None:
        dist.barrier(group)


class FailedElsewhere(RuntimeError):
    """The error of another process, which tells it itself."""


def on_first_rank(act: Callable[[], Any]) -> None:
    """Rank 0 acts while the others wait; what it raises ends all of them."""
    rank, size = world()
    if size == 1:
        act()
        return
    failed: Exception | None = None
    if rank == 0:
        try:
            act()
        except Exception as error:
            failed = error
    told = [None if failed is None else told_line(failed) or repr(failed)]
    dist.broadcast_object_list(told, src=0, group=patient_group())
    if failed is not None:
        raise failed
    if told[0] is not None:
        raise FailedElsewhere(f"rank 0: {told[0]}")


def prepare_unlabeled(
    plans_manager: Any,
    configuration: str,
    dataset_json: dict,
    hidden: Sequence[str],
    log: Callable[[str], None],
) -> list[str]:
    """Names of all unlabeled cases of this run, preprocessed where they were not: by rank 0, the others wait
    and find it done."""
    rank, size = world()
    cases: list[str] = []
    # a group of its own: nnU-Net's gives up waiting after 10 minutes, which preprocessing may well take
    group = patient_group()

    def prepare() -> None:
        nonlocal cases
        cases = ensure_unlabeled(plans_manager, configuration, dataset_json, hidden, log=log)

    on_first_rank(prepare)
    for turn in range(1, size):
        if turn == rank:
            prepare()
        dist.barrier(group)
    if not cases:
        if nnUNet_raw.is_set():
            folder = os.path.join(nnUNet_raw, plans_manager.dataset_name, "imagesUn")
            looked_at = f"no scan in {folder}" if os.path.isdir(folder) else f"{folder} does not exist"
        else:
            folder = target_of(plans_manager, configuration, dataset_json).folder
            looked_at = f"nnUNet_raw is not set, and none is preprocessed in {folder}"
        raise RuntimeError(
            f"no unlabeled case for {plans_manager.dataset_name}: {looked_at}. Put scans into its folder "
            "imagesUn in nnUNet_raw (named like imagesTr), or hide labels with `nnssl split`; without "
            "either, use nnUNetTrainerSupervised"
        )
    log(f"{len(cases)} unlabeled cases, {len(hidden)} of them with hidden labels")
    return cases


def share_of_batch(total: int | None, labeled: int) -> int:
    """Unlabeled samples per step of this rank: as many as labeled ones, or its share of `total` over all
    ranks."""
    if total is None:
        return labeled
    rank, size = world()
    if total < size:
        raise ValueError(
            f'"unlabeled_batch_size" is {total}, at least one sample per GPU is needed, and there are {size}'
        )
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
    previous: str | None = None,
) -> Any:
    """A running stream of unlabeled batches.

    Args:
        geometry: (rotation range, dummy 2D, initial patch size, mirror axes) as nnU-Net's trainer plans them
            for its own augmentation.
        seed: numbers that seed the background workers, the epoch among them, or a continued run would see the
            same patches again; None: unseeded.
        previous: in a cascade the folder of the previous stage's segmentations.
    """
    rotation, dummy_2d, initial_patch_size, mirror_axes = geometry
    patch_size = configuration_manager.patch_size
    mask_channels = nonzero_channels(configuration_manager.use_mask_for_norm)
    labels = () if previous is None else label_manager.foreground_labels
    views = ViewTransform(patch_size, rotation, mirror_axes, dummy_2d, num_strong, mask_channels, labels)
    data = UnlabeledDataset(folder, cases, previous)
    loader = UnlabeledLoader(data, batch_size, initial_patch_size, patch_size, label_manager, views)
    return start_stream(loader, get_allowed_n_proc_DA(), pin_memory, seed)
