"""The house itself: who imports whom, style, types."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "hyperparameter_search": {
        "batch_system",
        *("chosen", "command_line", "config", "cores", "data", "devices", "evaluation", "files"),
        "fleet",
        *("processes", "progress", "provenance", "recovery", "search", "shared_search", "signals"),
        *("compare", "confirm", "confirmation", "drawing", "events", "status"),
        *("storage", "study", "summary", "synthetic"),
    },
    "command_line": {"files", "summary"},
    "shared_search": {
        *("estimate", "files", "fleet", "processes", "recovery", "search", "status", "storage"),
        *("study", "summary"),
    },
    "fleet": {"files", "storage", "study", "summary"},
    "storage": {"files", "signals", "summary"},
    "batch_system": set(),
    "search": {
        *("batch_system", "config", "cores", "data", "devices", "drawing", "estimate", "events"),
        "files",
        *("processes", "progress", "signals", "study", "summary"),
    },
    "cores": set(),
    "devices": {"files"},
    "study": {"config", "files", "summary"},
    "recovery": {"files", "study", "summary"},
    "summary": {"files"},
    "estimate": {"summary"},
    "status": {"estimate", "files", "summary"},
    "drawing": {"files", "plots", "processes", "report", "storage", "summary"},
    "plots": {"figures", "files", "summary", "writer_plots"},
    "writer_plots": {"figures"},
    "figures": {"files"},
    "report": {"chosen", "confirmation", "evaluation", "files", "summary"},
    "progress": set(),
    "provenance": set(),
    "signals": set(),
    "processes": {"config", "data"},
    "fork_server_preload": {"worker"},
    "worker": {
        *("batches", "bootstrap", "checkpoints", "config", "cores", "devices", "files", "metrics"),
        *("model", "processes", "ranks", "train"),
    },
    "ranks": set(),
    "bootstrap": {"metrics"},
    "chosen": {"files", "summary"},
    "confirm": {"chosen", "confirmation", "files", "search", "study", "summary"},
    "confirmation": {"chosen", "summary"},
    "events": {"files", "summary"},
    "compare": {"chosen", "confirmation", "files", "summary"},
    "evaluation": {"chosen", "data", "files", "processes", "signals", "summary"},
    # The last one only where train.py is run as a program.
    "train": {
        *("batches", "checkpoints", "config", "data", "files", "metrics", "model", "ranks"),
        "train_command",
    },
    "checkpoints": {"config", "data", "files", "model"},
    "train_command": {
        *("checkpoints", "command_line", "data", "files", "prediction", "processes", "progress"),
        *("retraining", "signals", "train"),
    },
    "retraining": {
        *("checkpoints", "config", "data", "files", "provenance", "signals", "summary", "train"),
    },
    "prediction": {"batches", "config", "cores", "data", "files", "model", "train"},
    "metrics": set(),
    "batches": {"data"},
    "data": {"cores", "files"},
    "config": {"files"},
    "model": {"config"},
    "files": set(),
    "synthetic": set(),
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def test_imports_point_one_way() -> None:
    modules = {path.stem: imports_of(path) for path in ROOT.glob("*.py")}
    assert set(modules) == set(MAY_IMPORT)
    for name, imported in modules.items():
        assert imported & set(modules) <= MAY_IMPORT[name], name
    for name in ("train", "model", "data", "batches", "worker", "config", "files", "summary"):
        assert "optuna" not in modules[name], name
    for name in ("hyperparameter_search", "search", "study", "summary", "processes", "data"):
        assert "torch" not in modules[name], f"the search process stays free of torch: {name}"


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
