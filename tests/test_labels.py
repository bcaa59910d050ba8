from __future__ import annotations

import pytest
import torch

from nnssl.labels import LabelSpace
from tests.building import gradient


def test_classes_are_softmax_and_regions_sigmoid_in_float32() -> None:
    logits = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    torch.testing.assert_close(LabelSpace(3).probabilities(logits), logits.float().softmax(1))
    torch.testing.assert_close(
        LabelSpace(3, has_regions=True).probabilities(logits), logits.float().sigmoid()
    )


def test_harden_is_one_hot_argmax_without_gradient() -> None:
    p = torch.rand(2, 3, 4, 4, requires_grad=True)
    hard = LabelSpace(3).harden(p)
    assert not hard.requires_grad
    assert torch.equal(hard.argmax(1), p.argmax(1)) and torch.equal(hard.sum(1), torch.ones(2, 4, 4))


def test_harden_of_regions_allows_overlap_and_nothing() -> None:
    hard = LabelSpace(2, has_regions=True).harden(torch.tensor([0.9, 0.8, 0.1, 0.2]).view(2, 2, 1, 1))
    assert hard.flatten().tolist() == [1, 1, 0, 0]


def test_encode_ignores_what_carries_no_label() -> None:
    label = torch.tensor([0, 1, 2, 3]).view(1, 1, 2, 2)
    channels, mask = LabelSpace(3, ignore_label=3).encode(label)
    assert mask is not None and mask.flatten().tolist() == [True, True, True, False]
    assert channels.sum(1).flatten().tolist() == [1, 1, 1, 0]
    assert torch.equal(channels.argmax(1)[mask[:, 0]], label[mask])


def test_encode_of_regions_cuts_the_ignore_channel_off() -> None:
    target = torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool).view(2, 3, 1, 1)
    channels, mask = LabelSpace(2, has_regions=True, ignore_label=3).encode(target)
    assert (
        channels.flatten().tolist() == [1, 1, 0, 0]
        and mask is not None
        and mask.flatten().tolist() == [True, False]
    )


def test_every_voxel_belongs_to_a_class_also_with_regions() -> None:
    channels = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).view(2, 2, 1, 1)
    assert LabelSpace(2).num_classes == 2
    regions = LabelSpace(2, has_regions=True)
    member = regions.classes(channels)
    assert member.shape[0] == regions.num_classes == 3
    assert member.any(0).all() and member[:, 0].flatten().tolist() == [False, True, True]


def test_confidence_is_that_of_the_called_class_and_of_the_least_certain_region() -> None:
    p = torch.tensor([[0.2, 0.7], [0.8, 0.3]]).view(2, 2, 1, 1)  # samples of two channels
    assert LabelSpace(2).confidence(p).flatten().tolist() == pytest.approx([0.7, 0.8])
    regions = LabelSpace(2, has_regions=True)
    assert regions.confidence(p).flatten().tolist() == pytest.approx([0.7, 0.7])


def test_the_complement_is_as_probable_as_the_most_probable_region_is_not() -> None:
    p = torch.tensor([[0.2, 0.7], [0.8, 0.3]]).view(2, 2, 1, 1)
    assert torch.equal(LabelSpace(2).class_probabilities(p), p.movedim(1, 0))
    shares = LabelSpace(2, has_regions=True).class_probabilities(p)
    assert torch.equal(shares[1:], p.movedim(1, 0))
    assert shares[0].flatten().tolist() == pytest.approx([0.3, 0.2])


def test_encode_refuses_what_is_no_label_map() -> None:
    with pytest.raises(ValueError, match=r"\(B, 1, \.\.\.\)"):
        LabelSpace(3).encode(torch.zeros(2, 3, 4, 4))


def test_probabilities_are_differentiable_and_normalised() -> None:
    logits = torch.randn(2, 5, 4, 4, 4, requires_grad=True)
    p = LabelSpace(5).probabilities(logits)
    torch.testing.assert_close(p.sum(1), torch.ones(2, 4, 4, 4))
    p[:, 0].sum().backward()
    assert gradient(logits).any()
