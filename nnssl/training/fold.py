"""The cases of one fold on disk: whether all are there, as the raw dataset has them, and usable."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

from nnunetv2.paths import nnUNet_raw

from nnssl.data.dataset_json import declared_labels
from nnssl.data.findings import WARNING, listed, raise_errors
from nnssl.data.freshness import OTHER_SETTINGS, Case, Target
from nnssl.data.inspection import inspect_scans_of_training, inspect_split
from nnssl.data.labeled import labeled_cases, outdated_cases, undeclared_labels
from nnssl.data.split import absent_classes, hidden_cases, nnunet_split
from nnssl.datasets import dataset_number
from nnssl.files import write_json
from nnssl.training.task import preprocessed_cases


class FoldData:
    """What a training finds in the folders of its dataset.

    plans_manager, configuration, dataset_json, fold    as the trainer's
    preprocessed    the dataset's preprocessed folder
    say             takes a warning, one line
    """

    def __init__(
        self,
        plans_manager: Any,
        configuration: str,
        dataset_json: dict[str, Any],
        fold: int | str,
        preprocessed: str,
        say: Callable[[str], None],
    ) -> None:
        self.plans_manager, self.configuration, self.dataset_json = plans_manager, configuration, dataset_json
        self.fold, self.preprocessed, self.say = fold, preprocessed, say
        self.labeled = self.folder_of(configuration)
        self.splits_file = os.path.join(preprocessed, "splits_final.json")

    def folder_of(self, configuration: str) -> str:
        """Folder of the labeled cases as a configuration has them."""
        identifier = self.plans_manager.get_configuration(configuration).data_identifier
        return os.path.join(self.preprocessed, identifier)

    @property
    def raw(self) -> str:
        """The raw dataset; empty where it is not on this machine."""
        folder = os.path.join(nnUNet_raw, self.plans_manager.dataset_name) if nnUNet_raw.is_set() else ""
        return folder if os.path.isdir(folder) else ""

    @property
    def command(self) -> str:
        """What preprocesses the dataset anew."""
        number = dataset_number(self.plans_manager.dataset_name)
        plans_name = self.plans_manager.plans_name
        return f"nnssl plan-and-preprocess -d {number} -c {self.configuration} -p {plans_name}"

    def hidden(self) -> list[str]:
        """Cases whose labels this fold hides (key `unlabeled` of the splits file)."""
        return hidden_cases(self.splits_file, self.fold, set(preprocessed_cases(self.labeled)))

    def ensure_split(self, write: bool) -> None:
        """Refuse a wrong split; where there is none, `write` nnU-Net's, which would write it in place."""
        known = preprocessed_cases(self.labeled)
        raise_errors(inspect_split(self.splits_file, known, only=int(self.fold)))
        if not os.path.isfile(self.splits_file):
            self.refuse_incomplete()
            if write:
                write_json(nnunet_split(known), self.splits_file)

    def refuse_incomplete(self) -> None:
        """Refuse what a preprocessing that ended too early left: its split would leave cases out for good."""
        known, raw = preprocessed_cases(self.labeled), self.raw
        cases = self._cases_of(raw)[1] if raw else []
        if missing := sorted({case.name for case in cases} - set(known)):
            raise RuntimeError(
                f"{self.labeled}: {len(missing)} of {len(known) + len(missing)} labeled cases in {raw} are "
                f"not preprocessed ({listed(missing)}), and fold {self.fold} would leave them out. Run "
                f"`{self.command}`, or take them out of imagesTr and labelsTr"
            )

    def _cases_of(self, raw: str) -> tuple[Target, list[Case]]:
        """The labeled cases of the raw dataset, and where they are preprocessed."""
        return labeled_cases(self.plans_manager, self.configuration, self.dataset_json, raw)

    def inspect_scans(self) -> None:
        """Warn of odd scans by name, refuse wrong ones."""
        if not nnUNet_raw.is_set():
            return
        findings = list(
            inspect_scans_of_training(
                os.path.join(nnUNet_raw, self.plans_manager.dataset_name),
                self.preprocessed,
                self.dataset_json,
                self.plans_manager.plans,
                self.configuration,
            )
        )
        for finding in findings:
            if finding.level == WARNING:
                self.say(f"WARNING: {finding}")
        raise_errors(findings)

    def warn_of_outdated(self, used: Collection[str]) -> None:
        """Name the cases of those used that were edited or taken away since they were preprocessed; refuse
        those of another plan, beside which the unlabeled scans would have another voxel size."""
        if not (raw := self.raw):
            return
        target, cases = self._cases_of(raw)
        found = outdated_cases(target, cases, set(used)) if cases else {}
        if others := [case for case, reason in found.items() if reason == OTHER_SETTINGS]:
            raise RuntimeError(
                f"{target.folder}: {listed(others)} preprocessed with other settings (spacing, "
                f"normalization, resampling, labels) than {self.plans_manager.plans_name} and dataset.json "
                f"have now. Run `{self.command}`, or restore the plan. A plan of other settings than those "
                "beside it needs a data_identifier of its own, or overwrites their data"
            )
        if found:
            shown = listed([f"{case} ({reason})" for case, reason in found.items()])
            self.say(
                f"WARNING: {len(found)} labeled cases of fold {self.fold} are used as preprocessed, but "
                f"{raw} has them otherwise now: {shown}. Run `{self.command}` first to use them as they are "
                "there"
            )

    def without_truth(self, validation: Sequence[str]) -> str:
        """Which labels the final validation compares with are not there; empty where all are."""
        folder, ending = os.path.join(self.preprocessed, "gt_segmentations"), self.dataset_json["file_ending"]
        absent = [case for case in validation if not os.path.isfile(os.path.join(folder, case + ending))]
        if not absent:
            return ""
        return (
            f"{folder} lacks the labels of {listed(absent)}. Copy them there from labelsTr, or run "
            f"`{self.command}`"
        )

    def refuse_without_fingerprint(self) -> None:
        fingerprint = os.path.join(self.preprocessed, "dataset_fingerprint.json")
        if not os.path.isfile(fingerprint):
            raise FileNotFoundError(
                f"{fingerprint} does not exist: nnU-Net copies it beside the model. Copy the preprocessed "
                f"dataset whole, or run `{self.command}`"
            )

    def check_classes(
        self, dataset: Any, train: Sequence[str], validation: Sequence[str], label_manager: Any
    ) -> None:
        """Refuse labels that dataset.json does not declare, and classes that no labeled training case has.

        dataset    nnU-Net's, of the preprocessed training cases
        """
        declared = declared_labels(self.dataset_json)
        if odd := undeclared_labels(dataset, sorted({*train, *validation}), declared):
            shown = listed([f"{case} ({', '.join(map(str, values))})" for case, values in odd.items()])
            raise RuntimeError(
                f"label maps with values that dataset.json does not declare: {shown}; expected "
                f"{sorted(declared)}. Correct the label maps or dataset.json, and preprocess anew"
            )
        if absent := absent_classes(dataset, list(train), label_manager):
            raise RuntimeError(
                f"no labeled training case of fold {self.fold} contains {absent}: the network could never "
                "learn it. Add a labeled case with it to this fold (labeled: "
                f"{', '.join(sorted(train)[:8])}{' ...' if len(train) > 8 else ''})"
            )
