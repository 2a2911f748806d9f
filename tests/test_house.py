"""The house itself: who imports whom, sizes, style, types."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"hyperparameter_search", "train", "data", "model"}
# Each imports only what stands before it, or beside it in its own entry.
ORDER = (
    ("writer_search.common",),
    ("writer_search.config", "writer_search.space"),
    ("writer_search.lines",),
    ("data",),
    ("writer_search.descriptor",),
    ("model",),
    ("writer_search.training",),
    tuple(f"writer_search.{name}" for name in ("flag_values", "flags", "train_flags", "demo")),
    ("train",),
    ("writer_search.results",),
    ("writer_search.processes",),
    ("writer_search.study",),
    ("hyperparameter_search",),
)
IN_A_CHILD = {f"writer_search.processes.{name}" for name in ("child", "machine", "preload")}
OF_TRAINING = (
    *("torch", "torchvision", "model", "train"),
    *("writer_search.descriptor", "writer_search.training"),
)


def product() -> dict[str, Path]:
    """Give every module of the program by its dotted name."""
    files = [*ROOT.glob("*.py"), *(ROOT / "writer_search").rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name: path for name, path in names.items() if not name.endswith("__init__")}


def imports_of(path: Path) -> set[str]:
    """Name the modules that a file imports anywhere, also lazily or by a "module:function"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def place_of(module: str) -> int:
    (place,) = (
        number
        for number, entry in enumerate(ORDER)
        if any(module == name or module.startswith(f"{name}.") for name in entry)
    )
    return place


def is_within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def test_the_scripts_are_exactly_four() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


def test_imports_point_one_way() -> None:
    modules = product()
    graph = {name: imports_of(path) & modules.keys() for name, path in modules.items()}
    for name, imported in graph.items():
        later = {other for other in imported if place_of(other) > place_of(name)}
        assert not later, f"{name} imports what stands after it"
    list(TopologicalSorter(graph).static_order())  # raises for a circle, lazy imports included


def test_every_piece_is_small_enough_to_read() -> None:
    """Lines of functions, classes and files; the command's own file tells the whole story."""
    too_long = []
    for name, path in product().items():
        text = path.read_text()
        pieces = [(name, text.count("\n"), 450 if name == "hyperparameter_search" else 500)]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                most = 250 if isinstance(node, ast.ClassDef) else 60
                pieces.append((f"{name}.{node.name}", length, most))
        too_long += [piece for piece in pieces if piece[1] > piece[2]]
    assert too_long == []


def test_the_code_that_trains_knows_no_study_and_the_search_no_torch() -> None:
    for name, path in product().items():
        imported = imports_of(path)
        if place_of(name) <= place_of("train"):
            assert not any(is_within(module, ("optuna",)) for module in imported), name
        elif name not in IN_A_CHILD:
            assert not any(is_within(module, OF_TRAINING) for module in imported), name


def test_help_imports_neither_torch_nor_optuna() -> None:
    code = (
        "import contextlib, sys, hyperparameter_search as h\n"
        "with contextlib.suppress(SystemExit): h.main(['--help'])\n"
        "print(*sorted({'torch', 'torchvision', 'optuna'} & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stderr.strip() == ""
    assert ran.stdout.startswith("usage: hyperparameter_search.py")


@pytest.mark.parametrize("flags", [["--help"], ["--predict", "line.png"]], ids=["help", "mistake"])
def test_what_train_can_say_at_once_needs_no_torch(flags: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    *said, last = ran.stderr.splitlines()
    assert last == f"{0 if flags == ['--help'] else 2} False"
    assert said == [] or said == [
        "error: --model is missing: give a search's summary/best_model.pth"
    ]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=" ".join,
)
def test_style_and_types(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
