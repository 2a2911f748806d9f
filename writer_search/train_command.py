"""The command `python train.py`: predict with a saved model, or train a trial again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data import default_cache_dir
from train import DivergedError
from writer_search.common.files import UserError, one_line, place_errors_told
from writer_search.common.signals import Interrupted, StopSignals
from writer_search.flags import Parser, device_name, underscored
from writer_search.processes.parent import as_in_a_trial
from writer_search.results.progress import lasting_output
from writer_search.training.checkpoints import load_model
from writer_search.training.prediction import as_csv, as_json, as_table, predict
from writer_search.training.repeat import TRAIN_ON, Retraining, device_like, retrain

EXIT_OK, EXIT_INCOMPLETE, EXIT_USAGE = 0, 1, 2

EPILOG = """\
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


def build_parser() -> Parser:
    """Describe the command line, in groups."""
    parser = Parser(
        prog="train.py",
        description="Tell whose hand line images are in, with a model that a search has found; or "
        "train a search's trial again. Stop a training any time: the same command goes on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_use_flags(parser.add_argument_group("use a model"))
    _add_training_flags(parser.add_argument_group("train a trial again"))
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


def _add_training_flags(group: Any) -> None:
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


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; hyphens in flags are taken for underscores. Raises UserError."""
    args = build_parser().parse_args([underscored(word) for word in argv])
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


def predict_command(args: argparse.Namespace) -> int:
    """Predict and print: results to stdout, images that cannot be read to stderr."""
    device = device_like(args.device, torch.cuda.is_available())
    model, config, writers = load_model(args.model)
    predictions = predict(model, config, writers, args.predict, device)
    for name, cause in predictions.skipped.items():
        print(f"not read: {one_line(name)}: {cause}", file=sys.stderr)
    if not predictions.lines:
        raise UserError("--predict: no image could be read")
    show = as_json if args.json else as_csv if args.csv else as_table
    print(show(predictions))
    return EXIT_INCOMPLETE if predictions.skipped else EXIT_OK


def retrain_command(args: argparse.Namespace, stop: StopSignals) -> int:
    """Train a trial again."""
    wanted = Retraining(
        config_file=args.config,
        data_root=args.data_root,
        output_dir=args.output_dir,
        train_on=args.train_on,
        other_data=args.other_data,
        cache_dir=args.cache_dir or default_cache_dir(),
        device=args.device,
    )
    try:
        retrain(wanted, stop)
    except (DivergedError, torch.OutOfMemoryError) as error:
        print(f"error: the training failed: {one_line(error)}", file=sys.stderr)
        return EXIT_INCOMPLETE
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    with lasting_output():
        try:
            args = parse_args(sys.argv[1:] if argv is None else argv)
            if argv is None and args.config is not None:
                as_in_a_trial()  # some seconds; steps of large models gain up to a quarter
            with place_errors_told(), StopSignals() as stop:
                return predict_command(args) if args.predict else retrain_command(args, stop)
        except UserError as error:
            print(f"error: {one_line(error, 1000)}", file=sys.stderr)
            return EXIT_USAGE
        except Interrupted as error:
            saved = ": everything is saved; the same command goes on" if error.began else ""
            print(f"stopped by {error}{saved}", file=sys.stderr)
            return error.exit_code
