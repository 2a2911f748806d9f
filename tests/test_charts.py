"""Charts as SVG: well-formed whatever the names, true to scale, and not drawn from too little."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import pytest

from writer_search.results.pictures.axes import Axes, log_ticks, nice_ticks, short
from writer_search.results.pictures.charts import (
    Outcome,
    alone,
    history,
    hyperparameters,
    learning_curves,
    limits,
    trial_curves,
)

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<b>&\udcff"
SPACE = {
    "rate": {"low": 1e-4, "high": 1e-2, "log": True},
    HOSTILE: {"choices": ["a<b", "فارسی"]},
    "fixed": 3,
    "same": {"choices": [1, 2]},
}


def outcomes(values: list[float], state: str = "complete") -> list[Outcome]:
    return [
        Outcome(
            number,
            state,
            value if state == "complete" else None,
            [value / 3, value / 2, value],
            {
                "rate": 10 ** (-4 + number % 3),
                "<b>&\udcff": ["a<b", "فارسی"][number % 2],
                "same": 1,
            },
        )
        for number, value in enumerate(values)
    ]


def test_every_chart_is_well_formed_whatever_the_names() -> None:
    trials = outcomes([50, 80, 82, 83, 85.5])
    charts = [history(trials, 1.5, 5.0), learning_curves(trials, 5.0)]
    charts.append(hyperparameters(trials, SPACE))
    for chart in charts:
        assert chart is not None
        for panel in chart.panels:
            root = ET.fromstring(panel)
            assert root.tag == f"{SVG}svg"
            assert root.get("role") == "img"
            assert root.get("aria-label")
        ET.fromstring(alone(chart.panels, ".c { fill: red }"))
    assert charts[2] is not None
    assert len(charts[2].panels) == 2, "neither what is fixed nor what no trial varied"


def test_a_value_that_was_given_by_hand_has_its_place() -> None:
    trials = outcomes([50, 60, 70])
    by_hand = Outcome(3, "complete", 80.0, [80.0], {**trials[0].params, HOSTILE: "other"})
    chart = hyperparameters([*trials, by_hand], SPACE)
    assert chart is not None
    panel = ET.fromstring(chart.panels[1])
    assert "other" in [text.text for text in panel.iter(f"{SVG}text")]
    assert all(0 < float(dot.get("cx", 0)) < 300 for dot in panel.iter(f"{SVG}circle"))


def test_too_little_is_not_drawn() -> None:
    one = outcomes([50])
    assert history(one, 0.0, None) is None
    assert hyperparameters(outcomes([50, 60]), SPACE) is None
    assert learning_curves([Outcome(0, "complete", 50.0, [50.0], {})], None) is None
    assert trial_curves(0, [{"epoch": 1, "train_loss": 1.0}]) == []
    assert learning_curves(outcomes([3.0, 4.0], "pruned"), None) is not None, "none is complete"


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [100.0, 99.0], [2, 50, 51, 52, 53, 90], [97, 98, 98.5, 99, 10]]
)
def test_axes_of_percentages_stay_within_0_and_100(values: list[float]) -> None:
    low, high = limits(values)
    assert 0 <= low < high <= 100
    assert low <= max(values) <= high


def test_a_dot_stands_where_its_value_is() -> None:
    axes = Axes((0, 10), (0, 100), width=212, height=240, left=0, bottom=20, top=20)
    axes.dot(5, 25, "d", 3, "trial <5>")
    dot = ET.fromstring(axes.svg("one dot")).find(f"{SVG}circle")
    assert dot is not None
    assert (float(dot.get("cx", 0)), float(dot.get("cy", 0))) == (100, 170)
    title = dot.find(f"{SVG}title")
    assert title is not None
    assert title.text == "trial <5>"
    assert axes.at_y(-5) == axes.at_y(0), "what lies below stands at the edge"


def test_pruned_trials_stand_at_their_last_value_and_failures_are_counted() -> None:
    trials = [
        *outcomes([80, 90, 85]),
        Outcome(3, "pruned", None, [10.0, 70.0], {}),
        Outcome(4, "interrupted", None, [], {}),
        Outcome(5, "failed", None, [], {}),
    ]
    chart = history(trials, 2.0, 4.0)
    assert chart is not None
    assert "1 pruned" in chart.caption
    assert "2 failed or interrupted" in chart.caption
    assert "90.00 % ± 2.00" in chart.caption
    assert "Guessing reaches 4.0 %" in chart.caption
    panel = chart.panels[0]
    assert "trial 3, pruned at 70.00 %" in panel
    assert "trial 4, interrupted" in panel
    assert "trial 5, failed" in panel


@pytest.mark.parametrize("ends", [(0, 1), (0.2, 0.9), (12, 12.5), (0, 300), (-3, 4)])
def test_ticks_are_few_round_and_within(ends: tuple[float, float]) -> None:
    ticks = nice_ticks(*ends, most=6)
    assert 2 <= len(ticks) <= 7
    assert all(ends[0] - 1e-9 <= tick <= ends[1] + 1e-9 for tick in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))


@pytest.mark.parametrize("ends", [(3e-4, 6e-3), (1.2e-3, 2.9e-3), (1e-5, 0.5)])
def test_labels_of_a_log_axis_do_not_crowd(ends: tuple[float, float]) -> None:
    ticks = log_ticks(*ends)
    assert 1 <= len(ticks) <= 6
    assert ticks == sorted(ticks)


def test_curves_of_a_trial_leave_out_what_was_not_measured() -> None:
    rows: list[dict[str, Any]] = [
        {"epoch": 1, "train_loss": 2.0, "macro_top1": 0.1},
        {"epoch": 2, "train_loss": float("nan"), "macro_top1": 0.4},
    ]
    panels = trial_curves(7, rows)
    assert len(panels) == 2, "no learning rate was recorded"
    for panel in panels:
        assert "nan" not in ET.tostring(ET.fromstring(panel), encoding="unicode")


def test_curves_of_a_network_with_a_descriptor_show_what_it_gets_right_alone() -> None:
    rows = [
        {"epoch": epoch, "macro_top1": 0.9, "network_macro_top1": epoch / 10} for epoch in (1, 2, 3)
    ]
    (both,) = trial_curves(7, rows)
    (one,) = trial_curves(7, [{k: row[k] for k in ("epoch", "macro_top1")} for row in rows])
    assert "network alone (grey), both (colour)" in both
    assert "alone" not in one
    assert both.count('class="b"') == one.count('class="b"') == 1
    assert (both.count('class="l"'), one.count('class="l"')) == (1, 0)


def test_names_become_short_labels() -> None:
    assert short("a" * 100, 11) == "aaaaa…aaaaa"
    assert "\n" not in short("a\nb")
