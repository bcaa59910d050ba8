"""How good are Diff-CL's pseudo-labels? Dice of y_f, of y_g (in S = 1, 2, 4, 10 steps, from the noised
estimate of f and from noise) and of what both say together against the labels that the split hid.

    python -m benchmarks.quality.pseudo_labels 501 3d_fullres 0 -p PLANS --checkpoint checkpoint_final.pth

Looks at one central patch of every hidden case, in 2D of every slice; nothing here feeds back into a
training.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.run.run_training import get_trainer_from_args
from tqdm import tqdm

from nnssl.files import write_json
from nnssl.method import full_resolution, inference
from nnssl.training.randomness import seed_everything

STEPS = (1, 2, 4, 10)
STARTS = (0.25, 1.0)  # `sampling_start`; 1: noise


def central_patches(array: np.ndarray, size: list[int], fill: float) -> np.ndarray:
    """(C, Z, Y, X) to (1, C, *size), or to (Z, C, *size) where the size is that of a slice."""
    box = [[(n - p) // 2, (n - p) // 2 + p] for n, p in zip(array.shape[-len(size) :], size, strict=True)]
    if len(size) == 2:
        return np.moveaxis(crop_and_pad_nd(array, [[0, array.shape[1]], *box], fill), 1, 0)
    return crop_and_pad_nd(array, box, fill)[None]


def foreground_dice(hard: torch.Tensor, label: np.ndarray) -> float:
    """Mean Dice of the foreground classes that are present; hard (B, K, S), label (B, 1, S)."""
    predicted = hard.argmax(1).numpy()
    scores = []
    for k in range(1, hard.shape[1]):
        a, b = predicted == k, label[:, 0] == k
        if b.any():
            scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return float(np.mean(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold", type=int)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth")
    parser.add_argument("--every", type=int, default=1, help="look at every n-th hidden case")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trainer = get_trainer_from_args(
        args.dataset, args.configuration, args.fold, "nnUNetTrainerDiffCL", args.p, device=torch.device("cpu")
    )
    trainer.load_checkpoint(os.path.join(trainer.output_folder, args.checkpoint))
    method, patch = trainer.method, list(trainer.configuration_manager.patch_size)
    hidden = trainer.fold_data.hidden()[:: args.every]
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, hidden)
    scores: dict[str, list[float]] = {}

    def record(key: str, probabilities: torch.Tensor) -> None:
        scores.setdefault(key, []).append(foreground_dice(method.labels.harden(probabilities), label))

    seed_everything(0)
    for case in tqdm(hidden):
        data, seg, _, _ = dataset.load_case(case)
        image = torch.from_numpy(central_patches(data, patch, 0)).float()
        label = central_patches(seg, patch, 0)
        with inference(method.student, method.denoiser):
            p_f = method.probabilities(full_resolution(method.student(image)))
            record("y_f", p_f)
            noise = torch.randn_like(p_f)
            for share in STARTS:
                for steps in STEPS:
                    taus = method.diffusion.trailing_steps(steps, share)
                    x = (
                        noise
                        if share == 1
                        else method.diffusion.q_sample(
                            method.label_map(p_f), torch.full((len(p_f),), taus[0]), noise
                        )
                    )
                    x = method.diffusion.ddim_sample(
                        lambda x, tau, i=image: method.estimate(method.denoiser(x, tau, i)), x, taus
                    )
                    origin = "noise" if share == 1 else f"p_f at tau = {taus[0]}"
                    record(f"y_g from {origin}, S = {steps}", method.shares(x))
                    record(f"both, y_g from {origin}, S = {steps}", (p_f + method.shares(x)) / 2)
    print("| pseudo-label | mean Dice | sd |\n|---|---|---|")
    for key, values in scores.items():
        print(f"| {key} | {100 * np.mean(values):.2f} | {100 * np.std(values):.2f} |")
    if args.output:
        dice = {k: float(np.mean(v)) for k, v in scores.items()}
        write_json({"cases": len(hidden), "dice": dice}, args.output, indent=1)


if __name__ == "__main__":
    main()
