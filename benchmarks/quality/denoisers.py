"""What does Diff-CL's denoiser learn from the image, and what is it handed? Several denoisers side by side.

    python -m benchmarks.quality.denoisers 501 3d_fullres 0 --epochs 6 --iterations 100 --every 2

A student f and denoisers g of different label scale, draw of noise levels and width see the same labeled
batches and the same noise and, where they are of one width, start from the same weights; there is no
unlabeled term. Then the Dice against the hidden labels of y_f and of each y_g: from pure noise, from the
noised estimate of f, and from the noised truth (what is handed over). Central patches, as in `pseudo_labels`.
The plans file needs nothing under `nnssl`; general keys that stand there count.
"""

from __future__ import annotations

import argparse
import os
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch import Tensor, nn

from benchmarks.quality.pseudo_labels import central_patches, foreground_dice
from nnssl.batch import SemiBatch
from nnssl.config import Config
from nnssl.diffusion.gaussian import GaussianDiffusion
from nnssl.files import read_json
from nnssl.method import SemiMethod, full_resolution, inference
from nnssl.networks.time_conditioned import TimeConditionedUNet
from nnssl.trainer import SemiTrainer
from nnssl.training.randomness import seed_everything

STEPS = (1, 2, 4)
VARIANTS: dict[
    str, tuple[float, float, int]
] = {  # label scale b, share of samples at pure noise, divisor of the features
    "b = 1": (1.0, 0.0, 1),
    "b = 0.3": (0.3, 0.0, 1),
    "b = 0.1": (0.1, 0.0, 1),
    "b = 0.1, half of the samples pure noise": (0.1, 0.5, 1),
    "b = 0.1, half of the features": (0.1, 0.0, 2),
}


@dataclass(frozen=True)
class NoConfig(Config):
    """Nothing to set."""


class Denoisers(SemiMethod):
    name = "Denoisers"
    config_class = NoConfig
    needs_unlabeled = False

    def build(self) -> None:
        k = self.labels.channels
        self.diffusion = GaussianDiffusion()
        first = TimeConditionedUNet(self.planned.build_network(self.planned.input_channels + k, k))

        def denoiser(divisor: int) -> nn.Module:
            if divisor == 1:
                return deepcopy(first)
            return TimeConditionedUNet(
                self.planned.build_network(self.planned.input_channels + k, k, divisor)
            )

        self.denoisers = nn.ModuleList(denoiser(divisor) for _, _, divisor in VARIANTS.values())
        self.seconds = dict.fromkeys(VARIANTS, 0.0)

    def terms(self, batch: SemiBatch, t: float) -> dict[str, Tensor]:
        onehot, _ = self.labels.encode(batch.full_target())
        uniform, pure = (
            self.diffusion.draw_steps(len(onehot), onehot.device),
            torch.rand(len(onehot), device=onehot.device),
        )
        eps = torch.randn_like(onehot)
        losses = {"supervised": self.supervised_loss(self.student(batch.labeled), batch.target)}
        for (name, (b, share, _)), denoiser in zip(VARIANTS.items(), self.denoisers, strict=True):
            begun = time.process_time()
            tau = torch.where(pure < share, self.diffusion.steps - 1, uniform)
            noisy = self.diffusion.q_sample(b * (2 * onehot - 1), tau, eps)
            losses[name] = self.supervised_loss(denoiser(noisy, tau, batch.labeled), batch.target)
            self.seconds[name] += time.process_time() - begun
        return losses

    def weights(self, t: float) -> dict[str, float]:
        return dict.fromkeys(("supervised", *VARIANTS), 1.0)


class DenoisersTrainer(SemiTrainer):
    method_class = Denoisers

    def save_checkpoint(self, filename: str) -> None:
        """None is needed."""


def pseudo_labels(method: Any, image: Tensor, onehot: Tensor) -> dict[str, Tensor]:
    """Probabilities (B, K, S) by name."""
    diffusion, found = method.diffusion, {}
    with inference(method.student, *method.denoisers):
        found["y_f"] = p_f = method.probabilities(full_resolution(method.student(image)))
        noise = torch.randn_like(p_f)
        for (name, (b, _, _)), denoiser in zip(VARIANTS.items(), method.denoisers, strict=True):

            def estimate(x: Tensor, tau: Tensor, g: nn.Module = denoiser, b: float = b) -> Tensor:
                return b * (2 * method.probabilities(full_resolution(g(x, tau, image))) - 1)

            for steps in STEPS:
                sampled = diffusion.ddim_sample(estimate, noise, diffusion.trailing_steps(steps))
                found[f"y_g, {name}: from noise, S = {steps}"] = (sampled / b + 1) / 2
            for origin, shares, level in (("p_f", p_f, 249), ("the truth", onehot, 499)):
                tau = torch.full((len(image),), level)
                x = estimate(diffusion.q_sample(b * (2 * shares - 1), tau, noise), tau)
                found[f"y_g, {name}: from {origin} at tau = {level}, S = 1"] = (x / b + 1) / 2
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold", type=int)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--every", type=int, default=1, help="look at every n-th hidden case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = os.path.join(nnUNet_preprocessed, maybe_convert_to_dataset_name(args.dataset))
    plans = read_json(os.path.join(folder, f"{args.p}.json"))
    schedule = {
        "num_epochs": args.epochs,
        "num_iterations_per_epoch": args.iterations,
        "num_val_iterations_per_epoch": 1,
        "seed": 0,
    }
    plans |= {"continue_training": False, "nnssl": {**plans.get("nnssl", {}), **schedule}}
    trainer = DenoisersTrainer(
        plans,
        args.configuration,
        args.fold,
        read_json(os.path.join(folder, "dataset.json")),
        device=torch.device("cpu"),
    )
    begun = time.process_time()
    trainer.run_training()
    method: Any = trainer.method
    print(
        f"training: {(time.process_time() - begun) / 60:.2f} core-minutes; forward pass and loss, seconds "
        "per step:"
    )
    print({name: round(s / (args.epochs * args.iterations), 4) for name, s in method.seconds.items()})
    seed_everything(0)
    hidden, patch = trainer.fold_data.hidden()[:: args.every], list(trainer.configuration_manager.patch_size)
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, hidden)
    scores: dict[str, list[float]] = {}
    for i in range(0, len(hidden), 4):
        pairs = [dataset.load_case(case)[:2] for case in hidden[i : i + 4]]
        image = torch.cat([torch.from_numpy(central_patches(data, patch, 0)).float() for data, _ in pairs])
        labels = [central_patches(seg, patch, 0) for _, seg in pairs]
        onehot = (
            F.one_hot(
                torch.from_numpy(np.concatenate(labels))[:, 0].clamp(min=0).long(), method.labels.channels
            )
            .movedim(-1, 1)
            .float()
        )
        for name, probabilities in pseudo_labels(method, image, onehot).items():
            hard = method.labels.harden(probabilities)
            scores.setdefault(name, []).extend(
                foreground_dice(part, label)
                for part, label in zip(hard.split([len(x) for x in labels]), labels, strict=True)
            )
    print(f"{len(hidden)} hidden cases\n| pseudo-label | mean Dice | sd |\n|---|---|---|")
    for name, values in scores.items():
        print(f"| {name} | {100 * np.mean(values):.2f} | {100 * np.std(values):.2f} |")


if __name__ == "__main__":
    main()
