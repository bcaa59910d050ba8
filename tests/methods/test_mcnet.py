from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nnssl.method import full_resolution
from nnssl.methods.mcnet import MCNet, MCNetConfig, two_decoders
from tests.building import Task, put, with_unlabeled


def method(task: Task = Task(), config: MCNetConfig = MCNetConfig()) -> MCNet:  # noqa: B008
    return task.method(MCNet, config)


def test_the_second_decoder_has_no_encoder_and_no_transposed_convolution_of_its_own() -> None:
    m = method()
    assert {n.split(".")[0] for n, _ in m.second.named_parameters()} == {
        "stages",
        "transpconvs",
        "seg_layers",
    }
    assert not any(isinstance(layer, torch.nn.ConvTranspose3d) for layer in m.second.modules())
    assert any(isinstance(layer, torch.nn.ConvTranspose3d) for layer in m.student.modules())
    own, other = {id(p) for p in m.student.parameters()}, {id(p) for p in m.second.parameters()}
    assert not own & other
    assert not any(k.startswith("second.") and "encoder" in k for k in m.state_dict())


@pytest.mark.parametrize("task", [Task(), Task(dim=2, residual=True), Task(deep_supervision=False)])
def test_the_first_output_is_the_students_and_the_second_has_its_shape(task: Task) -> None:
    m, x = method(task), task.batch().labeled
    first, second = (o if isinstance(o, list) else [o] for o in two_decoders(m.student, m.second, x))
    expected = m.student(x)
    for a, b, c in zip(first, second, expected if isinstance(expected, list) else [expected], strict=True):
        torch.testing.assert_close(a, c)
        assert a.shape == b.shape and not torch.allclose(a, b)


def test_consistency_is_the_mean_square_to_the_others_sharpened_probabilities() -> None:
    task = Task(channels=3)
    m, batch = method(task, MCNetConfig(temperature=0.5)), task.batch()
    images = torch.cat([batch.labeled, batch.strong[0]])
    with torch.no_grad():
        p, q = (full_resolution(o).softmax(1) for o in two_decoders(m.student, m.second, images))
    sharp_p, sharp_q = (x**2 / (x**2).sum(1, keepdim=True) for x in (p, q))
    expected = (p - sharp_q).square().mean() + (q - sharp_p).square().mean()
    assert m(batch, 0.5)["consistency"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_sharpened_probabilities_are_targets_without_gradient() -> None:
    """Descending L_mc by the first decoder's head alone is descending mse(p_f, constant)."""
    m, batch = method(), Task().batch()
    weight = m.student.decoder.seg_layers[-1].weight
    (gradient,) = torch.autograd.grad(m(batch, 0.5)["consistency"], weight)
    first, second = two_decoders(m.student, m.second, torch.cat([batch.labeled, batch.strong[0]]))
    target = (full_resolution(second) / 0.1).softmax(1).detach()
    (expected,) = torch.autograd.grad((full_resolution(first).softmax(1) - target).square().mean(), weight)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("task", [Task(channels=3, ignore=True), Task(channels=2, regions=True, ignore=True)])
def test_ignored_voxels_do_not_count(task: Task) -> None:
    """The first two columns of labeled patches are ignored: what is said there, and only there, changes
    nothing."""
    m, batch = method(task), task.batch()
    both = m.both
    values = []
    for labeled_columns in (slice(0, 0), slice(0, 2), slice(2, 3)):

        def disturbed(*args: Any, columns: slice = labeled_columns) -> Any:
            first, second = both(*args)
            logits = first[0].clone()
            logits[:2, 0, ..., columns] += 3.0
            return [logits, *first[1:]], second

        put(m, both=disturbed)
        values.append(m(batch, 0.5)["consistency"].item())
    assert values[1] == values[0] and values[2] != pytest.approx(values[0], rel=1e-4)


def test_consistency_looks_at_labeled_and_unlabeled_patches() -> None:
    m, batch = method(), Task().batch()
    value = m(batch, 0.5)["consistency"].item()
    assert (
        m(replace(batch, labeled=batch.labeled + 1.0 * torch.randn_like(batch.labeled)), 0.5)[
            "consistency"
        ].item()
        != value
    )
    assert (
        m(with_unlabeled(batch, strong=(torch.randn_like(batch.weak),)), 0.5)["consistency"].item() != value
    )
