"""TensorBoard beside nnU-Net's wandb: a logger with the methods of `WandbLogger`, switched on by
`nnssl_tensorboard_enabled=1`. It needs the package tensorboard (`pip install "nnunet-semi[tensorboard]"`)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

SWITCH = "nnssl_tensorboard_enabled"
FOLDER = "tensorboard"
SILENT = {SWITCH: "0", "nnUNet_wandb_enabled": "0"}  # environment of a trainer that is no run


def enabled() -> bool:
    """The switch, with the values of nnU-Net's `nnUNet_wandb_enabled`."""
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "False", "false", "1", "True", "true"):
        raise ValueError(f"{SWITCH} is {value!r}, expected 0 or 1")
    return value in ("1", "True", "true")


class TensorBoardLogger:
    """Writes events into the folder `tensorboard` of the output folder.

    The file is opened with the first value, so that what a resumed run repeats replaces what was there.
    """

    def __init__(self, output_folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(
                f"{SWITCH} is set, but TensorBoard is not installed ({error}): pip install tensorboard"
            ) from error
        self._open = SummaryWriter
        self._folder = os.path.join(output_folder, FOLDER)
        self._writer: Any = None
        self._config: dict[str, Any] = {}
        self._step = 0

    def update_config(self, config: Mapping[str, Any]) -> None:
        self._config.update(config)

    def log(self, key: str, value: Any, step: int) -> None:
        if key.endswith("_timestamps"):  # events have their own, and 32 bits do not hold these
            return
        if self._writer is None:
            self._writer = self._open(self._folder, purge_step=step)
            self._writer.add_text("config", _table(self._config), step)
        self._step = step
        self._writer.add_scalar(key, float(value), step)

    def log_summary(self, key: str, value: Any) -> None:
        self.log(f"summary/{key}", value, self._step)
        self.flush()

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()


def _table(config: Mapping[str, Any]) -> str:
    """JSON, as Markdown's code."""
    return "\n".join(f"    {line}" for line in json.dumps(config, indent=2, default=str).splitlines())
