"""What a flag's value may be, and how a command line is read."""

from __future__ import annotations

import argparse
import math
import platform
import re
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from writer_search.common.errors import UserError
from writer_search.common.provenance import git_state

NUMBER = r"(\d+(?:\.\d*)?)"
TIME = rf"(?:{NUMBER}d)?\s*(?:{NUMBER}h)?\s*(?:{NUMBER}m)?\s*(?:{NUMBER}s)?"


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    help_flag = "--help"  # that shows all options

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.help_flag} shows all options)")


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


def path(text: str) -> Path:
    if not text:  # which would be the working directory
        raise argparse.ArgumentTypeError("the path is empty: is a variable not set?")
    return Path(text)


def time_span(text: str) -> float:
    """Read a time in seconds: 90, or with units, 90s, 45m, 2h, 1h30m, 1d."""
    parts = re.fullmatch(TIME, text.strip().lower())
    try:
        given = [float(part or 0) for part in parts.groups()] if parts else [0, 0, 0, float(text)]
    except ValueError:
        given = []
    number = sum(part * size for part, size in zip(given, (86400, 3600, 60, 1), strict=False))
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time above 0: give 90m, 2h, 1h30m, 1d, or a number of seconds"
        )
    return number


def kept_checkpoints(text: str) -> int | None:
    """How many trials keep their weights; None for all."""
    return {"all": None, "best": 1}[text] if text in ("all", "best") else whole_number(text)


def command(text: str) -> tuple[str, ...]:
    """Split a command as a shell would; no shell runs it."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no command: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("the command is empty")
    return words


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


class ShowVersion(argparse.Action):
    """Prints which program this is, and with what it runs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"{parser.prog}, {version_text()}")
        parser.exit()


def version_text() -> str:
    """Say which commit this is, and the versions of what it needs; imports none of it."""
    state = git_state(Path(__file__).parents[1])
    commit = f"commit {state['git_commit'][:12]}" if state["git_commit"] else "no commit known"
    changed = " with local changes" if state["git_dirty"] else ""
    packages = ", ".join(f"{name} {_installed(name)}" for name in ("torch", "optuna", "numpy"))
    return f"{commit}{changed}; Python {platform.python_version()}, {packages}"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version", action=ShowVersion, nargs=0, help="show commit and versions, and exit"
    )


def underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value
