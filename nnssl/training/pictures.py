"""Key `pseudo_label_pictures`: what the deployed network calls a few fixed unlabeled scans, over time.

Into the folder `pseudo_labels` of the output folder go the views once (`scans.npz`) and, at every moment, the
label, confidence and acceptance of every voxel (`epoch_<n>.npz`), of at most `SLICES` slices of each view.
With a teacher, student and teacher are compared on views of validation cases, too. No random number is drawn.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

from nnssl.data.streams import UnlabeledDataset
from nnssl.data.structures import mask_of, structures
from nnssl.data.unlabeled import unlabeled_folder
from nnssl.files import replacing
from nnssl.method import TeacherMethod, full_resolution, inference

FOLDER = "pseudo_labels"
SCANS, SLICES = 3, 16
SHARE = 0.003  # of the training's forward passes at most; small ones cost twice their share of the time


def moments(epochs: int, times: int) -> list[int]:
    """Epochs after which pictures are taken, evenly spread, the last one among them."""
    times = min(times, epochs)
    return [math.ceil((i + 1) * epochs / times) - 1 for i in range(times)]


def affordable(times: int, passes: int, steps: int, samples: int) -> int:
    """How often `passes` forward passes of one sample fit into `SHARE` of the training, at least once.

    samples: of a step; each counts as three passes, forward and backward.
    """
    return max(1, min(times, int(SHARE * 3 * samples * steps / passes)))


def spread(names: Sequence[str], count: int) -> list[str]:
    """Some of the names, from the first to the last."""
    names = sorted(names)
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).astype(int))]


def view(array: Any, center: Sequence[int], patch_size: Sequence[int], fill: float) -> np.ndarray:
    """(C, patch) around a voxel of (C, D, H, W), a slice where the patch is 2D; `fill` beyond the edges."""
    size = (1,) * (3 - len(patch_size)) + tuple(patch_size)
    lower = [c - n // 2 for c, n in zip(center, size, strict=True)]
    box = [[low, low + n] for low, n in zip(lower, size, strict=True)]
    return np.asarray(crop_and_pad_nd(array, box, fill)).reshape(array.shape[0], *patch_size)


class Pictures:
    """Takes the pictures of one run; on the first rank alone.

    Args:
        trainer: initialized, with its loaders started.
        times: how often over the training, fewer where they would cost more than `SHARE`.
    """

    def __init__(self, trainer: Any, times: int) -> None:
        self.trainer = trainer
        self.patch_size = tuple(int(n) for n in trainer.configuration_manager.patch_size)
        self.folder = Path(trainer.output_folder) / FOLDER
        self.structures = structures(trainer.dataset_json)
        self.networks = {"deployed": trainer.network}
        if isinstance(trainer.method, TeacherMethod):
            self.networks = {"student": trainer.method.student, "teacher": trainer.method.teacher}
        self.scans = self._unlabeled_views()
        self.labeled = self._validation_views() if len(self.networks) > 1 else []
        passes = len(self.scans) + len(self.networks) * len(self.labeled)
        steps = trainer.num_epochs * trainer.num_iterations_per_epoch
        samples = trainer.batch_size + (trainer.general.unlabeled_batch_size or trainer.batch_size)
        self.epochs = moments(trainer.num_epochs, affordable(times, passes, steps, samples))
        self.folder.mkdir(exist_ok=True)
        content, before = self._scans_file(), self._before()
        others = any(not np.array_equal(before.get(key, ()), value) for key, value in content.items())
        for old in self.folder.glob("epoch_*.npz"):  # of a run whose end this one does not continue
            if others or int(old.stem.removeprefix("epoch_")) >= trainer.current_epoch:
                old.unlink()
        self._write("scans.npz", content)

    def _before(self) -> dict[str, np.ndarray]:
        """scans.npz of the run so far; empty where none is there or it is damaged."""
        try:
            with np.load(self.folder / "scans.npz", allow_pickle=False) as content:
                return dict(content)
        except Exception:  # damaged files raise nearly anything
            return {}

    def _names(self, cases: Sequence[str]) -> list[str]:
        """The scans that a continued run has shown so far, where all of them are still there."""
        names = [str(name) for name in self._before().get("names", ())]
        if self.trainer.current_epoch > 0 and names and set(names) <= set(cases):
            return names
        return spread(cases, SCANS)

    def _unlabeled_views(self) -> dict[str, np.ndarray]:
        """The middle of some scans: {case: (C, patch)}."""
        trainer = self.trainer
        names = self._names(trainer.method.planned.unlabeled_cases)
        dataset = UnlabeledDataset(unlabeled_folder(trainer.preprocessed_dataset_folder), names)
        found = {}
        for name in names:
            image = dataset.load_case(name)[0]
            found[name] = view(image, [n // 2 for n in image.shape[1:]], self.patch_size, 0)
        return found

    def _validation_views(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Some validation cases around their structures: images (C, patch) and labels (patch)."""
        trainer = self.trainer
        names = spread(trainer.do_split()[1], SCANS)
        dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, names)
        found = []
        for name in names:
            image, labels, _, properties = dataset.load_case(name)
            places = [p for p in properties["class_locations"].values() if len(p)]
            center = np.concatenate(places)[:, 1:].mean(0) if places else np.divide(image.shape[1:], 2)
            index = [int(c) for c in center]
            fill = trainer.label_manager.ignore_label
            cut = view(labels, index, self.patch_size, -1 if fill is None else fill)
            found.append((view(image, index, self.patch_size, 0), cut[0]))
        return found

    def take(self, epoch: int) -> None:
        """Pictures after this epoch."""
        content = {}
        progress = (epoch + 1) / self.trainer.num_epochs
        for i, image in enumerate(self.scans.values()):
            p = self._probabilities(self.trainer.network, image)
            accepted = self.trainer.method.accepted(p, progress)
            content[f"label_{i}"] = self._cut(self._labels(p))
            confidence = self.trainer.method.labels.confidence(p)[0, 0].cpu().numpy()
            content[f"confidence_{i}"] = self._cut(to_byte(confidence))
            if accepted is not None:
                content[f"accepted_{i}"] = self._cut((accepted[0, 0] > 0).cpu().numpy())
        if self.labeled:
            for name, network in self.networks.items():
                content[f"dice_{name}"] = self._dice(network)
        self._write(f"epoch_{epoch:05d}.npz", content)

    def _probabilities(self, network: Any, image: np.ndarray) -> Tensor:
        """(1, K, patch). The network is called uncompiled: another shape would be compiled anew."""
        device = self.trainer.device
        x = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None].to(device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), inference(network), self.trainer.step.autocast():
            return self.trainer.method.probabilities(full_resolution(network.forward(x)))

    def _labels(self, p: Tensor) -> np.ndarray:
        return np.asarray(self.trainer.label_manager.convert_probabilities_to_segmentation(p[0].cpu()))

    def _dice(self, network: Any) -> np.ndarray:
        """Of every structure, pooled over the validation views; NaN where it is in none."""
        both, sizes = np.zeros(len(self.structures)), np.zeros(len(self.structures))
        for image, truth in self.labeled:
            called = self._labels(self._probabilities(network, image))
            ignored = self.trainer.label_manager.ignore_label
            known = truth >= 0 if ignored is None else (truth >= 0) & (truth != ignored)
            for k, values in enumerate(self.structures.values()):
                p, t = (mask_of(labels, values) & known for labels in (called, truth))
                both[k] += (p & t).sum()
                sizes[k] += p.sum() + t.sum()
        return np.divide(2 * both, sizes, out=np.full_like(both, np.nan), where=sizes > 0)

    def _cut(self, array: np.ndarray) -> np.ndarray:
        """Some slices of a view (patch) as small numbers; of a 2D one itself: (slices, H, W)."""
        volume = array.reshape((1,) * (3 - array.ndim) + array.shape)
        kept = volume[self._indices(volume.shape[0])]
        return kept.astype(np.uint8 if kept.max(initial=0) < 256 else np.uint16)

    @staticmethod
    def _indices(depth: int) -> np.ndarray:
        return np.unique(np.linspace(0, depth - 1, min(depth, SLICES)).round().astype(int))

    def _scans_file(self) -> dict[str, np.ndarray]:
        low_high = [np.percentile(image[0], [0.5, 99.5]) for image in self.scans.values()]
        images = {
            f"image_{i}": self._cut(to_byte((image[0] - low) / max(float(high - low), 1e-6)))
            for i, (image, (low, high)) in enumerate(zip(self.scans.values(), low_high, strict=True))
        }
        spacing = self.trainer.configuration_manager.spacing[-2:]
        return {"names": np.array(list(self.scans)), "spacing": np.array(spacing, float), **images}

    def _write(self, name: str, content: dict[str, np.ndarray]) -> None:
        with replacing(os.path.join(self.folder, name)) as partial:
            np.savez_compressed(partial, allow_pickle=False, **content)


def to_byte(share: np.ndarray) -> np.ndarray:
    """0 to 1 as 0 to 255."""
    return np.round(255 * np.clip(share, 0, 1)).astype(np.uint8)
