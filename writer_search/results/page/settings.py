"""What lies folded at the page's end: settings, data, and what ran where."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from writer_search.common.files import read_dict
from writer_search.results.page.html import Column, cell, count, facts, folded, name, table, text
from writer_search.results.page.snapshot import Snapshot, range_text
from writer_search.results.page.trials import ranges

PROVENANCE = (
    *("command", "git_commit", "git_dirty", "host", "device", "device_names", "data_root"),
    *("versions", "data_fingerprint"),
)


def settings(shown: Snapshot) -> str:
    """Fold away what few look for."""
    data = read_dict(shown.checkpoint_dir / "summary" / "data_report.json")
    return "\n".join(
        [
            folded("Settings and search space", _settings(shown), "settings"),
            folded("Data", _data(data), "data"),
            folded("Where it comes from", _provenance(shown.configs), "provenance"),
        ]
    )


def _settings(shown: Snapshot) -> str:
    """Show what makes the trials comparable; the ranges in a table of their own."""
    pairs = [(key, value) for key, value in _flat(shown.settings) if not key.startswith("space.")]
    rows = [
        f"<tr>{cell(text(key))}{cell(text(range_text(rule)))}</tr>"
        for key, rule in shown.space.items()
    ]
    columns = [Column("hyperparameter"), Column("searched, or fixed at")]
    return facts(pairs) + (table("space", "Search space", columns, rows) if rows else "")


def _flat(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    flat: list[tuple[str, object]] = []
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((prefix + key, value))
    return flat


def _data(report: Mapping[str, Any]) -> str:
    """Show the report on the data: what is told in numbers, the broken images, the writers."""
    writers, broken = report.get("writers"), report.get("broken")
    plain = {key: value for key, value in report.items() if key not in ("writers", "broken")}
    pairs = [(key.replace("_", " "), value) for key, value in _flat(plain)]
    if isinstance(broken, dict):
        pairs.append(("broken images, left out", len(broken)))
    parts = [facts(pairs)]
    if isinstance(broken, dict) and broken:
        listed = "".join(f"<li>{text(path)}: {text(why)}</li>" for path, why in broken.items())
        parts.append(folded("Broken images", f"<ul>{listed}</ul>", "broken"))
    if isinstance(writers, dict) and writers:
        title = f"Lines of {count(len(writers), 'writer')}"
        parts.append(folded(title, _writers(writers), "lines of writers"))
    return "\n".join(part for part in parts if part)


def _writers(writers: Mapping[str, Any]) -> str:
    splits = list(next(iter(writers.values()), {}))
    rows = [
        f"<tr>{cell(name(writer))}"
        + "".join(
            cell(text(own.get(split, "")), own.get(split, ""), number=True) for split in splits
        )
        + "</tr>"
        for writer, own in writers.items()
        if isinstance(own, dict)
    ]
    columns = [Column("writer"), *(Column(split, True) for split in splits)]
    return table("lines of writers", "Lines of each writer", columns, rows)


def _provenance(configs: Mapping[int, Mapping[str, Any]]) -> str:
    """Show what ran where; where trials differ, which trials ran with which."""
    values: dict[str, dict[str, list[int]]] = {}
    for number, config in configs.items():
        told = {key: config[key] for key in PROVENANCE if key in config}
        for key, value in _flat(told):
            shown = shlex.join(map(str, value)) if isinstance(value, list) else value
            values.setdefault(key, {}).setdefault(str(shown), []).append(number)
    pairs: list[tuple[str, object]] = []
    for key, by_value in values.items():
        if len(by_value) == 1:
            pairs.append((key.replace("_", " "), next(iter(by_value))))
            continue
        pairs += [
            (key.replace("_", " "), f"{value} (trials {ranges(numbers)})")
            for value, numbers in by_value.items()
        ]
    seeds = [c["config"]["seed"] for c in configs.values() if "seed" in c.get("config", {})]
    if seeds:
        some = ", ".join(map(str, seeds[:20])) + " …" * (len(seeds) > 20)
        pairs.append(("seeds of the trials", some))
    return facts(pairs)
