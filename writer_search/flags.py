"""The command line of the search: its flags, its help, and what it takes for a mistake."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from writer_search.common.errors import UserError
from writer_search.flag_values import (
    Parser,
    add_version,
    command,
    device_name,
    exit_code,
    kept_checkpoints,
    number_of_jobs,
    path,
    seed_number,
    time_span,
    two_or_more,
    underscored,
    whole_number,
)

CONFIRM_SEEDS = 3
STUDY_NAME = "writer_identification"  # of the study, in its storage
# What --help shows: what most people need, on one screen.
COMMON = {
    *("help", "help_all", "version", "demo", "data_root", "checkpoint_dir", "n_trials"),
    *("use_all_writers", "num_writers_subset", "epochs", "fix", "timeout", "device"),
    *("continue_interrupted", "status", "confirm_top", "evaluate_test"),
}
SHORT_EPILOG = """\
examples:
  python hyperparameter_search.py --demo
  python hyperparameter_search.py --data_root d --checkpoint_dir c --use_all_writers
  python hyperparameter_search.py --checkpoint_dir c --status
The same command continues after any stop; a higher --n_trials extends the search.
"""
EPILOG = """\
examples:
  search, and continue with the same command after any stop:
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

exit codes: 0 finished | 1 no trial is complete | 2 a mistake in the command or the
data | 3 too many trials failed in a row | 130, 143, ... stopped by a signal, after saving
"""


class ShowAll(argparse.Action):
    """Prints all options."""

    def __call__(self, *_: Any) -> NoReturn:
        parser = build_parser(everything=True)
        parser.print_help()
        parser.exit()


def build_parser(everything: bool = False) -> Parser:
    """Describe the command line, in groups.

    everything: whether its help shows all options, or those that most people need.
    """
    parser = Parser(
        prog="hyperparameter_search.py",
        usage=None if everything else "%(prog)s --data_root DIR --checkpoint_dir DIR [options]",
        description="Search for the best writer-identification model on handwritten text lines.\n"
        "Maximises validation macro top-1 accuracy. Stop it any time: the same command continues.",
        epilog=EPILOG if everything else SHORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.help_flag = "--help_all"
    parser.add_argument("--help_all", action=ShowAll, nargs=0, help="show all options, and exit")
    add_version(parser)
    common = parser.add_argument_group("what most people need")
    for title, add_flags in GROUPS:
        add_flags(parser.add_argument_group(title) if everything else common)
    if not everything:
        for action in parser._actions:
            if action.dest not in COMMON:
                action.help = argparse.SUPPRESS
    return parser


def _add_data_flags(group: Any) -> None:
    group.add_argument(
        "--data_root",
        type=path,
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
        help="take the first N writers by name (default: 7; --demo: all)",
    )
    group.add_argument(
        "--cache_dir",
        type=path,
        default=None,
        metavar="DIR",
        help="where decoded lines are kept for later searches (default: the user's cache)",
    )
    group.add_argument("--demo", action="store_true", help="run a small search on synthetic lines")


def _add_search_flags(group: Any) -> None:
    group.add_argument(
        "--checkpoint_dir",
        type=path,
        metavar="DIR",
        help="directory for all that the search writes",
    )
    group.add_argument(
        "--n_trials",
        type=whole_number,
        default=12,
        metavar="N",
        help="the total of complete trials wanted; raise it to extend (default: %(default)s)",
    )
    group.add_argument(
        "--sampler",
        choices=("tpe", "random", "gp"),
        default="tpe",
        help="how hyperparameters are drawn (default: %(default)s)",
    )
    group.add_argument(
        "--pruner",
        choices=("median", "percentile", "halving", "none"),
        help="how poor trials are ended early (default: median; with --sampler gp none)",
    )
    group.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        metavar="N",
        help="of the draws and the automatic split (default: %(default)s)",
    )
    group.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="fix a hyperparameter (repeatable)",
    )
    group.add_argument(
        "--space", type=path, metavar="FILE.json", help="ranges of your own; see the examples"
    )


def _add_limit_flags(group: Any) -> None:
    group.add_argument(
        "--timeout",
        type=time_span,
        metavar="TIME",
        help="start no trial after this time: 2h, 90m, 1h30m, 1d, or seconds; Slurm time limits "
        "are respected automatically",
    )
    group.add_argument(
        "--trial_timeout", type=time_span, metavar="TIME", help="end a trial that runs longer"
    )
    group.add_argument(
        "--max_consecutive_failed_trials",
        type=whole_number,
        default=5,
        metavar="N",
        help="stop when this many trials fail in a row (default: %(default)s)",
    )
    group.add_argument(
        "--continue_interrupted",
        action="store_true",
        help="continue interrupted or killed trials from their last checkpoint, as new trials, "
        "instead of drawing anew",
    )
    group.add_argument(
        "--keep_checkpoints",
        type=kept_checkpoints,
        default="all",
        metavar="{all,best,K}",
        help="keep the weights of all trials, of the best one, or of the best K "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--requeue_exit_code",
        type=exit_code,
        metavar="N",
        help="exit code while there is more to do (after a signal, before a Slurm job's end, or "
        "while trials are missing), so that a batch system can queue the job again",
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
        help="maximum epochs of a trial (default: %(default)s)",
    )
    group.add_argument(
        "--patience",
        type=whole_number,
        default=20,
        metavar="N",
        help="end a trial after N epochs without an improvement (default: %(default)s)",
    )
    group.add_argument(
        "--weights",
        choices=("auto", "imagenet", "none"),
        default="auto",
        help="ImageNet weights to start from; auto: if they are there or can be downloaded "
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
        help="trials that run at once (default: one per GPU; one without a GPU)",
    )
    group.add_argument(
        "--gpus_per_trial",
        type=whole_number,
        default=1,
        metavar="N",
        help="GPUs that train one trial together; on the CPU, processes (default: %(default)s)",
    )


def _add_looking_flags(group: Any) -> None:
    group.add_argument(
        "--compare",
        type=path,
        nargs="+",
        metavar="DIR",
        help="print several searches side by side, ranked where their lines and metric are the "
        "same, and exit; reads only",
    )
    group.add_argument(
        "--status", action="store_true", help="print the state of the search and exit; reads only"
    )
    group.add_argument("--json", action="store_true", help="with --status: print JSON")
    group.add_argument(
        "--watch",
        action="store_true",
        help="with --status: update it in place until the search ends or Ctrl-C",
    )


def _add_afterwards_flags(group: Any) -> None:
    group.add_argument(
        "--confirm_top",
        type=whole_number,
        metavar="K",
        help="when the trials are complete, train the best K configurations again with new seeds "
        "and choose the winner by their means",
    )
    group.add_argument(
        "--confirm_seeds",
        type=whole_number,
        metavar="S",
        help=f"new seeds for each configuration (default: {CONFIRM_SEEDS})",
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
        help="rebuild a damaged or lost database from the trial directories, then continue",
    )


GROUPS = (
    ("data", _add_data_flags),
    ("search", _add_search_flags),
    ("limits of a search", _add_limit_flags),
    ("training", _add_training_flags),
    ("machine", _add_machine_flags),
    ("looking at a search", _add_looking_flags),
    ("afterwards", _add_afterwards_flags),
)
DEMO = {
    "n_trials": 4,
    "epochs": 8,
    "checkpoint_dir": Path("runs/demo"),
    "num_writers_subset": None,  # all of them
    "weights": "none",
    "fix": ["backbone=resnet_thin", "batch_size=16"],
}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; hyphens in flags are taken for underscores. Raises UserError."""
    parser = build_parser()
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args([underscored(word) for word in argv])
    _check_status_flags(args)
    if args.compare:
        return args
    if args.checkpoint_dir is None and not (args.status and args.storage):
        raise UserError("--checkpoint_dir is missing: say where the search is to be kept")
    if args.study_name is not None and args.storage is None:
        raise UserError("--study_name needs --storage")
    _check_confirmation(args)
    args.study_name = args.study_name or STUDY_NAME
    if args.demo:
        if args.data_root is not None:
            raise UserError("--demo makes its own lines: leave out --data_root")
        if args.space is not None:
            raise UserError("--demo has a small space of its own: leave out --space")
        args.data_root = args.checkpoint_dir / "demo_lines"
    if args.sampler == "gp" and args.pruner not in (None, "none"):
        raise UserError("--sampler gp learns nothing from pruned trials: use --pruner none")
    args.pruner = args.pruner or ("none" if args.sampler == "gp" else "median")
    if args.data_root is None and not (args.status or args.recover):
        raise UserError("--data_root is missing: say where the line images are")
    return args


def _check_confirmation(args: argparse.Namespace) -> None:
    if args.confirm_top is not None and args.storage is not None:
        raise UserError(
            "--confirm_top does not work with --storage: when the search has ended, leave that "
            "out; the same command then rebuilds the study from a --checkpoint_dir that holds all "
            "trials, and confirms on this machine"
        )
    if args.confirm_seeds is not None and args.confirm_top is None:
        raise UserError("--confirm_seeds needs --confirm_top")
    args.confirm_seeds = args.confirm_seeds or CONFIRM_SEEDS


def _check_status_flags(args: argparse.Namespace) -> None:
    if (args.json or args.watch) and not args.status:
        raise UserError(f"--{'json' if args.json else 'watch'} needs --status")
    if args.json and args.watch:
        raise UserError("--json and --watch cannot be combined")
