"""`-pretrained_weights`: starting a method from a finished network, stock nnU-Net's among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.training.checkpoint import read_checkpoint

HEADS = ".seg_layers."  # nnU-Net's name of the layers that depend on the labels


def load_pretrained(
    method: nn.Module, deployed: nn.Module, path: str, dataset_json: Mapping[str, Any], fresh: Sequence[str]
) -> str:
    """The weights of the checkpoint into the deployed network, and into other networks of the method as far
    as names and shapes agree. Returns what was done, in one line.

    Unlike in nnU-Net, the deployed network's segmentation layers are taken over, too, where the source was
    trained on the same labels. A second network that sees the same keeps its own, so that the two differ. One
    that sees further channels takes them as well, and starts blind to those channels: with the function of
    the source.

    dataset_json  of the training that starts
    fresh         parts of the names of tensors that no stock network has; left as they are
    Raises RuntimeError where the networks differ otherwise, or the checkpoint cannot be read.
    """
    checkpoint = read_checkpoint(path, "cpu")
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
    deployed.load_state_dict({**target, **{k: source[k] for k in wanted}})
    others = {
        name: count
        for name, network in method.named_children()
        if network is not deployed and (count := _take_what_fits(network, source, heads))
    }
    said = f"pretrained weights: {path}, {len(wanted)} of {len(target)} tensors; segmentation layers "
    said += "taken over (same labels)" if heads else "fresh (other labels)"
    return said + "".join(f"; {name}: {count} tensors" for name, count in others.items())


def _take_what_fits(network: nn.Module, source: Mapping[str, Tensor], heads: bool) -> int:
    own = network.state_dict()
    shared = {key: name for key in own if (name := key.removeprefix("network.")) in source}
    further = {key for key, name in shared.items() if _sees_further_channels(own[key], source[name])}
    fits: dict[str, Tensor] = {}
    for key, name in shared.items():
        if key in further:
            fits[key] = torch.zeros_like(own[key])
            fits[key][:, : source[name].shape[1]] = source[name]
        elif source[name].shape == own[key].shape and (HEADS not in key or (heads and further)):
            fits[key] = source[name]
    network.load_state_dict({**own, **fits})
    return len(fits)


def _sees_further_channels(own: Tensor, source: Tensor) -> bool:
    """Whether they are weights of convolutions that differ in their input channels alone."""
    return (
        own.ndim == source.ndim > 2
        and own.shape[1] > source.shape[1]
        and (own.shape[0], *own.shape[2:]) == (source.shape[0], *source.shape[2:])
    )
