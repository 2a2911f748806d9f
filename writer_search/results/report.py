"""Writes summary/report.html: one page that shows a search, readable without network or script.

All that it shows comes from the search's files. Whatever stands in them (names of writers, texts of
errors) is escaped, and the page's own policy lets a browser run nothing but the script in here.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from writer_search.common.files import read_dict, write_text
from writer_search.common.text import duration, one_line, percent, shown_value
from writer_search.results.chosen import read_confirmation
from writer_search.results.confirmed import describe as describe_confirmation
from writer_search.results.confusion import confusion_of
from writer_search.results.rows import Row, best_row, home_of, trial_dir
from writer_search.results.tables import floor_lines
from writer_search.results.tested import describe

# Name, title, how to read it.
PICTURES = (
    ("history.png", "History", "The value of each trial and the best so far."),
    ("learning_curves.png", "Learning curves", "Every trial's validation value by epoch."),
    (
        "importances.png",
        "Importance of hyperparameters",
        "How much each sets the best trials apart from all; below some 20 trials it means little.",
    ),
    ("slices.png", "Each hyperparameter", "The value of the complete trials over each by itself."),
    (
        "parallel_coordinates.png",
        "Hyperparameters together",
        "A line for each complete trial, through its values from axis to axis.",
    ),
    ("writers.png", "Writers", "What the best trial recognises of each, the worst first."),
    ("confusion.png", "Confusion", "Whom the best trial takes for whom."),
    ("durations.png", "Time", "How long each trial took."),
    ("lines.png", "Lines", "Lines of the first writers as the network sees them."),
    ("more_lines.png", "More lines", "The same of the next writers."),
)
FEW_WRITERS = 30  # a longer table of writers is folded away
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}

STYLE = """
:root { color-scheme: light; --line: #ddd; --soft: #666; --mark: #b34700; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1rem; color: #222; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .2em 0; }
h2 { font-size: 1.2rem; margin: 2em 0 .5em; padding-bottom: .2em;
  border-bottom: 1px solid var(--line); }
.value { color: var(--mark); white-space: nowrap; }
.soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.wide table { overflow-wrap: normal; white-space: nowrap; }
.wide td.text { white-space: normal; min-width: 16em; }
th { background: #f5f5f5; }
td.number, th.number { text-align: right; }
tr.best td { background: #fdf0e6; font-weight: 600; }
th[tabindex] { cursor: pointer; }
th[aria-sort=ascending]::after { content: " ▲"; }
th[aria-sort=descending]::after { content: " ▼"; }
.facts th { background: none; font-weight: 600; min-width: 10.5em; }
@media (min-width: 700px) { .facts th { white-space: nowrap; } }
pre { background: #f5f5f5; padding: .7em; white-space: pre-wrap; font-size: .85rem; }
figure { margin: 1.5em 0; overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 620px; max-width: 1100px; }
figcaption { position: sticky; left: 0; margin-bottom: .3em; }
details summary { cursor: pointer; }
"""

# Sorts a table by the column whose head is chosen; a second time, the other way round.
SCRIPT = """
for (const head of document.querySelectorAll("table.sortable th")) {
  head.tabIndex = 0;
  const sort = () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = x - y;
      return (down ? -1 : 1) * (isNaN(difference) ? x.localeCompare(y) : difference);
    };
    body.append(...[...body.rows].sort(order));
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}
"""


def write_report(
    checkpoint_dir: Path,
    rows: Sequence[Row],
    recorded: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> None:
    """Write summary/report.html, whole.

    recorded: the study's user attributes.   notes: lines on pictures that were not drawn, and why.
    """
    page = report_html(checkpoint_dir, rows, recorded, notes)
    write_text(checkpoint_dir / "summary" / "report.html", page)


def report_html(
    checkpoint_dir: Path,
    rows: Sequence[Row],
    recorded: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """Describe a search as one self-contained page."""
    configs = {row.number: _read(_directory(checkpoint_dir, row), "config") for row in rows}
    confirmed = read_confirmation(checkpoint_dir, rows)
    name = _text(checkpoint_dir.absolute().name)
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    sections = [
        _result(checkpoint_dir, rows, recorded),
        _section("Confirmed with new seeds", _confirmation(confirmed)),
        _section("Test lines", _test(_read(checkpoint_dir / "summary", "test_metrics"))),
        _section("How to go on", _commands(configs)),
        _section("Trials", _trials(rows)),
        _section("Failures", _failures(rows)),
        _section("Pictures", _pictures(checkpoint_dir, rows, notes)),
        _section("Settings", _settings(recorded.get("settings", {}))),
        _section("Data", _data(_read(checkpoint_dir / "summary", "data_report"))),
        _section("Where it comes from", _provenance(configs)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Search {name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------ small pieces


def _text(value: object, limit: int = 2000) -> str:
    """Make anything a piece of the page: one line, printable, nothing in it is markup."""
    return html.escape(one_line(value, limit))


def _directory(checkpoint_dir: Path, row: Row) -> Path:
    """Give a trial's directory: another search's, where several share the study."""
    return trial_dir(home_of(row.attributes, checkpoint_dir), row.number)


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}" if content else ""


def _read(directory: Path, name: str) -> dict[str, Any]:
    return read_dict(directory / f"{name}.json")


def _facts(facts: Iterable[tuple[str, object]]) -> str:
    """Make a table of names and values."""
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>\n" for name, value in facts
    )
    return f'<table class="facts">\n{rows}</table>' if rows else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


# ---------------------------------------------------------------------------------------- sections


def _result(checkpoint_dir: Path, rows: Sequence[Row], recorded: Mapping[str, Any]) -> str:
    """Say what came out, and how sure that is."""
    best = best_row(rows)
    counts = [
        f"{sum(row.state == state for row in rows)} {shown}" for state, shown in STATES.items()
    ]
    wanted = recorded.get("run", {}).get("n_trials")
    told = ", ".join(counts) + (f"; {wanted} complete ones wanted" if wanted else "")
    spent = sum(row.seconds or 0.0 for row in rows if row.ended)
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    parts = [f'<p class="soft">Search {_text(checkpoint_dir.absolute())}, as of {written}</p>']
    if best is None:
        parts.append("<h1>No trial is complete yet</h1>")
    else:
        value = f'<span class="value">{percent(best.value)}</span>'
        parts.append(f"<h1>Best: {value} validation macro top-1, trial {best.number}</h1>")
        parts.append(f"<p>{_how_sure(checkpoint_dir, rows, best)}</p>")
        parts += [f"<p>{_text(line)}</p>" for line in floor_lines(rows)]
        parts.append(_facts((name, shown_value(value)) for name, value in best.params.items()))
        model = _directory(checkpoint_dir, best) / "best_model.pth"
        if model.exists():
            parts.append(f"<p>Its model: <code>{_text(model)}</code></p>")
    parts.append(f"<p>{_count(len(rows), 'trial')}: {told}. {duration(spent)} of training.</p>")
    return "\n".join(parts)


def _how_sure(checkpoint_dir: Path, rows: Sequence[Row], best: Row) -> str:
    """Say on how many lines the best value rests, and how many trials are as good within that."""
    value = best.value or 0.0
    metrics = _read(_directory(checkpoint_dir, best), "metrics").get("best")
    lines, error = standard_error(metrics if isinstance(metrics, dict) else {})
    if not lines:
        return "How sure that is cannot be told: the trial left no count of its validation lines."
    if error == 0:
        return (
            f"Measured on {_count(lines, 'validation line')}, all recognised. Even so, up to "
            f"{300 / lines:.1f} points of mistakes in new lines of the same kind would be no "
            "surprise (95 %, rule of three)."
        )
    ties = sum(
        row.state == "COMPLETE" and row.value is not None and row.value >= value - error
        for row in rows
    )
    others = ""
    if ties > 1:
        others = (
            f" {_count(ties - 1, 'other trial')} within one standard error of it cannot be told "
            "apart from it."
        )
    return (
        f"Measured on {_count(lines, 'validation line')}: standard error "
        f"{100 * error:.1f} points.{others} It was chosen for this value, so that new lines will "
        "on average show a lower one."
    )


def standard_error(metrics: Mapping[str, Any]) -> tuple[int, float]:
    """Give a trial's count of validation lines and the standard error of its macro top-1.

    The mean of writers' shares p of n lines each deviates by the root of the sum of p(1 - p) / n,
    over the number of writers. (0, 0.0) where the confusion is not recorded.
    """
    try:
        _, pairs = confusion_of(metrics)
    except ValueError:
        return 0, 0.0
    lines, right = Counter[int](), Counter[int]()
    for true, guessed, count in pairs:
        lines[true] += count
        right[true] += count * (true == guessed)
    if not lines:
        return 0, 0.0
    shares = {writer: right[writer] / count for writer, count in lines.items()}
    variance = sum(shares[w] * (1 - shares[w]) / count for w, count in lines.items())
    return lines.total(), math.sqrt(variance) / len(lines)


def _confirmation(found: dict[str, Any] | None) -> str:
    """Show what training the best configurations again has given, where that was done."""
    try:
        lines = describe_confirmation(found) if found else []
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""
    return f"<pre>{_lines(lines)}</pre>" if lines else ""


def _lines(lines: Sequence[str]) -> str:
    """Keep lines, and the columns in them; nothing in them is markup."""
    return "\n".join(html.escape(line) for line in lines)


def _test(found: dict[str, Any]) -> str:
    """Show what the chosen model was measured at on the test lines, where it was."""
    try:
        return f"<pre>{_lines(describe(found))}</pre>"
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""  # not measured, or by another version


def _commands(configs: Mapping[int, Mapping[str, Any]]) -> str:
    """Give the command to resume or extend, as the newest trial has recorded it."""
    for number in sorted(configs, reverse=True):
        command = configs[number].get("command")
        if isinstance(command, list) and command:
            line = shlex.join(["python", *map(str, command)])
            return (
                f"<pre>{_text(line, 10**5)}</pre>\n<p>The same command goes on where the search "
                "stopped, and runs the trials that are still missing. With a higher "
                "<code>--n_trials</code>, the total of complete trials, it extends the search.</p>"
            )
    return ""


def _trials(rows: Sequence[Row]) -> str:
    """Make the table of trials."""
    if not rows:
        return ""
    best = best_row(rows)
    names = sorted({name for row in rows for name in row.params})
    heads = ["trial", "state", "value", "epochs", "time", *names]
    numeric = {"trial", "value", "epochs", "time"} | {
        name for name in names if all(_is_number(row.params.get(name, 0)) for row in rows)
    }
    head = "".join(f'<th scope="col"{_class(name in numeric)}>{_text(name)}</th>' for name in heads)
    body = "\n".join(_trial(row, names, numeric, row is best) for row in rows)
    return (
        f'<div class="wide">\n<table class="sortable">\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        f"{body}\n</tbody>\n</table>\n</div>"
    )


def _trial(row: Row, names: Sequence[str], numeric: set[str], is_best: bool) -> str:
    ended = row.ended is not None and row.seconds is not None
    epochs = row.attributes.get("epochs", "")
    cells = [
        _cell(row.number, row.number, True),
        _cell(STATES.get(row.state, row.state.lower()), None, False),
        _cell("" if row.value is None else percent(row.value), row.value, True),
        _cell(epochs, epochs, True),
        _cell(duration(row.seconds or 0.0) if ended else "", row.seconds if ended else "", True),
    ]
    for name in names:
        value = row.params.get(name, "")
        cells.append(_cell(shown_value(value), value, name in numeric))
    mark = ' class="best"' if is_best else ""
    return f"<tr{mark}>{''.join(cells)}</tr>"


def _cell(shown: object, key: object, numeric: bool) -> str:
    """Make a cell; key: what it is sorted by, where that is not what it shows."""
    sort = f' data-key="{_text("" if key is None else key)}"' if numeric else ""
    return f"<td{_class(numeric)}{sort}>{_text(shown)}</td>"


def _class(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _failures(rows: Sequence[Row]) -> str:
    """List the failures by cause, the commonest first."""
    causes: dict[str, list[Row]] = {}
    for row in rows:
        if row.state == "FAIL":
            cause = str(row.attributes.get("failure", "no cause is recorded"))
            # The same cause at another epoch is the same cause.
            causes.setdefault(re.sub(r" (at|in) epoch \d+", "", cause), []).append(row)
    lines = []
    for cause, failed in sorted(causes.items(), key=lambda item: -len(item[1])):
        numbers = ranges([row.number for row in failed])
        log = trial_dir(Path(), failed[-1].number) / "error.log"
        lines.append(
            f'<tr><td class="number">{len(failed)}</td><td class="text">{_text(cause)}</td>'
            f"<td>{numbers}</td><td>{_text(log)}</td></tr>"
        )
    if not lines:
        return ""
    return (
        '<div class="wide">\n<table>\n<tr><th>count</th><th>cause</th><th>trials</th>'
        "<th>what to try, and the traceback</th></tr>\n" + "\n".join(lines) + "\n</table>\n</div>"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Write numbers in rising order shortly: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _pictures(checkpoint_dir: Path, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Inline the pictures that are there; say which are not, and why."""
    shown = [
        _picture(checkpoint_dir / "summary" / name, title, caption)
        for name, title, caption in PICTURES
    ]
    best = best_row(rows)
    if best is not None:
        title = f"Trial {best.number}, the best"
        caption = "Its losses, its validation value, its learning rate."
        shown.append(_picture(_directory(checkpoint_dir, best) / "curves.png", title, caption))
    missing = "".join(f"<li>{_text(note)}</li>" for note in notes)
    if missing:
        shown.append(f'<p class="soft">Not drawn:</p>\n<ul class="soft">{missing}</ul>')
    return "\n".join(part for part in shown if part)


def _picture(path: Path, title: str, caption: str) -> str:
    try:
        encoded = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return ""
    return (
        f"<figure>\n<figcaption><strong>{_text(title)}.</strong> {_text(caption)}</figcaption>\n"
        f'<img alt="{_text(title)}" src="data:image/png;base64,{encoded}">\n</figure>'
    )


def _settings(settings: Mapping[str, Any]) -> str:
    """Show what makes the trials comparable; the ranges in a table of their own."""
    facts = [(name, value) for name, value in _flat(settings) if not name.startswith("space.")]
    space = settings.get("space")
    lines = "".join(
        f"<tr><td>{_text(name)}</td><td>{_text(_range_text(rule))}</td></tr>\n"
        for name, rule in (space.items() if isinstance(space, dict) else ())
    )
    ranges = (
        f'<div class="wide">\n<table>\n<tr><th>hyperparameter</th><th>searched, or fixed at</th>'
        f"</tr>\n{lines}</table>\n</div>"
    )
    return _facts(facts) + (ranges if lines else "")


def _range_text(rule: object) -> str:
    if not isinstance(rule, dict):
        return shown_value(rule)
    if "choices" in rule:
        return ", ".join(map(shown_value, rule["choices"]))
    log = ", on a log scale" if rule.get("log") else ""
    return f"{shown_value(rule.get('low'))} to {shown_value(rule.get('high'))}{log}"


def _flat(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    flat: list[tuple[str, object]] = []
    for name, value in nested.items():
        if isinstance(value, dict) and value:
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, value))
    return flat


def _data(report: Mapping[str, Any]) -> str:
    """Show the report on the data: what is told in numbers, the broken images, the writers."""
    writers, broken = report.get("writers"), report.get("broken")
    plain = {name: value for name, value in report.items() if name not in ("writers", "broken")}
    facts = [(name.replace("_", " "), value) for name, value in _flat(plain)]
    if isinstance(broken, dict):
        facts.append(("broken images, left out", len(broken)))
    parts = [_facts(facts)]
    if isinstance(broken, dict) and broken:
        listed = "".join(f"<li>{_text(p)}: {_text(why)}</li>" for p, why in broken.items())
        parts.append(f"<details><summary>Broken images</summary><ul>{listed}</ul></details>")
    if isinstance(writers, dict) and writers:
        opened = " open" if len(writers) <= FEW_WRITERS else ""
        parts.append(
            f"<details{opened}><summary>Lines of {_count(len(writers), 'writer')}</summary>\n"
            f'<div class="wide">{_writers(writers)}</div></details>'
        )
    return "\n".join(part for part in parts if part)


def _writers(writers: Mapping[str, Any]) -> str:
    splits = list(next(iter(writers.values()), {}))
    heads = '<th scope="col">writer</th>' + "".join(
        f'<th scope="col" class="number">{_text(split)}</th>' for split in splits
    )
    lines = [
        f"<tr><td>{_text(name)}</td>"
        + "".join(_cell(counts.get(split, ""), counts.get(split, ""), True) for split in splits)
        + "</tr>"
        for name, counts in writers.items()
        if isinstance(counts, dict)
    ]
    return (
        f'<table class="sortable">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody>\n</table>"
    )


def _provenance(configs: Mapping[int, Mapping[str, Any]]) -> str:
    """Show what ran where; where trials differ, which trials ran with which."""
    names = (
        "command",
        "git_commit",
        "git_dirty",
        "host",
        "device",
        "device_names",
        "data_root",
        "versions",
    )
    values: dict[str, dict[str, list[int]]] = {}
    for number, config in configs.items():
        told = {name: config[name] for name in (*names, "data_fingerprint") if name in config}
        for name, value in _flat(told):
            shown = shlex.join(map(str, value)) if isinstance(value, list) else value
            values.setdefault(name, {}).setdefault(str(shown), []).append(number)
    facts = []
    for name, by_value in values.items():
        if len(by_value) == 1:
            facts.append((name.replace("_", " "), next(iter(by_value))))
            continue
        facts += [
            (name.replace("_", " "), f"{value} (trials {ranges(numbers)})")
            for value, numbers in by_value.items()
        ]
    seeds = [c["config"]["seed"] for c in configs.values() if "seed" in c.get("config", {})]
    if seeds:
        facts.append(
            ("seeds of the trials", ", ".join(map(str, seeds[:20])) + " …" * (len(seeds) > 20))
        )
    return _facts(facts)
