"""The search breaks off at each of its steps in turn; the same command goes on and loses nothing.

One process: a trial trains in a thread that runs only while the search waits for it, so that each
step is the same step in every run. Real kills of real processes are in test_command.py, chaos.py.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from chaos_checks import check_continuations, look
from optuna.trial import FrozenTrial, Trial, TrialState
from test_search import arguments

import train as train_module
from data import LineSet
from hyperparameter_search import main
from writer_search.config import TrialConfig
from writer_search.processes import child as worker
from writer_search.processes import machine, messages
from writer_search.processes import parent as processes
from writer_search.processes import runner as runner_module
from writer_search.processes.messages import PRUNE, STOP
from writer_search.results.rows import DATABASE, trial_dir
from writer_search.space import default_space, narrow, parse_fix, suggest
from writer_search.study.draws import Drawer
from writer_search.study.store import open_study
from writer_search.training import checkpoints


class Crash(BaseException):
    """Ends the search where it stands, as far as a test in one process can."""


class Killed(BaseException):
    """Ends a trial's thread where it waits."""


class InlineChild:
    """A trial in this process, in place of `ChildProcess`; a crash in it crashes the search."""

    def __init__(self, work: str, argument: Any) -> None:
        self.connection, self._bell = Pipe()
        self._bell.send_bytes(b"always readable: there is always a next message")
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        action = self._train if work == "writer_search.processes.child:run_trial" else self._answer
        self._thread = threading.Thread(target=self._run, args=(action, argument), daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[Any], Any], argument: Any) -> None:
        torch.set_num_threads(1)  # per thread
        try:
            self._wait_for_turn()
            last = action(argument)
        except Killed:
            return
        except Crash as crash:
            last = crash
        self._messages.put(last)

    def _answer(self, question: messages.MachineQuestion | None) -> processes.Message:
        return (
            ("ready", {}) if question is None else ("machine", machine._describe_machine(question))
        )

    def _train(self, job: processes.Job) -> processes.Message:
        try:
            metrics = train_module.train(
                job.config,
                job.data,
                job.trial_dir,
                self._report,
                continue_from=job.continue_from,
            )
        except (train_module.Pruned, train_module.Stopped) as error:
            return worker._outcome(error, job)
        return "done", {"metrics": asdict(metrics)}

    def _report(self, epoch: int, metrics: dict[str, Any]) -> None:
        content = {"epoch": epoch, "metrics": metrics, "again": False}
        self._messages.put(("report", content))
        self._wait_for_turn()
        order = self._orders.get_nowait()
        if order == PRUNE:
            raise train_module.Pruned
        if order == STOP:
            raise train_module.Stopped

    def _wait_for_turn(self) -> None:
        if not self._turns.get():
            raise Killed

    def receive(self) -> Any:
        self._turns.put(True)
        message = self._messages.get()
        if isinstance(message, Crash):
            raise message
        return message

    def order(self, order: str) -> None:
        self._orders.put(order)

    def kill(self) -> None:
        self._turns.put(False)
        self._thread.join()

    def end(self, seconds: float = 0.0) -> int:
        self.kill()
        self.connection.close()
        self._bell.close()
        return 0


class Epochs:
    """Watches epochs: none is begun again once its checkpoint is there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.saved: set[tuple[int, int]] = set()
        self.again: list[tuple[int, int]] = []
        real_epoch, real_save = train_module.train_epoch, checkpoints.Checkpoints.save

        def train_epoch(state: Any, config: Any, *more: Any) -> None:
            if (config.seed, state.epoch + 1) in self.saved:
                self.again.append((config.seed, state.epoch + 1))
            real_epoch(state, config, *more)

        def save(files: Any, *more: Any, **named: Any) -> None:
            real_save(files, *more, **named)  # and wait: see `save_each_batch`
            self.saved.add((files._config.seed, files._saved[0]))

        patch.setattr(train_module, "train_epoch", train_epoch)
        patch.setattr(checkpoints.Checkpoints, "save", save)


def leaves_a_trace(name: str, first: Any) -> bool:
    """Leave out directories that are there, and the study in memory that draws are made in."""
    if name == "Path.mkdir":
        return not first.exists()
    if name.startswith("Study."):
        return not isinstance(first._storage, optuna.storages.InMemoryStorage)
    return True


def crash_before(patch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Raise Crash instead of the step-th of all these calls. Returns the names of those made."""
    made: list[str] = []

    def breaking(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *more: Any, **named: Any) -> Any:
            if leaves_a_trace(name, first):
                made.append(name)
                if len(made) == step + 1:
                    raise Crash
            return real(first, *more, **named)

        return call

    for owner, name in (
        (os, "replace"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (optuna.Study, "tell"),
        (optuna.Study, "ask"),
        (optuna.Study, "add_trial"),
        (optuna.Study, "add_trials"),
        (optuna.Study, "set_user_attr"),
        (Trial, "set_user_attr"),
        (Trial, "report"),
        (InlineChild, "receive"),
        (InlineChild, "order"),
    ):
        patch.setattr(owner, name, breaking(f"{owner.__name__}.{name}", getattr(owner, name)))
    return made


def drawn(number: int) -> list[dict[str, Any]]:
    """Give the first draws of a search that nothing breaks off."""
    argv = arguments(Path(), Path())
    fix = parse_fix([argv[at + 1] for at, word in enumerate(argv) if word == "--fix"])
    space = narrow(default_space("cpu", False), fix, {})
    study, drawer = optuna.create_study(direction="maximize"), Drawer(space, "random", 0)
    for _ in range(number):
        trial = drawer.ask(study)
        suggest(trial, space)
        study.tell(trial, 0.5)
    return [trial.params for trial in study.get_trials()]


def check_trained(directory: Path, data: LineSet) -> None:
    """A complete trial came to what its configuration comes to in one piece, bit for bit."""
    described = json.loads((directory / "config.json").read_text())
    beside = directory / "unbroken"
    config = TrialConfig.from_dict(described["config"])
    train_module.train(config, data, beside)
    for name in ("metrics.json", "history.jsonl"):
        broken, whole = ((d / name).read_text() for d in (directory, beside))
        assert without_times(broken) == without_times(whole)
    models = [torch.load(d / "final_model.pth", weights_only=True) for d in (directory, beside)]
    for name, tensor in models[1]["model"].items():
        assert torch.equal(models[0]["model"][name], tensor)


def record_of(directory: Path, number: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((trial_dir(directory, number) / "trial.json").read_text())
    return record


def without_times(text: str) -> str:
    return re.sub(r'"(seconds|images_per_second)": [0-9.]+', "", text)


Go = Callable[..., int]


@pytest.fixture
def go(lines_root: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    monkeypatch.setattr(processes, "ChildProcess", InlineChild)
    monkeypatch.setattr(runner_module, "ChildProcess", InlineChild)
    monkeypatch.setattr(processes, "start_fork_server", lambda: None)

    def command(directory: Path, *more: str, **replaced: str) -> int:
        more = ("--cache_dir", str(cache_dir), "--sampler", "random", *more)
        return main(arguments(lines_root, directory, *more, **replaced))

    return command


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("more", "epochs_each"),
    [((), "1"), (("--continue_interrupted",), "2")],
    ids=["new", "continued"],
)
def test_crash_at_each_step(
    more: tuple[str, ...],
    epochs_each: str,
    go: Go,
    data: LineSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_each_batch: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """From an empty directory: break off at the first step, go on to the second, and so on.

    Each run settles what the one before it left, and has one complete trial to add.
    """
    directory = tmp_path / "c"
    epochs = Epochs(monkeypatch)
    complete: dict[int, FrozenTrial] = {}
    made: list[str] = []
    ended = False
    while not ended:
        with monkeypatch.context() as patch:
            made, last = crash_before(patch, len(made)), made
            try:
                wanted = {"n_trials": str(1 + len(complete)), "epochs": epochs_each}
                assert go(directory, *more, **wanted) == 0
                ended = True
            except Crash:
                pass
        trials = open_study(directory).get_trials() if (directory / DATABASE).exists() else []
        now = {trial.number: trial for trial in trials if trial.state == TrialState.COMPLETE}
        assert complete.items() <= now.items(), f"{last}: a finished trial is as it was"
        complete = now
        assert epochs.again == [], f"{last}: no epoch is trained twice"
    assert {name.partition(".")[2] for name in last} >= {"replace", "tell", "receive", "order"}
    assert {trial.state.name for trial in trials} == {"COMPLETE", "FAIL"}
    draws = drawn(1 + max(trial.user_attrs["draw"] for trial in trials))
    for trial in trials:
        assert trial.params == draws[trial.user_attrs["draw"]], "as if never broken off"
        assert trial.state.name == record_of(directory, trial.number)["state"]
    fresh = [trial.user_attrs["draw"] for trial in trials if "continues" not in trial.user_attrs]
    assert fresh == list(range(len(fresh))), "each draw is made, once"
    assert len({json.dumps(params) for params in draws}) == len(draws), "no draw repeats"
    wrong = check_continuations(look(directory), at_end=True, all_draws=bool(more))
    assert wrong == [], "none is dropped; without the flag the known-good one is gone on with"
    for done in complete:
        check_trained(trial_dir(directory, done), data)
    assert "Traceback" not in capfd.readouterr().err
