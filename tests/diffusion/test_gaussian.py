from __future__ import annotations

import math

import pytest
import torch

from nnssl.diffusion.gaussian import GaussianDiffusion


@pytest.fixture(scope="module")
def schedulers() -> tuple[GaussianDiffusion, object, object]:
    diffusers = pytest.importorskip(
        "diffusers", reason="diffusers (extra `dev`) is the independent reference"
    )
    kwargs = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
    ddim = diffusers.DDIMScheduler(
        prediction_type="sample", timestep_spacing="trailing", clip_sample=False, **kwargs
    )
    return GaussianDiffusion(), ddim, diffusers.DDPMScheduler(**kwargs)


def test_q_sample_equals_the_independent_implementation(schedulers: tuple) -> None:
    ours, _, ddpm = schedulers
    x, eps, tau = torch.randn(4, 2, 3, 4, 5), torch.randn(4, 2, 3, 4, 5), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(ours.q_sample(x, tau, eps), ddpm.add_noise(x, eps, tau), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "steps", [1, 2, 4, 10, 50]
)  # divisors of T: else the reference's previous step is not its next one
def test_ddim_chain_equals_the_independent_implementation_from_the_same_noise(
    schedulers: tuple, steps: int
) -> None:
    ours, ddim, _ = schedulers
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mix = torch.randn(2, 3, 4, 5)

    def network(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * 0.7 + mix + tau.view(-1, 1, 1, 1) / 1000)

    ddim.set_timesteps(steps)
    assert ours.trailing_steps(steps) == ddim.timesteps.tolist()
    x = noise
    for tau in ddim.timesteps:
        x = ddim.step(network(x, tau.repeat(2)), int(tau), x, eta=0.0).prev_sample
    assert ddim.config.set_alpha_to_one  # its last step returns x0_hat too
    torch.testing.assert_close(
        ours.ddim_sample(network, noise, ours.trailing_steps(steps)), x, atol=2e-5, rtol=2e-4
    )


def test_sampling_from_the_true_answer_returns_it() -> None:
    truth = torch.sign(torch.randn(1, 2, 6, 6))
    assert torch.equal(
        GaussianDiffusion().ddim_sample(lambda x, tau: truth, torch.randn(1, 2, 6, 6), [999, 749, 499, 249]),
        truth,
    )


def test_x_tau_has_the_stated_mean_and_variance() -> None:
    diffusion = GaussianDiffusion()
    tau = torch.full((1,), 300)
    x = diffusion.q_sample(
        torch.ones(1, 1, 400, 400),
        tau,
        torch.randn(1, 1, 400, 400, generator=torch.Generator().manual_seed(0)),
    )
    abar = math.prod(1 - (1e-4 + (2e-2 - 1e-4) * i / 999) for i in range(301))
    assert x.mean().item() == pytest.approx(math.sqrt(abar), abs=5e-3) and x.var().item() == pytest.approx(
        1 - abar, rel=2e-2
    )


def test_the_chain_starts_at_the_last_step_and_gets_every_step_once() -> None:
    seen, diffusion = [], GaussianDiffusion()

    def model(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        seen.append(tau[0].item())
        return torch.zeros_like(x)

    diffusion.ddim_sample(model, torch.randn(2, 1, 3, 3), diffusion.trailing_steps(10))
    assert seen == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


def test_a_chain_may_start_later() -> None:
    assert GaussianDiffusion().trailing_steps(2, 0.5) == [499, 249]
    assert GaussianDiffusion(100).trailing_steps(3, 0.3) == [29, 19, 9]
    with pytest.raises(ValueError, match=r"\[1, 500\] .* found 501 and 0.5"):
        GaussianDiffusion().trailing_steps(501, 0.5)
    with pytest.raises(ValueError, match="start"):
        GaussianDiffusion().trailing_steps(1, 1.1)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=r"\[1, 1000\]"):
        GaussianDiffusion().trailing_steps(steps)
    with pytest.raises(ValueError, match="beta_start"):
        GaussianDiffusion(beta_start=0.5, beta_end=0.1)


def test_the_schedule_is_not_part_of_a_checkpoint() -> None:
    assert GaussianDiffusion().state_dict() == {}


def test_steps_are_drawn_uniformly_or_towards_noise() -> None:
    diffusion, cpu = GaussianDiffusion(100), torch.device("cpu")
    torch.manual_seed(0)
    uniform, high = diffusion.draw_steps(20_000, cpu), diffusion.draw_steps(20_000, cpu, power=3.0)
    assert uniform.min() == 0 and uniform.max() == 99 and uniform.bincount().min() > 120
    assert (uniform < 50).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (high < 50).float().mean().item() == pytest.approx(0.125, abs=0.02)  # P(u^(1/3) < 1/2)
