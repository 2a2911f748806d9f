"""The README says what is: its help, its commands, its examples."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from test_search import Run, run

from writer_search.config import LIMITS
from writer_search.flags import build_parser, build_train_parser, parse_args, parse_train_args
from writer_search.space import default_space, narrow
from writer_search.training.checkpoints import load_model

__all__ = ["run"]  # the fixture
README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Give the fenced blocks of a language; they are every second piece between fences."""
    pieces = re.split(r"^```", README, flags=re.MULTILINE)[1::2]
    named = [piece.partition("\n") for piece in pieces]
    return [text for name, _, text in named if name == language]


def squeezed(text: str) -> str:
    """Leave out white space, and what Python versions print differently."""
    return re.sub(r"\s+", " ", text.replace("optional arguments:", "options:")).strip()


@pytest.mark.parametrize("parser", [build_parser(), build_train_parser()])
def test_help_is_the_program_s(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    (shown,) = (block for block in blocks("") if block.startswith(f"usage: {parser.prog}"))
    assert squeezed(shown) == squeezed(parser.format_help())


@pytest.mark.parametrize(
    ("program", "parse", "at_least"),
    [("hyperparameter_search.py", parse_args, 3), ("train.py", parse_train_args, 2)],
)
def test_commands_are_understood(
    program: str, parse: Callable[[list[str]], object], at_least: int
) -> None:
    text = README.replace("\\\n", " ")
    commands = re.findall(rf"python {re.escape(program)} ([^`|#\n]*)", text)
    for command in commands:
        parse(shlex.split(command))
    assert len(commands) >= at_least


def test_ranges_are_accepted() -> None:
    (example,) = blocks("json")
    space = narrow(default_space("cpu", False), {}, json.loads(example))
    assert set(json.loads(example)) <= set(space.searched)


def test_every_hyperparameter_is_named() -> None:
    for name in [*LIMITS, "backbone", "mixup"]:
        assert f"`{name}`" in README or name == "precision", name


def test_query_and_model_work(run: Run, tmp_path: Path) -> None:
    assert run(n_trials="1") == 0
    (query,) = blocks("sql")
    connection = sqlite3.connect(tmp_path / "c" / "optuna_study.db")
    ((number, state, value),) = connection.execute(query).fetchall()
    connection.close()
    assert (number, state) == (0, "COMPLETE")
    assert 0 <= value <= 1
    _, config, writers = load_model(tmp_path / "c" / "summary" / "best_model.pth")
    assert config.backbone == "tiny"
    assert len(writers) == 4


def test_test_command_is_what_ci_runs() -> None:
    (command,) = [b.strip() for b in blocks("bash") if b.strip().endswith("-m pytest")]
    assert "requirements-test.txt" in command
    assert "\n" not in command
