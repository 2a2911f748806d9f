"""What a confirmation found: means and deviations, whether the ranking held, the winner.

Reads rows, needs neither torch nor Optuna; `confirm.py` does the training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from writer_search.common.text import counted, percent
from writer_search.results.chosen import CONFIRM
from writer_search.results.rows import Row, trial_dir


@dataclass(frozen=True)
class Candidate:
    """A configuration to be confirmed: the search's trial, and the seeds it is trained with."""

    row: Row
    seeds: tuple[int, ...]

    @property
    def value(self) -> float:
        assert self.row.value is not None, "candidates are complete"
        return self.row.value


def summarise(
    candidates: Sequence[Candidate], runs: Sequence[Row], of_trials: Sequence[Row]
) -> dict[str, Any] | None:
    """Compare what the search had with what the new seeds gave; None when no run is complete.

    candidates: best first.   runs: the confirmation's trials.   of_trials: the search's.
    The winner has the highest mean; a candidate that failed with some seed comes after those that
    never did.
    """
    entries = [_entry(rank, candidate, runs) for rank, candidate in enumerate(candidates, 1)]
    order = sorted(entries, key=_place)
    for rank, entry in enumerate(order, 1):
        entry["confirmed_rank"] = rank
    if order[0]["mean"] is None:
        return None
    best_run = max(order[0]["runs"], key=lambda run: run["value"])
    first = entries[0]
    return {
        "metric": "validation macro top-1 accuracy",
        "of_trials": [row.number for row in of_trials if row.state == "COMPLETE"],
        "seeds": len(candidates[0].seeds),
        "candidates": entries,
        "ranking_held": order == entries,
        "optimism": None if first["mean"] is None else first["search_value"] - first["mean"],
        "winner": {
            "trial": order[0]["trial"],
            "mean": order[0]["mean"],
            "deviation": order[0]["deviation"],
            **best_run,
        },
    }


def _entry(rank: int, candidate: Candidate, rows: Sequence[Row]) -> dict[str, Any]:
    runs = [
        {
            "seed": row.attributes["seed"],
            "value": row.value,
            "directory": f"{CONFIRM}/{trial_dir(Path(), row.number).name}",
        }
        for row in rows
        if row.state == "COMPLETE" and row.attributes["seed"] in candidate.seeds
    ]
    values = [float(run["value"]) for run in runs]
    return {
        "trial": candidate.row.number,
        "params": candidate.row.params,
        "is_fitted": candidate.row.is_fitted,
        "search_rank": rank,
        "search_value": candidate.value,
        "runs": runs,
        "failed": len(candidate.seeds) - len(runs),
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def _place(entry: dict[str, Any]) -> tuple[bool, bool, float, int]:
    mean = entry["mean"]
    return mean is None, entry["failed"] > 0, -(mean or 0.0), entry["search_rank"]


def describe(found: dict[str, Any]) -> list[str]:
    """Put a confirmation into lines for people."""
    lines = [
        f"Confirmed with {counted(found['seeds'], 'new seed')} each, validation macro top-1:",
        "  trial  in the search  mean ± deviation  rank",
    ]
    for entry in found["candidates"]:
        failed = f"  {entry['failed']} failed" if entry["failed"] else ""
        lines.append(
            f"  {entry['trial']:5d}  {percent(entry['search_value']):>13}  "
            f"{spread(entry['mean'], entry['deviation']):>16}  "
            f"{entry['search_rank']} -> {entry['confirmed_rank']}{failed}"
        )
    held = "held" if found["ranking_held"] else "did not hold"
    first = found["candidates"][0]
    is_told = not first.get("is_fitted")  # files of earlier versions do not say
    lines.append(f"The ranking {held}." + (_optimism(found["optimism"]) if is_told else ""))
    if any(entry.get("is_fitted") for entry in found["candidates"]):
        lines.append(
            "  A descriptor has the same value with every seed: its deviation says nothing about "
            "how much of it is luck."
        )
    winner = found["winner"]
    lines.append(
        f"Winner: trial {winner['trial']}; summary/best_model.pth is its best run's, "
        f"{winner['directory']}, seed {winner['seed']}, {percent(winner['value'])}"
    )
    return lines + _tie(found["candidates"])


def spread(mean: float | None, deviation: float | None) -> str:
    """Say a mean and a deviation in percent."""
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + (" %" if deviation is None else f" ± {100 * deviation:.2f} %")


def _optimism(optimism: float | None) -> str:
    if optimism is None:
        return ""
    if abs(optimism) < 5e-5:
        return " The search's best value was neither too high nor too low."
    how = "too high" if optimism > 0 else "too low"
    return f" The search's best value was {100 * abs(optimism):.2f} points {how}."


def _tie(candidates: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the winner's lead is worth."""
    order = sorted(candidates, key=lambda entry: int(entry["confirmed_rank"]))
    first, *others = order
    if not others or None in (first["deviation"], others[0]["deviation"]):
        return []
    second = others[0]
    error = math.sqrt(sum(e["deviation"] ** 2 / len(e["runs"]) for e in (first, second)))
    lead = first["mean"] - second["mean"]
    if lead < 0:
        return [f"  trial {second['trial']} has a higher mean, but failed with some of its seeds"]
    if lead > 2 * error:
        return [
            f"  its lead over trial {second['trial']}, {100 * lead:.2f} points, is more than seeds "
            "explain; but all runs were measured on the same lines, and others may differ"
        ]
    return [
        f"  its lead over trial {second['trial']}, {100 * lead:.2f} points, is less than twice "
        f"its standard error ({100 * error:.2f}): take both as equal"
    ]


def remove_other_weights(checkpoint_dir: Path, found: dict[str, Any]) -> None:
    """Delete the weights of all runs but each candidate's best."""
    for entry in found["candidates"]:
        best = max((run["value"] for run in entry["runs"]), default=None)
        for run in entry["runs"]:
            if run["value"] != best:
                for weights in (checkpoint_dir / run["directory"]).glob("*.pth"):
                    weights.unlink(missing_ok=True)
