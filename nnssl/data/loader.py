"""Two streams: nnU-Net's own labeled loader, untouched, beside one for scans without labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits

from nnssl.data.views import ViewTransform


class UnlabeledDataset:
    """Preprocessed scans without labels: `<case>.b2nd` (C, D, H, W) float32 and `<case>_seg.b2nd`, the nonzero mask (1, D, H, W).

    Args:
        folder: the `..._unlabeled` folder; its files hold no label by construction.
        identifiers: case names.
    """

    def __init__(self, folder: str, identifiers: list[str]) -> None:
        self.source_folder = folder
        self.identifiers = sorted(identifiers)

    def load_case(self, identifier: str) -> tuple[Any, Any]:
        """Image and mask as lazily read arrays."""
        return self._open(identifier), self._open(identifier + "_seg")

    def _open(self, name: str) -> Any:
        mmap = {} if os.name == "nt" else {"mmap_mode": "r"}
        return blosc2.open(urlpath=os.path.join(self.source_folder, name + ".b2nd"), mode="r", dparams={"nthreads": 1}, **mmap)


class UnlabeledLoader(nnUNetDataLoader):
    """Random patches of unlabeled scans in weak and strong views.

    Position and padding are nnU-Net's (its `get_bbox`, never forced onto foreground); volumes smaller than the patch are padded.

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
        self.has_ignore = False  # there are no annotated regions to prefer
        self.views = views

    def generate_train_batch(self) -> dict:
        """{"weak": (U, C, S), "strong": [(U, C, S)] * K, "keys": U case names}."""
        cases = self.get_indices()
        weak, strong = [], []
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            for case in cases:
                image, nonzero = self._data.load_case(case)
                lower, upper = self.get_bbox(image.shape[1:], False, None)
                box = [[a, b] for a, b in zip(lower, upper, strict=True)]
                patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
                inside = torch.from_numpy(crop_and_pad_nd(nonzero, box, -1)).to(torch.int16)
                if self.patch_size_was_2d:
                    patch, inside = patch[:, 0], inside[:, 0]
                w, s = self.views(patch, inside)
                weak.append(w)
                strong.append(s)
        return {"weak": torch.stack(weak), "strong": [torch.stack(view) for view in zip(*strong, strict=True)], "keys": list(cases)}


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


def start_stream(loader: UnlabeledLoader, num_processes: int, pin_memory: bool, seed: Sequence[int] | None = None) -> Any:
    """Run a loader as nnU-Net does: in this process (num_processes = 0) or in background workers. Draws one batch to start them."""
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
    """Take out of nnU-Net's augmentation the one choice that depends on timing: blur by convolution or by FFT, equal up to rounding."""
    pending, seen = [loader.transforms], set()
    while pending:
        transform = pending.pop()
        if transform is None or id(transform) in seen:
            continue
        seen.add(id(transform))
        if isinstance(transform, GaussianBlurTransform):
            transform.benchmark = False
        pending.extend(getattr(transform, "transforms", ()))
        pending.append(getattr(transform, "transform", None))


def worker_seeds(seed: Sequence[int] | None, num_processes: int) -> list[int]:
    """One seed per background worker: numpy's and torch's generators there would else start equal in all of them (torch) or unseeded."""
    return [int(s) for s in np.random.SeedSequence(None if seed is None else list(seed)).generate_state(num_processes)]
