"""The chunked scan against the recurrence it stands for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnssl.ssm import ssd, ssd_scan
from tests.reference.ssm import sequential_scan

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "tiny": lambda u: 1e-4 * u,
    "usual": lambda u: 0.2 * u,
    "large": lambda u: 30 * u,
    "large between tiny": lambda u: torch.where(u < 0.2, 500 * u, 1e-3 * u),
    "zero between usual": lambda u: torch.where(u < 0.5, 0.0, u),
}


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    x, dt, A, B, C, D = map(change, inputs)
    return x, dt, A, B, C, D


def draw(
    batch: int,
    length: int,
    heads: int,
    width: int,
    groups: int,
    state: int,
    step: str = "usual",
    seed: int = 0,
) -> Inputs:
    """x, dt, A, B, C, D in float32."""
    g = torch.Generator().manual_seed(seed)
    x, B, C = (
        torch.randn(batch, length, *shape, generator=g)
        for shape in ((heads, width), (groups, state), (groups, state))
    )
    dt = STEPS[step](torch.rand(batch, length, heads, generator=g))
    return x, dt, -5 * torch.rand(heads, generator=g) - 0.1, B, C, torch.randn(heads, generator=g)


def errors(inputs: Inputs, chunk_size: int | None, reverse: bool) -> dict[str, float]:
    """Largest error of y and of every gradient, relative to the largest reference value.

    The gradients of A and D are sums of one term of either sign per token: relative to the sum of their
    magnitudes.
    """
    ours = each(inputs, lambda v: v.clone().requires_grad_())
    y = ssd_scan(*ours, chunk_size=chunk_size, reverse=reverse)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    found = [y.detach(), *torch.autograd.grad(y, ours, grad)]
    steps = inputs[1].shape
    per_token = each(inputs, lambda v: v.double().expand(steps) if v.ndim == 1 else v.double())
    exact = each(per_token, lambda v: v.clone().requires_grad_())
    y_exact = sequential_scan(*exact, reverse=reverse)
    expected = [y_exact.detach(), *torch.autograd.grad(y_exact, exact, grad.double())]
    scales = [v.abs().max() for v in expected]
    for k in (3, 6):
        scales[k] = expected[k].abs().sum((0, 1)).max()
        expected[k] = expected[k].sum((0, 1))
    differences = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
    names = ("y", "dx", "d dt", "dA", "dB", "dC", "dD")
    return {
        name: d / float(scale) if scale > 0 else d
        for name, d, scale in zip(names, differences, scales, strict=True)
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 150),
    groups=st.integers(1, 2),
    heads_per_group=st.integers(1, 3),
    width=st.integers(1, 9),
    state=st.integers(1, 9),
    chunk_size=st.integers(1, 48),
    segment_tokens=st.sampled_from([1, 64, 4096]),
    step=st.sampled_from(sorted(STEPS)),
    reverse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_equal_the_recurrence_in_float64(
    batch: int,
    length: int,
    groups: int,
    heads_per_group: int,
    width: int,
    state: int,
    chunk_size: int,
    segment_tokens: int,
    step: str,
    reverse: bool,
    seed: int,
) -> None:
    inputs = draw(batch, length, groups * heads_per_group, width, groups, state, step, seed)
    with mock.patch.dict(ssd.SEGMENT_TOKENS, cpu=segment_tokens):
        found = errors(inputs, chunk_size, reverse)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize(("length", "reverse"), [(777, True), (2048, False), (5000, False), (5000, True)])
def test_long_sequences_equal_the_recurrence_in_float64(length: int, reverse: bool) -> None:
    found = errors(draw(2, length, 2, 4, 1, 3), None, reverse)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("step", ["usual", "large between tiny"])
def test_bfloat16_inputs_are_scanned_within_one_percent(step: str, reverse: bool) -> None:
    x, dt, A, B, C, D = draw(2, 200, 4, 8, 2, 6, step)
    x, B, C = (v.bfloat16() for v in (x, B, C))
    assert ssd_scan(x, dt, A, B, C, D).dtype == torch.bfloat16
    found = errors((x, dt, A, B, C, D), 32, reverse)
    assert max(found.values()) <= 1e-2, found


def test_autocast_changes_nothing() -> None:
    inputs = each(draw(2, 100, 2, 8, 1, 4), torch.Tensor.requires_grad_)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = ssd_scan(*inputs)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_gradcheck_in_float64(reverse: bool, skip: bool) -> None:
    x, dt, *rest = (v.double() for v in draw(2, 11, 4, 3, 2, 2))
    inputs = tuple(v.requires_grad_() for v in (x, dt + 0.05, *rest))
    with mock.patch.dict(ssd.SEGMENT_TOKENS, cpu=16):
        scan = partial(ssd_scan, chunk_size=4, reverse=reverse)
        assert torch.autograd.gradcheck(scan, inputs if skip else inputs[:5])


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 100, 1000])
def test_chunk_size_changes_the_cost_only(chunk_size: int) -> None:
    inputs = draw(2, 100, 2, 8, 1, 4)
    expected = ssd_scan(*inputs, chunk_size=32)
    torch.testing.assert_close(ssd_scan(*inputs, chunk_size=chunk_size), expected, rtol=1e-5, atol=1e-5)


def test_reverse_is_the_scan_of_the_flipped_sequence() -> None:
    x, dt, A, B, C, D = draw(2, 131, 4, 8, 2, 4)
    flipped = ssd_scan(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), D).flip(1)
    torch.testing.assert_close(ssd_scan(x, dt, A, B, C, D, reverse=True), flipped, rtol=1e-5, atol=1e-5)


def test_zero_steps_leave_the_skip_alone() -> None:
    x, dt, A, B, C, D = draw(2, 70, 2, 4, 1, 3, "zero")
    assert torch.equal(ssd_scan(x, dt, A, B, C, D), D[:, None] * x)


def test_a_huge_step_forgets_everything_before_it() -> None:
    x, dt, A, B, C, D = draw(1, 90, 1, 4, 1, 3)
    dt[:, 50] = 1e4
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(ssd_scan(x, dt, A, B, C, D)[:, 50:].square().sum(), x)
    assert gradient[:, :50].abs().max() == 0 and gradient[:, 50:].abs().min() > 0


def test_two_runs_are_equal_bit_for_bit() -> None:
    inputs = each(draw(2, 1000, 4, 16, 1, 16), torch.Tensor.requires_grad_)
    runs = []
    for _ in range(2):
        y = ssd_scan(*inputs)
        runs.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_strided_inputs_equal_contiguous_ones() -> None:
    x, dt, A, B, C, D = draw(2, 60, 2, 4, 2, 4)
    packed = torch.cat([v.flatten(2) for v in (x, B, C, dt)], 2)
    views = packed.split([8, 8, 8, 2], dim=2)
    x_view, B_view, C_view = (v.unflatten(2, (2, 4)) for v in views[:3])
    assert torch.equal(ssd_scan(x_view, views[3], A, B_view, C_view, D), ssd_scan(x, dt, A, B, C, D))


def test_backward_keeps_the_inputs_and_one_state_per_segment_only() -> None:
    inputs = each(draw(1, 8192, 2, 8, 1, 4), torch.Tensor.requires_grad_)
    kept: list[Tensor] = []

    def keep(v: Tensor) -> Tensor:
        kept.append(v)
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        ssd_scan(*inputs)
    assert sum(v.numel() for v in kept) == sum(v.numel() for v in inputs) + 2 * (2 * 8 * 4)


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert ssd_scan(*draw(0, 5, 2, 4, 1, 3)).shape == (0, 5, 2, 4)


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 10, 8), r"expected x \(batch, L >= 1, H, P\)"),
        (0, (2, 0, 2, 4), r"found \(2, 0, 2, 4\)"),
        (1, (2, 10, 1), r"dt has shape \(2, 10, 1\), expected \(2, 10, 2\)"),
        (2, (3,), r"A has shape \(3,\), expected \(2,\)"),
        (4, (2, 9, 1, 3), r"C has shape \(2, 9, 1, 3\), expected \(2, 10, 1, 3\)"),
        (5, (1,), r"D has shape \(1,\), expected \(2,\)"),
    ],
)
def test_shapes_that_disagree_are_named(position: int, shape: tuple[int, ...], message: str) -> None:
    x, dt, A, B, C, D = (
        torch.zeros(shape) if i == position else v for i, v in enumerate(draw(2, 10, 2, 4, 1, 3))
    )
    with pytest.raises(ValueError, match=message):
        ssd_scan(x, dt, A, B, C, D)


def test_heads_that_are_no_multiple_of_the_groups_and_chunks_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="3 heads of x must be a multiple of the 2 groups"):
        ssd_scan(*draw(1, 5, 3, 2, 2, 2))
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ssd_scan(*draw(1, 5, 2, 2, 2, 2), chunk_size=0)
