"""The command line: its flags, its help, and what it takes for a mistake."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from writer_search.common.errors import UserError

STUDY_NAME = "writer_identification"  # of the study, in its storage
EPILOG = """\
examples:
  search, and go on after any stop with the same command:
    python hyperparameter_search.py --data_root lines --checkpoint_dir runs/a --use_all_writers
  eight more trials:
    the same command with --n_trials 20
  how is it going (from any terminal, at any time):
    python hyperparameter_search.py --checkpoint_dir runs/a --status
  hold some hyperparameters fixed, and search others in ranges of your own:
    ... --fix backbone=resnet18 --fix dropout=0.2 --space ranges.json
  try the program on synthetic lines:
    python hyperparameter_search.py --demo

ranges.json names hyperparameters and what to search for each; the others keep their ranges:
  {"learning_rate": {"low": 0.0005, "high": 0.005, "log": true},
   "crop_width": {"choices": [256, 512]}}

exit codes: 0 done what could be done | 1 no trial is complete | 2 a mistake in the command or the
data | 3 too many trials failed in a row | 130, 143, ... stopped by a signal, everything saved
"""


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows all options)")


def whole_number(text: str, low: int = 1) -> int:
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if number < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {low} or more")
    return number


def seed_number(text: str) -> int:
    return whole_number(text, 0)


def two_or_more(text: str) -> int:
    return whole_number(text, 2)


def number_of_jobs(text: str) -> int:
    number = whole_number(text)
    if number > 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 1024 trials at once")
    return number


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def kept_checkpoints(text: str) -> int | None:
    """How many trials keep their weights; None for all."""
    return {"all": None, "best": 1}[text] if text in ("all", "best") else whole_number(text)


def command(text: str) -> tuple[str, ...]:
    """Split a command as a shell would; no shell runs it."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no command: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("the command is empty")
    return words


def exit_code(text: str) -> int:
    number = whole_number(text, 0)
    if number > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not an exit code from 0 to 255")
    return number


def device_name(text: str) -> str:
    kind, colon, number = text.partition(":")
    if text not in ("auto", "cpu", "cuda") and not (kind == "cuda" and colon and number.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


def build_parser() -> Parser:
    """Describe the command line, in groups."""
    parser = Parser(
        prog="hyperparameter_search.py",
        description="Search for the best writer-identification model on handwritten text lines. "
        "Maximises validation macro top-1 accuracy. Stop it any time: the same command goes on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_data_flags(parser.add_argument_group("data"))
    _add_search_flags(parser.add_argument_group("search"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_machine_flags(parser.add_argument_group("machine"))
    _add_afterwards_flags(parser.add_argument_group("afterwards"))
    return parser


def _add_data_flags(group: Any) -> None:
    group.add_argument(
        "--data_root",
        type=Path,
        metavar="DIR",
        help="line images: {train,val,test}/<writer>/[<book>/]<page>/line_001.png, or the same "
        "without train, val and test: then split by --seed, pages and books kept whole",
    )
    writers = group.add_mutually_exclusive_group()
    writers.add_argument("--use_all_writers", action="store_true", help="take all writers")
    writers.add_argument(
        "--num_writers_subset",
        type=two_or_more,
        default=7,
        metavar="N",
        help="take the first N writers by name (default: %(default)s)",
    )
    group.add_argument(
        "--cache_dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="where decoded lines are kept for later searches (default: the user's cache)",
    )
    group.add_argument(
        "--demo", action="store_true", help="make synthetic lines and search on them, small"
    )


def _add_search_flags(group: Any) -> None:
    group.add_argument(
        "--checkpoint_dir", type=Path, metavar="DIR", help="everything the search writes"
    )
    group.add_argument(
        "--n_trials",
        type=whole_number,
        default=12,
        metavar="N",
        help="the total of complete trials wanted; raise it to extend (default: %(default)s)",
    )
    group.add_argument(
        "--sampler", choices=("tpe", "random", "gp"), default="tpe", help="(default: %(default)s)"
    )
    group.add_argument(
        "--pruner",
        choices=("median", "percentile", "halving", "none"),
        help="(default: median; with --sampler gp none)",
    )
    group.add_argument(
        "--seed", type=seed_number, default=0, metavar="N", help="(default: %(default)s)"
    )
    group.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="hold a hyperparameter fixed (repeatable)",
    )
    group.add_argument(
        "--space", type=Path, metavar="FILE.json", help="ranges of your own; see the examples"
    )
    group.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="start no trial after so long; the end of a Slurm job is minded by itself",
    )
    group.add_argument(
        "--trial_timeout", type=seconds, metavar="SECONDS", help="end a trial that runs longer"
    )
    group.add_argument(
        "--max_consecutive_failed_trials",
        type=whole_number,
        default=5,
        metavar="N",
        help="stop when so many fail in a row (default: %(default)s)",
    )

    group.add_argument(
        "--continue_interrupted",
        action="store_true",
        help="let a new trial go on from the last checkpoint of each interrupted one, "
        "instead of a new draw",
    )
    group.add_argument(
        "--keep_checkpoints",
        type=kept_checkpoints,
        default="all",
        metavar="{all,best,K}",
        help="whose weights stay on the disk: of all trials, the best, the best K "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--requeue_exit_code",
        type=exit_code,
        metavar="N",
        help="exit code after a signal, or before a Slurm job's end, for the batch system",
    )
    group.add_argument(
        "--on_event",
        type=command,
        metavar="CMD",
        help="run this command, without a shell, at the end of each trial and of the search, with "
        "a line of JSON on its standard input",
    )


def _add_training_flags(group: Any) -> None:
    group.add_argument(
        "--epochs",
        type=whole_number,
        default=100,
        metavar="N",
        help="most epochs of a trial (default: %(default)s)",
    )
    group.add_argument(
        "--patience",
        type=whole_number,
        default=20,
        metavar="N",
        help="end a trial after so many epochs without a better value (default: %(default)s)",
    )
    group.add_argument(
        "--weights",
        choices=("auto", "imagenet", "none"),
        default="auto",
        help="ImageNet weights to start from; auto: when at hand or downloadable "
        "(default: %(default)s)",
    )


def _add_machine_flags(group: Any) -> None:
    group.add_argument(
        "--storage",
        metavar="URL",
        help="share the study with searches on other machines: postgresql+psycopg://user@host/db "
        "(default: SQLite in --checkpoint_dir, for one search)",
    )
    group.add_argument(
        "--study_name",
        metavar="NAME",
        help=f"which study of that storage (default: {STUDY_NAME})",
    )
    group.add_argument(
        "--device",
        type=device_name,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    group.add_argument(
        "--n_jobs",
        type=number_of_jobs,
        metavar="N",
        help="trials at once (default: one per GPU; one without a GPU)",
    )
    group.add_argument(
        "--gpus_per_trial",
        type=whole_number,
        default=1,
        metavar="N",
        help="GPUs that train one trial together; on the CPU so many processes "
        "(default: %(default)s)",
    )


def _add_afterwards_flags(group: Any) -> None:
    group.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="print several searches side by side, ranked where their lines and metric are the "
        "same, and exit; reads only",
    )
    group.add_argument(
        "--status", action="store_true", help="print the state of the search and exit; reads only"
    )
    group.add_argument("--json", action="store_true", help="with --status: for programs")
    group.add_argument(
        "--watch",
        action="store_true",
        help="with --status: again and again in place, until the search ends or Ctrl-C",
    )
    group.add_argument(
        "--confirm_top",
        type=whole_number,
        metavar="K",
        help="when the trials are complete, train the best K configurations again with new seeds "
        "and take the winner from the means",
    )
    group.add_argument(
        "--confirm_seeds",
        type=whole_number,
        default=3,
        metavar="S",
        help="new seeds for each of them (default: %(default)s)",
    )
    group.add_argument(
        "--evaluate_test",
        action="store_true",
        help="at the end measure the chosen model on the test lines, once, with 95 %% intervals; "
        "never used for choosing",
    )
    group.add_argument(
        "--recover",
        action="store_true",
        help="rebuild a damaged or lost database from the trial directories, then go on",
    )


DEMO = {
    "n_trials": 4,
    "epochs": 8,
    "checkpoint_dir": Path("runs/demo"),
    "use_all_writers": True,
    "weights": "none",
    "fix": ["backbone=resnet_thin", "batch_size=16"],
}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; hyphens in flags are taken for underscores. Raises UserError."""
    parser = build_parser()
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args([underscored(word) for word in argv])
    if args.compare:
        return args
    _check_status_flags(args)
    if args.checkpoint_dir is None and not (args.status and args.storage):
        raise UserError("--checkpoint_dir is missing: say where the search is to be kept")
    if args.study_name is not None and args.storage is None:
        raise UserError("--study_name is of a study in a --storage: give that too")
    if args.confirm_top is not None and args.storage is not None:
        raise UserError("--confirm_top needs a search of its own: leave it out with --storage")
    args.study_name = args.study_name or STUDY_NAME
    if args.demo:
        if args.data_root is not None:
            raise UserError("--demo makes its own lines: leave out --data_root")
        args.data_root = args.checkpoint_dir / "demo_lines"
    if args.sampler == "gp" and args.pruner not in (None, "none"):
        raise UserError("--sampler gp learns nothing from pruned trials: use --pruner none")
    args.pruner = args.pruner or ("none" if args.sampler == "gp" else "median")
    if args.data_root is None and not (args.status or args.recover):
        raise UserError("--data_root is missing: say where the line images are")
    return args


def _check_status_flags(args: argparse.Namespace) -> None:
    if (args.json or args.watch) and not args.status:
        raise UserError(f"--{'json' if args.json else 'watch'} needs --status")
    if args.json and args.watch:
        raise UserError("--json and --watch exclude each other: a program asks again by itself")


def underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


# --------------------------------------------------------------------------------------- train.py

TRAIN_ON = ("train", "train+val")
TRAIN_EPILOG = """\
examples:
  whose hand is this:
    python train.py --predict page_1/ page_2/line_003.png --model runs/a/summary/best_model.pth

  repeat a trial outside of its search, or train the final model on all but the test lines:
    python train.py --config runs/a/trial_007/config.json --data_root lines --output_dir again
    python train.py --config runs/a/trial_007/config.json --data_root lines --output_dir final \\
        --train_on train+val

exit codes: 0 done | 1 some images could not be read, they are named, or the training failed |
2 a mistake in the command, or no image could be read | 130, 143, ... stopped by a signal
"""


def build_train_parser() -> Parser:
    """Describe the command line, in groups."""
    parser = Parser(
        prog="train.py",
        description="Tell whose hand line images are in, with a model that a search has found; or "
        "train a search's trial again. Stop a training any time: the same command goes on.",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_use_flags(parser.add_argument_group("use a model"))
    _add_again_flags(parser.add_argument_group("train a trial again"))
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device",
        type=device_name,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N; auto: a GPU where there is one, and for --config the kind "
        "that the trial had (default: %(default)s)",
    )
    return parser


def _add_use_flags(use: Any) -> None:
    use.add_argument(
        "--predict",
        type=Path,
        nargs="+",
        metavar="IMAGE_OR_DIR",
        help="line images, or directories of them; a directory that holds images is a page",
    )
    use.add_argument(
        "--model",
        type=Path,
        metavar="FILE.pth",
        help="a best_model.pth or final_model.pth; it holds all that its use needs",
    )
    form = use.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--csv", action="store_true", help="print one table of lines and pages")


def _add_again_flags(group: Any) -> None:
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE.json",
        help="the config.json of a trial: its hyperparameters, seed, threads and data",
    )
    group.add_argument(
        "--data_root", type=Path, metavar="DIR", help="the lines that the trial was trained on"
    )
    group.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="what the training writes, as a trial does"
    )
    group.add_argument(
        "--train_on",
        choices=TRAIN_ON,
        default="train",
        help="train+val: for the final model; then no epoch is chosen, and nothing validates it "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--other_data",
        action="store_true",
        help="train on all writers of --data_root, though they are not the trial's lines",
    )
    group.add_argument(
        "--cache_dir",
        type=Path,
        metavar="DIR",
        help="where decoded lines are kept (default: the user's cache)",
    )


def parse_train_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; hyphens in flags are taken for underscores. Raises UserError."""
    args = build_train_parser().parse_args([underscored(word) for word in argv])
    if (args.predict is None) == (args.config is None):
        raise UserError(
            "give --predict, to use a model, or --config, to train a trial again "
            "(--help shows all options)"
        )
    if args.predict is not None and args.model is None:
        raise UserError("--model is missing: give a search's summary/best_model.pth")
    for name, what in (("data_root", "where the lines are"), ("output_dir", "where to write")):
        if args.config is not None and getattr(args, name) is None:
            raise UserError(f"--{name} is missing: say {what}")
    return args
