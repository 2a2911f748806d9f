"""README.md and docs/ say what is: help, commands, code, links, names of files, lengths."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from servers import PostgreSQL
from test_search import arguments

import hyperparameter_search
import train
from writer_search.config import LIMITS
from writer_search.flags import STUDY_NAME, build_parser, parse_args
from writer_search.space import BACKBONES_BY_TIER, default_space, narrow
from writer_search.study.shared.storage import find_study, opened_storage
from writer_search.train_flags import build_train_parser, parse_train_args

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())
PARSERS = [build_parser(everything=True), build_train_parser()]
OF_OTHERS = {"--signal", "--cpus", "--channel"}  # Slurm's, Docker's, the reader's own


def blocks(language: str, text: str = EVERYTHING) -> list[str]:
    """Give the fenced blocks of a language, without the indentation of their fence."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [
        re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)
        for indent, name, content in found
        if name == language
    ]


def commands(program: str) -> list[str]:
    """Give the arguments of a program wherever a page has a command of it."""
    joined = EVERYTHING.replace("\\\n", " ")
    return re.findall(rf"python {re.escape(program)} ([^`|#\n]*)", joined)


# ------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: str(parser.prog))
def test_help_is_the_program_s(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    (shown,) = (block for block in blocks("") if block.startswith(f"usage: {parser.prog}"))
    assert shown.split() == parser.format_help().split()


@pytest.mark.parametrize(
    ("program", "parse", "at_least"),
    [("hyperparameter_search.py", parse_args, 8), ("train.py", parse_train_args, 4)],
)
def test_commands_are_understood(
    program: str, parse: Callable[[list[str]], object], at_least: int
) -> None:
    found = commands(program)
    for command in found:
        parse(shlex.split(command))
    assert len(found) >= at_least


def test_benchmarks_are_called_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    joined = re.sub(r"\s+", " ", EVERYTHING)
    called = re.findall(r"benchmarks\.(?!md\b)([a-z_]+)([^`]*?)(?=[`|]| python -m)", joined)
    for name, words in called:
        module = import_module(f"benchmarks.{name}")
        with pytest.raises(SystemExit):
            module.main()
        assert set(re.findall(r"--\w+", words)) <= set(
            re.findall(r"--\w+", capsys.readouterr().out)
        )
    assert len({name for name, _ in called}) >= 7


def test_every_option_that_is_named_exists() -> None:
    known = {option for parser in PARSERS for option in parser._option_string_actions}
    for script in [ROOT / "tests" / "chaos.py", *(ROOT / "benchmarks").glob("*.py")]:
        known |= set(re.findall(r'"(--\w+)"', script.read_text()))
    named = re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", EVERYTHING)
    assert {f"--{name.replace('-', '_')}" for name in named} <= known | OF_OTHERS


def test_defaults_in_the_readme_are_the_program_s() -> None:
    parser, checked = PARSERS[0], 0
    for names, defaults in re.findall(r"^\| (`--[^|]*) \| ([^|]+) \|", README, re.MULTILINE):
        options = re.findall(r"--(\w+)", names)
        for option, default in zip(options, defaults.strip().split(", "), strict=True):
            assert str(parser.get_default(option)) == default, option
            checked += 1
    assert checked >= 6


def test_ranges_are_accepted() -> None:
    examples = blocks("json")
    for example in examples:
        ranges = json.loads(example)
        for tier, pretrained in (("cpu", False), ("gpu", False)):
            assert set(ranges) <= set(narrow(default_space(tier, pretrained), {}, ranges).searched)
    assert examples


def test_every_hyperparameter_is_named() -> None:
    for name in [*LIMITS, "backbone", "mixup"]:
        assert f"`{name}`" in PAGES["docs/command_line.md"], name


def test_test_command_is_what_ci_runs() -> None:
    (line,) = re.findall(r"^.*-m pytest$", README, re.MULTILINE)
    assert f"{line}\n" in blocks("bash", README)
    assert "requirements-test.txt" in line
    assert "grep -m1 -- '-m pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


# ---------------------------------------------------------------------------------- links and names


def anchors(text: str) -> set[str]:
    """Give the names by which a page's headings are linked to."""
    outside = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    for path in re.findall(
        r"`((?:tests|docs|examples|benchmarks|writer_search)/[^`\s]*)`", PAGES[page]
    ):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(\w+\.py)`", PAGES[page]):
        assert (ROOT / name).exists() or name == "extract_lines.py", name  # kraken's


def named_in(tree: str) -> Iterator[str]:
    """Give the paths of an annotated tree; a directory ends in a slash."""
    above: list[str] = []
    for line in tree.splitlines():
        prefix, name = re.fullmatch(r"([│├└─ ]*)(\S+).*", line).groups()  # type: ignore[union-attr]
        depth = len(prefix) // 4
        if not name.startswith("…"):
            above[depth:] = [name]
            yield "".join(above)


def test_tree_of_the_program_is_the_program_s() -> None:
    (tree,) = blocks("", PAGES["docs/program.md"])
    named = set(named_in(tree))
    for path in named:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    folders = (path for path in (ROOT / "writer_search").rglob("*/") if any(path.glob("*.py")))
    for folder in [*folders, *ROOT.glob("*.py")]:
        assert f"{folder.relative_to(ROOT)}{'/' if folder.is_dir() else ''}" in named


def test_pages_are_short_and_linked() -> None:
    assert len(README.splitlines()) <= 230
    assert len(README.split()) <= 2000
    assert len(PAGES["docs/benchmarks.md"].splitlines()) <= 140
    for page in PAGES:
        assert page == "README.md" or f"({page})" in README, page


# ---------------------------------------------------------------------------------- what can be run


@cache
def made(lines_root: Path, directory: Path) -> Path:
    """Make the paths that the pages speak of, with a tiny search."""
    (directory / "lines").symlink_to(lines_root)
    pages = sorted(path.parent for path in lines_root.glob("test/*/*/line_001.png"))
    for number in (1, 2):
        (directory / f"page_{number}").symlink_to(pages[number])
    argv = arguments(lines_root, directory / "runs" / "search_001", n_trials="1")
    assert hyperparameter_search.main(argv) == 0
    (directory / "runs" / "search_002").symlink_to(directory / "runs" / "search_001")
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@pytest.fixture
def project(lines_root: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a directory in which `runs/search_001`, `lines` and `page_1` are there."""
    monkeypatch.chdir(made(lines_root, place))
    return place


def run_python(code: str, directory: Path, *arguments: str) -> None:
    """Run code as a user in the program's directory does."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_commands_that_read_work(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = 0
    for command in set(commands("hyperparameter_search.py")):
        if "--data_root" not in command and re.search("--(status|compare)", command):
            if "--checkpoint_dir runs/a" in command:  # of the help text
                continue
            assert hyperparameter_search.main(shlex.split(command)) == 0, command
            done += 1
    for command in set(commands("train.py")):
        if "--predict" in command and "runs/search_001" in command:
            assert train.main([*shlex.split(command), "--device", "cpu"]) == 0, command
            done += 1
    assert done >= 3
    assert "rank by best value" in capsys.readouterr().out


def test_query_works(project: Path) -> None:
    (query,) = blocks("sql")
    connection = sqlite3.connect("runs/search_001/optuna_study.db")
    ((trial_id, state, value),) = connection.execute(query).fetchall()
    connection.close()
    assert (trial_id, state) == (1, "COMPLETE")
    assert 0 <= value <= 1


def test_python_works(project: Path) -> None:
    """Each block by itself, in one process: to import torch takes seconds."""
    codes = [code.replace("epochs=20", "epochs=1") for code in blocks("python")]
    run_python("import sys\nfor code in sys.argv[1:]: exec(code, {})", project, *codes)
    assert len(codes) >= 3
    assert (project / "my_trial" / "metrics.json").exists()


def one_liners(of_a_server: bool) -> list[str]:
    found = re.findall(r'python -c "([^"]*)"', EVERYTHING)
    here = [code for code in found if "fetch" not in code]  # which needs a network
    return [code for code in here if ("postgresql" in code) == of_a_server]


@pytest.mark.parametrize("code", one_liners(of_a_server=False))
def test_one_liners_work(code: str, project: Path) -> None:
    run_python(code, project)
    assert "copy.db" not in code or (project / "copy.db").stat().st_size > 0


def test_weights_to_be_fetched_are_those_of_a_default_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("model.ensure_imagenet_weights", fetched.append)
    (code,) = re.findall(r'python -c "([^"]*fetch[^"]*)"', EVERYTHING)
    exec(code, {})
    assert tuple(fetched) == BACKBONES_BY_TIER["gpu", True]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("code", one_liners(of_a_server=True))
def test_one_liners_of_a_server_work(code: str, project: Path) -> None:
    """Skipped, with the reason, where PostgreSQL is not installed."""
    server = PostgreSQL()
    try:
        url = server.make_database("lines")
        run_python(code.replace("postgresql+psycopg://search@dbhost/lines", url), project)
        with opened_storage(url) as storage:
            study = find_study(storage, STUDY_NAME)
            assert study is not None
            assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE"]
    finally:
        server.remove()
