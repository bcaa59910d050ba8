from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from nnssl.data.views import ViewTransform, nonzero_channels, previous_stage_transforms
from nnssl.training.randomness import seed_everything


def transform(**kwargs: object) -> ViewTransform:
    defaults: dict = {
        "patch_size": (16, 20, 24),
        "rotation": (-0.5, 0.5),
        "mirror_axes": (0, 1, 2),
        "dummy_2d": False,
        "num_strong": 2,
    }
    return ViewTransform(**{**defaults, **kwargs})


def volume(channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright balls on dark ground: geometry can be read off any intensity."""
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, s) for s in (22, 28, 32)], indexing="ij"))
    ball = (((grid - torch.tensor([0.2, -0.3, 0.1]).view(3, 1, 1, 1)) ** 2).sum(0) < 0.12).float() * 4 - 1
    return ball[None].repeat(channels, 1, 1, 1), torch.zeros(1, 22, 28, 32, dtype=torch.int16)


def test_views_have_the_patch_size_and_number() -> None:
    weak, strong = transform()(*volume())
    assert weak.shape == (1, 16, 20, 24) and [s.shape for s in strong] == [weak.shape] * 2


def test_strong_views_keep_the_geometry_of_the_weak_view() -> None:
    seed_everything(0)
    views, overlap, changed = transform(), [], []
    for _ in range(30):
        weak, strong = views(*volume())
        inside = weak > 1
        if not 50 < inside.sum() < inside.numel() // 2:
            continue
        for s in strong:
            threshold = (s[inside].median() + s[~inside].median()) / 2
            found = s > threshold
            overlap.append((2 * (found & inside).sum() / (found.sum() + inside.sum())).item())
            changed.append((s - weak).abs().mean().item())
    assert len(overlap) > 30 and np.median(overlap) > 0.9
    assert np.median(changed) > 0.05


def test_the_strong_views_differ_from_each_other() -> None:
    seed_everything(1)
    views = transform()
    assert sum(not torch.equal(*views(*volume())[1]) for _ in range(10)) >= 8


def test_the_weak_view_is_the_image_itself_where_no_geometry_is_drawn() -> None:
    seed_everything(0)
    views = transform(mirror_axes=())
    image = torch.randn(1, 16, 20, 24)
    weak = [views(image.clone(), torch.zeros(1, 16, 20, 24, dtype=torch.int16))[0] for _ in range(20)]
    assert sum(torch.equal(w, image) for w in weak) >= 5  # rotation and scaling: 20 % each


def test_masked_channels_are_zero_outside_the_body_in_every_view() -> None:
    seed_everything(2)
    image = torch.randn(2, 22, 28, 32) + 3
    outside = torch.zeros(1, 22, 28, 32, dtype=torch.int16)
    outside[:, :, :14] = -1
    weak, strong = transform(mask_channels=[1], rotation=(0.0, 0.0), mirror_axes=())(image, outside)
    for view in (weak, *strong):
        empty = view[1] == 0
        assert 0.3 < empty.float().mean() < 0.7 and not (view[0][empty] == 0).all()


def test_anisotropic_mode_moves_within_slices_only() -> None:
    seed_everything(0)
    slices = torch.arange(16.0).view(1, 16, 1, 1).expand(1, 16, 28, 32).clone()
    views = transform(patch_size=(16, 20, 24), dummy_2d=True, mirror_axes=(), rotation=(-3.0, 3.0))
    for _ in range(10):
        weak, _ = views(slices.clone(), torch.zeros(1, 16, 28, 32, dtype=torch.int16))
        center = weak[0, :, 8:12, 10:14]
        torch.testing.assert_close(
            center, torch.arange(16.0).view(16, 1, 1).expand_as(center), atol=1e-3, rtol=0
        )


def test_2d_views_work() -> None:
    weak, strong = transform(patch_size=(20, 24), mirror_axes=(0, 1))(
        torch.randn(1, 28, 32), torch.zeros(1, 28, 32, dtype=torch.int16)
    )
    assert weak.shape == strong[0].shape == (1, 20, 24)


def test_the_same_seed_gives_the_same_views_also_after_pickling() -> None:
    drawn = []
    for views in (transform(), pickle.loads(pickle.dumps(transform()))):
        seed_everything(4)
        weak, strong = views(*volume())
        drawn.append([weak, *strong])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    ("given", "expected"), [([False, True], [1]), (None, []), ([], []), ([True, True], [0, 1])]
)
def test_mask_channels_follow_the_plan(given: list[bool] | None, expected: list[int]) -> None:
    assert nonzero_channels(given) == expected


def cascade_views(**kwargs: object) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Views of an image that is 5 in label 1 and 9 in label 2, whose previous segmentation is right."""
    labels = torch.zeros(22, 28, 32, dtype=torch.int16)
    labels[5:15, 5:15, 5:15], labels[5:15, 17:24, 16:28] = 1, 2
    image = torch.zeros(1, 22, 28, 32)
    image[0, labels == 1], image[0, labels == 2] = 5, 9
    segmentation = torch.stack([torch.zeros_like(labels), labels])
    weak, strong = transform(previous_labels=(1, 2), **kwargs)(image, segmentation)
    return weak, strong, labels


def test_the_previous_stage_moves_with_the_image_in_every_view() -> None:
    seed_everything(0)
    agreement = []
    for _ in range(20):
        weak, strong, _ = cascade_views()
        assert weak.shape == (3, 16, 20, 24) and all(s.shape == weak.shape for s in strong)
        for view in (weak, *strong):
            assert set(view[1:].unique().tolist()) <= {0.0, 1.0} and view[1:].sum(0).max() <= 1
        for channel, value in ((1, 5), (2, 9)):
            inside = weak[0].round() == value
            if inside.sum() > 100:
                agreement.append((weak[channel][inside]).mean().item())
    assert len(agreement) > 10 and min(agreement) > 0.9


def test_mistakes_of_the_previous_stage_are_simulated_in_strong_views_alone() -> None:
    seed_everything(1)
    changed, different = [], []
    for _ in range(30):
        weak, (a, b), labels = cascade_views(mirror_axes=(), rotation=(0.0, 0.0))
        changed.append(not torch.equal(a[1:], weak[1:]))
        different.append(not torch.equal(a[1:], b[1:]))
        if weak[0].unique().numel() == 3:  # neither rotated nor scaled
            cut = labels[3:19, 4:24, 4:28]
            assert torch.equal(weak[1:], torch.stack([cut == 1, cut == 2]).float())
    assert 5 < sum(changed) < 28 and sum(different) > 5


def test_simulated_mistakes_depend_on_the_random_state_alone() -> None:
    """Not on draws before: a continued training starts with fresh transforms."""
    mistakes, drawn = previous_stage_transforms(3), []
    image = torch.rand(4, 16, 16, 16).round()
    for _ in range(3):
        seed_everything(3)
        drawn.append([mistakes(image=image.clone())["image"] for _ in range(6)])
        seed_everything(len(drawn))
        mistakes(image=image.clone())
    assert any(not torch.equal(x, image) for x in drawn[0])
    assert all(torch.equal(a, b) for other in drawn[1:] for a, b in zip(drawn[0], other, strict=True))
