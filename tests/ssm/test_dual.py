from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnssl.ssm.dual import scan_both_directions
from nnssl.ssm.ssd import ssd_scan


def inputs(lines: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A, B, C, D of two heads of three channels and four states."""
    random = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, dtype=dtype, generator=random)  # noqa: E731
    x, dt = normal(lines, length, 2, 3), torch.rand(lines, length, 2, dtype=dtype, generator=random)
    return [x, dt, -normal(2).exp(), normal(lines, length, 1, 4), normal(lines, length, 1, 4), normal(2)]


def test_equals_the_loop_over_tokens_in_both_directions() -> None:
    x, dt, A, B, C, D = inputs(3, 7)
    expected = torch.zeros_like(x)
    for tokens in (range(7), reversed(range(7))):
        state = torch.zeros(3, 2, 3, 4, dtype=x.dtype)
        for t in tokens:
            for line in range(3):
                for head in range(2):
                    decayed = torch.exp(dt[line, t, head] * A[head]) * state[line, head]
                    state[line, head] = decayed + dt[line, t, head] * torch.outer(
                        x[line, t, head], B[line, t, 0]
                    )
                    expected[line, t, head] += state[line, head] @ C[line, t, 0] + D[head] * x[line, t, head]
    torch.testing.assert_close(scan_both_directions(x, dt, A, B, C, D), expected)


def test_blocks_of_lines_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [v.requires_grad_() for v in inputs(5, 6)]

    def result() -> list[Tensor]:
        y = scan_both_directions(*arguments)
        return [y, *torch.autograd.grad(y.square().sum(), arguments)]

    whole = result()
    monkeypatch.setattr("nnssl.ssm.dual.BLOCK", {"cpu": 2 * 2 * 6**2})  # two lines, two lines, one line
    torch.testing.assert_close(result(), whole)


def test_gradients_are_those_of_the_maths() -> None:
    arguments = [v.requires_grad_() for v in inputs(2, 5)]
    assert torch.autograd.gradcheck(scan_both_directions, arguments)


def test_without_gradients_the_result_is_the_same() -> None:
    arguments = inputs(2, 5)
    with_gradients = scan_both_directions(*(v.clone().requires_grad_() for v in arguments))
    torch.testing.assert_close(scan_both_directions(*arguments), with_gradients, rtol=0, atol=0)


def test_long_decays_stay_finite_and_equal_the_chunked_scan_in_float32() -> None:
    x, dt, A, B, C, D = inputs(4, 65, torch.float32)
    dt = 50 * dt  # forgets everything at once
    expected = ssd_scan(x, dt, A, B, C, D) + ssd_scan(x, dt, A, B, C, D, reverse=True)
    torch.testing.assert_close(scan_both_directions(x, dt, A, B, C, D), expected, rtol=1e-4, atol=1e-3)


def test_autocast_computes_in_float32_and_returns_the_dtype_of_the_tokens() -> None:
    x, dt, A, B, C, D = inputs(3, 9, torch.float32)
    narrow = [v.bfloat16() for v in (x, dt, A, B, C, D)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = scan_both_directions(*narrow)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, scan_both_directions(*(v.float() for v in narrow)).bfloat16())
