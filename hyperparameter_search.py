"""Search for the best writer-identification model on images of handwritten text lines.

The command from its start to its end: prepare, open the study, the loop, conclude. The flags are in
writer_search/flags.py, the preparation in writer_search/study/preparation.py, the loop in
writer_search/study/loop.py, and one trial in train.py.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports: the end, no traceback

import argparse
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from writer_search.common.errors import OF_THE_PLACE, UserError, place_errors_told, said_by, told
from writer_search.common.files import write_json
from writer_search.common.locks import DirectoryLock, SharedLock
from writer_search.common.output import lasting_output, live
from writer_search.common.place import (
    check_checkpoint_dir,
    keep_apart,
    open_standard_streams,
    require_directories,
)
from writer_search.common.provenance import pasted
from writer_search.common.signals import Interrupted, StopSignals
from writer_search.common.text import one_line
from writer_search.flags import parse_args
from writer_search.results.chosen import CONFIRM, Chosen, chosen_model, publish
from writer_search.results.compare import compare_text
from writer_search.results.page.snapshot import FINISHED, RUNNING, STOPPED, Standing
from writer_search.results.rows import DATABASE, home_of
from writer_search.results.status import LOOKS_BETWEEN_TRIALS, read_status, show
from writer_search.results.tables import closing_lines, keep_failing, saved_text

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from writer_search.processes.plan import Plan
    from writer_search.study.loop import Search

# Optuna, NumPy and all that needs them are imported where they are used: --status answers without
# torch, a mistake in the command is told at once, and the first word is there within a second.

EXIT_OK, EXIT_NOTHING_COMPLETE, EXIT_USAGE, EXIT_FAILURES = 0, 1, 2, 3


# ---------------------------------------------------------------------------------------- the study


def open_search(args: argparse.Namespace, plan: Plan, stop: StopSignals) -> Search:
    """Open or create the study, settle what a dead search left, print the banner."""
    from writer_search.study.banner import announce, banner, describe_run
    from writer_search.study.draws import make_pruner
    from writer_search.study.loop import Search
    from writer_search.study.preparation import is_finished, prepare, recorded_settings
    from writer_search.study.recovery import heal, open_healed, remove_workplace
    from writer_search.study.store import record_settings
    from writer_search.study.supplies import LocalSupply
    from writer_search.study.unfinished import (
        continue_interrupted,
        continued,
        settle_unfinished,
        told_of_checkpoints,
    )

    warnings, study = open_healed(args.checkpoint_dir, plan.settings)
    warnings += heal(args.checkpoint_dir / CONFIRM, plan.settings)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    for directory in (args.checkpoint_dir, args.checkpoint_dir / CONFIRM):
        remove_workplace(directory)
    if not plan.trains and not is_finished(args):  # the rebuilt study has fewer trials
        plan = prepare(args, recorded_settings(args))
    is_new = "settings" not in study.user_attrs
    record_settings(study, plan.settings, args.checkpoint_dir)
    study.pruner = make_pruner(args.pruner, args.epochs)
    settled = settle_unfinished(study, args.checkpoint_dir)
    settled += continue_interrupted(study, continued(args.continue_interrupted, plan.space))
    settled += told_of_checkpoints(study, args.checkpoint_dir)
    supply = LocalSupply(study, plan)
    rows = supply.rows()
    study.set_user_attr("run", describe_run(args.n_trials, len(plan.slots), rows))
    database = str(args.checkpoint_dir / DATABASE)
    announce(args, plan, banner(args, database, None if is_new else rows), settled)
    return Search(plan, stop, supply)


def open_shared_search(
    args: argparse.Namespace,
    plan: Plan,
    stop: StopSignals,
    storage: BaseStorage,
    lock: SharedLock,
    is_new: bool,
) -> Search:
    """Take part in a study in a shared storage; print the banner."""
    from writer_search.study.banner import announce, banner
    from writer_search.study.draws import Drawer, make_pruner
    from writer_search.study.loop import Search
    from writer_search.study.shared.fleet import Fleet
    from writer_search.study.shared.opening import open_shared
    from writer_search.study.shared.storage import shown_url
    from writer_search.study.shared.supply import SharedSupply, bury_dead
    from writer_search.study.unfinished import continued

    pruner = make_pruner(args.pruner, args.epochs)
    study = open_shared(storage, args.study_name, args.checkpoint_dir, plan.settings, pruner)
    where = str(args.checkpoint_dir.absolute())
    study.set_user_attr("run", {"n_trials": args.n_trials, "checkpoint_dir": where})
    # A number of its own in the seeds of each search: they draw differently from the same trials.
    drawer = Drawer(plan.space, plan.sampler, plan.seed, salt=[int.from_bytes(os.urandom(4))])
    wanted = continued(args.continue_interrupted, plan.space)
    fleet = Fleet(study, drawer, args.n_trials, args.checkpoint_dir, lock, wanted)
    settled = bury_dead(fleet, fleet.trials())
    search = Search(plan, stop, SharedSupply(fleet))
    shown = f"{shown_url(args.storage)}, study {args.study_name}"
    announce(args, plan, banner(args, shown, None if is_new else search.rows), settled)
    return search


def confirm_best(args: argparse.Namespace, search: Search) -> tuple[Search, bool, list[str]]:
    """Confirm the best trials, once all are complete.

    Gives the search that ran last, whether its result stands, and lines for people.
    """
    from writer_search.results.confirmed import describe, remove_other_weights, summarise
    from writer_search.study.confirm import confirm

    if search.stop.name is not None or search.recorder.gave_up:
        return search, False, []
    if not search.has_all:
        return search, False, ["Not confirmed yet: that begins when all trials are complete."]
    confirmation = confirm(search, args.confirm_top, args.confirm_seeds)
    last, left = confirmation.search, confirmation.runs_left
    if left:
        runs = f"{left} of {confirmation.runs} runs"
        return last, False, [f"Confirmation: {runs} still missing: the same command goes on."]
    found = summarise(confirmation.candidates, last.rows, search.rows)
    if found is None:
        return last, False, ["Confirmation: no run is complete; its failures are above."]
    write_json(args.checkpoint_dir / "summary" / "confirmation.json", found)
    if args.keep_checkpoints is not None:
        remove_other_weights(args.checkpoint_dir, found)
    return last, True, describe(found)


def conclude(args: argparse.Namespace, search: Search) -> int:
    """Confirm, bring the summary up to date, and say how all stands; gives the exit code."""
    from writer_search.study.banner import RULE

    last, is_settled, confirmed = (
        (search, True, []) if args.confirm_top is None else confirm_best(args, search)
    )
    search.recorder.read()
    rows, study = search.rows, search.supply.study
    if search.exhausted:
        study.set_user_attr("run", {**study.user_attrs["run"], "exhausted": True})
    search.recorder.attempt(lambda: search.recorder.summary.write(rows))
    chosen = chosen_model(args.checkpoint_dir, rows)
    published = search.recorder.attempt(lambda: publish(args.checkpoint_dir, chosen))
    lines = closing_lines(
        *(args.checkpoint_dir, rows, args.n_trials, search.plan.settings["space"]),
        model=published,
        exhausted=search.exhausted,
    )
    lines += confirmed
    is_settled = is_settled and search.has_all and not (last.stop.name or last.recorder.gave_up)
    if args.evaluate_test and search.stop.name is None:
        lines += measured_on_test(search, chosen if is_settled else None, published)
    update_page(search, FINISHED if is_settled else STOPPED)
    print("\n".join([RULE, *lines, RULE]))
    return exit_code(args, search, last)


def exit_code(args: argparse.Namespace, search: Search, last: Search) -> int:
    """Say why it ended early, if it did, and give the exit code. Raises Interrupted.

    last: the search itself, or its confirmation.
    """
    if search.stop.name is not None:
        raise Interrupted(search.stop.name, began=True, unsaved=last.recorder.unsaved)
    if last.recorder.gave_up:
        print(
            f"error: stopped after {last.recorder.gave_up}; fix it, then run the same command",
            file=sys.stderr,
        )
        return EXIT_FAILURES
    if last.complete < last.plan.n_trials and (cause := last.runner.devices.why_none()):
        print(f"error: {cause}; fix it, then run the same command", file=sys.stderr)
        return EXIT_FAILURES
    if last.complete < last.plan.n_trials and last.outlook.is_too_late():
        print(
            f"stopped before the end of the batch system's job: "
            f"{saved_text(last.recorder.unsaved)}; the same command goes on",
            file=sys.stderr,
        )
        if args.requeue_exit_code is not None:
            return int(args.requeue_exit_code)
    if not search.complete:
        return EXIT_NOTHING_COMPLETE
    has_more = not search.has_all or not last.has_all
    is_in_vain = keep_failing(last.rows, args.max_consecutive_failed_trials)
    if args.requeue_exit_code is not None and has_more and not is_in_vain:
        return int(args.requeue_exit_code)
    return EXIT_OK


def update_page(search: Search, state: str) -> None:
    """Write the report. state: where the search stands, unless others go on in this directory."""
    here = search.plan.checkpoint_dir.absolute()
    homes = [home_of(r.number, r.attributes, here) for r in search.rows if r.state == "RUNNING"]
    standing = Standing(RUNNING if here in map(Path.absolute, homes) else state)
    search.page.write(search.rows, search.supply.study, lambda: standing)


def measured_on_test(search: Search, chosen: Chosen | None, model_file: Path | None) -> list[str]:
    """Measure the chosen model on the test lines, unless it has been; lines for people.

    chosen: None as long as something is missing.   model_file: None where it is not there.
    """
    if chosen is None:
        return ["Not measured on the test lines yet: that follows once nothing is missing."]
    if model_file is None:
        return [f"Not measured on the test lines: the model of {chosen.name} is not there."]
    from writer_search.processes.messages import TestQuestion
    from writer_search.processes.test_measurement import evaluate_test

    plan = search.plan
    question = TestQuestion(
        model_file, plan.data, search.runner.threads.of_next([]), search.runner.devices.single()
    )
    return evaluate_test(plan.checkpoint_dir, chosen, question, search.stop)


def recover_study(args: argparse.Namespace, storage: BaseStorage | None) -> None:
    """Rebuild the study from the trial directories. Raises UserError."""
    from writer_search.study.damage import trial_directories
    from writer_search.study.recovery import recover

    if not args.checkpoint_dir.is_dir():
        raise UserError(f"--recover: {args.checkpoint_dir} does not exist")
    with told_when_unwritable(args.checkpoint_dir), DirectoryLock(args.checkpoint_dir):
        if storage is None:
            lines = recover(args.checkpoint_dir)
            if trial_directories(args.checkpoint_dir / CONFIRM):
                lines += [f"{CONFIRM}: {line}" for line in recover(args.checkpoint_dir / CONFIRM)]
        else:
            from writer_search.study.shared.opening import recover_shared

            lines = recover_shared(storage, args.study_name, args.storage, args.checkpoint_dir)
        print("\n".join(lines), flush=True)


@contextmanager
def told_when_unwritable(place: Path | str) -> Iterator[None]:
    """Turn a directory or study that cannot be written (disk full) into the user's mistake."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except (StorageInternalError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in OF_THE_PLACE:
            raise
        raise UserError(
            f"{place} cannot be written: {said_by(error)}; what was recorded is safe; fix it, then "
            "run the same command"
        ) from None


def make_checkpoint_dir(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--checkpoint_dir cannot be made: {one_line(error)}") from None


def run_search(args: argparse.Namespace) -> int:
    """Prepare, search, conclude."""
    with StopSignals() as stop:
        require_directories()
        check_checkpoint_dir(args.checkpoint_dir)
        if args.data_root is not None and not args.demo:
            keep_apart(args.checkpoint_dir, args.data_root)
        live.begin("importing Optuna")
        from writer_search.study.preparation import (
            is_finished,
            prepare,
            recorded_settings,
            standing_settings,
        )

        if args.storage is not None:
            return run_shared_search(args, stop)
        if args.recover:
            recover_study(args, None)
            if args.data_root is None:
                return EXIT_OK
        standing_settings(args.checkpoint_dir / CONFIRM)  # or its damage is told
        plan = prepare(args, recorded_settings(args), trains=not is_finished(args))
        make_checkpoint_dir(args.checkpoint_dir)
        with told_when_unwritable(args.checkpoint_dir), DirectoryLock(args.checkpoint_dir):
            live.begin("opening the study")
            search = open_search(args, plan, stop)
            with stop.deferred():
                return run_and_tell(args, search, args.checkpoint_dir)


def run_and_tell(args: argparse.Namespace, search: Search, where: Path | str) -> int:
    """Search and conclude; whatever the end, tell --on_event of it.   where: the study is."""
    from writer_search.results.events import search_event

    code = EXIT_NOTHING_COMPLETE  # of an error that is the program's own
    try:
        code = run_or_stop(args, search, where)
    except Interrupted as error:
        code = error.exit_code if args.requeue_exit_code is None else args.requeue_exit_code
        raise
    except UserError:
        code = EXIT_USAGE
        raise
    finally:
        search.events.send(search_event(args.checkpoint_dir, search.rows, args.n_trials, code))
        search.events.close()
    return code


def run_or_stop(args: argparse.Namespace, search: Search, where: Path | str) -> int:
    """Search and conclude. Raises Interrupted for a signal, also where another trouble came too.

    A batch system is to queue the job again, though the storage was away at that moment.
    """
    try:
        with told_when_unwritable(where):
            search.run()
            return conclude(args, search)
    except UserError as error:
        unsaved, code = search.recorder.unsaved, args.requeue_exit_code
        if search.stop.name is None and error.passes and unsaved:
            print(saved_text(unsaved), file=sys.stderr)
        if search.stop.name is None and (code is None or not error.passes):
            raise
        print(hidden(told(error), args.storage), file=sys.stderr)
        if search.stop.name is None:
            return int(code)
        raise Interrupted(search.stop.name, began=True, unsaved=unsaved) from None


def run_shared_search(args: argparse.Namespace, stop: StopSignals) -> int:
    """Prepare, search beside others in one storage, conclude."""
    from writer_search.study.preparation import prepare_shared
    from writer_search.study.shared.opening import refuse_strangers
    from writer_search.study.shared.storage import opened_storage, shown_url

    with opened_storage(args.storage, stop) as storage:
        if args.recover:
            recover_study(args, storage)
            if args.data_root is None:
                return EXIT_OK
        refuse_strangers(storage, args.study_name, args.storage, args.checkpoint_dir)
        plan, is_new = prepare_shared(args, storage)
        make_checkpoint_dir(args.checkpoint_dir)
        with SharedLock(args.checkpoint_dir) as lock:
            live.begin("opening the study")
            search = open_shared_search(args, plan, stop, storage, lock, is_new)
            with stop.deferred():
                return run_and_tell(args, search, shown_url(args.storage))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_standard_streams()
    with lasting_output():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    requeue = storage = None
    try:
        args = parse_args(argv)
        requeue, storage = args.requeue_exit_code, args.storage
        with place_errors_told():
            if args.compare:
                print(compare_text(args.compare))
                return EXIT_OK
            return show_status(args) if args.status else run_search(args)
    except UserError as error:
        print(hidden(told(error), storage), file=sys.stderr)
        return EXIT_USAGE
    except Interrupted as error:
        what = saved_text(error.unsaved) if error.began else "before the search began"
        print(
            f"stopped by {error}: {what}; to go on, run the same command: "
            f"{hidden(pasted(sys.argv), storage)}",
            file=sys.stderr,
        )
        return error.exit_code if requeue is None else requeue
    except KeyboardInterrupt:  # of --status and --compare, which change nothing
        return 128 + signal.SIGINT
    except Exception:
        if storage is None:
            raise
        print(hidden(traceback.format_exc(), storage), file=sys.stderr)
        return EXIT_NOTHING_COMPLETE


def hidden(text: str, storage: str | None) -> str:
    """Give a text without the password of the storage's URL."""
    if storage is None:
        return text
    from writer_search.study.shared.storage import hide_password

    return hide_password(text, storage)


def show_status(args: argparse.Namespace) -> int:
    """Print how the search stands: once, or until it ends. Raises UserError."""
    if args.storage is None:
        read = partial(read_status, args.checkpoint_dir)
        show(read, args.json, args.watch, sys.stdout)
        return EXIT_OK
    from writer_search.study.shared.status import shared_status
    from writer_search.study.shared.storage import find_study, opened_storage, shown_url

    where = f"{shown_url(args.storage)}, study {args.study_name}"
    with opened_storage(args.storage) as storage:
        study = find_study(storage, args.study_name)
        if study is None:
            raise UserError(f"{where}: there is no such study")
        read = partial(shared_status, study, where, args.checkpoint_dir)
        show(read, args.json, args.watch, sys.stdout, looks=LOOKS_BETWEEN_TRIALS)
    return EXIT_OK


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
