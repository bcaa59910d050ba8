"""The numbers of a plan that users edit: batch, patch, spacing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nnssl.data.findings import ERROR, Finding

KNOWN = "dynamic_network_architectures."  # U-Nets whose decoder needs the sizes of the encoder


def inherited(configurations: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """A configuration with what it takes from others, as nnU-Net puts them together."""
    content: dict[str, Any] = {}
    seen = []
    while name not in seen and isinstance(configurations.get(name), dict):
        seen.append(name)
        content = {**configurations[name], **content}
        name = configurations[name].get("inherits_from")
    return content


def inspect_sizes(place: str, own: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings about the configuration at `place`.

    own      what stands there itself; what it inherits is told where that stands
    content  the whole of it
    """
    batch, patch, spacing = (content.get(key) for key in ("batch_size", "patch_size", "spacing"))
    if "batch_size" in own and not _is_count(batch):
        yield Finding(ERROR, f"{place}.batch_size", f"is {batch!r}", "a whole number above 0", "Correct it")
    if "spacing" in own and not (isinstance(spacing, list) and all(map(_is_length, spacing))):
        yield Finding(
            ERROR, f"{place}.spacing", f"is {spacing!r}", "mm along each axis, above 0", "Correct it"
        )
    if not {"patch_size", "architecture"} & own.keys() or "patch_size" not in content:
        return
    sizes = patch if isinstance(patch, list) and all(map(_is_count, patch)) else []
    steps = _steps(content.get("architecture")) or [1] * len(sizes)
    if len(sizes) not in (2, 3) or len(steps) != len(sizes):
        expected = f"{len(steps) if len(steps) in (2, 3) else '2 or 3'} whole numbers above 0, one per axis"
        yield Finding(ERROR, f"{place}.patch_size", f"is {patch!r}", expected, "Correct it")
    elif any(size % step for size, step in zip(sizes, steps, strict=True)):
        fitting = [max(step, size // step * step) for size, step in zip(sizes, steps, strict=True)]
        expected = f"multiples of {steps}, by which the network divides it"
        yield Finding(ERROR, f"{place}.patch_size", f"is {patch}", expected, f"Take {fitting}, for example")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_length(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _steps(network: Any) -> Sequence[int]:
    """By what the encoder divides each axis; empty where that is not known."""
    if not isinstance(network, dict) or not str(network.get("network_class_name")).startswith(KNOWN):
        return []
    try:
        strides = [np.atleast_1d(stride) for stride in network["arch_kwargs"]["strides"]]
        return [int(step) for step in np.prod(np.broadcast_arrays(*strides), axis=0)]
    except (KeyError, TypeError, ValueError):  # nnU-Net tells it
        return []
