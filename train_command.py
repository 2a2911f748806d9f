"""The command `python train.py`: predict with a saved model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from command_line import Parser, device_name, underscored
from files import UserError, one_line
from prediction import as_csv, as_json, as_table, predict
from progress import lasting_output
from signals import Interrupted, StopSignals
from train import load_model

EXIT_OK, EXIT_INCOMPLETE, EXIT_USAGE = 0, 1, 2

EPILOG = """\
examples:
  whose hand is this:
    python train.py --predict page_1/ page_2/line_003.png --model runs/a/summary/best_model.pth

exit codes: 0 done | 1 some images could not be read, they are named | 2 a mistake in the command,
or no image could be read | 130, 143, ... stopped by a signal
"""


def build_parser() -> Parser:
    """Describe the command line, in groups."""
    parser = Parser(
        prog="train.py",
        description="Tell whose hand line images are in, with a model that a search has found.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    use = parser.add_argument_group("use a model")
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
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device",
        type=device_name,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; hyphens in flags are taken for underscores. Raises UserError."""
    args = build_parser().parse_args([underscored(word) for word in argv])
    if args.predict is None:
        raise UserError("--predict is missing: say which images (--help shows all options)")
    if args.model is None:
        raise UserError("--model is missing: give a search's summary/best_model.pth")
    return args


def device_of(name: str) -> torch.device:
    """Give the device of a name; auto takes a GPU where there is one. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: torch {torch.__version__} sees {count} CUDA device(s)")
    return device


def predict_command(args: argparse.Namespace) -> int:
    """Predict and print: results to stdout, images that cannot be read to stderr."""
    device = device_of(args.device)
    model, config, writers = load_model(args.model)
    predictions = predict(model, config, writers, args.predict, device)
    for name, cause in predictions.skipped.items():
        print(f"not read: {one_line(name)}: {cause}", file=sys.stderr)
    if not predictions.lines:
        raise UserError("--predict: no image could be read")
    show = as_json if args.json else as_csv if args.csv else as_table
    print(show(predictions))
    return EXIT_INCOMPLETE if predictions.skipped else EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    with lasting_output():
        try:
            args = parse_args(sys.argv[1:] if argv is None else argv)
            with StopSignals():
                return predict_command(args)
        except UserError as error:
            print(f"error: {one_line(error, 1000)}", file=sys.stderr)
            return EXIT_USAGE
        except Interrupted as error:
            print(f"stopped by {error}", file=sys.stderr)
            return error.exit_code
