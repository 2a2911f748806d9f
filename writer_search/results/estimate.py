"""How long a search still takes: a range, from how long its trials have taken so far."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from writer_search.common.text import duration
from writer_search.config import COHOG
from writer_search.results.rows import Row

# Student's t of an interval that holds 80 % (Abramowitz and Stegun, table 26.10), by degrees of
# freedom from 1; above, the normal distribution's.
T80 = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372)
NORMAL80 = 1.282
EVIDENCE_TRIALS = 100  # the last ones: they are most like those to come, and quick to go through
TRIALS_FOR_SPREAD = 3  # two say too often that all are alike

BEFORE = "epochs_before"  # attribute: epochs that were trained before a break

Range = tuple[float, float]  # seconds: low, high
Timed = tuple[float, float]  # of one trial: epochs done, seconds they took


def seconds_left(
    finished: Sequence[Timed],
    running: Sequence[Timed],
    to_start: int,
    epochs: int,
    jobs: int,
    patience: int,
    fitted: Sequence[float] = (),
) -> Range | None:
    """Estimate the time left as a range that should hold it four times in five.

    finished: complete and pruned trials, since later ones will be pruned too.   to_start: trials to
    come.   epochs: the most of a trial.   jobs: trials at once.   patience: epochs without a better
    value that end a trial. A pruner judges no trial in the first fifth of its epochs.   fitted: the
    seconds of descriptors among networks; some of the trials to come will be descriptors too.
    Returns None before there is evidence: no epoch is done yet. From the third finished trial on,
    their spread makes the range; before, it is what the limits of a trial allow.
    """
    speeds = [seconds / done for done, seconds in [*finished, *running] if done > 0 and seconds > 0]
    if not speeds:
        return None
    begun = [(done, seconds) for done, seconds in running if done > 0]
    fewest = min(epochs, patience + 1, epochs // 5 + 1)
    rests = [_rest(done, seconds, finished, fewest, epochs) for done, seconds in begun]
    coming = to_start + len(running) - len(begun)
    took = [seconds for _, seconds in finished]
    if took:  # descriptors alone say nothing of how long networks take
        took += fitted
    least = min([fewest * min(speeds), *fitted])
    low, high = _trials_to_come(took, coming, least, epochs * max(speeds))
    low += sum(rest[0] for rest in rests)
    high += sum(rest[1] for rest in rests)
    if jobs > 1:
        # The last trial may run alone.
        longest = max([epochs * max(speeds)] if coming else [rest[1] for rest in rests], default=0)
        high = high / jobs + (1 - 1 / jobs) * longest
    low = max([low / max(1, jobs), *(rest[0] for rest in rests)])
    return low, max(low, high)


def recorded_left(
    rows: Sequence[Row],
    running: Mapping[int, Timed],
    to_start: int,
    jobs: int,
    settings: Mapping[str, Any],
) -> Range | None:
    """Estimate as `seconds_left` does, of a search that is known by its records alone.

    running: by the trials' numbers.   settings: the study's.
    """
    fits = trains_nothing(settings.get("space", {}))
    alike = [running[row.number] for row in rows if row.number in running and row.is_fitted == fits]
    epochs, patience = (int(settings.get(name, 0)) for name in ("epochs", "patience"))
    most = 1 if fits else epochs
    fitted = fitted_seconds(rows, fits)
    return seconds_left(finished_epochs(rows, fits), alike, to_start, most, jobs, patience, fitted)


def _rest(
    done: float, seconds: float, finished: Sequence[Timed], fewest: int, epochs: int
) -> Range:
    """Say how long a running trial goes on: to where others have ended, those pruned included."""
    speed = seconds / done
    ends = [float(end) for end, _ in finished if end > done]
    if len(finished) < TRIALS_FOR_SPREAD or not ends:
        ends = [max(done, float(fewest)), float(epochs)]
    return (min(ends) - done) * speed, max(0.0, max(ends) - done) * speed


def _trials_to_come(took: Sequence[float], count: int, least: float, longest: float) -> Range:
    """Say how long so many trials take, one after the other.

    took: seconds of finished ones.   least, longest: what the limits of a trial allow.
    """
    known = len(took)
    if known < TRIALS_FOR_SPREAD:
        return count * least, count * longest
    quantile = T80[known - 2] if known - 2 < len(T80) else NORMAL80
    # The sum of `count` new ones deviates by their own spread and by the known mean's error.
    error = quantile * statistics.stdev(took) * math.sqrt(count + count**2 / known)
    middle = count * statistics.mean(took)
    most = max(middle, count * longest)
    return max(count * min(took) / 2, middle - error), min(most, middle + error)


def trains_nothing(space: Mapping[str, Any]) -> bool:
    """Tell a search of descriptors alone, whose trials have one epoch.

    space: the study's, as its settings have it.
    """
    return space.get("backbone") in (COHOG, {"choices": [COHOG]})


def finished_epochs(rows: Sequence[Row], fitted: bool = False) -> list[Timed]:
    """Give (epochs, seconds) of the last complete or pruned trials, the last one first.

    fitted: of those that are fitted at once, which say nothing of those that are trained.
    """
    ended = (row for row in reversed(rows) if row.state in ("COMPLETE", "PRUNED"))
    timed = (
        unbroken(row.attributes.get("epochs", 0), row.attributes.get(BEFORE, 0), row.seconds or 0.0)
        for row in islice(ended, EVIDENCE_TRIALS)
        if row.is_fitted == fitted
    )
    return [one for one in timed if one[0] > 0]


def fitted_seconds(rows: Sequence[Row], fits: bool) -> list[float]:
    """Give the seconds of the last complete descriptors; none where the search fits them alone."""
    return [] if fits else [seconds for _, seconds in finished_epochs(rows, fitted=True)]


def unbroken(done: float, before: float, seconds: float) -> Timed:
    """Give (epochs, seconds) as of a trial without a break.

    done: its epochs, of which `before` were trained before the break; the seconds are those since.
    (0, 0) where it has trained nothing since, or nobody knows how long: it tells nothing then.
    """
    if done <= before or seconds <= 0:
        return 0.0, 0.0
    return float(done), seconds * done / (done - before)


def range_text(left: Range | None) -> str:
    """Say a range of time for people."""
    if left is None:
        return "not known yet"
    low, high = duration(left[0]), duration(left[1])
    return f"about {high}" if low == high else f"{low} to {high}"
