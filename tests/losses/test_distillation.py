from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnssl.banks import EmbeddingBank, case_numbers
from nnssl.losses.distillation import bank_distillation
from tests.building import gradient
from tests.reference import action as reference


def example(seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    s, z, m = (F.normalize(torch.randn(n, 5, generator=g, dtype=torch.float64), dim=1) for n in (6, 6, 9))
    valid = torch.rand(6, 9, generator=g) > 0.4
    valid[2] = False
    valid[3] = torch.arange(9) == 4
    return s, z, m, valid


def test_distillation_equals_the_loop() -> None:
    s, z, m, valid = example()
    value = bank_distillation(s, z, m, valid, 0.1, 0.05)
    torch.testing.assert_close(value, reference.bank_distillation(s, z, m, valid, 0.1, 0.05))
    assert value.item() > 0.1


def test_equal_embeddings_at_equal_temperatures_cost_nothing() -> None:
    s, z, m, valid = example()
    s = z.clone().requires_grad_()
    value = bank_distillation(s, z, m, valid, 0.1, 0.1)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and gradient(s).abs().max() < 1e-12


def test_a_sharp_teacher_makes_it_the_cross_entropy_of_the_nearest_row() -> None:
    s, z, m, valid = example()
    nearest = (z @ m.T).masked_fill(~valid, -2).argmax(1)
    usable = valid.sum(1) >= 2
    expected = F.cross_entropy((s @ m.T / 0.1).masked_fill(~valid, -torch.inf)[usable], nearest[usable])
    assert bank_distillation(s, z, m, valid, 0.1, 1e-5).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_gradient_reaches_the_student_only_and_is_right() -> None:
    s, z, m, valid = example()
    assert torch.autograd.gradcheck(
        lambda x: bank_distillation(x, z, m, valid, 0.1, 0.05), s.requires_grad_()
    )
    z = z.requires_grad_()
    bank_distillation(s, z, m, valid, 0.1, 0.05).backward()
    assert z.grad is None


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_give_a_differentiable_zero(rows: int) -> None:
    s, z, m, valid = example()
    valid = torch.arange(9) < torch.full((6, 1), rows)
    s = s.requires_grad_()
    value = bank_distillation(s, z, m, valid, 0.1, 0.01)
    value.backward()
    assert value.item() == 0 and not gradient(s).any()


def test_bfloat16_autocast_leaves_the_similarities_alone() -> None:
    s, z, m, valid = (x.float() if x.is_floating_point() else x for x in example())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bank_distillation(s, z, m, valid, 0.1, 0.01)
    assert torch.equal(inside, bank_distillation(s, z, m, valid, 0.1, 0.01))


def test_the_bank_keeps_the_last_rows_and_their_cases() -> None:
    bank = EmbeddingBank(4, 1)
    for first in (0, 3, 6):
        values = torch.arange(first, first + 3)
        bank.push(values[:, None].float(), values + 100)
    assert sorted(bank.embeddings[:, 0].tolist()) == [5, 6, 7, 8]
    assert torch.equal(bank.cases, bank.embeddings[:, 0].long() + 100) and bank.count == 9


def test_of_more_rows_than_fit_the_last_stay() -> None:
    bank = EmbeddingBank(4, 1)
    bank.push(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    bank.push(torch.arange(7.0)[:, None], torch.arange(7))
    assert sorted(bank.embeddings[:, 0].tolist()) == [3, 4, 5, 6] and sorted(bank.cases.tolist()) == [
        3,
        4,
        5,
        6,
    ]
    bank.push(torch.tensor([[7.0]]), torch.tensor([7]))
    assert sorted(bank.cases.tolist()) == [4, 5, 6, 7]


def test_queries_see_filled_rows_of_other_cases() -> None:
    bank = EmbeddingBank(4, 2)
    a, b, c = case_numbers(("a", "b", "c"), torch.device("cpu"))
    assert not bank.others(torch.stack([a, b])).any()
    bank.push(torch.ones(3, 2), torch.stack([a, b, a]))
    assert bank.others(torch.stack([a, b, c])).tolist() == [
        [False, True, False, False],
        [True, False, True, False],
        [True] * 3 + [False],
    ]


def test_case_numbers_depend_on_the_name_alone() -> None:
    numbers = case_numbers(("case_1", "case_2", "case_1"), torch.device("cpu")).tolist()
    assert numbers[0] == numbers[2] == 3231434162 != numbers[1]


def test_the_own_key_is_one_more_row_of_every_query() -> None:
    s, z, m, valid = example()
    value = bank_distillation(s, z, m, valid, 0.1, 0.05, own_key=True)
    alone = []
    for i in range(len(s)):
        if valid[i].any():
            rows = torch.cat([z[i : i + 1], m[valid[i]]])
            everything = torch.ones(1, len(rows), dtype=torch.bool)
            alone.append(reference.bank_distillation(s[i : i + 1], z[i : i + 1], rows, everything, 0.1, 0.05))
    torch.testing.assert_close(value, torch.stack([torch.as_tensor(a) for a in alone]).mean())


def test_embeddings_that_are_all_the_same_cost_nothing_without_the_own_key_only() -> None:
    """The collapse: a student that tells nothing apart, and a teacher that does."""
    s = F.normalize(torch.ones(6, 5), dim=1)
    z, m = (F.normalize(torch.randn(n, 5, generator=torch.Generator().manual_seed(n)), dim=1) for n in (6, 9))
    everything = torch.ones(6, 9, dtype=torch.bool)
    same = bank_distillation(s, s, s[:1].expand(9, 5), everything, 0.1, 0.01)
    assert same.item() == pytest.approx(0, abs=1e-6)
    assert bank_distillation(s, z, m, everything, 0.1, 0.01, own_key=True).item() > 1


def test_around_a_center() -> None:
    s, z, m, valid = example()
    center = m.mean(0)
    a, b, c = (F.normalize(x - center, dim=1) for x in (s, z, m))
    expected = bank_distillation(a, b, c, valid, 0.1, 0.05, own_key=True)
    found = bank_distillation(s, z, m, valid, 0.1, 0.05, own_key=True, center=center)
    torch.testing.assert_close(found, expected)


def test_the_mean_of_a_bank_is_that_of_its_rows_in_use() -> None:
    bank = EmbeddingBank(4, 2)
    assert bank.mean().tolist() == [0, 0]
    bank.push(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.arange(2))
    assert bank.mean().tolist() == [2, 4]


def test_embeddings_that_become_the_same_gain_nothing_around_their_mean() -> None:
    """The collapse: differences of a thousandth are told apart like those of one."""
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(n, 16, generator=g, dtype=torch.float64) for n in (6, 6, 9)]
    everything = torch.ones(6, 9, dtype=torch.bool)

    def value(spread: float, centered: bool) -> float:
        s, z, m = (F.normalize(1 + spread * x, dim=1) for x in noise)
        center = m.mean(0) if centered else None
        return bank_distillation(s, z, m, everything, 0.1, 0.01, own_key=True, center=center).item()

    assert value(1e-3, False) < 1e-3
    assert value(1e-3, True) == pytest.approx(value(1e-4, True), rel=0.02) and value(1e-3, True) > 0.5
