"""Checks the command, finds and decodes the lines, asks the machine, and plans the run.

Nothing is written to the checkpoint directory before all of this has gone well. Neither torch nor
Optuna is imported before it is needed: a mistake in the command is told at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import default_cache_dir, find_lines, load_lines
from writer_search.common.cores import SharedCores, asked_threads, usable_cores
from writer_search.common.errors import UserError
from writer_search.common.files import read_json
from writer_search.common.output import live
from writer_search.common.provenance import provenance
from writer_search.common.text import counted, one_line
from writer_search.config import BEFORE, Choice, Value
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
    outside_of,
    parse_fix,
)
from writer_search.study.damage import find_damage, read_brief, recorded_settings_of

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from data import LineSet
    from writer_search.lines.report import LineFile
    from writer_search.processes.plan import Plan


def standing_settings(checkpoint_dir: Path) -> dict[str, Any] | None:
    """Give the settings of the study to go on with, be its database damaged; None for a new one.

    Changes nothing. Raises UserError, naming the way out, where a damaged database cannot heal.
    """
    damage = find_damage(checkpoint_dir)
    if damage is not None:
        from writer_search.study.recovery import rebuilt_or_told

        return rebuilt_or_told(checkpoint_dir, damage).settings
    database = checkpoint_dir / DATABASE
    told = recorded_settings_of(checkpoint_dir)
    return told or (read_brief(database).settings if database.exists() else None)


def is_finished(args: argparse.Namespace) -> bool:
    """Tell whether a study on this machine has all its trials, so that nothing is to be trained."""
    if args.confirm_top is not None or args.evaluate_test or find_damage(args.checkpoint_dir):
        return False
    database = args.checkpoint_dir / DATABASE
    return database.exists() and read_brief(database).complete >= int(args.n_trials)


def recorded_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """Read the settings of the study that is to be gone on with; None for a new one."""
    settings = standing_settings(args.checkpoint_dir)
    if settings is None:
        return None
    database = args.checkpoint_dir / DATABASE
    if not isinstance(settings, dict) or not {"tier", "weights", "precision"} <= settings.keys():
        raise UserError(
            f"{database} was begun by another version of this program, so its settings cannot "
            "be compared; use that version, or give a fresh --checkpoint_dir"
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
    live.begin("importing torch")
    questions.await_torch()
    if args.device != "cpu":
        live.begin("looking for GPUs")
    gpus, warnings = questions.find_gpus(args.device)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    memory = (args.cache_dir or default_cache_dir()) / "precision.json"
    question = MachineQuestion(gpus, weights, backbones, measure, threads, memory)
    return questions.ask_machine(question, live.begin)


def recorded_machine(recorded: dict[str, Any]) -> dict[str, Any]:
    """Describe the machine as the study has it, where nothing is to be trained on it."""
    decided = {name: recorded[name] for name in ("tier", "weights", "precision")}
    nothing = {"gpus": [], "device_names": [], "without_bfloat16": [], "weights_why": ""}
    return {**decided, **nothing, "versions": {}}


def warn_of_emulation(precision: dict[str, Any], without: list[str]) -> None:
    """Warn of a device that has no bfloat16 in hardware, where networks are to compute in it.

    The precision was decided elsewhere, on another node of a cluster, or by --fix.
    """
    if without and "bfloat16" in precision.values():
        print(
            f"warning: networks of this search compute in bfloat16, which {without[0]} only "
            "emulates: they take many times as long, or fail; use a device that has it, or begin a "
            "search in a fresh --checkpoint_dir with --fix precision=float32",
            file=sys.stderr,
        )


def prepare(args: argparse.Namespace, recorded: dict[str, Any] | None, trains: bool = True) -> Plan:
    """Check everything and decode the lines; nothing is written to the checkpoint directory.

    recorded: the settings of the study to go on with.   trains: whether anything is to be trained;
    where nothing is, torch is not needed, and takes no time. Raises UserError.
    """
    fix, ranges = parse_fix(args.fix), read_ranges(args.space)
    for pretrained in (False, True):  # a mistake in --fix or --space is told before torch is there
        narrow(default_space("cpu", pretrained), fix, ranges)
    cores = SharedCores()
    if trains:
        from writer_search.processes.fork_server import start_fork_server

        start_fork_server()  # it imports torch while this process imports Optuna, finds the lines
    live.begin("importing Optuna")
    from writer_search.processes.test_measurement import require_test_lines
    from writer_search.study.draws import make_sampler
    from writer_search.study.store import warm_up_storages

    if trains:
        warm_up_storages()
    make_sampler(args.sampler, 0)  # it may need what is not installed
    lines, left_out = wanted_lines(args)
    if recorded is not None and "cohog_head" not in recorded["space"]:
        # It was begun before there was a descriptor, or without it: its default backbones are so.
        networks = BACKBONES_BY_TIER[recorded["tier"], recorded["weights"] == "imagenet"]
        ranges = {"backbone": {"choices": list(networks)}, **ranges}
    if recorded is not None:
        named = set(recorded["space"]) | set(ranges)
        fix = {n: value for n, value in BEFORE.items() if n not in named} | fix
    machine = (
        recorded_machine(recorded)
        if recorded is not None and not trains
        else ask_machine(args, recorded, fix, ranges, cores)
    )
    refuse_other_kind(recorded, machine, args.device)
    decided = recorded or machine
    if recorded is not None and args.weights not in ("auto", recorded["weights"]):
        decided = {**recorded, "weights": args.weights}  # to be refused with the other differences
    usual = default_space(decided["tier"], decided["weights"] == "imagenet")
    space = narrow(usual, fix, ranges)
    live.begin("decoding lines")
    data = load_lines(
        args.data_root,
        lines,
        int(space.fixed["line_height"]),
        args.cache_dir or default_cache_dir(),
        left_out,
    )
    live.end()
    if args.evaluate_test:
        require_test_lines(data)
    for warning in outside_of(usual, fix):
        print(f"warning: {warning}", file=sys.stderr)
    settings = settings_of_study(args, decided, data, space)
    if not machine["precision"]:  # it was not measured, or not here
        warn_of_emulation(settings["precision"], machine["without_bfloat16"])
    plan = make_plan(args, machine, data, space, settings, cores)
    return replace(plan, trains=trains)


def wanted_lines(args: argparse.Namespace) -> tuple[list[LineFile], LeftOut]:
    """Find the lines of the wanted writers; writes the demo's first. Also gives what is no line."""
    if args.demo:
        from writer_search.demo import make_lines

        live.begin("writing the demo's lines")
        make_lines(args.data_root)
    wanted, left_out = None if args.use_all_writers else args.num_writers_subset, LeftOut()
    live.begin("finding lines")
    return find_lines(args.data_root, wanted, args.seed, left_out), left_out


def settings_of_study(
    args: argparse.Namespace, decided: dict[str, Any], data: LineSet, space: Space
) -> dict[str, Any]:
    """Give all that has to stay the same when a study goes on.

    decided: tier, weights and precision, as the study or the machine has them.
    """
    return {
        "metric": "validation macro top-1 accuracy",
        "data": data.described(args.data_root, args.seed),
        "epochs": args.epochs,
        "patience": args.patience,
        "tier": decided["tier"],
        "weights": decided["weights"],
        "precision": precision_of(space) or decided["precision"],
        "space": space.to_dict(),
    }


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
            f"warning: OMP_NUM_THREADS={asked} for each of "
            f"{counted(len(slots) * ranks, 'process', 'processes')} is more than the "
            f"{counted(usable_cores(), 'core')} here, which makes all of them slow",
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
    from writer_search.study.shared.storage import create_shared_study, settings_of

    plan = prepare(args, settings_of(storage, args.study_name))
    if create_shared_study(storage, args.study_name, plan.settings):
        return plan, True
    recorded = settings_of(storage, args.study_name)
    if recorded not in (None, json.loads(json.dumps(plan.settings))):
        plan = prepare(args, recorded)  # what the quicker search has measured holds for all
    return plan, False


def public_command(args: argparse.Namespace) -> list[str]:
    """Give the command for config.json, without a password."""
    if args.storage is None:
        return sys.argv
    from writer_search.study.shared.storage import hide_password

    return [hide_password(word, args.storage) for word in sys.argv]
