"""The command line of train.py: its flags, its help, and what it takes for a mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from writer_search.common.environment import as_in_a_trial
from writer_search.common.errors import UserError, told
from writer_search.common.place import open_standard_streams, require_directories
from writer_search.flag_values import Parser, add_version, device_name, path, underscored

TRAIN_ON = ("train", "train+val")
TRAIN_EPILOG = """\
examples:
  name the writers of some lines:
    python train.py --predict page_1/ page_2/line_003.png --model runs/a/summary/best_model.pth

  repeat a trial outside of its search, or train the final model on all but the test lines:
    python train.py --config runs/a/trial_007/config.json --data_root lines --output_dir again
    python train.py --config runs/a/trial_007/config.json --data_root lines --output_dir final \\
        --train_on train+val

exit codes: 0 done | 1 some images could not be read or files were left out, or the
training failed | 2 a mistake in the command, or no image could be read | 130, 143, ...
stopped by a signal
"""


def build_train_parser() -> Parser:
    """Describe the command line, in groups."""
    parser = Parser(
        prog="train.py",
        description="Name the writers of line images with a model that a search has found, or "
        "train a search's trial again. Stop a training any time: the same command continues.",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_use_flags(parser.add_argument_group("use a model"))
    _add_again_flags(parser.add_argument_group("train a trial again"))
    add_version(parser)
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
        type=path,
        nargs="+",
        metavar="IMAGE_OR_DIR",
        help="line images, or directories of them; a directory that holds images is a page",
    )
    use.add_argument(
        "--model",
        type=path,
        metavar="FILE.pth",
        help="a best_model.pth or final_model.pth; it contains all that it needs",
    )
    form = use.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--csv", action="store_true", help="print one table of lines and pages")


def _add_again_flags(group: Any) -> None:
    group.add_argument(
        "--config",
        type=path,
        metavar="FILE.json",
        help="the config.json of a trial: its hyperparameters, seed, threads and data",
    )
    group.add_argument(
        "--data_root", type=path, metavar="DIR", help="the lines that the trial was trained on"
    )
    group.add_argument(
        "--output_dir",
        type=path,
        metavar="DIR",
        help="directory for the training's files, the same as a trial's",
    )
    group.add_argument(
        "--train_on",
        choices=TRAIN_ON,
        help="train+val: also on the validation lines, for a final model; then no epoch is chosen, "
        "and there is no validation value (default: as the training of --config)",
    )
    group.add_argument(
        "--other_data",
        action="store_true",
        help="accept lines other than the trial's, and train on all writers of --data_root",
    )
    group.add_argument(
        "--cache_dir",
        type=path,
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


def tell_before_torch(argv: Sequence[str]) -> None:
    """Answer --help and what is wrong with the command; say on a terminal what takes seconds.

    A training then gets the environment that trials have, for which the program starts anew.
    """
    open_standard_streams()
    try:
        require_directories()
        args = parse_train_args(argv)
    except UserError as error:
        print(told(error), file=sys.stderr)
        sys.exit(2)
    if args.config is not None:
        as_in_a_trial()  # steps of large models gain up to a quarter
    if sys.stderr.isatty():
        print("importing torch ...", file=sys.stderr, flush=True)
