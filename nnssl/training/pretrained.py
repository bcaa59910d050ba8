"""`-pretrained_weights`: starting a method from a finished network, stock nnU-Net's among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnssl.networks.upsampling import as_interpolating

OWN_SHARE = 0.1  # of the initial segmentation layers, in a second network of the same architecture
HEADS = ".seg_layers."  # nnU-Net's name of the layers that depend on the labels


def load_pretrained(
    method: nn.Module,
    deployed: nn.Module,
    checkpoint: Mapping[str, Any],
    path: str,
    dataset_json: Mapping[str, Any],
    fresh: Sequence[str],
) -> str:
    """The weights of the checkpoint, which was read from `path`, into the deployed network, and into other
    networks of the method as far as names and shapes agree. Returns what was done, in one line.

    Unlike in nnU-Net, the deployed network's segmentation layers are taken over, too, where the source was
    trained on the same labels. A second network of the same architecture adds a tenth of its own to them, so
    that the two differ; with its own alone it would teach the first its mistakes. A teacher, which does not
    learn by itself, and a network that differs anyway take them as they are: where it sees further channels
    it starts blind to those, with the function of the source; where it interpolates, from the means of the
    transposed convolutions over their kernels.

    dataset_json  of the training that starts
    fresh         parts of the names of tensors that no stock network has; left as they are
    Raises RuntimeError where the networks differ otherwise.
    """
    source: dict[str, Tensor] = checkpoint["network_weights"]
    target = deployed.state_dict()
    labels = checkpoint.get("init_args", {}).get("dataset_json", {}).get("labels")
    heads = labels == dataset_json["labels"]
    known = {k for k in target if not any(part in k for part in fresh)} | (target.keys() & source.keys())
    wanted = [k for k in target if k in known and (heads or HEADS not in k)]
    if odd := [k for k in wanted if k not in source or source[k].shape != target[k].shape]:
        found = tuple(source[odd[0]].shape) if odd[0] in source else "missing"
        raise RuntimeError(
            f"{path} does not fit this network: {odd[0]} is {found} there, expected "
            f"{tuple(target[odd[0]].shape)}; {len(odd)} of {len(wanted)} tensors differ. Give this dataset "
            "the plan of that model first (nnUNetv2_move_plans_between_datasets), and train with it (-p)"
        )
    if broken := [k for k in wanted if not torch.isfinite(source[k]).all()]:
        raise RuntimeError(
            f"{path}: {len(broken)} of {len(wanted)} tensors have values that are not finite ({broken[0]}). "
            "The training that wrote it failed; take an earlier checkpoint"
        )
    deployed.load_state_dict({**target, **{k: source[k] for k in wanted}})
    others = {
        name: taken
        for name, network in method.named_children()
        if network is not deployed and (taken := _take_what_fits(network, source, heads))
    }
    left = sorted(source.keys() - target.keys())
    said = f"pretrained weights: {path}, {len(wanted)} of {len(target)} tensors; segmentation layers "
    said += "taken over (same labels)" if heads else "fresh (other labels)"
    if left:
        said += f"; not taken, without a place here: {len(left)} of its tensors ({left[0]}, ...)"
    return said + "".join(f"; {name}: {taken}" for name, taken in others.items())


def _take_what_fits(network: nn.Module, source: Mapping[str, Tensor], heads: bool) -> str:
    """What was taken; empty where nothing fits."""
    own = network.state_dict()
    fits = {key: fit for key, value in own.items() if (fit := _fitted(key, value, source)) is not None}
    if not heads:
        fits = {key: fit for key, fit in fits.items() if HEADS not in f".{key}"}
    weights = {key: fit.weight for key, fit in fits.items()}
    learns = any(weight.requires_grad for weight in network.parameters())  # unlike a teacher
    mixed = {}
    if learns and not any(fit.adapted for fit in fits.values()):
        mixed = {k: w.to(own[k]) + OWN_SHARE * own[k] for k, w in weights.items() if HEADS in f".{k}"}
    network.load_state_dict({**own, **weights, **mixed})
    if not weights:
        return ""
    said = f"{len(weights)} tensors"
    return said + f", with {OWN_SHARE:.0%} of its own in its segmentation layers" * bool(mixed)


class _Fit(NamedTuple):
    weight: Tensor
    adapted: bool  # or the source's own


def _fitted(key: str, own: Tensor, source: Mapping[str, Tensor]) -> _Fit | None:
    """What the source has for a tensor of another network, which may be a decoder alone."""
    name = key.removeprefix("network.")
    for whole in (name, f"decoder.{name}"):
        if (given := source.get(whole)) is not None:
            if given.shape == own.shape:
                return _Fit(given, False)
            return _Fit(_blind(given, own), True) if _sees_further_channels(own, given) else None
        if ".transpconvs." in whole and (given := source.get(whole.replace(".conv.", "."))) is not None:
            return _Fit(as_interpolating(given) if given.ndim > 1 else given, True)
    return None


def _sees_further_channels(own: Tensor, source: Tensor) -> bool:
    """Whether they are weights of convolutions that differ in their input channels alone."""
    return (
        own.ndim == source.ndim > 2
        and own.shape[1] > source.shape[1]
        and (own.shape[0], *own.shape[2:]) == (source.shape[0], *source.shape[2:])
    )


def _blind(given: Tensor, own: Tensor) -> Tensor:
    """The given weight for the first input channels, 0 for the others."""
    weight = torch.zeros_like(own)
    weight[:, : given.shape[1]] = given
    return weight
