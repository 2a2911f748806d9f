"""Tells what differs between the settings of a study and those of a start, in the flags' names."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from writer_search.common.errors import UserError
from writer_search.common.files import read_signed
from writer_search.common.provenance import pasted
from writer_search.common.text import one_line, shown_value
from writer_search.config import OF_COHOG
from writer_search.results.rows import trial_dir
from writer_search.space import OPENED_BY_SPACE, Space, default_space
from writer_search.study.damage import trial_directories

ABSENT = "none"
# What each setting is given by; others are told by their own name.
FLAGS = {
    "data.writers": "--num_writers_subset, --use_all_writers (writers)",
    "data.lines.train": "--data_root (training lines)",
    "data.lines.val": "--data_root (validation lines)",
    "data.lines.test": "--data_root (test lines)",
    "data.split": "--seed, --data_root (split)",
    "data.fingerprint": "--data_root (fingerprint of the lines)",
    "tier": "--device (kind)",
    **{name: f"--{name}" for name in ("epochs", "patience", "weights")},
}


def refuse_changes(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint_dir: Path
) -> None:
    """Raise UserError, with each difference, when settings differ from the study's.

    What merely follows from another difference is told last. The command that the newest trial in
    the checkpoint directory was begun with is given, to be pasted.
    """
    old, new = _flat(recorded), _flat(json.loads(json.dumps(wanted)))
    changed = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n)]
    if not changed:
        return
    follows = [n for n in changed if _follows(n, changed, recorded, wanted)]
    details = [
        f"{_label(n, old, new)}: {_shown(old, n)} in the study, {_shown(new, n)} now"
        for n in changed
        if n not in follows
    ]
    if follows:
        details.append(f"changed as a consequence: {', '.join(_named(n) for n in follows)}")
    command = _recorded_command(checkpoint_dir)
    if command is not None:
        details.append(f"the study was last run by: {command}")
    raise UserError(
        "this search was started with other settings, so its trials could not be compared with "
        "new ones; give the old settings, or a fresh --checkpoint_dir",
        details,
    )


def _follows(
    name: str, changed: list[str], recorded: Mapping[str, Any], wanted: Mapping[str, Any]
) -> bool:
    """Tell whether a setting differs only because another one does."""
    causes = set(changed) - {name}
    kind, _, rest = name.partition(".")
    if name == "data.fingerprint":
        return bool({n for n in causes if n.startswith("data.")} | causes & {"space.line_height"})
    if name.startswith("data.lines."):
        return bool(causes & {"data.writers", "data.split"})
    if kind == "precision":
        return bool(causes & {"weights", "tier", "space.backbone", "space.precision"})
    if kind != "space":
        return False
    if causes & {"weights", "tier"}:
        usual = [_usual(settings).get(rest) for settings in (recorded, wanted)]
        if [settings["space"].get(rest) for settings in (recorded, wanted)] == usual:
            return True
    is_absent = any(rest not in settings["space"] for settings in (recorded, wanted))
    if rest in ("with_cohog", *OF_COHOG) and is_absent:
        return bool(causes & {"space.backbone", "space.with_cohog"})
    if rest == "mixup" and is_absent:
        return "space.mixup_alpha" in causes
    if rest in ("margin", "scale") and "space.loss" in causes:
        opened = Space({rest: OPENED_BY_SPACE[rest]}).to_dict()[rest]
        return opened in (recorded["space"].get(rest), wanted["space"].get(rest))
    return False


def _usual(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give the default space of a study's kind, as JSON has it."""
    space = default_space(settings["tier"], settings["weights"] == "imagenet").to_dict()
    usual: dict[str, Any] = json.loads(json.dumps(space))
    return usual


def _label(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    kind, _, rest = name.partition(".")
    if kind == "space":
        is_range = any(isinstance(settings.get(name), dict) for settings in (old, new))
        return f"--fix or --space {rest}" if is_range else f"--fix {rest}"
    return f"--fix precision ({rest})" if kind == "precision" else FLAGS.get(name, name)


def _named(name: str) -> str:
    """Name a setting in a few words."""
    kind, _, rest = name.rpartition(".")
    names = {"data.fingerprint": "the lines' fingerprint", "data.split": "the split"}
    if name in names:
        return names[name]
    if kind == "data.lines":
        return f"the number of {rest} lines"
    return f"precision of {rest}" if kind == "precision" else rest


def _shown(settings: Mapping[str, Any], name: str) -> str:
    """Say a value, or a range of values."""
    value = settings.get(name, ABSENT)
    if not isinstance(value, dict):
        return one_line(shown_value(value), 200)
    if "choices" in value:
        return one_line(" or ".join(map(shown_value, value["choices"])), 200)
    ends = " to ".join(shown_value(value.get(end)) for end in ("low", "high"))
    return ends + (" (log)" if value.get("log") else "")


def _recorded_command(checkpoint_dir: Path) -> str | None:
    """Give the command of the newest trial that tells one, for this script and interpreter."""
    for number in reversed(trial_directories(checkpoint_dir)):
        command = read_signed(trial_dir(checkpoint_dir, number) / "config.json").get("command")
        if isinstance(command, list) and command:
            return pasted([sys.argv[0], *map(str, command[1:])])
    return None


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and prefix != "space.":  # a range is told as one
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
