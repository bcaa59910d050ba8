"""``nnssl pseudo-label``: segmentations of all unlabeled scans, those first that most need correction.

nnU-Net's own predictor averages over folds and mirrorings. Here it makes one pass after the other, so that
what is averaged can be compared: where the passes disagree, the network is unsure. A cascade's scans are
first predicted by the same folds of its previous stage, averaged.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import basename, dirname, isdir, isfile, join
from typing import Any

import blosc2
import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor
from tqdm import tqdm

from nnssl.commands.export import FINAL, checkpoint_file, trained_models
from nnssl.data.findings import listed, raise_errors
from nnssl.data.freshness import Case, digest, stamp
from nnssl.data.inspection import read_dataset_json
from nnssl.data.raw import CheckedPlans, SourceError, num_channels
from nnssl.data.structures import mask_of, structures
from nnssl.data.unlabeled import find_unlabeled_images
from nnssl.files import move, one_at_a_time, read_object, scratch_folder, write_json, write_text
from nnssl.training.checkpoint import read_checkpoint

STATE, TABLE, FORMAT = "pseudo_labels.json", "quality.csv", 1
SEGMENTATIONS, CONFIDENCE = "segmentations", "confidence"


class PassPredictor(nnUNetPredictor):
    """nnU-Net's predictor, which makes one pass over a scan per fold and mirroring.

    previous  in a cascade, what predicts the previous stage
    """

    mirrored: tuple[int, ...] = ()
    previous: PassPredictor | None = None

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        axes = [axis + 2 for axis in self.mirrored]
        return torch.flip(self.network(torch.flip(x, axes)), axes) if axes else self.network(x)

    def mirrorings(self) -> list[tuple[int, ...]]:
        """Sets of axes, as nnU-Net averages over them."""
        axes = self.allowed_mirroring_axes or ()
        return [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]

    @property
    def num_passes(self) -> int:
        own = len(self.list_of_parameters) * len(self.mirrorings())
        return own + (self.previous.num_passes if self.previous else 0)

    def passes(self, data: Tensor) -> Iterator[Tensor]:
        """Logits (heads, D, H, W) of a preprocessed scan, float32 on the CPU."""
        network: Any = self.network
        for parameters in self.list_of_parameters:
            getattr(network, "_orig_mod", network).load_state_dict(parameters)  # within a compiled one
            for axes in self.mirrorings():
                self.mirrored = axes
                yield self.predict_sliding_window_return_logits(data).float().cpu()


def pseudo_label(
    dataset_id: int,
    configuration: str,
    folds: Sequence[str],
    trainer: str,
    output: str,
    plans_name: str = "nnUNetPlans",
    checkpoint_name: str = FINAL,
    device: str | None = None,
) -> str:
    """Predict every scan of imagesUn that `output` does not hold yet; returns the path of the table.

    `output` gets ``segmentations`` and ``confidence`` (per cent, 0 to 100) in the format of the images, and
    ``quality.csv``, worst first. Every scan is written whole, so that the command can be interrupted; a file
    that somebody edited is never written again.
    """
    dataset = str(convert_id_to_dataset_name(dataset_id))
    raw = join(nnUNet_raw, dataset)
    findings, dataset_json = read_dataset_json(join(raw, "dataset.json"))
    raise_errors(findings)
    scans = find_unlabeled_images(raw, dataset_json)
    if not scans:
        raise ValueError(f"{join(raw, 'imagesUn')}: no scans. Put the scans to predict there.")
    folder = str(get_output_folder(dataset, trainer, plans_name, configuration))
    stages = {folder: _checkpoints(folder, folds, checkpoint_name)}
    while before := _previous_stage(next(reversed(stages))):
        stages[before] = _checkpoints(before, folds, checkpoint_name)
    stamps = [{fold: stamp(file) for fold, file in files.items()} for files in stages.values()]
    model = {"model": folder, "checkpoints": stamps[0]}
    state = _State(output, model | ({"previous_stages": stamps[1:]} if stamps[1:] else {}))
    cases = [Case(name, tuple(files), "imagesUn") for name, files in scans.items()]
    todo = [case for case in cases if not state.holds(case)]
    if own := [case.name for case in todo if state.is_somebody_elses(case.name, dataset_json["file_ending"])]:
        print(
            f"Not predicted, and not in {TABLE}: {listed(own)}. {join(output, SEGMENTATIONS)} holds "
            "segmentations of these scans that this command did not write. Move them away to have the scans "
            "predicted."
        )
        todo = [case for case in todo if case.name not in own]
    if todo:
        predictor = _load(list(stages), list(stages[folder]), checkpoint_name, device)
        problems = _predict_all(todo, predictor, state)
        state.refresh()
    path = state.write_table({case.name for case in cases})
    if todo and problems:
        raise ValueError(
            f"{len(problems)} of {len(cases)} scans could not be predicted (the others are in {path}):\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    return path


def _checkpoints(folder: str, folds: Sequence[str], name: str) -> dict[str, str]:
    """{fold: path of its checkpoint}; ValueError naming what was trained instead."""
    if not isdir(folder):
        raise ValueError(
            f"no trained model in {folder}: train it first, or correct -tr, -p or -c. "
            f"{trained_models(folder)}"
        )
    raise_errors(read_dataset_json(join(folder, "dataset.json"))[0])
    found = {fold: checkpoint_file(folder, fold, name) for fold in dict.fromkeys(folds)}
    for path in found.values():
        read_checkpoint(path, "cpu", "-chk")  # names a damaged one; nnU-Net's predictor does not
    return found


def _previous_stage(folder: str) -> str:
    """Folder of the model that predicts what the one in `folder` starts from; empty outside a cascade."""
    trainer, plans_name, configuration = basename(folder).split("__")
    plans = PlansManager(join(folder, "plans.json"))
    previous = plans.get_configuration(configuration).previous_stage_name
    return join(dirname(folder), f"{trainer}__{plans_name}__{previous}") if previous else ""


def _load(stages: list[str], folds: list[str], checkpoint_name: str, device: str | None) -> PassPredictor:
    """stages  folders of the models, the last stage of a cascade first"""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    predictor = PassPredictor(device=torch.device(chosen), allow_tqdm=False)
    with contextlib.redirect_stdout(io.StringIO()):
        predictor.initialize_from_trained_model_folder(stages[0], folds, checkpoint_name)
    if stages[1:]:
        predictor.previous = _load(stages[1:], folds, checkpoint_name, device)
    return predictor


def _predict_all(cases: Sequence[Case], predictor: PassPredictor, state: _State) -> list[str]:
    """Predict and write case by case; returns what went wrong, a line per case."""
    problems = []
    with tqdm(total=len(cases) * predictor.num_passes, desc="pseudo-labels", unit="pass") as bar:
        for case in cases:
            bar.set_postfix_str(case.name)
            before = bar.n
            state.refresh()
            if state.holds(case):  # by another process that was started with the same command
                bar.update(predictor.num_passes)
                continue
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints
                    state.add(case, *_predict(case, predictor, bar.update), predictor)
            except SourceError as error:
                problems.append(f"{case.name}: {error}")
            bar.update(before + predictor.num_passes - bar.n)
    return problems


def _predict(
    case: Case, predictor: PassPredictor, done: Callable[[int], Any]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any], dict[str, Any]]:
    """Segmentation, confidence in per cent (both on the grid of the image), the reader's properties and the
    row of the table."""
    sources = [{**stamp(file), "blake2b": digest(file)} for file in case.sources]
    manager, labels = predictor.configuration_manager, predictor.label_manager
    data, properties = _preprocessed(case, predictor, done)
    segmented: list[Any] = []
    mean = _average(
        predictor, data, done, lambda x: segmented.append(_packed(labels.convert_logits_to_segmentation(x)))
    )
    classes, spacing = structures(predictor.dataset_json), properties["spacing"]
    probabilities = labels.apply_inference_nonlin(mean).numpy()
    final = np.asarray(labels.convert_logits_to_segmentation(mean))
    row = quality(
        final,
        (array[:] for array in segmented),
        probabilities,
        classes,
        with_background=not labels.has_regions,
    )
    del probabilities, final
    segmentation, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
        mean,
        predictor.plans_manager,
        manager,
        labels,
        properties,
        return_probabilities=True,
        num_threads_torch=torch.get_num_threads(),
    )
    sure = np.maximum(probabilities, 1 - probabilities).min(0) if labels.has_regions else probabilities.max(0)
    row["ml"] = _volumes(segmentation, spacing, classes)
    row["sources"] = sources
    return segmentation, np.rint(100 * sure).astype(np.uint8), properties, row


def _preprocessed(
    case: Case, predictor: PassPredictor, done: Callable[[int], Any]
) -> tuple[Tensor, dict[str, Any]]:
    """What the network sees of a scan, and the reader's properties."""
    manager, content = predictor.configuration_manager, predictor.dataset_json
    plans = CheckedPlans(predictor.plans_manager.plans, case.images, num_channels(content), strict=True)
    preprocessor = manager.preprocessor_class(verbose=False)
    if predictor.previous is None:
        data, _, properties = preprocessor.run_case(list(case.images), None, plans, manager, content)
        return torch.from_numpy(data).float(), properties
    with tempfile.TemporaryDirectory() as scratch:  # through a file, as nnU-Net takes it
        file = join(scratch, case.name + content["file_ending"])
        segmentation, properties = _segmented(case, predictor.previous, done)
        predictor.plans_manager.image_reader_writer_class().write_seg(segmentation, file, properties)
        data, previous, properties = preprocessor.run_case(list(case.images), file, plans, manager, content)
    labels = predictor.label_manager.foreground_labels
    data = np.vstack((data, convert_labelmap_to_one_hot(previous[0], labels, data.dtype)))
    return torch.from_numpy(data).float(), properties


def _segmented(
    case: Case, predictor: PassPredictor, done: Callable[[int], Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """The segmentation by an earlier stage on the grid of the image, and the reader's properties."""
    data, properties = _preprocessed(case, predictor, done)
    segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
        _average(predictor, data, done),
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
        num_threads_torch=torch.get_num_threads(),
    )
    return segmentation, properties


def _average(
    predictor: PassPredictor,
    data: Tensor,
    done: Callable[[int], Any],
    each: Callable[[Tensor], Any] = lambda logits: None,
) -> Tensor:
    """Mean logits of all passes; `each` sees those of every pass."""
    total: Tensor | None = None
    passes = 0
    for logits in predictor.passes(data):
        each(logits)
        total = logits if total is None else total.add_(logits)
        passes += 1
        done(1)
    if total is None:
        raise RuntimeError("the predictor made no pass: the model has no parameters")
    return total.div_(passes)


def _packed(segmentation: Any) -> Any:
    """Compressed in memory: up to forty label maps of a scan have to be kept."""
    return blosc2.asarray(np.ascontiguousarray(segmentation, dtype=np.uint16))


# expected quality


def quality(
    final: np.ndarray,
    passes: Iterator[np.ndarray],
    probabilities: np.ndarray,
    classes: Mapping[str, tuple[int, ...]],
    with_background: bool,
) -> dict[str, Any]:
    """How good a segmentation can be expected to be, without knowing the truth.

    agreement   per class: mean Dice of the passes' segmentations with the final one; None where no pass has
                the class
    confidence  mean over the classes of the soft Dice of probability and segmentation: the Dice that one
                expects where probabilities are right

    Args:
        final: the label map (D, H, W) of the averaged passes.
        passes: the label map of each pass.
        probabilities: (heads, D, H, W) of the averaged passes; `with_background`: the first head is none of
            the classes.
    """
    masks = {name: mask_of(final, values) for name, values in classes.items()}
    scores: dict[str, list[float]] = {name: [] for name in classes}
    number = 0
    for segmentation in passes:
        number += 1
        for name, values in classes.items():
            score = dice(mask_of(segmentation, values), masks[name])
            if score is not None:
                scores[name].append(score)
    soft = []
    for head, mask in enumerate(masks.values(), int(with_background)):
        if mask.any():
            p = probabilities[head]
            soft.append(2 * float(p[mask].sum()) / float(p.sum() + mask.sum()))
    per_class = {name: float(np.mean(values)) if values else None for name, values in scores.items()}
    known = [value for value in per_class.values() if value is not None]
    return {
        "agreement": (float(np.mean(known)) if known else 0.0) if number > 1 else None,
        "confidence": float(np.mean(soft)) if soft else 0.0,
        "per_class": per_class if number > 1 else dict.fromkeys(classes),
    }


def _volumes(
    segmentation: np.ndarray, spacing: Sequence[float], classes: Mapping[str, tuple[int, ...]]
) -> dict[str, float | None]:
    """In ml; None for what is found in a single slice whose thickness nnU-Net's reader made up."""
    made_up = len(segmentation) == 1 and spacing[0] > 998 * max(spacing[1:])
    voxels = {name: int(mask_of(segmentation, values).sum()) for name, values in classes.items()}
    millilitres = float(np.prod(spacing)) / 1000
    return {n: None if number and made_up else round(number * millilitres, 3) for n, number in voxels.items()}


def dice(a: np.ndarray, b: np.ndarray) -> float | None:
    """Of two masks; None where both are empty."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / total if total else None


# the output folder


class _State:
    """What an output folder holds, and of which model: ``pseudo_labels.json``, the files and the table."""

    def __init__(self, folder: str, model: dict[str, Any]) -> None:
        self.folder, self.file = folder, join(folder, STATE)
        self.content: dict[str, Any] = {"format": FORMAT, **model, "cases": {}}
        if not isfile(self.file) and isdir(folder) and os.listdir(folder):
            raise ValueError(f"{folder} is not empty and holds no {STATE}. Choose a new folder with -o.")
        self.refresh()

    def refresh(self) -> None:
        """Take up what stands in the file: another process may be at work here, too."""
        if not isfile(self.file):
            return
        found = read_object(self.file)
        if {**found, "cases": {}} != {**self.content, "cases": {}}:
            raise ValueError(
                f"{self.folder} holds pseudo-labels of another model or of other checkpoints "
                f"({found.get('model')}). Choose another folder with -o."
            )
        self.content = found

    def path(self, part: str, case: str, ending: str) -> str:
        return join(self.folder, part, case + ending)

    def holds(self, case: Case) -> bool:
        """Whether the case is there and of today's scan, or its segmentation was edited; ValueError where the
        scan changed after that."""
        record = self.content["cases"].get(case.name)
        if record is None:
            return False
        files = [join(self.folder, file) for file in record["files"]]
        same_scan = len(record["sources"]) == len(case.sources) and all(
            map(_is_same, record["sources"], case.sources)
        )
        if same_scan and all(map(isfile, files)):
            return True
        if not isfile(files[0]) or digest(files[0]) == record["digest"]:
            return False
        if not same_scan:
            raise ValueError(
                f"{files[0]} was edited, and the scan {case.images[0]} changed since. Move the edited file "
                "away to have the scan predicted again."
            )
        return True

    def add(
        self,
        case: Case,
        segmentation: np.ndarray,
        confidence: np.ndarray,
        properties: dict[str, Any],
        row: dict[str, Any],
        predictor: PassPredictor,
    ) -> None:
        """Write the record of a case, then its files: without a record a file is somebody else's."""
        ending = predictor.dataset_json["file_ending"]
        writer = predictor.plans_manager.image_reader_writer_class()
        files = [f"{part}/{case.name}{ending}" for part in (SEGMENTATIONS, CONFIDENCE)]
        with contextlib.ExitStack() as stack:
            made = []
            for part, array in ((SEGMENTATIONS, segmentation), (CONFIDENCE, confidence)):
                os.makedirs(join(self.folder, part), exist_ok=True)
                scratch = stack.enter_context(scratch_folder(join(self.folder, part)))
                writer.write_seg(array, join(scratch, case.name + ending), properties)
                made += [(join(scratch, name), join(self.folder, part, name)) for name in os.listdir(scratch)]
            stack.enter_context(one_at_a_time(self.folder))
            self.refresh()
            if self.holds(case):  # the other one was faster, and its record tells its files
                return
            if self.is_somebody_elses(case.name, ending):
                raise SourceError(f"{join(self.folder, files[0])} came to be there meanwhile and is kept")
            for _, target in made:  # of an earlier scan: left there it would look edited if this ends here
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(target)
            segmented = digest(join(dirname(made[0][0]), case.name + ending))
            self.content["cases"][case.name] = {"files": files, "digest": segmented, **row}
            write_json(self.content, self.file, indent=1)
            for source, target in sorted(made):  # TIFF comes with a second file
                move(source, target)
            self.write_table(set(self.content["cases"]))

    def is_somebody_elses(self, case: str, ending: str) -> bool:
        """Whether there is a segmentation that was not written here."""
        return case not in self.content["cases"] and os.path.lexists(self.path(SEGMENTATIONS, case, ending))

    def write_table(self, cases: set[str]) -> str:
        """``quality.csv`` of these cases, worst first."""
        records = {name: r for name, r in self.content["cases"].items() if name in cases}
        ranked = sorted(records, key=lambda name: (*_order(records[name]), name))
        classes = list(next(iter(records.values()))["per_class"]) if records else []
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        heads = [*(f"agreement {c}" for c in classes), *(f"ml {c}" for c in classes)]
        writer.writerow(["rank", "case", "agreement", "confidence", *heads, "segmentation"])
        for rank, name in enumerate(ranked, 1):
            r = records[name]
            values = [r["agreement"], r["confidence"], *(r["per_class"][c] for c in classes)]
            shown = ["" if v is None else f"{v:.4f}" for v in values]
            volumes = ["" if r["ml"][c] is None else f"{r['ml'][c]:g}" for c in classes]
            writer.writerow([rank, name, *shown, *volumes, r["files"][0]])
        path = join(self.folder, TABLE)
        write_text(text.getvalue(), path)
        return path


def _is_same(stored: Mapping[str, Any], file: str) -> bool:
    """Whether a scan's file is the one that was predicted; a new time alone does not make it another."""
    now = stamp(file)
    if all(stored[key] == value for key, value in now.items()):
        return True
    same_size = (stored["file"], stored["bytes"]) == (now["file"], now["bytes"])
    return same_size and stored.get("blake2b") == digest(file)


def _order(record: Mapping[str, Any]) -> tuple[float, float]:
    """Agreement, then confidence; with a single pass nothing can agree, and confidence decides."""
    agreement = record["agreement"]
    return (record["confidence"] if agreement is None else agreement), record["confidence"]


def unedited(folder: str, names: Sequence[str]) -> list[str]:
    """Cases whose segmentation in `folder` is still the one that was predicted there."""
    for place in (folder, dirname(os.path.abspath(folder))):
        if isfile(join(place, STATE)):
            records = read_object(join(place, STATE)).get("cases", {})
            files = {n: join(folder, basename(records[n]["files"][0])) for n in names if n in records}
            return [n for n, file in files.items() if isfile(file) and digest(file) == records[n]["digest"]]
    return []


def summary(path: str, shown: int = 5) -> str:
    """What to print at the end: the cases to correct first."""
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    single = all(not row["agreement"] for row in rows)
    by = "confidence (one fold and no mirroring: nothing to compare)" if single else "agreement"
    if rows and all(v and float(v) == 0 for row in rows for k, v in row.items() if k.startswith("ml ")):
        return f"{path}: {len(rows)} scans, and the network found nothing in any of them: train it longer"
    worst = listed([row["case"] for row in rows[:shown]])
    return f"{path}: {len(rows)} scans by {by}, worst first: {worst}{', ...' * (len(rows) > shown)}"
