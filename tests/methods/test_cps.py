from __future__ import annotations

import pytest
import torch

from nnssl.ema import copy_weights
from nnssl.losses.pseudo_label import cross_entropy_dice
from nnssl.method import full_resolution
from nnssl.methods.cps import CPS, CPSConfig
from tests.building import Task

PLAIN = CPSConfig(cutmix_probability=0.0)


def method(task: Task = Task(), config: CPSConfig = PLAIN) -> CPS:  # noqa: B008
    return task.method(CPS, config)


def test_the_networks_start_from_different_weights_of_the_same_architecture() -> None:
    m = method()
    pairs = list(zip(m.student.parameters(), m.second.parameters(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    assert not torch.equal(pairs[0][0], pairs[0][1])


@pytest.mark.parametrize("task", [Task(channels=3), Task(channels=2, regions=True)])
def test_each_network_learns_what_the_other_says_of_the_weak_view(task: Task) -> None:
    """The second network calls everything class 1: that is the student's target; the student's own calls are
    the second's."""
    m, batch = method(task), task.batch()
    with torch.no_grad():
        *_, bias = (p for n, p in m.second.named_parameters() if "seg_layers" in n and n.endswith("bias"))
        bias.copy_(torch.tensor([-50.0, 50.0, -50.0][: task.channels]))
    terms = m(batch, 0.5)
    constant = torch.zeros(2, task.channels, *task.patch_size)
    constant[:, 1] = 1
    with torch.no_grad():
        strong = [full_resolution(n(batch.strong[0])) for n in (m.student, m.second)]
        called = m.labels.harden(m.probabilities(full_resolution(m.student(batch.weak))))
    torch.testing.assert_close(terms["pseudo"], cross_entropy_dice(strong[0], constant, m.labels))
    torch.testing.assert_close(terms["pseudo_second"], cross_entropy_dice(strong[1], called, m.labels))


def test_equal_networks_have_equal_losses() -> None:
    m = method()
    copy_weights(m.second, m.student)
    terms = m(Task().batch(), 0.5)
    assert terms["pseudo"].item() == pytest.approx(terms["pseudo_second"].item())
    assert terms["supervised"].item() == pytest.approx(terms["supervised_second"].item())


def test_boxes_mix_images_and_both_pseudo_labels_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With boxes over everything, each sample is its neighbour in image and label: the losses of the unmixed
    batch."""
    plain = method()(Task().batch(), 0.5)
    monkeypatch.setattr(
        "nnssl.methods.cps.cutmix_mask", lambda n, size, *a: torch.ones(n, 1, *size, dtype=torch.bool)
    )
    mixed = method()(Task().batch(), 0.5)
    for name in ("pseudo", "pseudo_second"):
        assert mixed[name].item() == pytest.approx(plain[name].item(), rel=1e-5)


def test_pseudo_labels_carry_no_gradient_to_their_source() -> None:
    m = method()
    m(Task().batch(), 0.5)["pseudo"].backward()
    assert all(p.grad is None for p in m.second.parameters())
