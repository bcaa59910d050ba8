"""Reading a checkpoint, and its parts: the method without the deployed network, what each rank has of its
own, versions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import nnssl
from nnssl.data.findings import listed
from nnssl.files import copy_file, torch_damage

NAMES = tuple(
    f"checkpoint_{name}.pth" for name in ("final", "latest", "best")
)  # as nnU-Net's --c prefers them

Cases = dict[str, list[str]]  # {train, val, unlabeled: names}, as in the split


def read_checkpoint(path: str, device: Any, sound_option: str = "") -> dict[str, Any]:
    """A checkpoint, whole. RuntimeError naming the file where it is damaged, with the sound ones beside it.

    sound_option  how the command at hand takes a sound one, e.g. "-chk"; empty: only as --c finds it
    """
    if damage := torch_damage(path):
        raise RuntimeError(f"{path} cannot be used: {damage}. {_way_out(path, sound_option)}")
    content = torch.load(path, map_location=device, weights_only=False)
    if not isinstance(content, dict) or "network_weights" not in content:
        raise RuntimeError(f"{path} is not a checkpoint of nnU-Net: it has no key `network_weights`")
    return content


def _way_out(path: str, sound_option: str) -> str:
    """What to do without this checkpoint."""
    folder, name = os.path.split(path)
    others = [other for other in NAMES if other != name and os.path.lexists(os.path.join(folder, other))]
    sound = [other for other in others if not torch_damage(os.path.join(folder, other))]
    if not sound:
        return "No other checkpoint there is sound: restore it from a copy, or delete it and train anew"
    told = ", ".join(f"{other} (epochs done: {_epochs(os.path.join(folder, other))})" for other in sound)
    if sound_option:
        return f"Sound there: {told}. Choose with {sound_option}"
    before = [other for other in NAMES[: NAMES.index(sound[0])] if other in (name, *others)]
    return f"Sound there: {told}. Move {' and '.join(before or [name])} away, and --c resumes from {sound[0]}"


def refuse_blocked(folder: str) -> None:
    """RuntimeError where something that is not a file bears the name of a checkpoint: nnU-Net would take it
    for absent, and the training could not write there."""
    for name in NAMES:
        path = os.path.join(folder, name)
        if os.path.lexists(path) and not os.path.isfile(path):
            raise RuntimeError(f"{path}: {torch_damage(path)}, expected a checkpoint. Move it away")


def checkpoints_in(folder: str) -> list[str]:
    """Names of the checkpoints that --c would find there."""
    return [name for name in NAMES if os.path.isfile(os.path.join(folder, name))]


@contextmanager
def latest_kept(folder: str, acts: bool) -> Iterator[None]:
    """nnU-Net removes the latest checkpoint at the end of a training, of one that wrote none, too."""
    latest = os.path.join(folder, NAMES[1])
    if not (acts and os.path.isfile(latest)):
        yield
        return
    aside = latest + ".kept"
    os.replace(latest, aside)
    try:
        yield
    finally:
        os.replace(aside, latest)


def complete_best(path: str, ema: Sequence[float]) -> None:
    """nnU-Net writes an epoch as latest, then as best if it is: where a run ended in between, do the second.

    path  the checkpoint that a run resumes from
    ema   nnU-Net's measure of every epoch so far; the higher, the better
    """
    folder, name = os.path.split(path)
    best, before = os.path.join(folder, NAMES[2]), highest(ema[:-1])
    if name != NAMES[1] or not ema or (before is not None and not ema[-1] > before):
        return
    if torch_damage(best) or _epochs(best) < len(ema):
        copy_file(path, best)


def _epochs(path: str) -> int:
    return int(torch.load(path, map_location="cpu", weights_only=False, mmap=True)["current_epoch"])


def how_to_resume(folder: str, epochs: Mapping[str, int], disabled: bool) -> str:
    """What a user whose training was stopped should do.

    epochs  {checkpoint of this training: the epoch it resumes at}
    """
    taken = next((name for name in NAMES if os.path.isfile(os.path.join(folder, name))), None)
    if taken is not None and taken in epochs:
        return f"rerun with --c to resume at epoch {epochs[taken]} ({taken})"
    reason = "checkpointing is disabled" if disabled else "there is no checkpoint yet"
    if taken is not None:
        reason += f", and {os.path.join(folder, taken)}, which --c would take, is of an earlier training"
    return f"{reason}; rerun without --c to start anew"


def trained_on(used: Cases, validation: Iterable[str]) -> list[str]:
    """Validation cases whose labels a run trained on; not those that it had in both on purpose."""
    return sorted(set(validation) & set(used["train"]) - set(used["val"]))


def changed_cases(used: Cases, now: Cases) -> list[str]:
    """What differs between the cases of a run and those that it has now, one line per key of the split."""
    lines = []
    for key in used:
        there, here = set(used[key]), set(now[key])
        parts = (("added", here - there), ("removed", there - here))
        if told := [f"{word} {listed(sorted(names))}" for word, names in parts if names]:
            lines.append(f"{key}: {'; '.join(told)}")
    return lines


def versions() -> dict[str, str]:
    """What wrote the checkpoint."""
    return {"nnssl": nnssl.__version__, "torch": torch.__version__, "numpy": np.__version__}


def highest(values: Iterable[float | None]) -> float | None:
    """The highest of the numbers; None and NaN are left out."""
    return max((v for v in values if v is not None and v == v), default=None)


def method_state(method: nn.Module, deployed: nn.Module) -> dict[str, Any]:
    """The method's state without the deployed network, which nnU-Net saves as `network_weights`."""
    left_out = _keys_of(method, deployed)
    return {k: v for k, v in method.state_dict().items() if k not in left_out}


def load_method(method: nn.Module, deployed: nn.Module, state: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Load what `method_state` gave; returns the keys that are missing and those that the method lacks."""
    missing, unexpected = method.load_state_dict(state, strict=False)
    left_out = _keys_of(method, deployed)
    return [k for k in missing if k not in left_out], list(unexpected)


def by_name(
    state: Mapping[str, Any],
    per_case: Mapping[str, tuple[str, int]],
    before: Mapping[str, Sequence[str]],
    now: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The state of a method whose cases were those of `before`, for those of `now`: entries of the same name
    keep their values, new ones begin with zeros.

    per_case     {key: (kind of cases, axis)}, as `SemiMethod.per_case`
    before, now  {kind of cases: names in their order}
    """
    moved = dict(state)
    for key, (kind, axis) in per_case.items():
        places, old = {case: i for i, case in enumerate(before[kind])}, state[key].movedim(axis, 0)
        new = old.new_zeros(len(now[kind]), *old.shape[1:])
        for i, case in enumerate(now[kind]):
            if case in places:
                new[i] = old[places[case]]
        moved[key] = new.movedim(0, axis)
    return moved


def _keys_of(method: nn.Module, deployed: nn.Module) -> set[str]:
    """Keys of the method's state that name the deployed network."""
    prefix = next(name for name, module in method.named_children() if module is deployed)
    return {f"{prefix}.{k}" for k in deployed.state_dict()}


def from_all_ranks(mine: Any) -> list[Any]:
    """What every rank has, in their order. Collective under DDP."""
    if not dist.is_available() or not dist.is_initialized():
        return [mine]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    return states
