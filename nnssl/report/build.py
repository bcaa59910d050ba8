"""The report: from the runs to report.html, its PNGs and report_cases.csv."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.data.raw import training_files
from nnssl.data.structures import structures
from nnssl.files import write_text
from nnssl.metrics import CONFIDENCE, RESAMPLES
from nnssl.report import html, pictures
from nnssl.report.charts import PNG_MARK, Chart, Dots, Row, draw
from nnssl.report.curves import (
    acceptance_charts,
    loss_charts,
    term_charts,
    validation_charts,
    weight_chart,
)
from nnssl.report.html import Cell, Marked, Number
from nnssl.report.panels import ERRORS, OUTLINES, Strip, case_strip, draw_strip
from nnssl.report.pictures import teacher_charts
from nnssl.report.runs import Run
from nnssl.report.scores import METRICS, Key, Scores, read_image, read_labels, score_runs, truth_folder

NAME, TABLE = "report.html", "report_cases.csv"
COLUMNS = ("case", "fold", "structure", "trainer")  # the first ones of the table
WORST, BEST = 2, 1  # cases shown


def write_report(runs: Sequence[Run], output: str | os.PathLike[str]) -> Path:
    """report.html, report_cases.csv and report_*.png in `output`; those of an earlier report are replaced.

    ValueError where a file of such a name is none of ours; it is kept.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (NAME, TABLE):
        if os.path.lexists(folder / name) and not is_ours(folder / name):
            raise foreign(folder / name)
    for old in folder.glob("report_*.png"):
        if is_ours(old):
            old.unlink()
    report = Report(runs, folder)
    write_text(report.page(), folder / NAME)
    if report.scores.cases:
        write_text(cases_csv(report.scores), folder / TABLE)
    return folder / NAME


def is_ours(path: Path) -> bool:
    """Whether an earlier report left this file: by its mark, not by its name."""
    if path.suffix != ".png":
        start = path.read_bytes()[:1000] if path.is_file() else b""
        return html.GENERATOR.encode() in start or start.startswith(",".join(COLUMNS).encode())
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == PNG_MARK["Software"]
    except (OSError, UnidentifiedImageError):
        return False


def foreign(path: Path) -> ValueError:
    return ValueError(
        f"{path} is there and was not written by an earlier report, so it is kept. Move it away, "
        "or choose another folder with -o"
    )


class Report:
    """runs: of one dataset; the first model is what the others are compared with."""

    def __init__(self, runs: Sequence[Run], folder: Path) -> None:
        self.runs, self.folder = list(runs), folder
        self.scores = score_runs(runs)
        self.models = list(self.scores.models)
        self.styles = {model: i for i, model in enumerate(self.models)}

    def page(self) -> str:
        first = self.runs[0]
        configurations = sorted({run.folder.parent.name.split("__")[-1] for run in self.runs})
        folds = sorted({run.fold for run in self.runs})
        title = f"{first.dataset}: {', '.join(self.models)}"
        written = time.strftime("%Y-%m-%d %H:%M")
        lead = html.paragraph(
            f"{', '.join(configurations)}, fold{'s' * (len(folds) > 1)} {', '.join(folds)}. "
            f"Written {written}.",
            "soft",
        )
        sections: dict[str, Callable[[], str]] = {
            "Scores": self.score_tables,
            "Paired differences": self.differences,
            "Cases": self.pictures_of_cases,
            "Validation over time": self.validation,
            "Terms": self.terms,
            "Pseudo-labels": self.pseudo_labels,
            "All cases": self.all_cases,
            "Time and memory": self.resources,
            "Configuration": self.configuration,
        }
        made = {name: make() for name, make in sections.items()}
        return html.page(title, lead, {"In short": self.in_short(), **made})  # last: what could not be read

    def free(self, name: str) -> Path:
        """Where a picture goes; ValueError where somebody else's is."""
        path = self.folder / name
        if os.path.lexists(path) and not is_ours(path):
            raise foreign(path)
        return path

    # what it comes to

    def in_short(self) -> str:
        items = []
        for model in self.models[1:]:
            items += self.comparison(model, self.models[0])
        for run in self.runs:
            items.append(("", f"{run.model}, fold {run.fold}: {run.status}."))
        items += [("", note) for note in (*self.scores.notes, *self.unread())]
        if not self.scores.cases:
            items.append(("", "No case is scored yet: scores appear after the final validation."))
        return html.bullets(items)

    def unread(self) -> list[str]:
        """What of the runs is damaged."""
        return [note for run in self.runs for note in run.notes]

    def comparison(self, model: str, reference: str) -> list[tuple[str, str]]:
        """Whether the mean Dice differs, in a sentence."""
        structure = self.scores.rows()[-1]
        found = self.scores.difference(model, reference, structure, "dice") if self.scores.cases else None
        if found is None:
            return []
        verdict = found.verdict(True)
        style = verdict if verdict in ("better", "worse") else "unclear"
        cases = f"{found.cases} case{'s' * (found.cases > 1)}"
        text = (
            f"{model} against {reference}: mean Dice {found.mean:+.3f} ({CONFIDENCE} % interval "
            f"{found.low:+.3f} to {found.high:+.3f}, {cases}): {verdict}."
        )
        return [(style, html.minus(text))]

    def score_tables(self) -> str:
        s = self.scores
        if not s.cases:
            return ""
        rows: list[list[Cell]] = []
        for structure in s.rows():
            for model in s.models:
                row: list[Cell] = [structure, model]
                for key, metric in METRICS.items():
                    values = s.column(model, structure, key)
                    values = values[np.isfinite(values)]
                    if not len(values):
                        row.append(Number(math.nan))
                        continue
                    sd = f" ± {values.std(ddof=1):.{metric.digits}f}" if len(values) > 1 else ""
                    row.append(Number(float(values.mean()), text=f"{values.mean():.{metric.digits}f}{sd}"))
                rows.append(row)
        heads = ["structure", "trainer", *(f"{m.name} {m.unit}".strip() for m in METRICS.values())]
        text = (
            f"Mean over {len(s.cases)} validation cases ± standard deviation. 95HD and ASD in mm, smaller is "
            "better; a structure that was not found counts with the diagonal of the grid, one that neither "
            "has is not scored. ASD goes from the prediction to the label."
        )
        charts: list[Chart | Dots] = [
            Dots(
                f"Dice of every case: {structure}",
                [self.dots(model, structure) for model in s.models],
                "Dice",
                "A dot per case; the bar is the mean.",
            )
            for structure in s.structures
        ]
        draw(charts, self.free("report_dice.png"))
        return html.table(heads, rows, text, "scores") + html.charts(charts)

    def dots(self, model: str, structure: str) -> Row:
        values = self.scores.column(model, structure, "dice")
        names = [key.case for key in self.scores.cases]
        mark = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
        return Row(model, values.tolist(), names, mark, style=self.styles[model])

    def differences(self) -> str:
        s = self.scores
        if not s.cases or len(s.models) < 2:
            return ""
        reference, rows, dots = s.models[0], [], []
        for structure in s.rows():
            for model in s.models[1:]:
                for key, metric in METRICS.items():
                    found = s.difference(model, reference, structure, key)
                    if found is None:
                        continue
                    verdict = found.verdict(metric.higher)
                    row: list[Cell] = [structure, f"{model} − {reference}", f"{metric.name} {metric.unit}"]
                    row += [Number(v, metric.digits, signed=True) for v in found[:3]]
                    style = verdict if verdict in ("better", "worse") else "unclear"
                    rows.append([*row, Number(found.cases, 0), Marked(verdict, style)])
                    if key == "dice":
                        gap = s.column(model, structure, key) - s.column(reference, structure, key)
                        dots.append(
                            Row(
                                f"{structure}: {model}",
                                gap.tolist(),
                                [case.case for case in s.cases],
                                found.mean,
                                (found.low, found.high),
                                self.styles[model],
                            )
                        )
        heads = ["structure", "difference", "metric", "mean", "from", "to", "cases", "verdict"]
        text = (
            f"Differences of the same cases. From, to: {CONFIDENCE} % bootstrap interval of the mean over "
            f"the cases ({RESAMPLES} resamples); it says nothing about another seed of the training."
        )
        chart = Dots(
            f"Dice minus that of {reference}",
            dots,
            "difference in Dice",
            f"A dot per case, the mean with its {CONFIDENCE} % interval; to the right is better.",
            zero=True,
        )
        draw([chart], self.free("report_differences.png"))
        return html.table(heads, rows, text, "differences") + html.charts([chart])

    def all_cases(self) -> str:
        s = self.scores
        rows: list[list[Cell]] = []
        for key in s.cases:
            for structure in s.structures:
                for model in s.models:
                    values = s.values[model][key][structure]
                    numbers = [Number(values[k], m.digits) for k, m in METRICS.items()]
                    rows.append([key.case, key.fold, structure, model, *numbers])
        if not rows:
            return ""
        heads = [
            "case",
            "fold",
            "structure",
            "trainer",
            *(f"{m.name} {m.unit}".strip() for m in METRICS.values()),
        ]
        return html.table(heads, rows, "Click on a head to sort. Also in report_cases.csv.", "cases")

    # pictures

    def chosen_cases(self) -> dict[Key, str]:
        """Cases worth looking at, and why: the worst, the best, and where the models differ most."""
        s, rank = self.scores, self.scores.rows()[-1]
        each = np.array([s.column(model, rank, "dice") for model in s.models])
        level = each.mean(0)
        order = [i for i in np.argsort(level) if math.isfinite(level[i])]
        chosen: dict[int, str] = {
            i: "Worst case" if n == 0 else "Next worst" for n, i in enumerate(order[:WORST])
        }
        for i in reversed(order[len(order) - BEST :]):
            chosen.setdefault(i, "Best case")
        if len(s.models) > 1:
            gap = each[-1] - each[0]
            largest = [i for i in np.argsort(gap) if math.isfinite(gap[i])]
            pair = f"of {s.models[-1]} over {s.models[0]}"
            if largest and gap[largest[-1]] > 0:
                chosen.setdefault(largest[-1], f"Largest gain {pair}")
            if largest and gap[largest[0]] < 0:
                chosen.setdefault(largest[0], f"Largest loss {pair}")
        return {s.cases[i]: why for i, why in chosen.items()}

    def pictures_of_cases(self) -> str:
        if not self.scores.cases:
            return ""
        found = structures(self.runs[0].dataset_json)
        parts = [
            html.paragraph(
                "Three planes through the structure with the lowest Dice of the case: the labels, and every "
                "trainer's prediction with its errors.",
                "soft",
            ),
            html.boxes({name: OUTLINES[i % len(OUTLINES)] for i, name in enumerate(found)} | ERRORS),
        ]
        images = self.images()
        for number, (key, why) in enumerate(self.chosen_cases().items(), 1):
            strip = self.strip(key, why, images.get(key.case))
            parts.append(html.strip(strip))
            safe = re.sub(r"[^\w.-]", "_", key.case)
            draw_strip(strip, self.free(f"report_case_{number}_{safe}.png"))
        return "".join(parts)

    def images(self) -> dict[str, str]:
        """First channel of every labeled case, where the raw data are on this machine."""
        from nnunetv2.paths import nnUNet_raw

        if not nnUNet_raw.is_set():
            return {}
        first = self.runs[0]
        raw = os.path.join(str(nnUNet_raw), first.dataset)
        if not os.path.isdir(raw):
            return {}
        files = training_files(raw, first.dataset_json)
        return {case: images[0] for case, (images, _) in files.items() if images}

    def strip(self, key: Key, why: str, image: str | None) -> Strip:
        s, first = self.scores, next(run for run in self.runs if run.fold == key.fold)
        content = first.dataset_json
        by_model = {run.model: run for run in self.runs if run.fold == key.fold}
        predictions = {m: read_labels(by_model[m].predictions[key.case], content)[0] for m in s.models}
        place = truth_folder(first)
        assert place is not None, "scored cases have labels"
        truth, spacing = read_labels(place / first.predictions[key.case].name, content)
        level = {
            name: np.mean([s.values[m][key][name]["dice"] for m in s.models])
            for name in s.structures
            if all(math.isfinite(s.values[m][key][name]["dice"]) for m in s.models)
        }
        shown = min(level, key=lambda name: level[name]) if level else s.structures[0]
        dice = ", ".join(
            f"{m} " + " / ".join(f"{s.values[m][key][name]['dice']:.3f}" for name in s.structures)
            for m in s.models
        )
        shown_image, absent = _image_of(image, content, truth.shape)
        return case_strip(
            f"{why}: {key.case} (Dice {dice}){absent}",
            shown_image,
            truth,
            predictions,
            spacing,
            structures(content),
            shown,
            content["labels"].get("ignore"),
        )

    # curves

    def validation(self) -> str:
        charts = [*validation_charts(self.runs, self.styles), *loss_charts(self.runs, self.styles)]
        draw(charts, self.free("report_validation.png"))
        if not charts:
            return ""
        text = (
            "nnU-Net's validation during the training: Dice of the deployed network, pooled over random "
            "patches of the validation cases. The scores above are those of whole scans."
        )
        return html.paragraph(text, "soft") + html.charts(charts)

    def terms(self) -> str:
        parts = []
        for model in self.models:
            charts = [
                *term_charts(self.runs, model, "loss"),
                *weight_chart(self.runs, model),
                *term_charts(self.runs, model, "diagnostic"),
                *term_charts(self.runs, model, "gradient"),
            ]
            if charts:
                draw(charts, self.free(f"report_terms_{re.sub(r'[^A-Za-z0-9]+', '_', model)}.png"))
                parts.append(f"<h3>{html.escape(model)}</h3>\n" + html.charts(charts))
        return "".join(parts)

    def pseudo_labels(self) -> str:
        charts = [*acceptance_charts(self.runs, self.styles), *teacher_charts(self.runs)]
        draw(charts, self.free("report_pseudo_labels.png"))
        parts = [html.charts(charts)]
        strips = [strip for run in self.runs for strip in pictures.strips(run, self.runs)]
        if strips:
            text = (
                "What the deployed network called the middle of a few unlabeled scans, over the training. "
                "Confidence from dark blue (0.5 or less) to yellow (1). Accepted: voxels whose pseudo-label "
                "would teach, in the structure's color, of the background in blue."
            )
            names = structures(self.runs[0].dataset_json)
            colors = {name: OUTLINES[i % len(OUTLINES)] for i, name in enumerate(names)}
            parts += [html.paragraph(text, "soft"), html.boxes(colors | {"background": pictures.ACCEPTED})]
        for number, strip in enumerate(strips, 1):
            parts.append(html.strip(strip))
            draw_strip(strip, self.free(f"report_pseudo_labels_{number}.png"))
        return "".join(parts)

    # figures of the runs

    def resources(self) -> str:
        rows: list[list[Cell]] = []
        for run in self.runs:
            seconds, record = run.seconds, run.record
            each = float(np.median(seconds)) if seconds else math.nan
            memory = record.get("peak_memory") or math.nan
            left = (run.epochs - run.epochs_done) * each if run.epochs else math.nan
            row: list[Cell] = [run.model, run.fold, Number(run.epochs_done, 0), Number(each, 1)]
            row += [Number(sum(seconds) / 3600 if seconds else math.nan, 2), Number(left / 3600, 2)]
            row += [Number(memory / 2**30, 2), record.get("device", "–"), record.get("precision", "–")]
            rows.append(row)
        heads = [
            "trainer",
            "fold",
            "epochs",
            "s per epoch",
            "h so far",
            "h left",
            "peak GiB",
            "device",
            "precision",
        ]
        text = (
            "Seconds: median over the epochs, training and validation on patches, without the final "
            "validation. Memory: allocated on the GPU, or resident where the training runs on the CPU."
        )
        return html.table(heads, rows, text, "resources")

    def configuration(self) -> str:
        parts = []
        for model in self.models:
            run = next(run for run in self.runs if run.model == model)
            record = run.record
            rows: list[list[Cell]] = []
            changed: list[int] = []
            for section, values in run.config.items():
                for key, value in values.items():
                    name = f"{section}.{key}" if section else key
                    if name in record.get("changed", []):
                        changed.append(len(rows))
                    rows.append([name, text_of(value), "changed" if len(rows) in changed else ""])
            planned = ("patch_size", "spacing", "batch_size", "network", "mirror_axes", "plans", "cases")
            rows += [[f"plan: {key}", text_of(record[key]), ""] for key in planned if key in record]
            rows += [[f"version: {k}", str(v), ""] for k, v in record.get("versions", {}).items()]
            if rows:
                name = f"configuration-{self.styles[model]}"
                parts.append(
                    html.table(
                        ["key", "value", "default"],
                        rows,
                        f"{model}; in bold what differs from the default",
                        name,
                        changed,
                    )
                )
            else:
                parts.append(
                    html.paragraph(f"{model}: no configuration of nnssl, a trainer of nnU-Net's own.")
                )
        return "".join(parts)


def _image_of(
    file: str | None, dataset_json: dict[str, Any], shape: tuple[int, ...]
) -> tuple[np.ndarray | None, str]:
    """First channel of a case that is pictured, and why there is none where its file has changed since."""
    if not (file and os.path.isfile(file)):
        return None, ""
    try:
        image = read_image(file, dataset_json)
    except Exception:  # of whatever library reads it
        return None, f", {file} cannot be read"
    return (image, "") if image.shape == shape else (None, f", {file} has another grid than the labels")


def text_of(value: Any) -> str:
    """A configured value in a few words."""
    if isinstance(value, dict):
        return ", ".join(f"{text_of(v)} {k}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(text_of, value))}]"
    return "null" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def cases_csv(scores: Scores) -> str:
    """A row per case, structure and model, in full precision."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*COLUMNS, *METRICS])
    for key in scores.cases:
        for structure in scores.structures:
            for model in scores.models:
                values = scores.values[model][key][structure]
                shown = ["" if math.isnan(values[k]) else f"{values[k]:.6g}" for k in METRICS]
                writer.writerow([key.case, key.fold, structure, model, *shown])
    return stream.getvalue()
