"""Torture the real command: a random fault in each round, then checks from the files alone.

    python tests/chaos.py --rounds 200 --jobs 2 --seed 7

A series is one checkpoint directory in which faults pile up. What a round may break is looked up in
the database and the directories, never taken from the program's own words. A violation leaves its
directory behind, with a copy of it from before the round, and ends the command with 1.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import IO

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the program is run from its directory, not installed

import torch  # noqa: E402
from chaos_checks import (  # noqa: E402
    DATABASE,
    FINISHED,
    Memory,
    Seen,
    check_continuations,
    check_draws,
    check_files,
    check_histories,
    check_kept,
    check_output,
    check_replay,
    check_settled,
    contents,
    look,
    trial_dir,
)
from test_command import Command, is_alive  # noqa: E402

from data import LineSet, find_lines, load_lines  # noqa: E402
from writer_search.demo import make_lines  # noqa: E402

LINE_HEIGHT = 16
HANGING_SECONDS = 150.0  # no round lasts so long
LEFT_BEHIND_SECONDS = 5.0
REPLAYS = 3  # continued trials of a series that are trained again without a break
MARK = "CHAOS_MARK"  # the environment variable by which a command's processes are found
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# ------------------------------------------------------------------------------------- the command


class MarkedCommand(Command):
    """A running search whose lines are collected, and whose processes all carry a mark."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self.mark = uuid.uuid4().hex
        os.environ[MARK] = self.mark
        super().__init__(argv)
        self.lines: list[str] = []
        self.problems: list[str] = []
        streams = ((self.process.stdout, self.lines), (self.process.stderr, self.problems))
        self._readers = [
            threading.Thread(target=_collect, args=pair, daemon=True) for pair in streams
        ]
        for reader in self._readers:
            reader.start()

    def wait_for_line(self, number: int) -> None:
        """Wait until so many lines are printed, or the command ends."""
        deadline = time.monotonic() + HANGING_SECONDS
        while len(self.lines) < number and self.runs() and time.monotonic() < deadline:
            time.sleep(0.005)

    def runs(self) -> bool:
        return is_alive(self.process.pid)

    def end(self) -> list[str]:
        """Wait for the end of all processes; say what was wrong with it, and clean up."""
        wrong = []
        try:
            self.process.wait(HANGING_SECONDS)
        except subprocess.TimeoutExpired:
            wrong.append(f"the command hangs: {len(self.processes())} processes")
            self.process.kill()
            self.process.wait()
        ended = time.monotonic()
        late: dict[int, tuple[int, str]] = {}
        while left := self.processes():
            seconds = time.monotonic() - ended
            if seconds > LEFT_BEHIND_SECONDS:
                late = late or left
            if seconds > HANGING_SECONDS:
                for pid in left:
                    send(pid, signal.SIGKILL)
            time.sleep(0.05)
        if late:
            words = [words[:60] for _, words in late.values()]
            wrong.append(f"left behind, for {time.monotonic() - ended:.1f} s: {words}")
        for reader in self._readers:
            reader.join(LEFT_BEHIND_SECONDS)
        return wrong

    def processes(self) -> dict[int, tuple[int, str]]:
        """Find the command's living processes by their mark: pid → (parent, command line)."""
        mark = f"{MARK}={self.mark}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError, ValueError):
                    if mark in (entry / "environ").read_bytes():
                        fields = (entry / "stat").read_text().rpartition(")")[2].split()
                        words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        found[int(entry.name)] = (int(fields[1]), words)
        return found

    def server(self) -> int | None:
        """Find the fork server."""
        for pid, (parent, words) in self.processes().items():
            if parent == self.process.pid and "multiprocessing.forkserver" in words:
                return pid
        return None

    def children(self) -> list[int]:
        """Find what the fork server has forked."""
        server = self.server()
        return [pid for pid, (parent, _) in self.processes().items() if parent == server]


def _collect(stream: IO[str], lines: list[str]) -> None:
    lines.extend(iter(stream.readline, ""))


def is_locked(path: Path) -> bool:
    """Tell whether a process holds the lock; the trial of it is given back at once."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def send(pid: int, number: int) -> bool:
    """Send a signal; a process that has just ended is no matter."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


# ------------------------------------------------------------------------------------------ faults


def kill_search(command: MarkedCommand, rng: Random) -> bool:
    return send(command.process.pid, signal.SIGKILL)


def kill_trial(command: MarkedCommand, rng: Random) -> bool:
    children = command.children()
    return bool(children) and send(rng.choice(children), signal.SIGKILL)


def kill_server(command: MarkedCommand, rng: Random) -> bool:
    server = command.server()
    return server is not None and send(server, signal.SIGKILL)


def signal_search(command: MarkedCommand, rng: Random) -> bool:
    return send(command.process.pid, rng.choice(SIGNALS))


def signal_group(command: MarkedCommand, rng: Random) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(command.process.pid, rng.choice(SIGNALS))
        return True
    return False


def two_signals(command: MarkedCommand, rng: Random) -> bool:
    inflicted = signal_search(command, rng)
    time.sleep(rng.choice((0, rng.uniform(0, 0.05), rng.uniform(0, 0.5))))
    signal_search(command, rng)
    return inflicted


def kill_after_signal(command: MarkedCommand, rng: Random) -> bool:
    inflicted = signal_search(command, rng)
    time.sleep(rng.uniform(0, 0.2))
    return kill_search(command, rng) and inflicted


def limit_trials(command: MarkedCommand, rng: Random) -> bool:
    """Let trials run out of disk: no file of theirs may grow beyond so many bytes."""
    server = command.server()
    if server is None:
        return False
    limit = rng.choice((0, 1_000, 16_000, 30_000))
    for pid in (server, *command.children()):
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
    return True


def limit_all(command: MarkedCommand, rng: Random) -> bool:
    """Let everything run out of disk, the study included: files may hardly grow any more."""
    database = Path(command.argv[command.argv.index("--checkpoint_dir") + 1]) / DATABASE
    size = database.stat().st_size if database.exists() else 0
    limit = rng.choice((0, size, size, size + 8192))
    for pid in (command.process.pid, *command.processes()):
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
    return True


DURING: dict[str, Callable[[MarkedCommand, Random], bool]] = {
    "kill -9 of the search": kill_search,
    "kill -9 of a trial": kill_trial,
    "kill -9 of the fork server": kill_server,
    "a signal": signal_search,
    "a signal to the group": signal_group,
    "two signals": two_signals,
    "a signal, then kill -9": kill_after_signal,
    "no room for trials' files": limit_trials,
    "no room for any file": limit_all,
}
LEAVES_TMP = {
    "kill -9 of the search",
    "kill -9 of a trial",
    "two signals",
    "a signal, then kill -9",
    "recovery cut off",
    "no room for any file",  # a search whose database cannot be written kills its trials
}


def flip_bytes(database: Path, rng: Random) -> None:
    content = bytearray(database.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 30, 500))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    database.write_bytes(content)


def truncate(database: Path, rng: Random) -> None:
    content = database.read_bytes()
    database.write_bytes(content[: rng.randrange(1, len(content))])


def delete(database: Path, rng: Random) -> None:
    for path in (database, database.with_name(f"{DATABASE}-journal")):
        path.unlink(missing_ok=True)


DAMAGE: dict[str, Callable[[Path, Random], object]] = {
    "database: bytes flipped": flip_bytes,
    "database: truncated": truncate,
    "database: empty": lambda database, rng: database.write_bytes(b""),
    "database: text": lambda database, rng: database.write_text("not a database\n" * 200),
    "database: deleted": delete,
    "recovery cut off": truncate,
}
WEIGHTS = {
    "kill -9 of the search": 8,
    "a signal": 8,
    "kill -9 of a trial": 16,
    "a signal to the group": 3,
    "two signals": 3,
    "database: bytes flipped": 3,
}

# ------------------------------------------------------------------------------------------ series


@dataclass(frozen=True)
class Setup:
    """What a series is made of; equal setups inflict the same faults, at about the same moments."""

    work: Path
    seed: int
    rounds: int
    continues: bool
    keeps_all: bool

    @property
    def directory(self) -> Path:
        return self.work / f"series_{self.seed}" / "c"


@dataclass
class Record:
    """What a round came to."""

    fault: str
    inflicted: bool = False
    seconds: float = 0.0
    finished: int = 0
    interrupted: int = 0
    wrong: list[str] = field(default_factory=list)


class Series:
    """Plays rounds in one checkpoint directory until one of them breaks it."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.directory = setup, setup.directory
        self.rng = Random(setup.seed)
        self.epochs = self.rng.randint(6, 30)
        self.n_trials = 2
        self.memory = Memory()
        self.records: list[Record] = []
        self.commands: list[MarkedCommand] = []  # of the round
        self.replayed = 0
        self.argv = self._argv()

    def _argv(self) -> list[str]:
        work, rng = self.setup.work, self.rng
        argv = ["--data_root", str(work / "lines"), "--checkpoint_dir", str(self.directory)]
        argv += ["--cache_dir", str(work / "cache")]
        for value in (
            f"line_height={LINE_HEIGHT}",
            "backbone=tiny",
            "crop_width=32",
            "batch_size=8",
        ):
            argv += ["--fix", value]
        if rng.random() < 0.75:  # otherwise it is measured: seconds of each new study
            argv += ["--fix", "precision=float32"]
        argv += ["--use_all_writers", "--weights", "none", "--device", "cpu"]
        argv += ["--epochs", str(self.epochs), "--patience", "9999"]
        argv += ["--sampler", rng.choice(("random", "tpe")), "--n_jobs", rng.choice("12")]
        argv += ["--pruner", rng.choice(("median", "halving", "none"))]
        argv += ["--seed", str(self.setup.seed)]
        return argv + ["--continue_interrupted"] * self.setup.continues

    def play(self) -> None:
        """Play all rounds, then one without a fault and the checks that take longest."""
        for number in range(self.setup.rounds):
            self.play_round(number, self.pick())
            if self.is_broken():
                return
        self.play_round(self.setup.rounds, "none", at_end=True)
        if not self.is_broken():
            self.records[-1].wrong += self.replay()
        self.tell(self.setup.rounds)

    def is_broken(self) -> bool:
        """Tell whether more than words or seconds were wrong: nothing later could be judged."""
        words = ("the output", "unknown words", "left behind, for")
        return any(not text.startswith(words) for text in self.records[-1].wrong)

    def pick(self) -> str:
        kinds = [*DURING, "a second start", "planted .tmp files"]
        kinds += DAMAGE if self.memory.finished else ()
        kinds += ("checkpoint deleted", "checkpoint truncated") if self.checkpoint_dirs() else ()
        return self.rng.choices(kinds, [WEIGHTS.get(kind, 2) for kind in kinds])[0]

    def play_round(self, number: int, fault: str, at_end: bool = False) -> None:
        started = time.monotonic()
        record = Record(fault)
        self.records.append(record)
        self.commands = []
        before = look(self.directory)
        complete = sum(trial.state == "COMPLETE" for trial in before)
        if complete + 1 >= self.n_trials and not at_end:
            self.n_trials = complete + self.rng.randint(1, 2)
        self.keep_copy()
        self.inflict(record)
        for command in self.commands:
            record.wrong += check_output(command.lines, command.problems)
        trials = look(self.directory)
        record.wrong += self.check(record, before, trials, at_end)
        self.memory.learn(self.directory, trials)
        record.finished = sum(t.state in FINISHED for t in trials) - sum(
            t.state in FINISHED for t in before
        )
        record.interrupted = len(interrupted(trials) - interrupted(before))
        record.seconds = time.monotonic() - started
        if not at_end or record.wrong:
            self.tell(number)

    def keep_copy(self) -> None:
        copy = self.directory.with_name("before")
        shutil.rmtree(copy, ignore_errors=True)
        if self.directory.exists():
            shutil.copytree(self.directory, copy)

    # ---------------------------------------------------------------------------------- inflicting

    def start(self, *more: str) -> MarkedCommand:
        command = MarkedCommand([*self.argv, "--n_trials", str(self.n_trials), *more])
        self.commands.append(command)
        return command

    def run(self, *more: str) -> tuple[int, list[str]]:
        command = self.start(*more)
        wrong = command.end()
        return command.process.returncode, wrong

    def inflict(self, record: Record) -> None:
        if record.fault in DAMAGE:
            self.damage(record)
        elif record.fault in DURING:
            self.disturb(record, DURING[record.fault])
        elif record.fault == "a second start":
            self.disturb(record, self.start_again)
        else:
            if record.fault != "none":
                record.inflicted = self.plant(record.fault)
            code, wrong = self.run()
            record.wrong += wrong + self.check_code(code, {0, 1, 3})

    def disturb(self, record: Record, fault: Callable[[MarkedCommand, Random], bool]) -> None:
        """Inflict a fault at a random moment of a run."""
        command = self.start()
        if self.rng.random() < 0.25:
            time.sleep(self.rng.uniform(0, 8))
        else:
            command.wait_for_line(self.rng.randint(1, 10 + 2 * self.epochs))
            time.sleep(self.rng.choice((0, self.rng.uniform(0, 0.05), self.rng.uniform(0, 0.5))))
        if command.runs():
            record.inflicted = fault(command, self.rng)
        record.wrong += command.end()
        allowed = {0, 1, 3}
        if record.inflicted and "signal" in record.fault:
            allowed |= {code for s in SIGNALS for code in (128 + s, -s)}
        if record.inflicted and "kill -9" in record.fault:
            allowed |= {-signal.SIGKILL}
        if "kill -9 of a trial" in record.fault or "fork server" in record.fault:
            allowed |= {2}  # hit while the machine was asked
        if "any file" in record.fault:
            allowed |= {2}  # the study cannot be written
        record.wrong += self.check_code(command.process.returncode, allowed)

    def check_code(self, code: int, allowed: set[int]) -> list[str]:
        return [] if code in allowed else [f"exit code {code}"]

    def start_again(self, first: MarkedCommand, rng: Random) -> bool:
        """Start the command once more beside the first, which stands still meanwhile."""
        if not (self.directory / "search.lock").exists() or not first.lines:
            return False  # too early: the first may not have the lock yet
        stopped: list[int] = []
        while new := first.processes().keys() - set(stopped):  # what was forked meanwhile, too
            stopped += new
            for pid in new:
                send(pid, signal.SIGSTOP)
        time.sleep(0.1)
        if not is_locked(self.directory / "search.lock"):
            for pid in stopped:
                send(pid, signal.SIGCONT)
            return False  # too late: the first has done all it had to
        before = contents(self.directory)
        second = self.start()
        try:
            wrong = second.end()
            if second.process.returncode != 2 or second.lines:
                wrong.append(f"the second start ended with {second.process.returncode}")
            if contents(self.directory) != before:
                wrong.append("the second start changed files")
        finally:
            for pid in stopped:
                send(pid, signal.SIGCONT)
        self.records[-1].wrong += wrong
        return True

    def plant(self, fault: str) -> bool:
        """Damage checkpoints of interrupted trials, or leave temporary files."""
        if "tmp" in fault:
            for place in (self.directory, self.directory / "summary", *self.checkpoint_dirs()):
                if place.is_dir():
                    path = place / f".history.jsonl.{self.rng.randrange(2, 30000)}.tmp"
                    path.write_bytes(self.rng.randbytes(100))
                    self.memory.leftovers.add(path)
            return True
        chosen = [d / "latest_checkpoint.pth" for d in self.checkpoint_dirs()]
        for path in chosen:
            if "deleted" in fault:
                path.unlink()
            else:
                content = path.read_bytes()
                path.write_bytes(content[: self.rng.randrange(len(content))])
                self.memory.planted[path] = path.stat().st_mtime_ns
        return bool(chosen)

    def checkpoint_dirs(self) -> list[Path]:
        """Give the trial directories that have a checkpoint and are not finished."""
        found = sorted(path.parent for path in self.directory.glob("trial_*/latest_checkpoint.pth"))
        finished = [trial_dir(self.directory, number) for number in self.memory.finished]
        return [path for path in found if path not in finished]

    def damage(self, record: Record) -> None:
        """Damage the database and run the plain command: it heals, also after one cut off."""
        DAMAGE[record.fault](self.directory / DATABASE, self.rng)
        record.inflicted = True
        if record.fault == "recovery cut off":
            command = self.start()
            command.wait_for_line(self.rng.choice((0, 0, 0, 1, 2)))
            time.sleep(self.rng.uniform(0, 3))
            self.rng.choice((kill_search, signal_search))(command, self.rng)
            record.wrong += command.end()
        code, wrong = self.run()
        # Code 2: a file with nothing beside it that could be rebuilt from.
        has_trials = any(self.directory.glob("trial_*/config.json"))
        record.wrong += wrong + self.check_code(code, {0, 1} if has_trials else {0, 1, 2})

    # ------------------------------------------------------------------------------------ checking

    def check(
        self, record: Record, before: Sequence[Seen], trials: Sequence[Seen], at_end: bool
    ) -> list[str]:
        wrong = check_kept(self.memory, self.directory, trials)
        wrong += check_draws(trials)
        wrong += check_histories(self.directory, trials, self.epochs)
        wrong += check_files(self.memory, self.directory, record.fault in LEAVES_TMP)
        wrong += self.check_budget(before, trials, record)
        wrong += check_continuations(trials, at_end, self.setup.continues)
        if not record.inflicted:
            wrong += check_settled(before, trials)
        states = [trial.state for trial in trials]
        if "RUNNING" in states and (not record.inflicted or record.fault not in DURING):
            wrong.append(f"a trial is still running: {states}")
        return wrong

    def check_budget(
        self, before: Sequence[Seen], trials: Sequence[Seen], record: Record
    ) -> list[str]:
        """A run starts as many trials as were missing: no more, and undisturbed no fewer."""
        missing = self.n_trials - sum(trial.state == "COMPLETE" for trial in before)
        running = {trial.number for trial in before if trial.state == "RUNNING"}
        missing -= sum(t.state == "COMPLETE" and t.number in running for t in trials)
        started = [t for t in trials if t.state != "WAITING"]
        count = len(started) - sum(trial.state != "WAITING" for trial in before)
        runs = sum(1 for command in self.commands if command.lines)
        if count > max(0, missing) * max(1, runs):
            return [f"{count} trials were started, {missing} were missing"]
        complete = sum(trial.state == "COMPLETE" for trial in trials)
        if record.fault == "none" and complete < self.n_trials and count < missing:
            return [f"{count} trials were started, {missing} were missing, {complete} complete"]
        return []

    def replay(self) -> list[str]:
        """Train some complete trials again in one piece, those first that went on most often."""
        complete = [trial for trial in look(self.directory) if trial.state == "COMPLETE"]
        complete.sort(key=lambda trial: (-trial.attributes.get("continued", 0), -trial.number))
        data = lines_of(self.setup.work)
        wrong = []
        for trial in complete[:REPLAYS]:
            wrong += check_replay(self.directory, trial.number, data)
            self.replayed += 1
        return wrong

    def tell(self, number: int) -> None:
        """Say how a round went; on a violation, all that it takes to look into it."""
        record = self.records[-1]
        place = f"series {self.setup.seed} round {number:2d}"
        text = [
            f"{place} | {record.fault}{'' if record.inflicted else ' (not inflicted)'} | "
            f"{record.seconds:.1f} s | finished {record.finished}, interrupted "
            f"{record.interrupted} | {'VIOLATION' if record.wrong else 'good'}"
        ]
        if record.wrong:
            text += [f"  {wrong}" for wrong in record.wrong]
            text.append(f"  directory: {self.directory}; before the round: ../before")
            for command in self.commands:
                text.append(f"  command: {' '.join(command.argv)}: {command.process.returncode}")
                text += [f"    | {line.rstrip()}" for line in [*command.lines, *command.problems]]
        print("\n".join(text), flush=True)


def interrupted(trials: Sequence[Seen]) -> set[int]:
    return {t.number for t in trials if t.state == "RUNNING" or t.attributes.get("interrupted")}


def lines_of(work: Path) -> LineSet:
    return load_lines(
        work / "lines", find_lines(work / "lines", None, 0), LINE_HEIGHT, work / "cache"
    )


# ----------------------------------------------------------------------------------------- the run


def play_series(setup: Setup) -> tuple[Setup, list[Record], int]:
    """Play one series in this process; its directory stays where something was wrong."""
    torch.set_num_threads(1)
    setup.directory.parent.mkdir()
    series = Series(setup)
    series.play()
    if not setup.keeps_all and not any(record.wrong for record in series.records):
        shutil.rmtree(setup.directory.parent)
    return setup, series.records, series.replayed


def play_all(work: Path, args: argparse.Namespace) -> tuple[list[Record], int]:
    """Play series, `--jobs` at once, until there are enough rounds."""
    rng = Random(args.seed)
    records: list[Record] = []
    replayed, missing, count = 0, args.rounds, 0
    under_way: set[Future[tuple[Setup, list[Record], int]]] = set()
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        while missing > 0 or under_way:
            while missing > 0 and len(under_way) < args.jobs:
                rounds = min(missing, rng.randint(10, 20))
                seed = args.seed * 1000 + count
                setup = Setup(work, seed, rounds, count % 2 == 0, args.keep is not None)
                under_way.add(pool.submit(play_series, setup))
                missing -= rounds
                count += 1
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for setup, played, number in (future.result() for future in done):
                records += played
                replayed += number
                # A series that broke leaves rounds to be played; the last, undisturbed, is extra.
                missing += max(0, setup.rounds - len(played))
    return records, replayed


def table(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Count by fault."""
    rows: dict[str, dict[str, int]] = {}
    for record in sorted(records, key=lambda record: record.fault):
        names = ("rounds", "inflicted", "finished", "interrupted", "violations")
        row = rows.setdefault(record.fault, dict.fromkeys(names, 0))
        row["rounds"] += 1
        row["inflicted"] += record.inflicted
        row["finished"] += record.finished
        row["interrupted"] += record.interrupted
        row["violations"] += bool(record.wrong)
    return rows


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="faults to inflict")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="series at once")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and keep everything")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make lines, play all rounds, print the table; 1 where a round was bad."""
    args = parse_args(argv)
    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    work = (args.keep or Path(tempfile.mkdtemp(prefix="chaos_"))).absolute()
    make_lines(
        work / "lines",
        num_writers=4,
        pages_per_split={"train": 2, "val": 1, "test": 1},
        lines_per_page=3,
        line_height=LINE_HEIGHT,
    )
    lines_of(work)  # decoded once
    records, replayed = play_all(work, args)
    rows = table(records)
    names = next(iter(rows.values()))
    print(f"{'fault':<28}" + "".join(f"{name:>12}" for name in names))
    for fault, row in rows.items():
        print(f"{fault:<28}" + "".join(f"{number:>12}" for number in row.values()))
    total = {name: sum(row[name] for row in rows.values()) for name in names}
    print(f"{'all':<28}" + "".join(f"{number:>12}" for number in total.values()))
    seconds = round(time.monotonic() - started, 1)
    outcome = {"seed": args.seed, "seconds": seconds, "replayed": replayed, **total}
    print(json.dumps({**outcome, "faults": rows}))
    if args.keep is None and not total["violations"]:
        shutil.rmtree(work)
    return int(total["violations"] > 0)


if __name__ == "__main__":
    sys.exit(main())
