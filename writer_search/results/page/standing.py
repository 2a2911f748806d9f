"""The page's head: how the search stands, the best trial, and how sure that is."""

from __future__ import annotations

import html
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime

from writer_search.common.files import is_there, read_dict
from writer_search.common.provenance import pasted
from writer_search.common.text import duration, percent, shown_value
from writer_search.results.chosen import chosen_model, read_confirmation
from writer_search.results.confirmed import describe as describe_confirmation
from writer_search.results.estimate import range_text
from writer_search.results.page.html import count, folded, section, soft, text
from writer_search.results.page.snapshot import (
    CONFIRMING,
    FINISHED,
    RUNNING,
    STOPPED,
    Snapshot,
)
from writer_search.results.rows import STATES, Row, count_states, home_of
from writer_search.results.tables import floor_lines
from writer_search.results.tested import describe

EVERY_SECONDS = 10  # the page looks for a newer one
EVERY_SECONDS_STOPPED = 60  # the same, where the search may be started again
SAID = {
    RUNNING: "The search runs.",
    CONFIRMING: "All trials are complete; the best ones are being trained again with new seeds.",
    FINISHED: "Finished.",
    STOPPED: "Not running: the same command goes on where the search stopped.",
}
RUNS = {RUNNING: "Trial {} runs", CONFIRMING: "Run {} of the confirmation"}


def head(shown: Snapshot) -> str:
    """Say how the search stands, and for how long it still runs."""
    standing, now = shown.standing, datetime.now().astimezone()
    every = EVERY_SECONDS if standing.is_live else EVERY_SECONDS_STOPPED
    looks = f' data-written="{now.timestamp():.0f}" data-every="{every}"'
    looks = "" if standing.state == FINISHED else looks
    said = SAID[standing.state]
    if standing.state == CONFIRMING:
        said += f" {count(standing.runs_left, 'run')} to go."
    if standing.is_live:
        said += f" Time left: {range_text(standing.left)}."
    parts = [
        soft(f"Search {text(shown.checkpoint_dir.absolute())}, as of {now:%Y-%m-%d %H:%M:%S %Z}"),
        f'<p class="state" role="status"{looks}>{text(said)}</p>',
        f"<p>{_counts(shown)}</p>",
    ]
    parts += [
        f"<p>{RUNS[standing.state].format(trial.number)}: epoch {trial.epoch} of {trial.epochs}"
        + ("" if trial.best is None else f", best so far {percent(trial.best)}")
        + ".</p>"
        for trial in standing.running
    ]
    if standing.is_live:
        parts.append(
            '<p id="late" hidden>This page was written <span></span> minutes ago. Unless it was '
            "sent to you, the search may have been killed; the same command goes on.</p>"
        )
    return "\n".join(parts)


def _counts(shown: Snapshot) -> str:
    states = count_states(shown.rows)
    told = {state: f"{states[state]} {state}" for state in STATES if states[state]}
    run = shown.recorded.get("run", {})
    if wanted := run.get("n_trials"):
        told = {"complete": ""} | told  # the first, also when there is none
        told["complete"] = f"{states['complete']} complete of {wanted} wanted"
    spent = sum(row.seconds or 0.0 for row in shown.rows if row.ended)
    return (
        f"{count(len(shown.rows), 'trial')}{': ' if told else ''}{', '.join(told.values())}"
        f". {duration(spent)} of training."
        + (" The space has no other configuration." if run.get("exhausted") else "")
    )


def best_trial(shown: Snapshot) -> str:
    """Say what came out, how sure that is, and what it has to beat."""
    best = shown.best
    if best is None:
        return "<h1>No trial is complete yet</h1>"
    value = f'<span class="value">{percent(best.value)}</span>'
    parts = [f"<h1>Best: {value} validation macro top-1, trial {best.number}</h1>"]
    pages = shown.metrics.get("page_macro_top1")
    if isinstance(pages, float):
        parts.append(
            f"<p>Whole pages, by all of their lines together: <strong>{percent(pages)}</strong> "
            "of each writer's pages on average.</p>"
        )
    parts.append(f"<p>{_how_sure(shown, best)}</p>")
    parts += [f"<p>{text(line)}</p>" for line in floor_lines(shown.rows, shown.space)]
    parts.append(_hyperparameters(shown, best))
    model = shown.files.directory(best) / "best_model.pth"
    if is_there(model):
        parts.append(f"<p>Its model: <code>{text(model)}</code></p>")
    parts += [
        _winner(shown, best),
        section("Confirmed with new seeds", _confirmation(shown)),
        section("Test lines", _test(shown)),
    ]
    return "\n".join(part for part in parts if part)


def _hyperparameters(shown: Snapshot, best: Row) -> str:
    fixed = shown.fixed([best])
    lines = [
        f'<tr><th scope="row">{text(name)}</th><td>{text(shown_value(value))}{mark}</td></tr>\n'
        for values, mark in ((best.params, ""), (fixed, ' <span class="fixed">fixed</span>'))
        for name, value in values.items()
    ]
    if not lines:
        return ""
    return folded(
        f"Hyperparameters of trial {best.number}",
        f'<table class="facts">\n<tbody>{"".join(lines)}</tbody>\n</table>',
        "hyperparameters",
    )


def _how_sure(shown: Snapshot, best: Row) -> str:
    """Say on how many lines the best value rests, and how many trials are as good within that."""
    value = best.value or 0.0
    shares, has_pages = shares_of(shown)
    lines = sum(number for own in shares for number, _ in own)
    error = standard_error(shares)
    if not lines:
        return "Its standard error is not known: the trial left no count of its validation lines."
    if error == 0 and any(true != guessed for true, guessed, _ in shown.confusion[1]):
        return (
            f"Measured on {count(lines, 'validation line')}. Its standard error is not known: "
            "each writer's lines are all right, or all wrong."
        )
    ties = sum((row.value or 0.0) >= value - error for row in shown.complete)
    others = ""
    if error == 0:
        if ties > 1:
            others = f" {count(ties - 1, 'other trial')} did as well; the earliest is named best."
        return (
            f"Measured on {count(lines, 'validation line')}, all recognised.{others} Even so, up "
            f"to {min(100.0, 300 / lines):.1f} points of mistakes in new lines of the same kind "
            "would be no surprise (95 %, rule of three), more where lines of a page go wrong "
            "together."
        )
    if ties > 1:
        others = (
            f" {count(ties - 1, 'other trial')} within one standard error of it cannot be told "
            "apart from it."
        )
    return (
        f"Measured on {count(lines, 'validation line')}: standard error "
        f"{100 * error:.1f} points{_at_least(shares) if has_pages else ''}.{others} It was chosen "
        "for this value, so expect a lower one on new lines."
    )


def _at_least(shares: Shares) -> str:
    single = sum(len(own) == 1 for own in shares)
    if not single:
        return ""
    whose = f"{count(single, 'writer')} {'has' if single == 1 else 'have'} a single page"
    return f" or more ({whose}, so how they vary from page to page is not known)"


# Of each writer (lines, right lines) of each page; of all pages as one where they are not known.
Shares = Sequence[Sequence[tuple[int, int]]]


def shares_of(shown: Snapshot) -> tuple[Shares, bool]:
    """Give what the best trial gets right, and whether by page; nothing if it is not recorded."""
    counts: dict[object, Counter[object]] = defaultdict(Counter)
    right = Counter[object]()
    has_pages = bool(shown.predictions) and all(line.page for line in shown.predictions)
    if has_pages:
        for line in shown.predictions:
            counts[line.writer][line.page] += 1
            right[line.writer, line.page] += line.is_right
    else:
        for true, guessed, number in shown.confusion[1]:
            counts[true][None] += number
            right[true, None] += number * (true == guessed)
    return [[(n, right[w, p]) for p, n in own.items()] for w, own in counts.items()], has_pages


def standard_error(shares: Shares) -> float:
    """Give the standard error of a macro top-1: of the mean over writers of their shares."""
    return math.sqrt(sum(map(share_variance, shares))) / max(1, len(shares))


def share_variance(pages: Sequence[tuple[int, int]]) -> float:
    """Give the variance of the share that is right, from (lines, right lines) of each page.

    Lines of a page are right or wrong together, so the share varies as pages do: a ratio estimate,
    Cochran 1977, ch. 6. Not less than if all were independent: pages may be alike by chance.
    """
    lines, right = sum(number for number, _ in pages), sum(hits for _, hits in pages)
    share = right / lines
    independent = share * (1 - share) / lines
    if len(pages) == 1:
        return independent
    apart = math.fsum((hits - share * number) ** 2 for number, hits in pages) / lines**2
    return max(independent, apart * len(pages) / (len(pages) - 1))


def _winner(shown: Snapshot, best: Row) -> str:
    """Say whose the search's model is, where it was confirmed."""
    try:
        chosen = chosen_model(shown.checkpoint_dir, shown.rows)
    except (KeyError, TypeError):
        return ""
    if chosen is None or not chosen.is_confirmed:
        return ""
    return (
        f"<p>After the confirmation <code>summary/best_model.pth</code> is of {text(chosen.name)}; "
        "its configuration is in that directory. Lines, writers and pages on this page are those "
        f"of trial {best.number} in the search.</p>"
    )


def _confirmation(shown: Snapshot) -> str:
    """Show what training the best configurations again has given, where that was done."""
    found = read_confirmation(shown.checkpoint_dir, shown.rows)
    try:
        return _lines(describe_confirmation(found)) if found else ""
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""


def _test(shown: Snapshot) -> str:
    """Show what the chosen model was measured at on the test lines, where it was."""
    found = read_dict(shown.checkpoint_dir / "summary/test_metrics.json")
    try:
        lines = describe(found)
        chosen = chosen_model(shown.checkpoint_dir, shown.rows)
        measured = (shown.checkpoint_dir / found["directory"]).absolute()
        if chosen is not None and chosen.directory.absolute() != measured:
            lines.append(
                f"  That was an earlier choice; now it is {chosen.name}, not measured yet."
            )
        return _lines(lines)
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""  # not measured, or by another version


def _lines(lines: Sequence[str]) -> str:
    """Keep lines, and the columns in them; nothing in them is markup."""
    return "<pre>" + "\n".join(html.escape(line) for line in lines) + "</pre>" if lines else ""


def how_to_go_on(shown: Snapshot) -> str:
    """Give the command to resume or extend, as the newest trial has recorded it."""
    here = shown.checkpoint_dir
    for row in sorted(shown.rows, key=lambda row: row.number, reverse=True):
        if home_of(row.number, row.attributes, here).absolute() != here.absolute():
            continue
        command = shown.configs[row.number].get("command")
        if isinstance(command, list) and command:
            line = pasted(list(map(str, command)))
            return (
                f"<pre>{html.escape(line)}</pre>\n<p>The same command goes on where the search "
                "stopped, and runs the trials that are still missing. With a higher "
                "<code>--n_trials</code>, the total of complete trials, it extends the search.</p>"
            )
    return ""
