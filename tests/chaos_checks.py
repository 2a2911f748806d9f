"""What chaos.py holds a search to, read from the database and the directories alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from data import LineSet
from train import train
from writer_search.config import TrialConfig

DATABASE = "optuna_study.db"
BOUND = ("config.json", "history.jsonl", "metrics.json", "final_model.pth", "best_model.pth")
FINISHED = ("COMPLETE", "PRUNED")
MOST_CONTINUATIONS = 3
NO_FAULT = ("killed by SIGKILL", "No space left")  # of a trial's own: it may be continued
QUESTION = re.compile(r"\?\s*$|\[y/n\]|\(y/n\)", re.IGNORECASE | re.MULTILINE)

# --------------------------------------------------------------------------------- what can be seen


@dataclass(frozen=True)
class Seen:
    """A trial as the database has it. params: name → Optuna's number, with its distribution."""

    number: int
    state: str
    value: float | None
    params: str
    attributes: dict[str, Any]
    steps: dict[int, float]


def look(directory: Path) -> list[Seen]:
    """Read a copy of the database, so that a killed writer's journal stays for the program."""
    if not (directory / DATABASE).exists():
        return []
    with tempfile.TemporaryDirectory() as copy:
        for path in directory.glob(f"{DATABASE}*"):
            if path.name in (DATABASE, f"{DATABASE}-journal"):
                shutil.copy(path, copy)
        with closing(sqlite3.connect(Path(copy) / DATABASE)) as connection:
            tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
            return _trials(connection) if ("trial_values",) in tables else []


def _trials(connection: sqlite3.Connection) -> list[Seen]:
    def of(trial: int, what: str, table: str) -> list[Any]:
        query = f"SELECT {what} FROM {table} WHERE trial_id = ? ORDER BY 1"
        return connection.execute(query, (trial,)).fetchall()

    trials = connection.execute("SELECT trial_id, number, state FROM trials ORDER BY number")
    return [
        Seen(
            number,
            state,
            next((value for (value,) in of(trial, "value", "trial_values")), None),
            json.dumps(of(trial, "param_name, param_value, distribution_json", "trial_params")),
            {
                key: json.loads(text)
                for key, text in of(trial, "key, value_json", "trial_user_attributes")
            },
            dict(of(trial, "step, intermediate_value", "trial_intermediate_values")),
        )
        for trial, number, state in trials
    ]


def trial_dir(directory: Path, number: int) -> Path:
    return directory / f"trial_{number:03d}"


def fingerprints(directory: Path) -> dict[str, str]:
    """Hash the files of a trial that nothing may change once it is finished."""
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in BOUND
        if (directory / name).exists()
    }


def contents(directory: Path) -> dict[str, bytes]:
    """Read all files; the database is left out where a journal has to be rolled back first."""
    has_journal = (directory / f"{DATABASE}-journal").exists()
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not (has_journal and path.name.startswith(DATABASE))
    }


def history_of(directory: Path) -> list[dict[str, Any]]:
    path = directory / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------------------------------ checks


@dataclass
class Memory:
    """What a series has seen to be finished, and what its faults have left there."""

    finished: dict[int, tuple[Seen, dict[str, str]]] = field(default_factory=dict)
    failed: dict[int, Seen] = field(default_factory=dict)
    planted: dict[Path, int] = field(default_factory=dict)  # broken checkpoints → their mtime in ns
    leftovers: set[Path] = field(default_factory=set)  # .tmp files of killed processes
    checked: set[tuple[Path, int]] = field(default_factory=set)  # files that were found good

    def learn(self, directory: Path, trials: Sequence[Seen]) -> None:
        for trial in trials:
            if trial.state in FINISHED:
                files = fingerprints(trial_dir(directory, trial.number))
                self.finished[trial.number] = (trial, files)
            elif trial.state == "FAIL":
                self.failed[trial.number] = trial


def check_kept(memory: Memory, directory: Path, trials: Sequence[Seen]) -> list[str]:
    """No finished trial is lost, changed or trained again."""
    now = {trial.number: trial for trial in trials}
    wrong = []
    for number, (before, files) in memory.finished.items():
        if now.get(number) != before:
            wrong.append(f"trial {number} was {before}, is {now.get(number)}")
        if (after := fingerprints(trial_dir(directory, number))) != files:
            changed = [name for name in files if after.get(name) != files[name]]
            wrong.append(f"trial {number}: files changed: {changed or sorted(after)}")
    for number, before in memory.failed.items():
        after_failure = now.get(number)
        if after_failure is None or after_failure.params != before.params:
            wrong.append(f"failed trial {number} was {before}, is {after_failure}")
    return wrong


def check_draws(trials: Sequence[Seen]) -> list[str]:
    """Equal parameters are those of one chain of continuations, one after the other."""
    followers: dict[str, list[Seen]] = {}
    for trial in trials:
        if trial.params != "[]":
            followers.setdefault(trial.params, []).append(trial)
    wrong = []
    for equals in followers.values():
        for earlier, later in pairwise(equals):
            if later.attributes.get("continues") != earlier.number:
                wrong.append(f"trial {later.number} repeats the draw of trial {earlier.number}")
    return wrong


def check_histories(directory: Path, trials: Sequence[Seen], epochs: int) -> list[str]:
    """A complete trial has trained each epoch once, and says so everywhere."""
    wrong = []
    for trial in trials:
        if trial.state != "COMPLETE":
            continue
        rows = history_of(trial_dir(directory, trial.number))
        if [row["epoch"] for row in rows] != list(range(1, epochs + 1)):
            wrong.append(f"trial {trial.number}: epochs {[row['epoch'] for row in rows]}")
        if trial.steps != {row["epoch"]: row["macro_top1"] for row in rows}:
            wrong.append(f"trial {trial.number}: the database has epochs {sorted(trial.steps)}")
        if trial.value != max((row["macro_top1"] for row in rows), default=None):
            wrong.append(f"trial {trial.number}: value {trial.value} is not its best epoch's")
    return wrong


def check_continuations(trials: Sequence[Seen], at_end: bool, all_draws: bool) -> list[str]:
    """What was broken off is followed once, but not after three in a row that saved no more.

    all_draws: of each draw, and not of the known-good first one alone.
    """
    wrong = []
    follows = Counter(trial.attributes.get("continues") for trial in trials)
    for trial in trials:
        if trial.state != "FAIL" or "seed" not in trial.attributes:
            continue
        lately = chain_of(trials, trial)[1:][-MOST_CONTINUATIONS:]
        in_vain = [seen for seen in lately if not seen.attributes.get("advanced")]
        was_last = len(in_vain) == MOST_CONTINUATIONS
        failure = trial.attributes.get("failure", "")
        is_due = trial.attributes.get("interrupted") or any(word in failure for word in NO_FAULT)
        is_wanted = all_draws or trial.attributes["draw"] == 0
        is_due = bool(is_due) and is_wanted and not was_last
        if follows[trial.number] > is_due or (at_end and follows[trial.number] != is_due):
            wrong.append(f"{follows[trial.number]} trials continue trial {trial.number}: {trial}")
    return wrong


def chain_of(trials: Sequence[Seen], trial: Seen) -> list[Seen]:
    """Give the trials that go on with one another, up to this one, the first one first."""
    before = trial.attributes.get("continues")
    earlier = [seen for seen in trials if before is not None and seen.number == before]
    return [*(chain_of(trials, earlier[0]) if earlier else []), trial]


def check_settled(before: Sequence[Seen], trials: Sequence[Seen]) -> list[str]:
    """What a dead search had left running is settled by the next: interrupted, or complete."""
    now = {trial.number: trial for trial in trials}
    wrong = []
    for trial in before:
        after = now.get(trial.number)
        if trial.state != "RUNNING" or (after and after.state == "COMPLETE"):
            continue
        if after is None or after.state != "FAIL" or not after.attributes.get("interrupted"):
            wrong.append(f"trial {trial.number} was left running, is {after}")
    return wrong


def check_files(memory: Memory, directory: Path, may_leave: bool) -> list[str]:
    """Each file is whole: JSON parses, checkpoints load and belong to the configuration there."""
    wrong = []
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        identity = (path, path.stat().st_mtime_ns)
        if path.suffix == ".tmp" and path not in memory.leftovers:
            memory.leftovers.add(path)
            if not may_leave:
                wrong.append(f"left over: {path}")
        if identity not in memory.checked and memory.planted.get(path) != identity[1]:
            memory.checked.add(identity)
            wrong += check_file(path)
    return wrong


def check_file(path: Path) -> list[str]:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            history_of(path.parent)
        elif path.suffix == ".pth":
            loaded = torch.load(path, weights_only=True)
            if path.parent.name.startswith("trial_"):
                wanted = json.loads((path.parent / "config.json").read_text())["config_hash"]
                if loaded["config_hash"] != wanted:
                    return [f"{path} belongs to configuration {loaded['config_hash']}"]
    except Exception as error:
        return [f"{path} cannot be read: {error!r}"]
    return []


def check_output(lines: Sequence[str], problems: Sequence[str]) -> list[str]:
    """No traceback, no question, nothing on stderr but sentences of ours."""
    text = "".join([*lines, *problems])
    last = text.rstrip().rpartition("\n")[2]
    wrong = [
        f"the output has {what!r}: {last}"
        for what in ("Traceback", "Exception ignored", "Fatal Python error")
        if what in text
    ]
    if QUESTION.search(text):
        wrong.append("the output asks a question")
    known = ("warning: ", "error: ", "stopped by ")
    if not wrong and any(not line.startswith(known) for line in problems):
        wrong.append("unknown words on stderr")
    return wrong


def check_replay(directory: Path, number: int, data: LineSet) -> list[str]:
    """Train a trial's configuration in one piece; the result must be the same bit for bit."""
    beside = trial_dir(directory, number)
    described = json.loads((beside / "config.json").read_text())
    # Sums are split among threads: another number of them rounds otherwise.
    torch.set_num_threads(described["threads"])
    with tempfile.TemporaryDirectory() as name:
        train(TrialConfig.from_dict(described["config"]), data, Path(name))
        values = [
            json.loads((d / "metrics.json").read_text())["value"] for d in (beside, Path(name))
        ]
        models = [
            torch.load(d / "final_model.pth", weights_only=True)["model"]
            for d in (beside, Path(name))
        ]
    equal = all(torch.equal(models[0][key], models[1][key]) for key in models[1])
    if values[0] != values[1] or not equal:
        return [f"trial {number}: {values[0]}, in one piece {values[1]}; equal weights: {equal}"]
    return []
