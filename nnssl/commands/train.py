"""``nnssl train``: nnUNetv2_train with the dataset inspected and the command line checked first, on one
process or, under torchrun, on many.

A process that torchrun started finds its place in RANK, WORLD_SIZE and LOCAL_RANK; `-num_gpus` starts such
processes itself, as nnU-Net does.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from os.path import join
from typing import Any

from nnssl.data.findings import WARNING, raise_errors
from nnssl.errors import told_line
from nnssl.interruption import Terminated, interruptible
from nnssl.training.arguments import check_data, check_names
from nnssl.training.lookup import trainer_paths

# nnU-Net's lines, one per trainer that it looks at: for the log file
SEARCH = ("Trainer '", "Searching ", "  Inspecting ", "Found class ", "Using trainer ")


def train(args: argparse.Namespace) -> int:
    """Carry out the command in this process, or in `-num_gpus` of them."""
    os.environ["nnUNet_extTrainer"] = os.pathsep.join(trainer_paths())
    rank, ranks = _place()
    alike = True  # whatever is wrong is wrong in every process of this computer
    try:
        if ranks > 1 and args.num_gpus > 1:
            raise ValueError(f"-num_gpus {args.num_gpus}: leave it out, torchrun started {ranks} processes.")
        dataset, plans = check_names(args)
        _inspect(args, dataset, rank == 0)
        check_data(args, dataset, plans, max(ranks, args.num_gpus))
        args.dataset_name_or_id = dataset
        alike = False
        if args.num_gpus > 1:
            return _spawn(args)
        _train(args)
    except Exception as error:
        told_by_another = os.environ.get("LOCAL_RANK", "0") != "0" if alike else _is_relayed(error)
        if told_by_another and told_line(error):
            return 1
        raise
    return 0


def _is_relayed(error: Exception) -> bool:
    from nnssl.data.streams import FailedElsewhere

    return isinstance(error, FailedElsewhere)


def _place() -> tuple[int, int]:
    """Rank of this process and number of all, by the variables that torchrun sets."""
    try:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise ValueError(f"RANK and WORLD_SIZE must be whole numbers: {error}") from None


def _inspect(args: argparse.Namespace, dataset: str, aloud: bool) -> None:
    """The files of the dataset; the trainer inspects the scans when it starts."""
    from nnssl.data.inspection import inspect_files
    from nnssl.methods import method_classes

    raw = join(os.environ.get("nnUNet_raw", ""), dataset)
    preprocessed = join(os.environ["nnUNet_preprocessed"], dataset)
    sections = {name: method.config_class for name, method in method_classes().items()}
    fold = args.fold if args.fold == "all" else int(args.fold)
    findings = list(inspect_files(raw, preprocessed, args.p, sections, fold=fold))
    for finding in findings:
        if aloud and finding.level == WARNING:
            print(f"WARNING: {finding}")
    raise_errors(findings)


def _train(args: argparse.Namespace) -> None:
    """What nnUNetv2_train does with one rank, on any device and any number of nodes."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
    from torch.backends import cudnn

    device = _prepare(args.device)
    fold = args.fold if args.fold == "all" else int(args.fold)
    with _process_group(device):
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                trainer: Any = get_trainer_from_args(
                    args.dataset_name_or_id, args.configuration, fold, args.tr, args.p, args.c, device
                )
        finally:
            lines = said.getvalue().splitlines()
            print("\n".join(line for line in lines if not line.startswith(SEARCH)))
        search = "\n".join(line for line in lines if line.startswith(SEARCH))
        trainer.print_to_log_file(search, also_print_to_console=False, add_timestamp=False)
        trainer.disable_checkpointing = args.disable_checkpointing
        maybe_load_checkpoint(trainer, args.c, args.val)
        if args.pretrained_weights and not args.val:  # as in nnU-Net
            load_weights(trainer, args.pretrained_weights)
        if torch.cuda.is_available():
            cudnn.deterministic = False
            cudnn.benchmark = True
        if not args.val:
            trainer.run_training()
        if args.val_best:
            trainer.load_checkpoint(join(trainer.output_folder, "checkpoint_best.pth"))
        trainer.perform_actual_validation(args.npz)


def _prepare(name: str) -> Any:
    """The device of this process, and its threads."""
    import torch

    from nnssl.data.parallel import usable_cores

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda":
        torch.set_num_threads(1)  # as nnU-Net: more do not help beside a GPU
        torch.set_num_interop_threads(1)
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    return torch.device(name)


@contextmanager
def _process_group(device: Any) -> Iterator[None]:
    """Of all ranks, where there are several."""
    import torch.distributed as dist

    if _place()[1] == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def load_weights(trainer: Any, file: str) -> None:
    """`-pretrained_weights`: by our trainers' own loader, else by nnU-Net's."""
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    if not trainer.was_initialized:
        trainer.initialize()
    getattr(trainer, "load_pretrained", load_pretrained_weights)(trainer.network, file)


def _spawn(args: argparse.Namespace) -> int:
    """A process per GPU; the first that fails ends the others, and its message is told."""
    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("", 0))
        port = os.environ.get("MASTER_PORT", str(free.getsockname()[1]))
    spawn = mp.get_context("spawn")
    messages = spawn.SimpleQueue()
    ranks = [spawn.Process(target=_rank, args=(rank, args, port, messages)) for rank in range(args.num_gpus)]
    try:
        for process in ranks:
            process.start()
        while all(process.exitcode in (None, 0) for process in ranks):
            if all(process.exitcode == 0 for process in ranks):
                return 0
            ranks[0].join(0.2)
            time.sleep(0.05)
        if not messages.empty():
            print(f"nnssl train: error: {messages.get()}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stop:
        stop.told = True  # type: ignore[union-attr]
        raise
    finally:
        for process in ranks:
            if process.is_alive():
                process.terminate()
        for process in ranks:
            if process.pid is not None:
                process.join()


def _rank(rank: int, args: argparse.Namespace, port: str, messages: Any) -> None:
    """One process of several on this computer."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.num_gpus, "MASTER_PORT": port}
    os.environ |= {**{key: str(value) for key, value in places.items()}, "MASTER_ADDR": "localhost"}
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with interruptible():
            threading.Thread(target=end_with_parent, daemon=True).start()
            _train(args)
    except Exception as error:
        if (line := told_line(error)) is None:
            raise
        if not _is_relayed(error):
            messages.put(line)
        sys.exit(1)
