"""Raw terms and weights, one row per epoch: losses.csv and losses.png beside nnU-Net's progress.png."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from nnssl.files import replacing, write_text


class History:
    """Rows {"epoch", "lr", "total", "loss/<term>", "diagnostic/<name>", "gradient/<term>",
    "accepted/<class>", "called/<class>", "weight/<term>", "validation_loss", "dice/<structure>"}; saved in
    the checkpoint: the file always matches it.

    total: the weighted sum that was minimised. called: share of the unlabeled voxels that are called a class;
    accepted: share that are called so and teach.

    Times are not in here (nnU-Net's log has them): the same run writes the same file.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._next_plot = 0.0

    def add(self, epoch: int, lr: float, losses: dict[str, float], weights: dict[str, float]) -> None:
        """losses: epoch means keyed as in the class's docstring; weights: at the end of the epoch."""
        self.rows = [r for r in self.rows if r["epoch"] < epoch]
        self.rows.append(
            {"epoch": epoch, "lr": lr, **losses, **{f"weight/{k}": v for k, v in weights.items()}}
        )

    def describe(self) -> str:
        """The last row in one line, for console and log."""
        row = self.rows[-1]
        terms = [k.removeprefix("loss/") for k in row if k.startswith("loss/")]
        line = "losses " + ", ".join(
            f"{k} {row[f'loss/{k}']:.4f} (weight {row[f'weight/{k}']:.4g})" for k in terms
        )
        return line + "".join(
            f"; {k.removeprefix('diagnostic/')} {row[k]:.4g}" for k in row if k.startswith("diagnostic/")
        )

    def write(self, folder: str, last: bool = True) -> None:
        """losses.csv and losses.png into `folder`; the picture, unless it is the `last`, so seldom that it
        takes a five-hundredth of the time."""
        # a continued run may have other columns than it began with
        columns = list(dict.fromkeys(c for row in self.rows for c in row))
        lines = [",".join(f"{r.get(c, float('nan')):.10g}" for c in columns) for r in self.rows]
        lines.insert(0, ",".join(f'"{c}"' if "," in c else c for c in columns))  # a class's name may have one
        write_text("\n".join(lines) + "\n", os.path.join(folder, "losses.csv"))
        begun = time.monotonic()
        if last or begun >= self._next_plot:
            self._plot(os.path.join(folder, "losses.png"))
            end = time.monotonic()
            self._next_plot = end + 500 * (end - begun)

    def _plot(self, path: str) -> None:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        terms = [c.removeprefix("loss/") for c in self.rows[0] if c.startswith("loss/")]
        epochs = [r["epoch"] for r in self.rows]
        with plt.rc_context(
            {**plt.rcParamsDefault, "backend": "agg"}
        ):  # nnU-Net's plot leaves its own style behind
            figure, axes = plt.subplots(
                len(terms), 1, figsize=(7, 1.2 + 1.7 * len(terms)), sharex=True, squeeze=False
            )
            for axis, term in zip(axes[:, 0], terms, strict=True):
                axis.plot(
                    epochs,
                    [r[f"loss/{term}"] for r in self.rows],
                    color="tab:blue",
                    marker="." if len(epochs) < 30 else None,
                )
                axis.set_ylabel(term, color="tab:blue")
                axis.grid(alpha=0.3)
                right = axis.twinx()
                right.plot(
                    epochs, [r[f"weight/{term}"] for r in self.rows], color="tab:orange", linestyle="--"
                )
                right.set_ylabel("weight", color="tab:orange")
                right.set_ylim(bottom=0)
            axes[-1, 0].set_xlabel("epoch")
            axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
            figure.suptitle("raw terms and their weights")
            figure.tight_layout()
            with replacing(path) as partial:
                figure.savefig(partial, dpi=90)
            plt.close(figure)


def whole_plot(plot: Callable[[str], None]) -> Callable[[str], None]:
    """nnU-Net's plot of its progress, which writes in place, as a file that is there whole or not at all."""

    def plot_progress_png(output_folder: str) -> None:
        with replacing(os.path.join(output_folder, "progress.png")) as partial:
            plot(os.path.dirname(partial))

    return plot_progress_png
