"""`training.json` in the output folder: what a run is and how far it has come, for `nnssl report`.

It is rewritten at the start and after every epoch, also while the training runs. Raw terms are in losses.csv.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
from typing import Any

import torch

from nnssl.config import Config
from nnssl.data.structures import structures
from nnssl.files import write_text
from nnssl.training.checkpoint import versions

NAME = "training.json"
LOGGED = (  # of nnU-Net's logger
    "train_losses",
    "val_losses",
    "dice_per_class_or_region",
    "ema_fg_dice",
    "epoch_start_timestamps",
    "epoch_end_timestamps",
)


def facts(trainer: Any) -> dict[str, Any]:
    """What does not change during a run.

    classes: nnU-Net's order of `dice_per_class_or_region`; meaning: of terms and diagnostics; changed: keys
    that differ from their defaults; cases: how many.
    """
    manager, configuration, method = trainer.plans_manager, trainer.configuration_manager, trainer.method
    labeled, validation = trainer.do_split()
    sections: dict[str, Config] = {"": trainer.general, method.name: trainer.method_config}
    return {
        "trainer": type(trainer).__name__,
        "method": method.name,
        "dataset": manager.dataset_name,
        "configuration": trainer.configuration_name,
        "plans": manager.plans_name,
        "fold": trainer.fold,
        "classes": list(structures(trainer.dataset_json)),
        "cases": {
            "labeled": len(labeled),
            "unlabeled": len(method.planned.unlabeled_cases),
            "validation": len(validation),
        },
        "num_epochs": trainer.num_epochs,
        "patch_size": [int(n) for n in configuration.patch_size],
        "spacing": [float(s) for s in configuration.spacing],
        "batch_size": trainer.batch_size,
        "network": configuration.network_arch_class_name.rpartition(".")[2],
        "mirror_axes": list(trainer.mirror_axes()),
        "meaning": dict(method.meaning),
        "config": {name: dataclasses.asdict(section) for name, section in sections.items()},
        "changed": [
            f"{name}.{key}".removeprefix(".") for name, c in sections.items() for key in non_default(c)
        ],
        "device": device_name(trainer.device),
        "precision": trainer.step.precision(),
        "versions": versions(),
    }


def non_default(config: Config) -> list[str]:
    """Keys whose value is not the default."""
    return [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    kind = platform.processor() or platform.machine()
    return f"{device.type} ({kind}, {threads} thread{'s' * (threads > 1)})"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device, or of this process where the device is the CPU; 0: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if os.name == "nt":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_record(trainer: Any, known: dict[str, Any]) -> None:
    """`known` are the `facts`."""
    logged = trainer.logger.local_logger.my_fantastic_logging
    content = {
        **known,
        "epochs_done": trainer.current_epoch,
        "peak_memory": peak_memory(trainer.device),
        "logging": {key: _plain(logged[key]) for key in LOGGED if key in logged},
    }
    write_text(json.dumps(content, default=str), os.path.join(trainer.output_folder, NAME))


def _plain(value: Any) -> Any:
    """NumPy's numbers as JSON's; null for what is not finite."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return float(value) if math.isfinite(value) else None
