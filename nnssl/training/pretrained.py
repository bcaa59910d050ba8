"""`-pretrained_weights`: starting a method from a finished network, stock nnU-Net's among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nnssl.training.checkpoint import read_checkpoint

HEADS = ".seg_layers."  # nnU-Net's name of the layers that depend on the labels


def load_pretrained(
    method: nn.Module, deployed: nn.Module, path: str, dataset_json: Mapping[str, Any], fresh: Sequence[str]
) -> str:
    """The weights of the checkpoint into the deployed network, and into other networks of the method as far
    as names and shapes agree, but for their segmentation layers. Returns what was done, in one line.

    Unlike in nnU-Net, the deployed network's segmentation layers are taken over, too, where the source was
    trained on the same labels.

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
        if network is not deployed and (count := _take_what_fits(network, source))
    }
    said = f"pretrained weights: {path}, {len(wanted)} of {len(target)} tensors; segmentation layers "
    said += "taken over (same labels)" if heads else "fresh (other labels)"
    return said + "".join(f"; {name}: {count} tensors" for name, count in others.items())


def _take_what_fits(network: nn.Module, source: Mapping[str, Tensor]) -> int:
    own = network.state_dict()
    fits = {
        key: source[name]
        for key, value in own.items()
        if (name := key.removeprefix("network.")) in source
        if source[name].shape == value.shape and HEADS not in key
    }
    network.load_state_dict({**own, **fits})
    return len(fits)
