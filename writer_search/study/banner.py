"""What a search says when it begins: its banner, and what it runs on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from writer_search.common.files import write_json
from writer_search.common.output import live, wrapped
from writer_search.common.text import counted, percent
from writer_search.lines.split import write_split
from writer_search.lines.walk import OTHERS
from writer_search.processes.plan import Plan
from writer_search.results.pictures.lines import draw_lines
from writer_search.results.rows import Row, count_complete, count_states

RULE = "=" * 70


def announce(
    args: argparse.Namespace, plan: Plan, banner_lines: list[str], settled: list[str]
) -> None:
    data, summary = plan.data, args.checkpoint_dir / "summary"
    summary.mkdir(exist_ok=True)
    write_json(summary / "data_report.json", data.report)
    names = (data.writers[label] for label in data.labels)
    write_split(summary / "split.csv", zip(data.paths, names, data.splits.tolist(), strict=True))
    draw_lines(summary, data)
    live.end()
    print("\n".join(banner_lines), flush=True)
    for line in settled:
        print(line, flush=True)
    print(describe_plan(plan), flush=True)


def describe_run(n_trials: int, n_jobs: int, rows: Sequence[Row]) -> dict[str, int]:
    """Say what this run may still start, and from which trial on: for `--status`."""
    waiting = [row.number for row in rows if row.state == "WAITING"]
    return {
        "n_trials": n_trials,
        "n_jobs": n_jobs,
        "to_start": max(0, n_trials - count_complete(rows)),
        "first_trial": min(waiting, default=len(rows)),
    }


def banner(args: argparse.Namespace, database: str, rows: Sequence[Row] | None) -> list[str]:
    """Say what is about to start; rows: None for a new study."""
    if rows is None:
        return [
            RULE,
            "STARTING NEW HYPERPARAMETER SEARCH",
            RULE,
            f"Study database: {database}",
            f"Number of trials: {args.n_trials}",
            "Optimization metric: Validation Macro Top-1 Accuracy",
            "Note: This search is resumable. You can safely stop and restart.",
            RULE,
        ]
    states = count_states(rows)
    values = [row.value for row in rows if row.value is not None]
    interrupted = states["interrupted"]
    return [
        RULE,
        "RESUMING EXISTING STUDY",
        RULE,
        f"Study loaded from: {database}",
        f"Completed trials: {states['complete']}",
        f"Pruned trials: {states['pruned']}",
        f"Failed trials: {states['failed']}",
        *([f"Interrupted trials: {interrupted}"] if interrupted else []),
        f"Remaining trials: {max(0, args.n_trials - states['complete'])}",
        f"Best value so far: {percent(max(values, default=None))}",
        RULE,
    ]


def describe_plan(plan: Plan) -> str:
    """Say on what the search runs, as wide as the terminal."""
    lines = plan.data.report["lines"]
    counts = ", ".join(f"{lines[split]} {split}" for split in lines)
    used = len(plan.data.writers)
    others = plan.data.report["left_out"].get(OTHERS, {}).get("count", 0)
    writers = counted(used, "writer")
    if others:
        writers = f"{used} of {used + others} writers (--use_all_writers takes all)"
    facts = [
        writers,
        f"lines: {counts}",
        f"{plan.data.line_height} px",
        f"weights: {plan.settings['weights']}",
    ]
    if plan.trains:
        where = ", ".join(dict.fromkeys(f"GPU {gpu}" for slot in plan.slots for gpu in slot))
        ranks = f" of {plan.ranks} ranks" if plan.ranks > 1 else ""
        trials, threads = counted(len(plan.slots), "trial"), counted(plan.threads, "thread")
        facts.append(f"{where or 'CPU'}, {trials}{ranks} at once, {threads} each")
    return "\n".join(wrapped(facts, " | "))
