from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnssl.data.streams import (
    TwoStreams,
    UnlabeledDataset,
    UnlabeledLoader,
    make_repeatable,
    share_of_batch,
    start_stream,
    worker_seeds,
)
from nnssl.data.views import RepeatableMorphology, ViewTransform
from nnssl.training.randomness import seed_everything

LABELS = SimpleNamespace(all_labels=[0, 1], has_ignore_label=True)
PATCH = (8, 12, 10)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Three cases; the second is smaller than the patch along every axis."""
    for i, shape in enumerate(((14, 20, 18), (4, 6, 5), (10, 16, 30))):
        image = np.full((1, *shape), 10.0 * (i + 1), np.float32)
        blosc2.asarray(image, urlpath=str(tmp_path / f"case_{i}.b2nd"))
        blosc2.asarray(np.zeros((1, *shape), np.int16), urlpath=str(tmp_path / f"case_{i}_seg.b2nd"))
        (tmp_path / f"case_{i}.pkl").write_bytes(pickle.dumps({"class_locations": {}}))
    return str(tmp_path)


def loader(
    folder: str,
    cases: list[str] | None = None,
    patch: tuple[int, ...] = PATCH,
    batch: int = 4,
    strong: int = 2,
) -> UnlabeledLoader:
    views = ViewTransform(patch, (-0.3, 0.3), tuple(range(len(patch))), False, strong)
    initial = tuple(round(1.3 * p) for p in patch)
    return UnlabeledLoader(
        UnlabeledDataset(folder, cases or ["case_0", "case_1", "case_2"]),
        batch,
        initial,
        patch,
        LABELS,
        views,
    )


def test_a_draw_does_not_grow_with_the_number_of_cases_and_is_that_of_nnunet(folder: str) -> None:
    drawn = loader(folder)
    np.random.seed(3)
    cases = drawn.get_indices()
    np.random.seed(3)
    assert list(np.random.choice(["case_0", "case_1", "case_2"], 4)) == list(cases)
    assert isinstance(drawn.indices, np.ndarray)


def test_a_batch_has_a_weak_view_and_k_strong_ones_per_case(folder: str) -> None:
    batch = next(loader(folder))
    assert batch["weak"].shape == (4, 1, *PATCH) and batch["weak"].dtype == torch.float32
    assert len(batch["strong"]) == 2 and all(s.shape == batch["weak"].shape for s in batch["strong"])
    assert len(batch["keys"]) == 4 and set(batch["keys"]) <= {"case_0", "case_1", "case_2"}


def test_each_sample_comes_from_the_case_it_names(folder: str) -> None:
    seed_everything(0)
    batch = next(loader(folder, batch=12))
    for key, weak in zip(batch["keys"], batch["weak"], strict=True):
        assert weak.max().item() == pytest.approx(10 * (int(key[-1]) + 1), rel=1e-4)


def test_every_case_is_drawn(folder: str) -> None:
    seed_everything(0)
    stream = loader(folder)
    assert {k for _ in range(10) for k in next(stream)["keys"]} == {"case_0", "case_1", "case_2"}


def test_a_volume_smaller_than_the_patch_is_padded(folder: str) -> None:
    weak = next(loader(folder, ["case_1"]))["weak"]
    assert (
        weak.shape == (4, 1, *PATCH) and (weak == 0).any() and torch.isclose(weak.amax(), torch.tensor(20.0))
    )


def test_2d_patches_are_slices(folder: str) -> None:
    batch = next(loader(folder, patch=(12, 10)))
    assert batch["weak"].shape == (4, 1, 12, 10) and batch["strong"][0].shape == (4, 1, 12, 10)


@pytest.mark.parametrize("patch", [PATCH, (12, 10)])
def test_a_cascades_segmentation_is_cut_out_with_the_image(
    folder: str, tmp_path: Path, patch: tuple[int, ...]
) -> None:
    """Label 2 in the middle of images that are 1 there; outside the volume there is no label."""
    previous = tmp_path / "previous"
    previous.mkdir()
    for i, shape in enumerate(((14, 20, 18), (4, 6, 5), (10, 16, 30))):
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(n // 4, n - n // 4) for n in shape)] = 2
        blosc2.asarray(label, urlpath=str(previous / f"case_{i}.b2nd"))
        image = (label[None] == 2).astype(np.float32)
        blosc2.asarray(image, urlpath=str(Path(folder) / f"case_{i}.b2nd"), mode="w")
    views = ViewTransform(patch, (0.0, 0.0), (0,), False, 1, previous_labels=(1, 2))
    data = UnlabeledDataset(folder, ["case_0", "case_1", "case_2"], str(previous))
    seed_everything(0)
    batch = next(UnlabeledLoader(data, 12, patch, patch, LABELS, views))
    assert batch["weak"].shape == (12, 3, *patch) and (batch["weak"][:, 1] == 0).all()
    plain = [w for w in batch["weak"] if w[0].unique().numel() <= 2]
    assert len(plain) > 3 and all(torch.equal(w[0], w[2]) for w in plain)
    assert any(w[0].any() for w in plain)


def test_the_same_seed_draws_the_same_batches_also_from_a_pickled_loader(folder: str) -> None:
    """What a spawned worker receives is a pickled copy."""
    drawn = []
    for stream in (loader(folder), pickle.loads(pickle.dumps(loader(folder)))):
        seed_everything(3)
        drawn.append([next(stream) for _ in range(2)])
    for a, b in zip(*drawn, strict=True):
        assert torch.equal(a["weak"], b["weak"]) and all(
            torch.equal(s, t) for s, t in zip(a["strong"], b["strong"], strict=True)
        )
        assert a["keys"] == b["keys"]


def test_background_workers_deliver_and_end(folder: str) -> None:
    labeled = iter([{"data": 1}])
    stream = TwoStreams(labeled, start_stream(loader(folder), 2, pin_memory=False, seed=(0, 0, 0)))
    batch = next(stream)
    assert batch["data"] == 1 and batch["unlabeled"]["weak"].shape == (4, 1, *PATCH)
    workers = stream.unlabeled._processes
    stream._finish()
    for worker in workers:
        worker.join(timeout=10)
    assert not any(worker.is_alive() for worker in workers)


def test_make_repeatable_replaces_what_depends_on_earlier_draws() -> None:
    morphology = ApplyRandomBinaryOperatorTransform([-2, -1])
    stream = SimpleNamespace(transforms=ComposeTransforms([RandomTransform(morphology, 0.4)]))
    make_repeatable(stream)
    assert type(morphology) is RepeatableMorphology
    morphology.channel_idx = [-1, -2]
    seed_everything(0)
    first = morphology.get_parameters(image=torch.zeros(3, 2, 2))
    seed_everything(0)
    assert morphology.get_parameters(image=torch.zeros(3, 2, 2)) == first


def test_workers_get_seeds_of_their_own() -> None:
    seeds = [
        worker_seeds(numbers, 8) for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]  # seed, rank, epoch
    assert len({s for eight in seeds for s in eight}) == 32 and seeds[0] == worker_seeds((0, 0, 0), 8)
    assert worker_seeds(None, 4) != worker_seeds(None, 4)


def test_the_unlabeled_batch_is_shared_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share_of_batch(None, 3) == 3
    for total, size in ((5, 2), (4, 4), (7, 3)):
        shares = []
        for rank in range(size):
            monkeypatch.setattr("nnssl.data.streams.world", lambda r=rank, s=size: (r, s))
            shares.append(share_of_batch(total, 1))
        assert sum(shares) == total and max(shares) - min(shares) <= 1
    with pytest.raises(ValueError, match=r'"unlabeled_batch_size" is 2.*there are 3'):
        share_of_batch(2, 1)
