"""Search for the best writer-identification model on images of handwritten text lines.

This is the command line. The search itself is in search.py, one trial in train.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from config import Choice, Space, Value, default_space, narrow, parse_fix
from data import default_cache_dir, describe_report, find_lines, load_lines
from files import DirectoryLock, UserError, one_line, refuse_if_in_use, write_json
from progress import lasting_output
from signals import Interrupted, StopSignals
from summary import (
    DATABASE,
    closing_lines,
    percent,
    publish_best_model,
    read_rows,
    read_study,
    status_text,
    write_summary,
)

if TYPE_CHECKING:
    import optuna

    from data import LineSet
    from search import Plan, Search

# Optuna and all that needs it are imported where they are used: --status answers without them, and
# a mistake in the command is told at once.

EXIT_OK, EXIT_NOTHING_COMPLETE, EXIT_USAGE, EXIT_FAILURES = 0, 1, 2, 3
RULE = "=" * 70

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

# ------------------------------------------------------------------------------------ command line


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
        "--timeout", type=seconds, metavar="SECONDS", help="start no trial after so long"
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
        help="exit code after a signal, where a batch system wants one of its own",
    )


def _add_training_flags(group: Any) -> None:
    group.add_argument(
        "--epochs",
        type=whole_number,
        default=25,
        metavar="N",
        help="most epochs of a trial (default: %(default)s)",
    )
    group.add_argument(
        "--patience",
        type=whole_number,
        default=10,
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


def _add_afterwards_flags(group: Any) -> None:
    group.add_argument(
        "--status", action="store_true", help="print the state of the search and exit; reads only"
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
    "fix": ["backbone=resnet_thin", "batch_size=16"],
}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; hyphens in flags are taken for underscores. Raises UserError."""
    parser = build_parser()
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args([_underscored(word) for word in argv])
    if args.checkpoint_dir is None:
        raise UserError("--checkpoint_dir is missing: say where the search is to be kept")
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


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


# ------------------------------------------------------------------------------------- preparation


def check_checkpoint_dir(directory: Path) -> None:
    """Raise UserError when the directory cannot hold a search; creates nothing."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--checkpoint_dir {directory}: {existing} is a file, not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--checkpoint_dir {directory} cannot be written: no permission")
    refuse_if_in_use(directory)


def recorded_settings(directory: Path) -> dict[str, Any] | None:
    """Read the settings of the study that is to be gone on with; None for a new one."""
    database = directory / DATABASE
    if not database.exists():
        return None
    try:
        settings: dict[str, Any] | None = read_study(database).get("settings")
        return settings
    except sqlite3.DatabaseError as error:
        raise UserError(f"{database} cannot be read: {one_line(error)}") from None


def read_ranges(path: Path | None) -> dict[str, Any]:
    """Read the file of --space. Raises UserError."""
    if path is None:
        return {}
    try:
        ranges = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--space {path} cannot be read: {one_line(error)}") from None
    if not isinstance(ranges, dict):
        raise UserError(f"--space {path}: expected a JSON object of hyperparameters")
    return ranges


def backbones_of(space: Space) -> tuple[str, ...]:
    """Name the backbones that trials of this space may have."""
    rule = space.searched.get("backbone")
    return (
        tuple(map(str, rule.choices))
        if isinstance(rule, Choice)
        else (str(space.fixed["backbone"]),)
    )


def ask_machine(
    args: argparse.Namespace,
    recorded: dict[str, Any] | None,
    fix: dict[str, Value],
    ranges: dict[str, Any],
) -> dict[str, Any]:
    """Let a child process find out devices, weights and precision. Raises UserError."""
    from processes import ChildProcess, MachineQuestion, start_fork_server

    start_fork_server()
    backbones: tuple[str, ...] | None = None
    weights = args.weights
    if recorded is not None:  # decided once per study
        backbones, weights = tuple(recorded["precision"]), recorded["weights"]
    elif "backbone" in fix or "backbone" in ranges:
        backbones = backbones_of(narrow(default_space("cpu", False), fix, ranges))
    question = MachineQuestion(args.device, weights, backbones, measure=recorded is None)
    child = ChildProcess("worker:answer_question", question)
    try:
        message = child.receive()
    except BaseException:
        child.kill()
        raise
    finally:
        child.end()
    if message is None:
        raise UserError("torch cannot be used here; see the messages above")
    kind, answer = message
    if kind == "mistake":
        raise UserError(answer["cause"])
    return answer


def prepare(args: argparse.Namespace) -> Plan:
    """Check everything and decode the lines; nothing is written to the checkpoint directory.

    Raises UserError.
    """
    from study import make_sampler

    make_sampler(args.sampler, 0)  # it may need what is not installed
    fix, ranges = parse_fix(args.fix), read_ranges(args.space)
    for pretrained in (False, True):  # a mistake in --fix or --space is told before torch is there
        narrow(default_space("cpu", pretrained), fix, ranges)
    if args.demo:
        from synthetic import make_lines

        make_lines(args.data_root)
    wanted = None if args.use_all_writers else args.num_writers_subset
    lines = find_lines(args.data_root, wanted, args.seed)
    recorded = recorded_settings(args.checkpoint_dir)
    machine = ask_machine(args, recorded, fix, ranges)
    decided = recorded or machine
    if recorded is not None and args.weights not in ("auto", recorded["weights"]):
        decided = {**recorded, "weights": args.weights}  # to be refused with the other differences
    space = narrow(default_space(decided["tier"], decided["weights"] == "imagenet"), fix, ranges)
    data = load_lines(
        args.data_root,
        lines,
        int(space.fixed["line_height"]),
        args.cache_dir or default_cache_dir(),
    )
    settings = {
        "metric": "validation macro top-1 accuracy",
        "data": {
            "fingerprint": data.fingerprint,
            "writers": len(data.writers),
            "lines": data.report["lines"],
            "split": "given" if (args.data_root / "train").is_dir() else f"by seed {args.seed}",
        },
        "epochs": args.epochs,
        "patience": args.patience,
        "tier": decided["tier"],
        "weights": decided["weights"],
        "precision": decided["precision"],
        "space": space.to_dict(),
    }
    return make_plan(args, machine, data, space, settings)


def make_plan(
    args: argparse.Namespace,
    machine: dict[str, Any],
    data: LineSet,
    space: Space,
    settings: dict[str, Any],
) -> Plan:
    """Divide the machine between the trials that run at once."""
    from search import Plan, provenance

    gpus: list[str | None] = list(machine["gpus"]) or [None]
    n_jobs = args.n_jobs or len(gpus)
    if machine["weights_why"]:
        print(
            f"warning: training from scratch, without ImageNet weights: {machine['weights_why']}",
            file=sys.stderr,
        )
    for warning in describe_report(data.report):
        print(f"warning: {warning}", file=sys.stderr)
    return Plan(
        checkpoint_dir=args.checkpoint_dir,
        data=data,
        space=space,
        settings=settings,
        n_trials=args.n_trials,
        slots=tuple(gpus[job % len(gpus)] for job in range(n_jobs)),
        threads=max(1, len(os.sched_getaffinity(0)) // n_jobs),
        sampler=args.sampler,
        seed=args.seed,
        timeout=args.timeout,
        trial_timeout=args.trial_timeout,
        max_consecutive_failed_trials=args.max_consecutive_failed_trials,
        kept_models=args.keep_checkpoints,
        provenance=provenance(args.data_root, machine),
    )


# ---------------------------------------------------------------------------------------- the study


def open_search(args: argparse.Namespace, plan: Plan) -> optuna.Study:
    """Open or create the study, settle what a dead search left, print the banner."""
    from study import (
        continue_interrupted,
        make_pruner,
        open_study,
        record_settings,
        settle_unfinished,
    )

    study = open_study(args.checkpoint_dir)
    is_new = "settings" not in study.user_attrs
    record_settings(study, plan.settings)
    study.pruner = make_pruner(args.pruner, args.epochs)
    study.set_user_attr("run", {"n_trials": args.n_trials, "n_jobs": len(plan.slots)})
    settled = settle_unfinished(study, args.checkpoint_dir)
    if args.continue_interrupted:
        settled += continue_interrupted(study)
    (args.checkpoint_dir / "summary").mkdir(exist_ok=True)
    write_json(args.checkpoint_dir / "summary" / "data_report.json", plan.data.report)
    print("\n".join(banner(args, is_new)), flush=True)
    for line in settled:
        print(line, flush=True)
    print(describe_plan(plan), flush=True)
    return study


def banner(args: argparse.Namespace, is_new: bool) -> list[str]:
    """Say what is about to start."""
    database = args.checkpoint_dir / DATABASE
    if is_new:
        return [
            RULE,
            "STARTING NEW HYPERPARAMETER SEARCH",
            RULE,
            f"Study database: {database}",
            f"Number of trials: {args.n_trials}",
            "Optimization metric: Validation Macro Top-1 Accuracy",
            "Note: This search is resumable. You can safely stop and restart.",
            RULE,
        ]
    rows = read_rows(database)
    states = [row.state for row in rows]
    complete = [row.value for row in rows if row.value is not None]
    return [
        RULE,
        "RESUMING EXISTING STUDY",
        RULE,
        f"Study loaded from: {database}",
        f"Completed trials: {len(complete)}",
        f"Pruned trials: {states.count('PRUNED')}",
        f"Failed trials: {states.count('FAIL')}",
        f"Remaining trials: {max(0, args.n_trials - len(complete))}",
        f"Best value so far: {percent(max(complete, default=None))}",
        RULE,
    ]


def describe_plan(plan: Plan) -> str:
    """Say on what the search runs, in one line."""
    lines = plan.data.report["lines"]
    counts = ", ".join(f"{lines[split]} {split}" for split in lines)
    where = ", ".join(sorted({f"GPU {slot}" for slot in plan.slots if slot is not None}))
    return (
        f"{len(plan.data.writers)} writers | lines: {counts} | {plan.data.line_height} px | "
        f"{where or 'CPU'}, {len(plan.slots)} trial(s) at once, {plan.threads} thread(s) each | "
        f"weights: {plan.settings['weights']}"
    )


def conclude(args: argparse.Namespace, search: Search) -> int:
    """Bring the summary up to date, say how the search stands, and give the exit code."""
    rows = read_rows(args.checkpoint_dir / DATABASE)
    write_summary(args.checkpoint_dir, rows)
    published = publish_best_model(args.checkpoint_dir, rows)
    print(
        "\n".join(
            [RULE, *closing_lines(args.checkpoint_dir, rows, args.n_trials, search.exhausted), RULE]
        )
    )
    if search.stop.name is not None:
        raise Interrupted(search.stop.name, began=True)
    if search.gave_up:
        print(
            f"error: stopped after {len(search.failures)} failed trials in a row; common cause: "
            f"{one_line(search.common_cause())}; mend it, and the same command goes on",
            file=sys.stderr,
        )
        return EXIT_FAILURES
    return (
        EXIT_OK if published or any(r.state == "COMPLETE" for r in rows) else EXIT_NOTHING_COMPLETE
    )


def recover_study(args: argparse.Namespace) -> None:
    """Rebuild the study from the trial directories. Raises UserError."""
    from recovery import recover

    if not args.checkpoint_dir.is_dir():
        raise UserError(f"--recover: {args.checkpoint_dir} does not exist")
    with DirectoryLock(args.checkpoint_dir):
        print("\n".join(recover(args.checkpoint_dir)), flush=True)


@contextmanager
def told_when_unwritable(database: Path) -> Iterator[None]:
    """Turn a study that cannot be written (disk full, permission) into the user's mistake."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        raise UserError(
            f"{database} cannot be written: {one_line(error.__cause__ or error)}; what was "
            "recorded is safe; mend it, and the same command goes on"
        ) from None


def run_search(args: argparse.Namespace) -> int:
    """Prepare, search, conclude."""
    with StopSignals() as stop:
        from recovery import refuse_damage
        from search import Search

        check_checkpoint_dir(args.checkpoint_dir)
        if args.recover:
            recover_study(args)
            if args.data_root is None:
                return EXIT_OK
        refuse_damage(args.checkpoint_dir)
        plan = prepare(args)
        try:
            args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--checkpoint_dir cannot be made: {one_line(error)}") from None
        with DirectoryLock(args.checkpoint_dir):
            study = open_search(args, plan)
            search = Search(study, plan, stop)
            with stop.deferred(), told_when_unwritable(args.checkpoint_dir / DATABASE):
                search.run()
                return conclude(args, search)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    with lasting_output():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    requeue = None
    try:
        args = parse_args(argv)
        requeue = args.requeue_exit_code
        if args.status:
            print(status_text(args.checkpoint_dir))
            return EXIT_OK
        return run_search(args)
    except UserError as error:
        print(f"error: {one_line(error, 1000)}", file=sys.stderr)
        return EXIT_USAGE
    except Interrupted as error:
        command = shlex.join([Path(sys.executable).name, *sys.argv])
        what = "everything is saved" if error.began else "before the search began"
        print(
            f"stopped by {error}: {what}; to go on, run the same command: {command}",
            file=sys.stderr,
        )
        return error.exit_code if requeue is None else requeue


if __name__ == "__main__":
    sys.exit(main())
