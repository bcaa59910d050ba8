"""SemiTrainer: nnU-Net's trainer with a second, unlabeled stream and a `SemiMethod` in its training step."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nnssl.batch import SemiBatch
from nnssl.config import resolve, sections_of_others
from nnssl.data.dataset_json import inspect_dataset_json
from nnssl.data.findings import listed, raise_errors
from nnssl.data.inspection import (
    inspect_preprocessed,
    misplaced_keys,
)
from nnssl.data.intact import damage_named, dataset_class
from nnssl.data.mirroring import allowed_axes, offsets_of, worst
from nnssl.data.split import unused_backup
from nnssl.data.streams import (
    TwoStreams,
    UnlabeledDataset,
    make_repeatable,
    on_first_rank,
    prepare_unlabeled,
    share_of_batch,
    unlabeled_stream,
    wait_for_all,
    world,
)
from nnssl.data.structures import structures
from nnssl.data.unlabeled import unlabeled_cases, unlabeled_folder
from nnssl.ema import copy_weights
from nnssl.files import remove_leftovers, save_torch
from nnssl.interruption import Terminated, interruptible
from nnssl.labels import LabelSpace
from nnssl.method import Planned, SemiMethod, weighted_sum
from nnssl.methods import known_methods
from nnssl.training.agreement import Agreement
from nnssl.training.arguments import check_device
from nnssl.training.bfloat16_check import refuse_wrong_bfloat16
from nnssl.training.boundary import check_command, watch
from nnssl.training.checkpoint import (
    NAMES,
    Cases,
    by_name,
    changed_cases,
    checkpoints_in,
    complete_best,
    from_all_ranks,
    highest,
    how_to_resume,
    latest_kept,
    load_method,
    method_state,
    read_checkpoint,
    refuse_blocked,
    trained_on,
    versions,
)
from nnssl.training.console import FirstSteps, epoch_line, start_block
from nnssl.training.continuity import changed_keys, of_the_function, refuse_other_plan, refuse_trained_on
from nnssl.training.fold import FoldData
from nnssl.training.gradient_checkpointing import recompute
from nnssl.training.gradients import is_measured, term_gradients
from nnssl.training.history import History, whole_plot
from nnssl.training.ignore_label import without_waiting
from nnssl.training.lock import TrainingLock
from nnssl.training.memory_format import use_channels_last
from nnssl.training.next_stage import (
    fingerprint_of,
    folder_for_unlabeled,
    predict_unlabeled,
    previous_of_unlabeled,
    refuse_missing_next,
    refuse_unpredicted,
)
from nnssl.training.optimizer_step import OptimizationStep, reached
from nnssl.training.pictures import Pictures
from nnssl.training.pretrained import load_pretrained
from nnssl.training.randomness import restore_rng, rng_state, seed_everything
from nnssl.training.record import facts, peak_memory, write_record
from nnssl.training.task import Trainable, geometry
from nnssl.training.tensorboard import TensorBoardLogger
from nnssl.training.tensorboard import enabled as tensorboard_enabled

CUDA = torch.device("cuda")
PREDICTED_FROM = 3000  # steps of a run: memory is predicted in the time of about 30 steps of a small network

watch()


class SemiTrainer(nnUNetTrainer):
    """Base of all trainers of this library; a subclass names its method.

    nnU-Net's planning, augmentation, loop, validation and inference stay in charge. This class adds: the
    unlabeled stream, one forward pass per step through the method, one backward pass of sum_k lambda_k L_k,
    the method's state in the checkpoint, and its terms in the logs. `self.network` is the deployed student
    and a submodule of `self.method`.
    """

    method_class: ClassVar[type[SemiMethod]]
    _loud = True  # whether print_to_log_file prints, too

    network: Any  # the deployed network, with encoder and decoder; it, method and step: from initialize on
    method: SemiMethod
    step: OptimizationStep
    was_initialized: bool

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        check_device(device.type)
        check_command()
        self.general, self.method_config = self._configs(plans)
        raise_errors(misplaced_keys(self._source(plans), plans, {*known_methods(), self.method_class.name}))
        raise_errors(inspect_dataset_json(f"dataset.json of {plans.get('dataset_name')}", dataset_json))
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:
            self._place_rank(device)
        base, say = self.preprocessed_dataset_folder_base, self.print_to_log_file
        self.fold_data = FoldData(self.plans_manager, configuration, dataset_json, fold, base, say)
        refuse_blocked(self.output_folder)
        remove_leftovers(self.output_folder)
        for key in (
            "num_epochs",
            "num_iterations_per_epoch",
            "num_val_iterations_per_epoch",
            "save_every",
            "initial_lr",
        ):
            setattr(self, key, getattr(self.general, key))
        self.logger.plot_progress_png = whole_plot(self.logger.plot_progress_png)
        if tensorboard_enabled() and self.local_rank == 0:
            self.logger.loggers.append(TensorBoardLogger(self.output_folder))
        self.history = History()
        self.agreement: Agreement | None = None
        self._auto_axes: tuple[int, ...] | None = None
        self._resumed: dict | None = None
        self._unlabeled: list[str] = []  # cases, from the start of the loaders on
        self._earlier: list[str] = []  # checkpoints of another training in this folder
        self._fresh = False  # whether weights changed since the last checkpoint was read or written
        self._used: Cases | None = None  # by the run; in `train` those of all its time
        self._iteration = 0
        self._skipped: list[set[str]] = []  # the cases of every step that was skipped in this epoch
        self._bar: tqdm | None = None
        self._announced = ""
        self._facts: dict[str, Any] = {}
        self._first_steps: FirstSteps | None = None
        self._pictures: Pictures | None = None
        self._lock: TrainingLock | None = None
        self._epochs_in: dict[str, int] = {}  # checkpoints of this run

    # construction

    def _place_rank(self, device: torch.device) -> None:
        """The device of this rank, which nnU-Net takes for the only node's GPU of the same number."""
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", str(self.local_rank))))
        else:
            self.device, self.grad_scaler = device, None

    @classmethod
    def _configs(cls, plans: dict) -> tuple[Any, Any]:
        method = cls.method_class
        source = cls._source(plans)
        return resolve(plans.get("nnssl", {}), method.name, method.config_class, known_methods(), source)

    @staticmethod
    def _source(plans: dict) -> str:
        return f"the plans file {plans['plans_name']} of {plans['dataset_name']}"

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The deployed network; nnU-Net calls this in training and in inference."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        config = cls._configs(plans_manager.plans)[1]
        patch_size, spacing = geometry(configuration_manager)
        return cls.method_class.adapt_network(network, config, patch_size, spacing)

    def initialize(self) -> None:
        """As nnU-Net's, in an order that suits methods: network, method (copies, heads), optimizer over all,
        compile, DDP around all."""
        if self.was_initialized:
            raise RuntimeError("initialize() was called twice on the same trainer")
        raise_errors(inspect_preprocessed(self.preprocessed_dataset_folder))
        if self.general.seed is not None:
            seed_everything(self.general.seed + self.local_rank)
        self.build()
        if self._do_i_compile():
            # either goes through the graph twice
            if self.agreement is not None or self.general.term_gradients:
                torch._functorch.config.donated_buffer = False
            compile_networks(self.method)
        self._forward: nn.Module = self.method
        if self.is_ddp:
            self.method = nn.SyncBatchNorm.convert_sync_batchnorm(self.method)
            self._forward = DistributedDataParallel(
                self.method,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
            )
        self.dataset_class = dataset_class(self.preprocessed_dataset_folder)
        if start := sys.modules.get("nnunetv2.run.run_training"):  # which loads -pretrained_weights
            start.load_pretrained_weights = self.load_pretrained  # type: ignore[attr-defined]
        self.was_initialized = True
        self.print_to_log_file(
            f"{self.method.name}: {self.general} {self.method_config}", also_print_to_console=False
        )
        own = {*known_methods(), self.method.name}
        for name in sections_of_others(self.plans_manager.plans.get("nnssl", {}), own):
            self.print_to_log_file(
                f'WARNING: "nnssl.{name}" in the plans file is of no method of this library'
            )
        if line := self.method.describe():
            self.print_to_log_file(line)
        configs = {"general": self.general, self.method.name: self.method_config}
        self.logger.update_config({"nnssl": {k: dataclasses.asdict(v) for k, v in configs.items()}})

    def load_pretrained(self, network: nn.Module, path: str, verbose: bool = False) -> None:
        """In the place of nnU-Net's `load_pretrained_weights`, which refuses networks with blocks of ours."""
        if network is not self.network:  # of another trainer in this process
            return load_pretrained_weights(network, path, verbose)
        checkpoint = read_checkpoint(path, "cpu", "-pretrained_weights")
        fresh = self.method.fresh_blocks
        said = load_pretrained(self.method, network, checkpoint, path, self.dataset_json, fresh)
        self.print_to_log_file(said)
        if line := self._seen_by(checkpoint):
            self.print_to_log_file(f"WARNING: {path} {line}: its validation is not on unseen cases")
        self.method.pretrained = True

    def _seen_by(self, checkpoint: Mapping[str, Any]) -> str:
        """Why a network may know labels of this fold's validation cases; empty where nothing says so."""
        origin = checkpoint.get("init_args", {})
        dataset = origin.get("plans", {}).get("dataset_name")
        if self.fold == "all" or dataset != self.plans_manager.dataset_name:
            return ""
        if used := checkpoint.get("nnssl", {}).get("cases"):
            seen = trained_on(used, self._cases_now()["val"])
            return f"was trained on the labels of {listed(seen)} of key val" if seen else ""
        fold = origin.get("fold")
        return f"is of fold {fold} of this dataset, and this is fold {self.fold}" * (fold != self.fold)

    def build(self) -> None:
        """Networks, method and optimizer, on the device. Of the data only the names of cases are asked."""
        self._set_batch_size_and_oversample()
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        heads = self.label_manager.num_segmentation_heads
        self.network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            heads,
            self.enable_deep_supervision,
        ).to(self.device)
        if self.general.amp == "bfloat16" and self.device.type == "cpu":
            refuse_wrong_bfloat16(
                self.network, self.configuration_manager.patch_size, self.general.channels_last
            )
        self.loss = self._build_loss()
        self.method = self.method_class(self.network, self.method_config, self._planned()).to(self.device)
        which = self.general.gradient_checkpointing
        if recompute(self.method, which) == 0 and which != "none":
            self.print_to_log_file(
                f'WARNING: "gradient_checkpointing": "{which}" has no effect: {self.method.name} trains no '
                'network beside the student. Set "all" to save memory'
            )
        if self.general.channels_last:
            use_channels_last(self.method, len(self.configuration_manager.patch_size))
        self.network = self.method.deployed(self.general.deploy)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.step = OptimizationStep(
            self.optimizer,
            self.grad_scaler,
            self.general.amp,
            self.device,
            self.general.max_nonfinite_steps,
            [list(network.parameters()) for network in self.method.children()],
        )
        wanted = self.general.agreement
        weighed = self.method.agreement if wanted is None else wanted
        if weighed and self.method_class.needs_unlabeled:  # the baseline goes by the plan of the others
            self.agreement = Agreement(self.method)

    def _planned(self) -> Planned:
        """Everything of the plan that a method may need."""
        labels = self.label_manager
        patch_size, spacing = geometry(self.configuration_manager)
        labeled, unlabeled = self._cases() if self.method_class.needs_unlabeled else ([], [])

        def build(input_channels: int, output_channels: int, divisor: int = 1) -> nn.Module:
            configuration = deepcopy(self.configuration_manager)
            architecture = configuration.configuration["architecture"]["arch_kwargs"]
            architecture["features_per_stage"] = [
                max(1, width // divisor) for width in architecture["features_per_stage"]
            ]
            return nnUNetTrainer.build_network_architecture(
                self.plans_manager,
                configuration,
                input_channels,
                output_channels,
                self.enable_deep_supervision,
            )

        return Planned(
            build_network=build,
            input_channels=self.num_input_channels,
            labels=LabelSpace(labels.num_segmentation_heads, labels.has_regions, labels.ignore_label),
            patch_size=patch_size,
            spacing=spacing,
            supervised_loss=self.loss,
            labeled_cases=tuple(sorted(labeled)),
            unlabeled_cases=tuple(unlabeled),
            mirror_axes=self.mirror_axes(),
            steps=self.num_epochs * self.num_iterations_per_epoch,
            compile=self._do_i_compile(),
            previous=len(labels.foreground_labels) if self.is_cascaded else 0,
        )

    def _build_loss(self) -> Any:
        loss = without_waiting(super()._build_loss())
        if not np.isfinite(getattr(loss, "weight_factors", (0.0,))).all():
            raise RuntimeError(
                f"{self.configuration_name} has a network of two stages, for which nnU-Net's weights of deep "
                "supervision are 0 / 0 and every loss NaN. Give the plan a third stage (architecture, "
                "arch_kwargs), or switch deep supervision off"
            )
        return loss

    def _cases(self) -> tuple[list[str], list[str]]:
        """Names of the labeled and unlabeled training cases."""
        labeled = self.do_split()[0]
        unlabeled = unlabeled_cases(
            self.plans_manager, self.configuration_name, self.dataset_json, self.fold_data.hidden()
        )[1]
        return labeled, [case.name for case in unlabeled]

    def configure_optimizers(self) -> tuple[Any, Any]:
        """nnU-Net's SGD and poly schedule, over the parameters of all networks and heads; what a module names
        in `without_decay` has no weight decay."""
        network, self.network = (
            self.network,
            Trainable(self.method),
        )  # nnU-Net asks self.network for its parameters
        try:
            optimizer, schedule = super().configure_optimizers()
        finally:
            self.network = network
        kept = {
            id(getattr(module, name))
            for module in self.method.modules()
            for name in getattr(module, "without_decay", ())
        }
        for group in list(optimizer.param_groups):
            if apart := [p for p in group["params"] if id(p) in kept]:
                group["params"] = [p for p in group["params"] if id(p) not in kept]
                optimizer.add_param_group({**group, "params": apart, "weight_decay": 0.0})
        return optimizer, schedule

    # data

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(
        self,
    ) -> tuple[Any, bool, Any, tuple[int, ...]]:
        """nnU-Net's geometry of both streams, with the mirror axes of the configuration; they are nnU-Net's
        in prediction, too."""
        with self._in_the_log_alone():
            rotation, dummy_2d, initial_patch_size, axes = (
                super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            )
        if self.general.mirror_axes is not None:
            axes = self.mirror_axes()
            self.inference_allowed_mirroring_axes = axes or None
        return rotation, dummy_2d, initial_patch_size, axes

    def mirror_axes(self) -> tuple[int, ...]:
        """Axes of a patch that may be mirrored; "auto": read once off the labels of the training cases."""
        axes, dimensions = self.general.mirror_axes, len(self.configuration_manager.patch_size)
        if axes == "auto":
            if self._auto_axes is None:
                self._auto_axes = self._axes_from_labels(dimensions)
            return self._auto_axes
        if axes is None:
            return tuple(range(dimensions))  # nnU-Net
        if max(axes, default=0) >= dimensions:
            raise ValueError(
                f'"nnssl.mirror_axes" of the plans file: {list(axes)}, but patches of '
                f"{self.configuration_name} have {dimensions} axes"
            )
        return axes

    def _axes_from_labels(self, dimensions: int) -> tuple[int, ...]:
        cases = self.do_split()[0]
        dataset = dataset_class(self.preprocessed_dataset_folder)(
            self.preprocessed_dataset_folder, list(cases)
        )
        offsets = offsets_of(dataset, cases, self.label_manager, dimensions)
        axes = allowed_axes(offsets, dimensions)
        figures = "; ".join(map(str, worst(offsets))) or "no case has two classes"
        self.print_to_log_file(f"mirror_axes: auto is {list(axes)} ({figures})")
        return axes

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, refused where it is wrong or would train on hidden labels."""
        if self.fold != "all":
            self.fold_data.ensure_split(write=self.local_rank == 0)
        self.fold_data.hidden()
        with self._in_the_log_alone():
            return super().do_split()

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders; the training one paired with the unlabeled stream."""
        self._refuse_missing_stages()
        if self.fold == "all" and self._resumed is None:  # a run goes on with the cases that it had
            self.fold_data.refuse_incomplete()
        on_first_rank(lambda: self.fold_data.warn_of_outdated(self._labeled_cases()))
        if self.method_class.needs_unlabeled:
            on_first_rank(self.fold_data.inspect_scans)
            unlabeled = self._prepare_unlabeled(self.configuration_name)
            previous = self._previous_of_unlabeled(unlabeled)
            self._unlabeled = unlabeled
        train, val = super().get_dataloaders()
        before = [] if self._used is None else self._used["train"]
        self._used = self._cases_now()
        self._used["train"] = sorted({*before, *self._used["train"]})
        if self.general.seed is not None:
            for stream in (train, val):
                make_repeatable(getattr(stream, "data_loader", None) or stream.generator)
        if not self.method_class.needs_unlabeled:
            return train, val
        samples = share_of_batch(self.general.unlabeled_batch_size, self.batch_size)
        self._warn_without_neighbour(samples)
        stream = unlabeled_stream(
            unlabeled_folder(self.preprocessed_dataset_folder),
            unlabeled,
            samples,
            self.configuration_manager,
            self.label_manager,
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size(),
            self.method.num_strong_views,
            self.device.type == "cuda",
            None
            if self.general.seed is None
            else (self.general.seed % 2**32, self.local_rank, self.current_epoch),
            previous,
        )
        return TwoStreams(train, stream), val

    def _labeled_cases(self) -> list[str]:
        """Those of training and validation."""
        train, val = self.do_split()
        return sorted({*train, *val})

    def _cases_now(self) -> Cases:
        """What the split and the folders give this fold."""
        train, val = self.do_split()
        unlabeled = self.method.planned.unlabeled_cases
        return {
            key: sorted(map(str, cases))
            for key, cases in (("train", train), ("val", val), ("unlabeled", unlabeled))
        }

    def _refuse_trained_on(self, used: Cases, network: str) -> None:
        fold = f"{self.fold_data.splits_file}, fold {self.fold}"
        refuse_trained_on(used, self._cases_now()["val"], network, fold)

    def _compare_cases(self, used: Cases, checkpoint: str) -> None:
        """Refuse as above; warn of every other change by name."""
        self._refuse_trained_on(used, checkpoint)
        for change in changed_cases(used, self._cases_now()):
            self.print_to_log_file(
                f"WARNING: the cases of fold {self.fold} are others than those of {checkpoint}: {change}"
            )

    def _warn_without_neighbour(self, samples: int) -> None:
        """Mixing takes place between the unlabeled samples of a step, of all ranks."""
        keys = ("cutmix_probability", "classmix_probability")
        acting = [key for key in keys if getattr(self.method_config, key, 0)]
        if acting and samples == 1 and world()[1] == 1:
            self.print_to_log_file(
                f"WARNING: {acting[0]} has no effect with one unlabeled patch per step, with no other to "
                "be mixed with. Raise unlabeled_batch_size to 2 where memory allows"
            )

    def _cases_read(self) -> Iterator[tuple[str, str]]:
        """Folder and name of every case of this run."""
        labeled = self.preprocessed_dataset_folder
        yield from ((labeled, case) for cases in self.do_split() for case in cases)
        yield from ((unlabeled_folder(labeled), case) for case in self._unlabeled)

    def on_train_start(self) -> None:
        on_first_rank(self._refuse_other_plan)
        self.fold_data.refuse_without_fingerprint()
        super().on_train_start()
        train, val = self.do_split()
        dataset = self.dataset_class(self.preprocessed_dataset_folder, list(train))
        self.fold_data.check_classes(dataset, train, val, self.label_manager)
        if absent := self.fold_data.without_truth(val):
            self.print_to_log_file(f"WARNING: the final validation would fail: {absent}")
        if self.local_rank == 0:
            self._begin_record()
        if self._resumed is None:  # pretrained weights, if any, are in self.network by now
            if self.network is not self.method.student:
                copy_weights(self.method.student, self.network)
            self.method.make_copies()
        else:
            restore_rng(self._resumed["rng"], self.local_rank)  # after the loaders drew their first batches
            self._resumed = None

    def _refuse_other_plan(self) -> None:
        def then(plans: dict) -> dict[str, Any]:
            config = dataclasses.asdict(self._configs(plans)[1])
            keys = {key: config[key] for key in self.method_class.network_keys}
            return of_the_function(plans, self.configuration_name) | keys

        now = then(self.plans_manager.plans)
        refuse_other_plan(self.output_folder_base, self.output_folder, then, now)

    def _begin_record(self) -> None:
        """What `nnssl report` reads, from here on after every epoch."""
        self._facts = facts(self)
        if self.num_epochs * self.num_iterations_per_epoch >= PREDICTED_FROM:
            from nnssl.training.cost import predicted_memory  # imports much

            self._facts["predicted_memory"] = predicted_memory(self)
        write_record(self, self._facts)
        self.print_to_log_file(start_block(self._facts), add_timestamp=False)
        self._first_steps = FirstSteps(
            self.num_iterations_per_epoch,
            self.num_epochs - self.current_epoch,
            lambda: peak_memory(self.device),
        )
        if not (self.method_class.needs_unlabeled and self.general.pseudo_label_pictures):
            return
        if self.is_cascaded:  # a view would need the previous stage's segmentation of it
            self.print_to_log_file("pseudo_label_pictures: none are taken in a cascade")
            return
        self._pictures = Pictures(self, self.general.pseudo_label_pictures)

    # the run

    def run_training(self) -> None:
        """nnU-Net's loop, one at a time in a folder. An interruption is one line that says how to go on;
        where a case cannot be read, the file is named."""
        lock = TrainingLock(self.output_folder)
        with interruptible():
            on_first_rank(lambda: lock.acquire(self.print_to_log_file))
            self._lock = lock
            on_first_rank(self._warn_of_earlier)
            try:
                with damage_named(self._cases_read):
                    super().run_training()
            except (KeyboardInterrupt, Terminated) as stop:
                self._say_stopped(
                    stop,
                    f"stopped in epoch {self.current_epoch} of {self.num_epochs}; "
                    + how_to_resume(self.output_folder, self._epochs_in, self.disable_checkpointing),
                )
                raise
            finally:
                # workers first: a thread of nnU-Net's loader cries when they are gone without a word
                for loader in (self.dataloader_train, self.dataloader_val):
                    if hasattr(loader, "_finish"):
                        loader._finish()
                lock.release()

    def _warn_of_earlier(self) -> None:
        """Name the checkpoints of an earlier training, of which a forgotten --c is the likeliest reason."""
        there = checkpoints_in(self.output_folder) if self._resumed is None else []
        self._earlier = [name for name in there if name not in self._epochs_in]
        if not self._earlier:
            return
        fate = "are kept: this one writes none"
        if not self.disable_checkpointing:
            fate = "are renamed to *.bak when this one writes its first"
        self.print_to_log_file(
            f"WARNING: this training starts anew, but {self.output_folder} holds checkpoints of an earlier "
            f"one ({', '.join(self._earlier)}), with which --c goes on. They {fate}"
        )

    def _set_earlier_aside(self) -> None:
        """All at once, so that --c never finds those of two trainings, and not before it would find ours.
        With them goes a validation of weights that this process has trained on from."""
        for name in self._earlier:
            if os.path.isfile(os.path.join(self.output_folder, name)):
                self._set_aside(name, " of the earlier training")
        if self._fresh and os.path.isdir(os.path.join(self.output_folder, "validation")):
            self._set_aside("validation", ", of other weights,")
        self._fresh = False
        self._earlier = []

    def _set_final_aside(self) -> None:
        """Of a finished training that goes on for more epochs: --c would prefer it to what is newer."""
        final, now = NAMES[0], self.current_epoch + 1
        there = os.path.isfile(os.path.join(self.output_folder, final))
        if there and self._epochs_in.get(final, now) < now:
            self._set_aside(final, ", of fewer epochs,")
            self._epochs_in.pop(final, None)

    def _set_aside(self, name: str, what: str) -> None:
        path = os.path.join(self.output_folder, name)
        kept = unused_backup(path)
        os.replace(path, kept)
        before, self._loud = self._loud, True  # nnU-Net saves where its own lines go into the log alone
        self.print_to_log_file(f"{name}{what} is now {os.path.basename(kept)}")
        self._loud = before

    def _say_stopped(self, stop: BaseException, line: str) -> None:
        if self._bar is not None:
            self._bar.close()
        stop.told = True  # type: ignore[attr-defined]
        if self.local_rank == 0:
            self.print_to_log_file(line, also_print_to_console=False)
            print(f"{type(self).__name__}: {line}", file=sys.stderr, flush=True)

    def on_epoch_start(self) -> None:
        if self._lock is not None:
            self._lock.verify()
        super().on_epoch_start()

    # the step

    def on_train_epoch_start(self) -> None:
        with self._in_the_log_alone():
            super().on_train_epoch_start()
        self.method.train()
        self._iteration = self.step.skipped = 0
        self._skipped = []
        if (line := self.method.announce(self.progress())) != self._announced:
            self.print_to_log_file(line)
            self._announced = line
        if self.local_rank == 0 and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.num_iterations_per_epoch, desc=f"epoch {self.current_epoch}", leave=False
            )

    def print_to_log_file(
        self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True
    ) -> None:
        super().print_to_log_file(
            *args, also_print_to_console=also_print_to_console and self._loud, add_timestamp=add_timestamp
        )

    @contextmanager
    def _in_the_log_alone(self) -> Iterator[None]:
        """nnU-Net's lines inside go into the log file and not to the console."""
        before, self._loud = self._loud, False
        try:
            yield
        finally:
            self._loud = before

    def print_plans(self) -> None:
        with self._in_the_log_alone():
            super().print_plans()

    def plot_network_architecture(self) -> None:
        with self._in_the_log_alone():
            super().plot_network_architecture()

    def _say_epoch(self) -> None:
        """The line of an epoch that ends now, before a checkpoint is written."""
        logger, done = self.logger, self.current_epoch
        starts = logger.get_value("epoch_start_timestamps", None)[: done + 1]
        ends = [*logger.get_value("epoch_end_timestamps", None)[:done], time.time()]
        values = map(float, logger.get_value("dice_per_class_or_region", -1))
        dice = dict(zip(structures(self.dataset_json), values, strict=True))
        row, loss = self.history.rows[-1], float(logger.get_value("val_losses", -1))
        seconds = [end - start for start, end in zip(starts, ends, strict=True)]
        self.print_to_log_file(epoch_line(done, self.num_epochs, row, loss, dice, seconds))
        row |= {"validation_loss": loss, **{f"dice/{name}": value for name, value in dice.items()}}
        for sink in logger.loggers:  # nnU-Net's own; its local one knows its own keys alone
            for key, value in row.items():
                if key != "epoch":
                    sink.log(key, value, done)
            if isinstance(sink, TensorBoardLogger):
                sink.flush()

    def _class_names(self) -> list[str]:
        """Of `LabelSpace.classes`."""
        return ["background", *structures(self.dataset_json)]

    def progress(self) -> float:
        """t: share of all iterations done, in [0, 1]."""
        return (self.current_epoch + self._iteration / self.num_iterations_per_epoch) / self.num_epochs

    def train_step(self, batch: dict) -> dict:
        """One step: sum_k lambda_k(t) L_k, one backward pass, clipping per network, the method's update."""
        t = self.progress()
        data = SemiBatch.from_loader(batch, self.device)
        weights = self.method.weights(t)
        self.optimizer.zero_grad(set_to_none=True)
        self.method.before_step(t)
        with self.step.autocast():
            terms = self._forward(data, t)
            if terms.keys() != weights.keys():
                raise RuntimeError(
                    f"{self.method.name}: terms {sorted(terms)} and weights {sorted(weights)} must have the "
                    "same keys"
                )
        step = self.current_epoch * self.num_iterations_per_epoch + self._iteration
        if self.agreement is not None:
            weights = self.agreement.weigh(terms, weights, step, self.step.loss_scale())
        # on several GPUs every parameter must take part in the backward pass, those of unweighted terms too
        loss = weighted_sum(terms, weights, all_terms=self.is_ddp)
        resting: list[nn.Parameter] = []
        if self.is_ddp and 0 in weights.values():  # as on one GPU, where they have no gradient
            active = reached(weighted_sum(terms, weights))
            resting = [p for p in self.method.parameters() if id(p) not in active]
        gradients = self._term_gradients(terms, weights, step)
        logged = {"loss": loss, **{f"loss/{k}": v for k, v in terms.items()}}
        logged |= {f"diagnostic/{k}": v for k, v in self.method.diagnostics.items()}
        logged |= {f"gradient/{k}": v for k, v in gradients.items()}
        if self.method.acceptance is not None:
            for kind, shares in zip(("accepted", "called"), self.method.acceptance, strict=True):
                logged |= {f"{kind}/{k}": v for k, v in zip(self._class_names(), shares, strict=True)}
        skipped = self.step.skipped
        if self.step.take(loss, list(logged.values()), resting):
            self._fresh = True
            self.method.after_step(data, t)
        if self.step.skipped > skipped:
            self._skipped.append({*data.labeled_cases, *(data.unlabeled.cases if data.unlabeled else ())})
        self._iteration += 1
        if self._first_steps is not None and (line := self._first_steps.after_step()):
            self.print_to_log_file(line)
        if self._bar is not None:
            self._bar.update()
        values = dict(zip(logged, self.step.values, strict=True))
        if self.agreement is not None:
            values["diagnostic/agreement"] = self.agreement.factor
        return values

    def _term_gradients(
        self, terms: dict[str, Tensor], weights: dict[str, float], step: int
    ) -> dict[str, Tensor]:
        """Of every term in the steps that `term_gradients` asks for, NaN in the others; before the backward
        pass."""
        n, steps = self.general.term_gradients, self.num_epochs * self.num_iterations_per_epoch
        if n == 0:
            return {}
        if is_measured(step, steps, n):
            return term_gradients(terms, weights, self.method.student, self.step.loss_scale())
        return {k: v.detach().new_full((), float("nan")) for k, v in terms.items()}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        names = dict.fromkeys(k for o in train_outputs for k in o)  # some begin with a phase of the method
        sums = {k: np.array([o.get(k, np.nan) for o in train_outputs], dtype=np.float64) for k in names}
        finite = np.isfinite(sums["loss"])
        means = {}
        for k, v in sums.items():
            partial = k.startswith(("gradient/", "accepted/", "called/"))  # in some steps only
            kept = v[finite & np.isfinite(v)] if partial else v[finite]
            means[k] = float(kept.mean()) if kept.size else float("nan")
        if self.is_ddp:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, means)
            means = {k: float(np.mean([g[k] for g in gathered])) for k in means}
        # of the epoch's last step: with the next epoch a phase may begin
        last = self.current_epoch + 1 - 1 / self.num_iterations_per_epoch
        weights = self.method.weights(last / self.num_epochs)
        if self.agreement is not None:
            weights = self.agreement.applied(weights)
        means["total"] = means.pop("loss")
        # beside the validation loss, which is supervised, too
        shown = "loss/supervised" if weights.get("supervised") else "total"
        self.logger.log("train_losses", means[shown], self.current_epoch)
        self.history.add(self.current_epoch, self.optimizer.param_groups[0]["lr"], means, weights)
        self.print_to_log_file(self.history.describe(), also_print_to_console=False)
        if self.step.skipped:
            suspects = sorted(set.intersection(*self._skipped)) if len(self._skipped) > 1 else []
            shared = f"; in all of them: {listed(suspects)}, look there for NaN" if suspects else ""
            self.print_to_log_file(
                f"WARNING: {self.step.skipped} steps of this epoch were skipped: their loss was not finite"
                f"{shared}"
            )

    def on_epoch_end(self) -> None:
        if self.local_rank == 0:
            self._say_epoch()
        with self._in_the_log_alone():
            super().on_epoch_end()
        if self.local_rank == 0:
            self.history.write(self.output_folder, last=self.current_epoch == self.num_epochs)
            write_record(self, self._facts)
            epoch = self.current_epoch - 1
            if self._pictures is not None and epoch in self._pictures.epochs:
                self._pictures.take(epoch)

    def on_train_end(self) -> None:
        with latest_kept(self.output_folder, self.disable_checkpointing and self.local_rank == 0):
            super().on_train_end()
        if isinstance(self.dataloader_train, TwoStreams):
            self.dataloader_train._finish()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, in the precision of the training on a CPU; on CUDA in nnU-Net's own, float16, as
        nnUNetv2_predict."""
        precision = self.step.autocast() if self.device.type == "cpu" else nullcontext()
        lock = TrainingLock(self.output_folder)
        with interruptible():
            if self.local_rank == 0 and (holder := lock.try_acquire(self.print_to_log_file)):
                self.print_to_log_file(f"WARNING: {holder}; this validates the checkpoint as it is now")
            try:
                if (used := self._used) is not None:
                    on_first_rank(lambda: self._refuse_trained_on(used, "this network"))
                if absent := self.fold_data.without_truth(self.do_split()[1]):
                    raise FileNotFoundError(f"{absent}; then validate with --val")
                with precision, damage_named(self._cases_read):
                    super().perform_actual_validation(save_probabilities)
                    if self.method_class.needs_unlabeled:
                        for configuration in self.configuration_manager.next_stage_names or []:
                            self._predict_unlabeled(configuration)
            except (KeyboardInterrupt, Terminated) as stop:
                self._say_stopped(stop, "stopped in the final validation; rerun with --val to repeat it")
                raise
            finally:
                lock.release()

    # cascades

    def _refuse_missing_stages(self) -> None:
        stages = self.configuration_manager.next_stage_names or []
        refuse_missing_next(
            self.configuration_name, {stage: self.fold_data.folder_of(stage) for stage in stages}
        )
        if self.is_cascaded:
            refuse_unpredicted(
                self._labeled_cases(),
                self.preprocessed_dataset_folder,
                self.folder_with_segs_from_previous_stage,
                self.configuration_manager.previous_stage_name,
                self.fold,
                self.fold_data.splits_file,
            )

    def _previous_of_unlabeled(self, cases: list[str]) -> str | None:
        """Folder of the previous stage's segmentations of all unlabeled cases; None outside a cascade."""
        if not self.is_cascaded:
            return None
        return previous_of_unlabeled(
            cases,
            unlabeled_folder(self.preprocessed_dataset_folder),
            self.folder_with_segs_from_previous_stage,
            self.configuration_manager.previous_stage_name,
            self.fold,
        )

    def _predict_unlabeled(self, next_configuration: str) -> None:
        """Predict the unlabeled scans for the next stage of a cascade, every rank its share."""
        cases = self._prepare_unlabeled(self.configuration_name)
        self._prepare_unlabeled(next_configuration)
        self.set_deep_supervision_enabled(False)
        self.network.eval()
        predictor = nnUNetPredictor(
            device=self.device, perform_everything_on_device=self.device.type == "cuda", allow_tqdm=False
        )
        predictor.manual_initialization(
            self.network,
            self.plans_manager,
            self.configuration_manager,
            None,
            self.dataset_json,
            type(self).__name__,
            self.inference_allowed_mirroring_axes,
        )
        rank, size = world()
        try:
            number = predict_unlabeled(
                predictor,
                fingerprint_of(self.network.state_dict(), self.inference_allowed_mirroring_axes),
                cases[rank::size],
                UnlabeledDataset(
                    unlabeled_folder(self.preprocessed_dataset_folder),
                    cases,
                    self._previous_of_unlabeled(cases),
                ),
                unlabeled_folder(self.fold_data.folder_of(next_configuration)),
                folder_for_unlabeled(self.output_folder, next_configuration),
            )
        finally:
            self.set_deep_supervision_enabled(True)
        wait_for_all()
        self.print_to_log_file(
            f"{number} unlabeled cases predicted for {next_configuration}, "
            f"{len(cases[rank::size]) - number} were up to date"
        )

    def _prepare_unlabeled(self, configuration: str) -> list[str]:
        return prepare_unlabeled(
            self.plans_manager,
            configuration,
            self.dataset_json,
            self.fold_data.hidden(),
            log=self.print_to_log_file,
        )

    # checkpoints and what touches the network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self.network.decoder.deep_supervision = enabled

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint plus the key `nnssl` with everything else a run consists of."""
        checkpoint = self._checkpoint()  # on every rank: random states are gathered
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
        else:
            self._set_earlier_aside()
            save_torch(checkpoint, filename)
            self._epochs_in[os.path.basename(filename)] = self.current_epoch + 1
            self._set_final_aside()

    def _checkpoint(self) -> dict[str, Any]:
        """nnU-Net's keys, and under `nnssl` everything beside them that an exact continuation needs.
        Collective under DDP."""
        # nnU-Net saves the latest checkpoint before it compares its epoch with the best
        best = highest([*self.logger.get_value("ema_fg_dice", None), self._best_ema])
        return {
            "network_weights": self.network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": best,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "nnssl": {
                "method": method_state(self.method, self.network),  # banks are alike on all ranks
                "rng": from_all_ranks(rng_state()),
                "history": self.history.rows,
                "mirror_axes": self._auto_axes,
                "pretrained": self.method.pretrained,
                "agreement": None if self.agreement is None else self.agreement.state_dict(),
                "config": {
                    "general": dataclasses.asdict(self.general),
                    "method": dataclasses.asdict(self.method_config),
                },
                "versions": versions(),
                "cases": self._used,
                "order": self._order(),
            },
        }

    def _order(self) -> dict[str, list[str]]:
        """Names of the cases in the order that the method knows them by."""
        planned = self.method.planned
        return {"labeled": list(planned.labeled_cases), "unlabeled": list(planned.unlabeled_cases)}

    def load_checkpoint(self, source: dict | str, /) -> None:
        """Put a checkpoint back, initializing first where needed; random states are restored once the loaders
        have started. Positional: nnU-Net's own name of the parameter differs between its releases."""
        checkpoint = read_checkpoint(source, self.device) if isinstance(source, str) else source
        if not self.was_initialized:
            self.initialize()
        name = source if isinstance(source, str) else "the checkpoint"
        if "nnssl" not in checkpoint:
            raise RuntimeError(
                f"{name} was not written by {type(self).__name__}: it has no key `nnssl`, so teachers and "
                "banks cannot be resumed. Start from its weights with -pretrained_weights instead"
            )
        state = checkpoint["nnssl"]
        if (other := checkpoint["trainer_name"]) != type(self).__name__:
            raise RuntimeError(
                f"{name} was written by {other}, expected {type(self).__name__}. Resume with -tr {other}, or "
                "start from its weights with -pretrained_weights"
            )
        if (used := state.get("cases")) is None:
            self.print_to_log_file(f"{name} does not name its cases: the split is not compared with them")
        else:
            on_first_rank(lambda: self._compare_cases(used, name))
        changed = changed_keys(
            checkpoint,
            name,
            self.general,
            self.method_config,
            self.method.name,
            self.method_class.network_keys,
            (self.configuration_name, self.configuration_manager.configuration),
        )
        if changed:
            self.print_to_log_file(
                f"WARNING: the plans file has changed since {name} was written: {'; '.join(changed)}"
            )
        self._used = used
        self.my_init_kwargs = checkpoint["init_args"]
        self.current_epoch = checkpoint["current_epoch"]
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        remedy = "Resume with the plans file that the run was started with"
        try:
            self.network.load_state_dict(checkpoint["network_weights"])
            of_method = state["method"]
            if before := state.get("order"):
                of_method = by_name(of_method, self.method.per_case, before, self._order())
            missing, unexpected = load_method(self.method, self.network, of_method)
        except RuntimeError as error:  # PyTorch's, of many lines
            first, *others = (line.strip() for line in str(error).splitlines()[1:] or [str(error)])
            more = f" (and {len(others)} more)" if others else ""
            raise RuntimeError(
                f"{name} does not fit this configuration: {first.rstrip('.')}{more}. {remedy}"
            ) from error
        if missing or unexpected:
            raise RuntimeError(
                f"the checkpoint of {checkpoint['trainer_name']} (nnssl {state['versions']['nnssl']}) is "
                f"incompatible with this configuration: missing {missing[:5]}, unexpected {unexpected[:5]}. "
                f"{remedy}"
            )
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.history.rows = list(state["history"])
        if self.general.mirror_axes == "auto" and state.get("mirror_axes") is not None:
            self._auto_axes = tuple(state["mirror_axes"])  # the labels may have changed since
            self.method.planned = dataclasses.replace(self.method.planned, mirror_axes=self._auto_axes)
        if self.agreement is not None and state.get("agreement"):
            self.agreement.load_state_dict(state["agreement"])
        self.method.pretrained = state.get("pretrained", False)
        self._resumed = state
        if isinstance(source, str) and self.local_rank == 0 and not self.disable_checkpointing:
            complete_best(source, self.logger.get_value("ema_fg_dice", None))
        if isinstance(source, str):
            self._epochs_in[os.path.basename(source)] = self.current_epoch


def compile_networks(method: SemiMethod) -> None:
    """Compile the method's planned networks, in place; heads are small."""
    for network in method.children():
        if hasattr(network, "decoder") or hasattr(network, "network"):
            network.compile()
