"""The command ``nnssl``: what nnU-Net's own commands do not do. Heavy imports wait until a subcommand needs
them."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
import warnings
from collections.abc import Sequence
from shlex import quote

from nnssl.commands.environment import version_line
from nnssl.commands.trainers import list_trainers, trainers_folder
from nnssl.errors import told_line
from nnssl.interruption import STATUS, Terminated, interruptible
from nnssl.training.arguments import add_arguments, fold_name
from nnssl.training.lookup import DATASET, check_folders, check_numbers, dataset_name, nnunet_folder

DEFAULT_CONFIGURATIONS = ["2d", "3d_fullres", "3d_lowres"]  # as nnUNetv2_plan_and_preprocess


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. An error is one message on stderr, without traceback
    unless --traceback stands anywhere on the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in given
    args = build_parser().parse_args([argument for argument in given if argument != "--traceback"])
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what it cannot print
        sys.stdout.reconfigure(errors="backslashreplace")
    # PyTorch to itself: nothing a user could do about
    warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
    try:
        check_folders()
        check_numbers()
        with interruptible():
            status: int = args.run(args) or 0
            sys.stdout.flush()
            return status
    except (KeyboardInterrupt, Terminated) as stop:
        if traceback:
            raise
        interrupted = isinstance(stop, KeyboardInterrupt)
        if not getattr(stop, "told", False):
            what = "interrupted" if interrupted else "terminated"
            print(f"nnssl {args.command}: {what}. Rerun to resume.", file=sys.stderr)
        return 130 if interrupted else STATUS
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141  # as shells count it
        line = told_line(error)
        if traceback or (line is None and args.command == "train"):  # nobody repeats a training for it
            raise
        print(f"nnssl {args.command}: error: {line or _unforeseen(error)}", file=sys.stderr)
        return 1


def _nobody_reads() -> bool:
    """Whether standard output leads nowhere any more, as behind `| head`; then the rest of it is dropped."""
    try:
        output, poll = sys.stdout.fileno(), select.poll()
    except (AttributeError, OSError):  # not on Windows, not in a test
        return False
    poll.register(output, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _unforeseen(error: Exception) -> str:
    """On one line and with its kind."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}. This was not foreseen; --traceback shows where it comes from."


def _add_folds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f",
        type=fold_name,
        nargs="+",
        required=True,
        metavar="FOLD",
        help="folds; all: the model trained on all cases",
    )


class _Version(argparse.Action):
    """argparse's own would break the line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version_line())
        parser.exit()


def _dataset_id(text: str) -> int:
    """The number of a dataset given by number or name."""
    if not DATASET.fullmatch(text):
        try:
            return int(text)
        except ValueError:
            pass
    try:
        return int(DATASET.fullmatch(dataset_name(text))[1])  # type: ignore[index]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    """All subcommands; each sets ``run``."""
    parser = argparse.ArgumentParser(
        "nnssl", description="Semi-supervised training for nnU-Net v2.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    trainers = commands.add_parser(
        "trainers", help="list the trainers for nnUNetv2_train -tr", allow_abbrev=False
    )
    trainers.add_argument(
        "--path",
        action="store_true",
        help='print the folder they are in: export nnUNet_extTrainer="$(nnssl trainers --path)"',
    )
    trainers.set_defaults(run=_trainers)

    _add_plan_and_preprocess(commands)

    train = commands.add_parser(
        "train",
        help="nnUNetv2_train, with dataset and options checked first",
        description="All options of nnUNetv2_train. Finds our trainers without nnUNet_extTrainer, inspects "
        "the dataset, and runs on several nodes under torchrun.",
        allow_abbrev=False,
    )
    add_arguments(train)
    train.set_defaults(run=_train)

    split = commands.add_parser(
        "split",
        help="hide labels: write splits_final.json with the key `unlabeled`",
        description="Without --val: nnU-Net's own 5 folds, in each of which N training cases keep their "
        "label (fewer than 5 cases: each fold leaves one out). With --val: one fold. "
        "An existing splits_final.json is kept as a backup.",
        allow_abbrev=False,
    )
    split.add_argument("-d", type=_dataset_id, required=True, metavar="ID", help="dataset ID or name")
    split.add_argument(
        "--labeled", type=int, required=True, metavar="N", help="training cases that keep their label"
    )
    split.add_argument(
        "--unlabeled",
        type=int,
        metavar="M",
        help="use M of the other training cases without label (default: all)",
    )
    split.add_argument(
        "--val",
        nargs="+",
        metavar="CASE",
        help="validation cases, or a file of them (a name per line, or a JSON list)",
    )
    choice = split.add_mutually_exclusive_group()
    choice.add_argument("--first", action="store_true", help="label the first cases in name order")
    choice.add_argument(
        "--seed", type=int, default=0, metavar="S", help="draw the labeled cases at random (default: seed 0)"
    )
    split.set_defaults(run=_split)

    check = commands.add_parser(
        "check", help="check installation, dataset and split, and say what to fix", allow_abbrev=False
    )
    check.add_argument("-d", type=_dataset_id, metavar="ID", help="dataset ID or name")
    check.add_argument("-c", metavar="CONFIG", help="configuration (default: all that are preprocessed)")
    check.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans name (default: nnUNetPlans)")
    check.add_argument("-tr", metavar="TRAINER", help="memory and time of a step of it, too; with -d")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.set_defaults(run=_check)

    env = commands.add_parser(
        "env",
        help="versions, devices and variables in one paste, for bug reports",
        allow_abbrev=False,
    )
    env.add_argument("--json", action="store_true", help="print them as JSON")
    env.set_defaults(run=_env)

    export = commands.add_parser(
        "export",
        help="turn a trained model into one that plain nnU-Net can load",
        description="Writes DIR/nnUNetTrainer__PLANS__CONFIG for nnUNetv2_predict_from_modelfolder, and a "
        ".zip of the same name for "
        "nnUNetv2_install_pretrained_model_from_zip (which replaces a model that nnUNetTrainer trained with "
        "the same plan).",
        allow_abbrev=False,
    )
    export.add_argument("-d", type=_dataset_id, required=True, metavar="ID", help="dataset ID or name")
    export.add_argument("-c", required=True, metavar="CONFIG", help="configuration")
    _add_folds(export)
    export.add_argument("-tr", required=True, metavar="TRAINER", help="trainer, as in nnUNetv2_train -tr")
    export.add_argument(
        "-p", default="nnUNetPlans", metavar="PLANS", help="plans name (default: nnUNetPlans)"
    )
    export.add_argument(
        "-chk",
        default="checkpoint_final.pth",
        metavar="NAME",
        help="checkpoint (default: checkpoint_final.pth)",
    )
    export.add_argument("-o", required=True, metavar="DIR", help="output folder")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.set_defaults(run=_export)

    _add_pseudo_label(commands)
    _add_adopt(commands)
    _add_report(commands)
    _add_advise(commands)
    _add_pilot(commands)
    return parser


def _add_pseudo_label(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "pseudo-label",
        help="segment all scans of imagesUn; a table tells which to correct first",
        description="Predicts every scan of imagesUn with nnU-Net's predictor, all folds given, mirrored as "
        "in the training. DIR/segmentations and DIR/confidence (per cent) get a file per scan, "
        "DIR/quality.csv a line, worst first by how far mirrorings and folds agree. Rerun to resume.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-d", type=_dataset_id, required=True, metavar="ID", help="dataset ID or name")
    add("-c", required=True, metavar="CONFIG", help="configuration")
    add("-tr", required=True, metavar="TRAINER", help="trainer, as in nnUNetv2_train -tr")
    _add_folds(parser)
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans name (default: nnUNetPlans)")
    add(
        "-chk",
        default="checkpoint_final.pth",
        metavar="NAME",
        help="checkpoint (default: checkpoint_final.pth)",
    )
    add("-o", required=True, metavar="DIR", help="output folder")
    add("-device", choices=["cuda", "cpu", "mps"], help="default: cuda where there is one, else cpu")
    parser.set_defaults(run=_pseudo_label)


def _add_adopt(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "adopt",
        help="take corrected segmentations over as labels",
        description="Moves the scans of FOLDER from imagesUn to imagesTr, with the files of FOLDER as their "
        "labels, and preprocesses them. They train in every fold and validate in none; plan and trained "
        "models stay. All or nothing: values, grids and names are checked first. Rerun to resume.",
        allow_abbrev=False,
    )
    parser.add_argument("-d", type=_dataset_id, required=True, metavar="ID", help="dataset ID or name")
    parser.add_argument("folder", metavar="FOLDER", help="corrected segmentations, named like their scans")
    parser.add_argument("-np", type=int, metavar="N", help="preprocessing processes (default: nnU-Net's)")
    parser.add_argument("--dry-run", action="store_true", help="check and tell, change nothing")
    parser.add_argument(
        "--accept-unedited",
        action="store_true",
        help="adopt segmentations of `nnssl pseudo-label` that nobody changed, too",
    )
    parser.set_defaults(run=_adopt)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="write a page about one or several trainings: scores, differences, pictures, curves",
        description="Writes report.html, which needs nothing beside it, its pictures as PNG and the scores "
        "as CSV. The first trainer is what the others are compared with, on the same cases. Works while a "
        "training runs, too; trainings of nnU-Net's own trainers can be among them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        metavar="FOLDER",
        help="instead of -d, -c and -tr: TRAINER__PLANS__CONFIG, or fold_X in it",
    )
    add("-d", type=_dataset_id, metavar="ID", help="dataset ID or name")
    add("-c", metavar="CONFIG", help="configuration")
    add("-f", type=fold_name, nargs="+", metavar="FOLD", help="folds (default: all that are there)")
    add("-tr", nargs="+", metavar="TRAINER", help="trainers, as in nnUNetv2_train -tr")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans name (default: nnUNetPlans)")
    add("-o", required=True, metavar="DIR", help="output folder")
    parser.set_defaults(run=_report)


def _add_advise(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "advise",
        help="which trainer to try on a dataset, why, and what it costs here",
        description="The choice comes from the measured tables of this project, for numbers of labels, "
        "classes and dimensions near those of the dataset. Time and memory come from steps on this device.",
        allow_abbrev=False,
    )
    _add_dataset(parser)
    parser.add_argument("--no-measure", action="store_true", help="leave time and memory out")
    parser.set_defaults(run=_advise)


def _add_pilot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "pilot",
        help="train supervised and one method on a short schedule, and compare them",
        description="Both train with the same seed, on a plan of their own, and are compared on the "
        "validation cases of the fold. Rerun to resume.",
        allow_abbrev=False,
    )
    _add_dataset(parser)
    parser.add_argument("-tr", metavar="TRAINER", help="the method (default: what `nnssl advise` says)")
    parser.add_argument(
        "--share", type=float, default=0.1, metavar="S", help="of the epochs of the plan (default: 0.1)"
    )
    parser.add_argument(
        "-pretrained_weights",
        metavar="FILE",
        help="checkpoint that both start from, a finished supervised one of this fold (default: none)",
    )
    parser.add_argument("-o", metavar="DIR", help="folder of the report (default: beside the models)")
    parser.set_defaults(run=_pilot)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    """Which dataset, and on which device."""
    add = parser.add_argument
    add("-d", type=_dataset_id, required=True, metavar="ID", help="dataset ID or name")
    add("-c", metavar="CONFIG", help="configuration (default: 3d_fullres, or else 2d)")
    add("-f", type=fold_name, default="0", metavar="FOLD", help="fold (default: 0)")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="plans name (default: nnUNetPlans)")
    add("-device", choices=["cuda", "cpu", "mps"], help="default: cuda where there is one, else cpu")


def _add_plan_and_preprocess(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan-and-preprocess",
        help="nnU-Net's planning and preprocessing, then imagesUn with the same plan",
        description="All options of nnUNetv2_plan_and_preprocess, plus -p and --replan. Only what is "
        "missing or stale is done.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-d", nargs="+", type=_dataset_id, required=True, metavar="ID", help="dataset IDs or names")
    add(
        "-c",
        nargs="+",
        default=DEFAULT_CONFIGURATIONS,
        metavar="CONFIG",
        help="configurations (default: 2d 3d_fullres 3d_lowres)",
    )
    add(
        "-np",
        nargs="+",
        type=int,
        metavar="N",
        help="preprocessing processes, one number or one per configuration (default: nnU-Net's)",
    )
    plan = parser.add_mutually_exclusive_group()
    plan.add_argument("-p", metavar="NAME", help="use this existing plan instead of planning")
    plan.add_argument(
        "--replan",
        action="store_true",
        help="make a new plan even if there is one; the old one is backed up, its key nnssl kept",
    )
    add("-fpe", default="DatasetFingerprintExtractor", metavar="CLASS", help="fingerprint extractor")
    add("-npfp", type=int, metavar="N", help="fingerprint processes (default: 8, or the number of cores)")
    add(
        "--verify_dataset_integrity",
        action="store_true",
        help="check the raw labeled data first; recommended once",
    )
    add("--no_pp", action="store_true", help="plan only")
    add("--clean", action="store_true", help="extract the fingerprint again when planning")
    add(
        "-pl",
        default="ExperimentPlanner",
        metavar="CLASS",
        help="experiment planner, e.g. nnUNetPlannerResEncM",
    )
    add("-gpu_memory_target", type=float, metavar="GB", help="planner's memory target")
    add("-preprocessor_name", metavar="CLASS", help="preprocessor class (default: DefaultPreprocessor)")
    add("-overwrite_target_spacing", nargs=3, type=float, metavar="MM", help="target spacing of 3d_fullres")
    add("-overwrite_plans_name", metavar="NAME", help="name of the new plan")
    add("--verbose", action="store_true")
    add("--no_pbar", action="store_true", help="no progress bars")
    parser.set_defaults(run=_plan_and_preprocess)


def _trainers(args: argparse.Namespace) -> None:
    folder = trainers_folder()
    if args.path:
        print(folder)
        return
    trainers = list_trainers(folder)
    width = max(map(len, trainers), default=0)
    for name, line in trainers.items():
        print(f"{name:{width}}  {line}")


def _train(args: argparse.Namespace) -> int:
    from nnssl.commands.train import train

    return train(args)


def _split(args: argparse.Namespace) -> None:
    from nnssl.commands.split import split

    split(args)


def _plan_and_preprocess(args: argparse.Namespace) -> None:
    from nnssl.commands.plan_and_preprocess import plan_and_preprocess

    plan_and_preprocess(args)


def _check(args: argparse.Namespace) -> int:
    from nnssl.commands.check import run_checks

    if args.tr is not None and args.d is None:
        raise ValueError("-tr looks at a plan: name the dataset with -d")
    return run_checks(args.d, args.c, args.p, args.json, args.tr)


def _env(args: argparse.Namespace) -> None:
    import json

    from nnssl.commands.environment import as_text, environment

    found = environment()
    print(json.dumps(found, indent=2) if args.json else as_text(found))


def _report(args: argparse.Namespace) -> None:
    _check_options(args, *([] if args.folders else ["nnUNet_results"]))
    from nnssl.commands.report import report

    report(args)


def _check_options(args: argparse.Namespace, *variables: str) -> None:
    """ValueError where a variable of nnU-Net that the command needs is not set, -o is no folder, or -device
    is not there."""
    from nnssl.training.arguments import check_device

    for variable in variables:
        nnunet_folder(variable)
    output = getattr(args, "o", None)
    if output and os.path.lexists(output) and not os.path.isdir(output):
        raise ValueError(f"-o {output}: is no folder. Choose a new one, or remove it.")
    if getattr(args, "device", None):
        check_device(args.device)


def _export(args: argparse.Namespace) -> None:
    _check_options(args, "nnUNet_results")
    from nnssl.commands.export import export_model

    folder, archive = export_model(args.d, args.c, args.f, args.tr, args.o, args.p, args.chk, args.overwrite)
    predict = f"nnUNetv2_predict_from_modelfolder -m {quote(folder)} -f {' '.join(args.f)}"
    print(f"{folder}: {predict} -i IMAGES -o PREDICTIONS")
    print(f"{archive}: nnUNetv2_install_pretrained_model_from_zip {quote(archive)}")


def _pseudo_label(args: argparse.Namespace) -> None:
    _check_options(args, "nnUNet_raw", "nnUNet_results")
    from nnssl.commands.pseudo_label import pseudo_label, summary

    print(summary(pseudo_label(args.d, args.c, args.f, args.tr, args.o, args.p, args.chk, args.device)))


def _adopt(args: argparse.Namespace) -> None:
    _check_options(args, "nnUNet_raw", "nnUNet_preprocessed")
    from nnssl.commands.adopt import adopt

    adopt(args.d, args.folder, args.dry_run, args.accept_unedited, args.np)


def _advise(args: argparse.Namespace) -> None:
    _check_options(args, "nnUNet_preprocessed", "nnUNet_results")
    from nnssl.commands.advise import advise

    advise(args.d, args.c, args.f, args.p, args.device, not args.no_measure)


def _pilot(args: argparse.Namespace) -> None:
    _check_options(args, "nnUNet_preprocessed", "nnUNet_results")
    from nnssl.commands.pilot import pilot

    print(
        pilot(
            args.d,
            args.c,
            args.f,
            args.tr,
            args.p,
            args.share,
            args.device,
            args.o,
            args.pretrained_weights,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
