"""Records a trial: its start in config.json, its end in the study, trial.json and error.log."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, Trial, TrialState

from writer_search.common.clock import now
from writer_search.common.files import read_json, write_signed, write_text
from writer_search.processes.messages import Job
from writer_search.processes.plan import Plan
from writer_search.results.rows import STARTED_BY_CLOCK, aware, trial_dir


def tell(
    study: optuna.Study,
    checkpoint_dir: Path,
    number: int,
    state: TrialState,
    value: float | None = None,
) -> None:
    """Finish a trial in the study, then write its trial.json."""
    write_record(checkpoint_dir, study.tell(number, value, state=state))


def write_config(plan: Plan, trial: Trial, job: Job) -> None:
    """Write config.json: all that it takes to repeat the trial, and to rebuild the study."""
    write_signed(
        job.trial_dir / "config.json",
        {
            "number": trial.number,
            "hyperparameters": trial.params,
            "distributions": distributions_of(trial),
            "config": job.config.to_dict(),
            "config_hash": job.config.hash(),
            "data_fingerprint": plan.data.fingerprint,
            "user_attrs": trial.user_attrs,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            STARTED_BY_CLOCK: now(),
            "device": ",".join(job.gpus) or "cpu",
            "ranks": job.ranks,
            "threads": job.threads,
            "micro_batch": job.micro_batch,
            "settings": plan.settings,
            **plan.provenance,
        },
    )


def write_record(checkpoint_dir: Path, trial: FrozenTrial) -> None:
    """Write a finished trial's trial.json: all that it takes to rebuild the study's row."""
    directory = trial_dir(checkpoint_dir, trial.number)
    directory.mkdir(exist_ok=True)
    write_signed(
        directory / "trial.json",
        {
            "number": trial.number,
            "state": trial.state.name,
            "value": trial.value,
            "params": trial.params,
            "distributions": distributions_of(trial),
            "intermediate_values": trial.intermediate_values,
            "datetime_start": _iso(trial.datetime_start),
            "datetime_complete": _iso(trial.datetime_complete),
            "user_attrs": trial.user_attrs,
        },
    )


def distributions_of(trial: Trial | FrozenTrial) -> dict[str, str]:
    """Describe the distributions of a trial's hyperparameters, as Optuna stores them."""
    return {name: distribution_to_json(d) for name, d in trial.distributions.items()}


def _iso(naive_local: datetime | None) -> str | None:
    time = aware(naive_local)
    return time.isoformat() if time else None


def write_error_log(
    directory: Path, cause: str, *, epoch: int | None, traceback: str = "", advice: str = ""
) -> None:
    """Write error.log: when, where, why in one line, the traceback, what to try."""
    lines = [
        f"when:   {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"epochs: {epoch or 0} done",
        f"cause:  {cause}",
    ]
    if advice:
        lines.append(f"try:    {advice}")
    if traceback:
        lines += ["", traceback.rstrip()]
    directory.mkdir(exist_ok=True)
    write_text(directory / "error.log", "\n".join(lines) + "\n")


def finished_value(directory: Path) -> float | None:
    """Give the value of a trial that wrote its metrics for the configuration beside them."""
    try:
        metrics, config = (
            read_json(directory / "metrics.json"),
            read_json(directory / "config.json"),
        )
        value = metrics["value"]
        matches = metrics["config_hash"] == config["config_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if matches and isinstance(value, float) and math.isfinite(value) else None
