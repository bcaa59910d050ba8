"""The mixer against Mamba-2's formulas, its parameters' layout, and the switch between back ends."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nnssl.ssm import Mamba2Mixer, available_backends, mamba, ssd_scan
from tests.building import put
from tests.reference.ssm import mamba2, mamba2_mix, mamba2_output


@pytest.fixture
def fresh_lookup() -> Iterator[None]:
    """Forgets what is known about mamba-ssm, before and after."""
    mamba._why_no_mamba_ssm.cache_clear()
    yield
    mamba._why_no_mamba_ssm.cache_clear()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(
    ("d_model", "d_state", "d_conv", "expand", "headdim", "ngroups"),
    [(32, 16, 4, 2, 16, 1), (24, 8, 3, 3, 12, 2)],
)
def test_parameters_are_named_and_shaped_as_in_mamba2(
    d_model: int, d_state: int, d_conv: int, expand: int, headdim: int, ngroups: int
) -> None:
    d_inner, heads = expand * d_model, expand * d_model // headdim
    conv = d_inner + 2 * ngroups * d_state
    mixer = Mamba2Mixer(d_model, d_state, d_conv, expand, headdim, ngroups)
    assert {name: tuple(value.shape) for name, value in mixer.state_dict().items()} == {
        "in_proj.weight": (2 * d_inner + 2 * ngroups * d_state + heads, d_model),
        "conv1d.weight": (conv, 1, d_conv),
        "conv1d.bias": (conv,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "norm.weight": (d_inner,),
        "out_proj.weight": (d_model, d_inner),
    }


def test_parameters_start_as_in_mamba2() -> None:
    torch.manual_seed(0)
    mixer = Mamba2Mixer(512, headdim=4)
    step, decay = F.softplus(mixer.dt_bias.detach()), mixer.A_log.detach().exp()
    assert 0.000999 <= step.min() < 0.002 and 0.08 < step.max() <= 0.1001  # log-uniform in [0.001, 0.1]
    assert abs(float(step.log().mean()) - float(torch.tensor(0.01).log())) < 0.3
    assert (
        1 <= decay.min() < 1.5 and 15.5 < decay.max() <= 16 and abs(float(decay.mean()) - 8.5) < 1
    )  # uniform in [1, 16]
    assert torch.equal(mixer.D, torch.ones(256)) and torch.equal(mixer.norm.weight, torch.ones(1024))
    assert mixer.in_proj.bias is None and mixer.out_proj.bias is None


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "headdim", "ngroups", "d_conv"),
    [(1, 8, 1, 4), (3, 16, 1, 4), (50, 8, 2, 4), (137, 4, 4, 4), (21, 8, 1, 1)],
)
def test_output_and_gradients_equal_the_formulas_token_by_token(
    length: int, headdim: int, ngroups: int, d_conv: int, reverse: bool
) -> None:
    torch.manual_seed(length)
    mixer = Mamba2Mixer(16, d_state=5, d_conv=d_conv, headdim=headdim, ngroups=ngroups, chunk_size=32)
    x = torch.randn(2, length, 16, requires_grad=True)
    y = mixer(x, reverse=reverse)
    exact = {name: value.detach().double().requires_grad_() for name, value in mixer.named_parameters()}
    x_exact = x.detach().double().requires_grad_()
    y_exact = mamba2(
        exact, x_exact.flip(1) if reverse else x_exact, d_state=5, headdim=headdim, ngroups=ngroups
    )
    y_exact = y_exact.flip(1) if reverse else y_exact
    weight = torch.randn(y.shape)
    gradients = torch.autograd.grad(y, [x, *mixer.parameters()], weight, materialize_grads=True)
    expected = torch.autograd.grad(
        y_exact, [x_exact, *exact.values()], weight.double(), materialize_grads=True
    )
    for name, a, b in zip(["y", "x", *exact], [y, *gradients], [y_exact, *expected], strict=True):
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=1e-5,
            atol=1e-5 * float(b.detach().abs().max()) + 1e-7,
            msg=partial("{}: {}".format, name),
        )


@pytest.mark.parametrize("d_conv", [1, 4])
def test_both_directions_are_scanned_with_the_same_weights_and_summed_before_the_norm(
    d_conv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnssl.ssm.dual.FEWEST_LINES", {"cpu": 2})
    mixer, x = Mamba2Mixer(8, d_state=4, d_conv=d_conv, headdim=8), torch.randn(2, 13, 8)
    parameters = {name: value.detach().double() for name, value in mixer.named_parameters()}
    zxbcdt = x.double() @ parameters["in_proj.weight"].T
    total = torch.zeros(2, 13, 16, dtype=torch.float64)
    for sequence in (torch.arange(13), torch.arange(13).flip(0)):
        total[:, sequence] += mamba2_mix(parameters, zxbcdt[:, sequence, 16:], d_state=4, headdim=8)
    expected = mamba2_output(parameters, total, zxbcdt[..., :16])
    assert relative_error(mixer.bidirectional(x).double(), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_many_lines_take_a_faster_way_to_the_same_sum(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    mixer = Mamba2Mixer(16, d_state=4, d_conv=1, headdim=8, memory=(1.0, 27.0)).to(dtype)
    x = torch.randn(3, 29, 16, dtype=dtype, requires_grad=True)
    slow = mixer.bidirectional(x)
    monkeypatch.setattr("nnssl.ssm.dual.FEWEST_LINES", {"cpu": 3})
    monkeypatch.setattr("nnssl.ssm.mamba.ssd_scan", None)
    fast = mixer.bidirectional(x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert fast.dtype == dtype and relative_error(fast.float(), slow.float()) <= tolerance
    inputs = [x, *mixer.parameters()]
    gradients = [torch.autograd.grad(y.float().square().sum(), inputs) for y in (fast, slow)]
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a.float(), b.float()) <= 10 * tolerance


def test_initial_memories_are_spread_between_the_shortest_and_the_longest() -> None:
    mixer = Mamba2Mixer(16, headdim=8, memory=(1.0, 27.0))
    forget = torch.nn.functional.softplus(mixer.dt_bias) * mixer.A_log.exp()
    torch.testing.assert_close(1 / forget, torch.tensor([1.0, 3.0, 9.0, 27.0]), rtol=1e-4, atol=0)


def test_a_norm_per_head_gives_every_head_the_same_power() -> None:
    mixer, x = Mamba2Mixer(16, headdim=8, memory=(1.0, 27.0), norm_per_head=True), torch.randn(2, 30, 16)
    z, xbcdt = mixer._project(x)
    power = mixer.norm(mixer._mix(xbcdt, False), z).unflatten(-1, (4, 8)).square().mean(-1)
    assert (power - 1).abs().median() < 0.01 and (power - 1).abs().max() < 0.3  # eps of the norm


@pytest.mark.parametrize("reverse", [False, True])
def test_a_token_reaches_itself_and_what_comes_after_it_in_scan_order_only(reverse: bool) -> None:
    mixer, x = Mamba2Mixer(8, chunk_size=8), torch.randn(1, 40, 8)
    changed = x.clone()
    changed[:, 20] += 1
    moved = (mixer(changed, reverse) - mixer(x, reverse)).abs().amax((0, 2)) > 0
    assert torch.equal(moved, torch.arange(40) <= 20 if reverse else torch.arange(40) >= 20)


def test_bfloat16_autocast_stays_within_two_percent_and_returns_gradients_in_float32() -> None:
    torch.manual_seed(0)
    mixer, x = Mamba2Mixer(32), torch.randn(2, 300, 32, requires_grad=True)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), expected) <= 2e-2
    gradients = torch.autograd.grad(y.float().square().sum(), [x, *mixer.parameters()])
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_a_whole_mixer_in_bfloat16_or_float64_keeps_its_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert Mamba2Mixer(16).to(dtype)(torch.randn(1, 20, 16, dtype=dtype)).dtype == dtype


def test_two_steps_of_two_equal_mixers_are_equal_bit_for_bit() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        mixer, x = Mamba2Mixer(16), torch.randn(2, 200, 16)
        mixer(x).square().mean().backward()
        results.append([p.grad for p in mixer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "triton"}, "backend is 'triton', expected one of auto, torch, mamba_ssm"),
        ({"headdim": 24}, "expand \\* d_model = 32 must be a multiple of headdim = 24"),
        ({"headdim": 16, "ngroups": 3}, "its heads one of ngroups = 3"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2Mixer(16, **arguments)


def test_mamba_ssm_without_cuda_is_reported_and_refused_but_auto_goes_on(
    fresh_lookup: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch_backend, kernels = available_backends()
    assert torch_backend == ("torch", True, "")
    assert (kernels.name, kernels.usable) == ("mamba_ssm", False) and "needs a CUDA device" in kernels.reason
    with pytest.raises(
        RuntimeError, match=r"'mamba_ssm' cannot be used here: needs a CUDA device.*choose 'auto' or 'torch'"
    ):
        Mamba2Mixer(16, backend="mamba_ssm")
    assert Mamba2Mixer(16, backend="auto")(torch.randn(1, 5, 16)).shape == (1, 5, 16)


def test_missing_mamba_ssm_is_named_with_the_remedy(
    fresh_lookup: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert "pip install mamba-ssm" in available_backends()[1].reason
    assert Mamba2Mixer(16)(torch.randn(1, 5, 16)).shape == (1, 5, 16)


def test_broken_mamba_ssm_is_reported_and_never_fatal(
    fresh_lookup: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise OSError('undefined symbol: _ZN3c104cuda')")
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available_backends()[1] == (
        "mamba_ssm",
        False,
        "installed but broken: OSError: undefined symbol: _ZN3c104cuda",
    )
    assert Mamba2Mixer(16)(torch.randn(1, 5, 16)).shape == (1, 5, 16)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_call_of_mamba_ssm_means_the_same_scan(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels replaced by our scan behind their signature: what is left to test is the order of arguments
    and the flips."""

    def mamba_chunk_scan_combined(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None
    ) -> Tensor:
        return ssd_scan(x, dt, A, B, C, D, chunk_size)

    fake = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    put(fake, mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    x, dt, B, C = (
        torch.randn(2, 50, 2, 8),
        torch.rand(2, 50, 2),
        torch.randn(2, 50, 1, 4),
        torch.randn(2, 50, 1, 4),
    )
    A, D = -torch.rand(2), torch.randn(2)
    found = mamba._mamba_ssm_scan(x, dt, A, B, C, D, None, reverse)
    torch.testing.assert_close(found, ssd_scan(x, dt, A, B, C, D, reverse=reverse), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not available_backends()[1].usable, reason=f"mamba_ssm: {available_backends()[1].reason}")
@pytest.mark.parametrize("reverse", [False, True])
def test_mamba_ssm_on_cuda_gives_the_outputs_and_gradients_of_plain_pytorch(reverse: bool) -> None:
    results = []
    for backend in ("torch", "mamba_ssm"):
        torch.manual_seed(0)
        mixer, x = Mamba2Mixer(64, backend=backend).cuda(), torch.randn(2, 500, 64).cuda()
        y = mixer(x, reverse)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))])
    for a, b in zip(*results, strict=True):
        assert relative_error(b, a) <= 2e-2
