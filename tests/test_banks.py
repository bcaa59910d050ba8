from __future__ import annotations

import numpy as np
import pytest
import torch

from nnssl.banks import CaseBank, ClassBank

# rows per labeled case


def rows(*numbers: float) -> torch.Tensor:
    """(K=2, B=1, P, E=2): both classes get the same."""
    return torch.tensor(numbers)[None, None, :, None].expand(2, 1, -1, 2)


def yes(embeddings: torch.Tensor) -> torch.Tensor:
    return torch.ones(embeddings.shape[:3], dtype=torch.bool)


def test_rows_go_to_their_case_and_class_and_the_oldest_leave_first() -> None:
    bank = CaseBank(2, 3, 4, 2)
    valid = torch.tensor([[[True, False, True]], [[False, False, False]]])
    bank.push([1], rows(1, 2, 3), valid)
    assert bank.count.tolist() == [[0, 2, 0], [0, 0, 0]] and bank.rows[0, 1, :2, 0].tolist() == [1, 3]
    bank.push([1], rows(4, 5, 6), yes(rows(4, 5, 6)))
    assert bank.rows[0, 1, :, 0].tolist() == [6, 3, 4, 5] and bank.rows[1, 1, :, 0].tolist() == [4, 5, 6, 0]
    assert not bank.rows[:, [0, 2]].any() and bank.filled().sum(2).tolist() == [[0, 4, 0], [0, 3, 0]]


def test_two_samples_of_one_case_both_arrive() -> None:
    bank = CaseBank(2, 2, 4, 2)
    both = torch.cat([rows(1, 2), rows(3, 4)], dim=1)
    bank.push([1, 1], both, yes(both))
    assert bank.count.tolist() == [[0, 4], [0, 4]] and bank.rows[0, 1, :, 0].tolist() == [1, 2, 3, 4]


def test_samples_without_a_case_are_left_out() -> None:
    bank = CaseBank(2, 1, 4, 2)
    both = torch.cat([rows(1), rows(2)], dim=1)
    bank.push([0], both, yes(both))
    assert bank.count.tolist() == [[1], [1]]


def test_draws_are_filled_rows_over_all_cases_without_repetition() -> None:
    bank = CaseBank(2, 3, 4, 2)
    bank.push([0], rows(1, 2, 3), yes(rows(1, 2, 3)))
    bank.push([2], rows(4, 5), yes(rows(4, 5)))
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        drawn, valid = bank.sample(4)
        assert drawn.shape == (2, 4, 2) and valid.all()
        for k in range(2):
            values = drawn[k, :, 0].tolist()
            assert len(set(values)) == 4 and set(values) <= {1, 2, 3, 4, 5}
            seen |= set(values)
    assert seen == {1, 2, 3, 4, 5}
    drawn, valid = bank.sample(100)
    assert (
        drawn.shape == (2, 12, 2)
        and valid.sum(1).tolist() == [5, 5]
        and set(drawn[0][valid[0]][:, 0].tolist()) == {1, 2, 3, 4, 5}
    )


def test_too_many_rows_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 4 embeddings"):
        CaseBank(2, 1, 4, 2).push([0], rows(1, 2, 3, 4, 5), yes(rows(1, 2, 3, 4, 5)))


# rows per class


def test_bank_keeps_the_last_rows_per_class() -> None:
    bank = ClassBank(2, 4, 1)
    rng = np.random.default_rng(0)
    kept: tuple[list[float], list[float]] = ([], [])
    for _ in range(20):
        rows = torch.from_numpy(rng.normal(size=(2, 3, 1))).float()
        valid = torch.from_numpy(rng.random((2, 3)) < 0.5)
        bank.push(rows, valid)
        for k in range(2):
            kept[k].extend(r.item() for r, v in zip(rows[k], valid[k], strict=True) if v)
    for k in range(2):
        assert sorted(bank.rows[k].flatten().tolist()) == pytest.approx(sorted(kept[k][-4:]))
    mean, known = bank.mean()
    assert known.all() and mean[0].item() == pytest.approx(np.mean(kept[0][-4:]), abs=1e-6)


def test_bank_mean_counts_filled_rows_only() -> None:
    bank = ClassBank(2, 8, 2)
    bank.push(torch.ones(2, 3, 2), torch.tensor([[True, True, False], [False, False, False]]))
    mean, known = bank.mean()
    assert (
        mean[0].tolist() == [1, 1]
        and known.tolist() == [True, False]
        and bank.filled().sum(1).tolist() == [2, 0]
    )


def test_bank_refuses_more_rows_than_it_holds() -> None:
    with pytest.raises(ValueError, match="at most 2 embeddings"):
        ClassBank(1, 2, 1).push(torch.ones(1, 3, 1), torch.ones(1, 3, dtype=torch.bool))
