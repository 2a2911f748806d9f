"""Checks the command, finds and decodes the lines, asks the machine, and plans the run.

Nothing is written to the checkpoint directory before all of this has gone well. Neither torch nor
Optuna is imported before it is needed: a mistake in the command is told at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import default_cache_dir, find_lines, load_lines
from writer_search.common.cores import SharedCores, asked_threads, usable_cores
from writer_search.common.errors import UserError
from writer_search.common.files import read_json
from writer_search.common.locks import refuse_if_in_use
from writer_search.common.place import require_short_path
from writer_search.common.provenance import provenance
from writer_search.common.text import one_line
from writer_search.config import Choice, Value
from writer_search.lines.report import describe_report
from writer_search.lines.walk import LeftOut
from writer_search.processes.deadlines import stop_time
from writer_search.processes.devices import divide, refuse_other_kind
from writer_search.results.rows import DATABASE
from writer_search.space import (
    BACKBONES_BY_TIER,
    Space,
    default_space,
    narrow,
    networks_of,
    parse_fix,
)

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from data import LineSet
    from writer_search.processes.plan import Plan


def check_checkpoint_dir(directory: Path) -> None:
    """Raise UserError when the directory cannot hold a search; creates nothing."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--checkpoint_dir {directory}: {existing} is a file, not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--checkpoint_dir {directory} cannot be written: no permission")
    require_short_path(directory)
    refuse_if_in_use(directory)


def recorded_settings(
    args: argparse.Namespace, storage: BaseStorage | None
) -> dict[str, Any] | None:
    """Read the settings of the study that is to be gone on with; None for a new one."""
    if storage is not None:
        from writer_search.study.shared.storage import settings_of

        return settings_of(storage, args.study_name)
    from writer_search.study.recovery import standing_settings

    settings = standing_settings(args.checkpoint_dir)
    if settings is None:
        return None
    database = args.checkpoint_dir / DATABASE
    if not isinstance(settings, dict) or not {"tier", "weights", "precision"} <= settings.keys():
        raise UserError(
            f"{database} was begun by another version of this program: its settings cannot be "
            "compared; go on with that version, or give a fresh --checkpoint_dir"
        )
    return settings


def read_ranges(path: Path | None) -> dict[str, Any]:
    """Read the file of --space. Raises UserError."""
    if path is None:
        return {}
    try:
        ranges = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--space {path} cannot be read: {one_line(error)}") from None
    if not isinstance(ranges, dict):
        raise UserError(f"--space {path}: expected a JSON object of hyperparameters")
    return ranges


def smallest_batch(space: Space) -> int:
    """Give the smallest batch size that trials of this space may have."""
    rule = space.searched.get("batch_size")
    if isinstance(rule, Choice):
        return min(int(size) for size in rule.choices)
    return int(rule.low if rule is not None else space.fixed["batch_size"])


def precision_of(space: Space) -> dict[str, Value]:
    """Give each network's precision where --fix names it: then nothing is measured."""
    precision = space.fixed.get("precision")
    return dict.fromkeys(networks_of(space), precision) if precision is not None else {}


def ask_machine(
    args: argparse.Namespace,
    recorded: dict[str, Any] | None,
    fix: dict[str, Value],
    ranges: dict[str, Any],
    cores: SharedCores,
) -> dict[str, Any]:
    """Let child processes find out devices, weights and precision. Raises UserError."""
    from writer_search.processes import questions
    from writer_search.processes.messages import MachineQuestion

    backbones: tuple[str, ...] | None = None
    weights = args.weights
    if recorded is not None:  # decided once per study
        backbones, weights = tuple(recorded["precision"]), recorded["weights"]
    elif "backbone" in fix or "backbone" in ranges:
        backbones = networks_of(narrow(default_space("cpu", False), fix, ranges))
    measure = recorded is None and "precision" not in fix
    threads = asked_threads(os.environ) or min(usable_cores(), cores.left())
    gpus, warnings = questions.find_gpus(args.device)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return questions.ask_machine(MachineQuestion(gpus, weights, backbones, measure, threads))


def prepare(args: argparse.Namespace, recorded: dict[str, Any] | None) -> Plan:
    """Check everything and decode the lines; nothing is written to the checkpoint directory.

    recorded: the settings of the study to go on with. Raises UserError.
    """
    from writer_search.processes.fork_server import start_fork_server

    fix, ranges = parse_fix(args.fix), read_ranges(args.space)
    for pretrained in (False, True):  # a mistake in --fix or --space is told before torch is there
        narrow(default_space("cpu", pretrained), fix, ranges)
    cores = SharedCores()
    start_fork_server()  # it imports torch while this process imports Optuna and finds the lines

    from writer_search.processes.test_measurement import require_test_lines
    from writer_search.study.draws import make_sampler

    make_sampler(args.sampler, 0)  # it may need what is not installed
    if args.demo:
        from writer_search.demo import make_lines

        make_lines(args.data_root)
    wanted = None if args.use_all_writers else args.num_writers_subset
    left_out = LeftOut()
    lines = find_lines(args.data_root, wanted, args.seed, left_out)
    if recorded is not None and "cohog_head" not in recorded["space"]:
        # It was begun before there was a descriptor, or without it: its default backbones are so.
        networks = BACKBONES_BY_TIER[recorded["tier"], recorded["weights"] == "imagenet"]
        ranges = {"backbone": {"choices": list(networks)}, **ranges}
    machine = ask_machine(args, recorded, fix, ranges, cores)
    refuse_other_kind(recorded, machine, args.device)
    decided = recorded or machine
    if recorded is not None and args.weights not in ("auto", recorded["weights"]):
        decided = {**recorded, "weights": args.weights}  # to be refused with the other differences
    space = narrow(default_space(decided["tier"], decided["weights"] == "imagenet"), fix, ranges)
    data = load_lines(
        args.data_root,
        lines,
        int(space.fixed["line_height"]),
        args.cache_dir or default_cache_dir(),
        left_out,
    )
    if args.evaluate_test:
        require_test_lines(data)
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
        "precision": precision_of(space) or decided["precision"],
        "space": space.to_dict(),
    }
    return make_plan(args, machine, data, space, settings, cores)


def make_plan(
    args: argparse.Namespace,
    machine: dict[str, Any],
    data: LineSet,
    space: Space,
    settings: dict[str, Any],
    cores: SharedCores,
) -> Plan:
    """Divide the machine between the trials that run at once."""
    from writer_search.processes.plan import Plan

    slots = divide(machine["gpus"], args.n_jobs, args.gpus_per_trial, machine["device_names"])
    ranks, asked = args.gpus_per_trial, asked_threads(os.environ)
    smallest = min(smallest_batch(space), data.report["lines"]["train"])
    if ranks > smallest:
        raise UserError(f"--gpus_per_trial {ranks} is more than a batch has images: {smallest}")
    idle = set(machine["gpus"]) - {gpu for slot in slots for gpu in slot}
    if machine["weights_why"]:
        print(
            f"warning: training from scratch, without ImageNet weights: {machine['weights_why']}",
            file=sys.stderr,
        )
    if asked is not None and asked * len(slots) * ranks > usable_cores():
        print(
            f"warning: OMP_NUM_THREADS={asked} for each of {len(slots) * ranks} process(es) is "
            f"more than the {usable_cores()} core(s) here, which makes all of them slow",
            file=sys.stderr,
        )
    if idle and args.n_jobs is None:
        print(f"warning: no trial uses GPU {', '.join(sorted(idle))}", file=sys.stderr)
    for warning in describe_report(data.report):
        print(f"warning: {warning}", file=sys.stderr)
    return Plan(
        checkpoint_dir=args.checkpoint_dir,
        data=data,
        space=space,
        settings=settings,
        n_trials=args.n_trials,
        slots=slots,
        ranks=ranks,
        threads=asked or max(1, usable_cores() // (len(slots) * ranks)),
        cores=None if asked or machine["gpus"] else cores,
        sampler=args.sampler,
        seed=args.seed,
        timeout=args.timeout,
        stop_at=stop_time(os.environ),
        trial_timeout=args.trial_timeout,
        max_consecutive_failed_trials=args.max_consecutive_failed_trials,
        kept_models=args.keep_checkpoints,
        on_event=args.on_event,
        continues=args.continue_interrupted,
        provenance={**provenance(args.data_root, machine), "command": public_command(args)},
    )


def prepare_shared(args: argparse.Namespace, storage: BaseStorage) -> tuple[Plan, bool]:
    """Prepare, and create the study where it is not there; also tell whether this search did."""
    from writer_search.study.shared.storage import create_shared_study, find_study, settings_of

    plan = prepare(args, recorded_settings(args, storage))
    if find_study(storage, args.study_name) is None and create_shared_study(
        storage, args.study_name, plan.settings
    ):
        return plan, True
    recorded = settings_of(storage, args.study_name)
    if recorded not in (None, json.loads(json.dumps(plan.settings))):
        plan = prepare(args, recorded)  # what the quicker search has measured holds for all
    return plan, False


def hidden(text: str, storage: str | None) -> str:
    """Give a text without the password of the storage's URL."""
    if storage is None:
        return text
    from writer_search.study.shared.storage import hide_password

    return hide_password(text, storage)


def public_command(args: argparse.Namespace) -> list[str]:
    """Give the command for config.json, without a password."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return [hidden(word, args.storage) for word in words]
