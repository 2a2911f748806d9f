"""Measures the chosen model on the test split: once, at the end of a search.

The measuring is done in a child process (`child.measure_on_test`); this file imports no torch.
"""

from __future__ import annotations

from datetime import UTC, datetime
from multiprocessing import connection
from pathlib import Path
from typing import Any

from data import LineSet
from writer_search.common.errors import UserError, why
from writer_search.common.files import read_dict, write_json
from writer_search.common.signals import StopSignals
from writer_search.common.text import one_line
from writer_search.processes.messages import TestQuestion
from writer_search.processes.parent import ChildProcess, exit_text
from writer_search.results.chosen import Chosen
from writer_search.results.tested import NOTE, describe


def require_test_lines(data: LineSet) -> None:
    """Raise UserError where --evaluate_test would find nothing, before a search is spent."""
    if not len(data.select("test")):
        raise UserError(
            "--evaluate_test: there are no test lines; add a test directory, or leave the flag out"
        )


def evaluate_test(
    checkpoint_dir: Path, chosen: Chosen, question: TestQuestion, stop: StopSignals
) -> list[str]:
    """Measure the chosen model, unless it has been, and write summary/test_metrics.json.

    Returns lines for people; none when a signal came first.
    """
    path = checkpoint_dir / "summary" / "test_metrics.json"
    before = read_dict(path)
    identity = {
        "trial": chosen.trial,
        "directory": _seen_from(checkpoint_dir, chosen.directory),
        "config_hash": read_dict(chosen.directory / "config.json").get("config_hash"),
        "data_fingerprint": question.data.fingerprint,
    }
    if _is_of(before, identity):
        return describe(before)
    lines = len(question.data.select("test"))
    print(f"evaluating {chosen.name} on {lines} test lines", flush=True)
    kind, content = _ask(question, stop)
    if kind == "stopped":
        return []
    if kind != "measured":
        return [f"The test split could not be evaluated: {one_line(content['cause'])}"]
    earlier = [
        *before.get("earlier", []),
        *([{name: before.get(name) for name in (*identity, "macro_top1")}] if before else []),
    ]
    found = {
        **identity,
        "note": NOTE,
        **content,
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
        # Where the choice has come back to a model, its value is no other one.
        "earlier": [one for one in earlier if not _is_of(one, identity)],
    }
    write_json(path, found)
    return describe(found)


def _is_of(measured: dict[str, Any], identity: dict[str, Any]) -> bool:
    return all(measured.get(name) == value for name, value in identity.items())


def _seen_from(checkpoint_dir: Path, directory: Path) -> str:
    """Name a directory as seen from another, where a shared search may not have its best trial."""
    inside, own = directory.absolute(), checkpoint_dir.absolute()
    return str(inside.relative_to(own) if inside.is_relative_to(own) else inside)


def _ask(question: TestQuestion, stop: StopSignals) -> tuple[str, dict[str, Any]]:
    """Let a child process measure; a signal ends it."""
    try:
        child = ChildProcess("writer_search.processes.child:measure_on_test", question)
    except OSError as error:
        return "failed", {"cause": f"did not start: {why(error)}"}
    message = None
    try:
        while message is None and stop.name is None:
            ready = connection.wait([child.connection, stop.wakeup])
            if stop.wakeup in ready:
                stop.wakeup.recv(4096)
            elif (message := child.receive()) is None:
                break  # it has died
    finally:
        if message is None:
            child.kill()
        code = child.end()
    if stop.name is not None:
        return "stopped", {}
    return message or ("failed", {"cause": exit_text(code)})
