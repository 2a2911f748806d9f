"""predictions.csv: whom a trial takes each validation line and page for."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from data import LineSet
from train import train
from writer_search.config import TrialConfig
from writer_search.lines.predictions import page_of, read_predictions, write_predictions
from writer_search.training.metrics import compute_metrics


def test_a_trial_s_predictions_agree_with_its_metrics(
    data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    metrics = train(config, data.for_trial(), tmp_path)
    assert metrics is not None
    lines = read_predictions(tmp_path)
    held_out = data.select("val")
    assert [line.path for line in lines] == [data.paths[i] for i in held_out]
    assert [line.writer for line in lines] == [data.writers[data.labels[i]] for i in held_out]
    assert all(line.path.startswith(f"val/{line.writer}/{line.page}/") for line in lines)
    assert np.mean([line.is_right for line in lines]) == pytest.approx(metrics.micro_top1)
    pages = {(line.writer, line.page): line.page_guess for line in lines}
    right = [writer == guess for (writer, _), guess in pages.items()]
    assert np.mean(right) == pytest.approx(metrics.page_macro_top1), "one page each"
    for line in lines:
        assert 0 <= line.probability_of_writer <= line.probability <= 1
        assert line.is_right == (line.probability == line.probability_of_writer)


def test_probabilities_and_page_guesses_are_those_of_the_logits() -> None:
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.05, 0.9, 0.05], [0.1, 0.1, 0.8]])
    labels, pages = np.array([0, 0, 0, 2]), np.array([0, 0, 0, 1])
    found = compute_metrics(logits, labels, pages, ("a", "b", "c")).predictions
    assert found is not None
    assert found.dtype == np.float32
    expected = [[0, 0.7, 0.7, 1], [1, 0.6, 0.1, 1], [1, 0.9, 0.05, 1], [2, 0.8, 0.8, 2]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "writer", "page"),
    [
        ("val/anna/b1/p2/line.png", "anna", "b1/p2"),
        ("anna/p2/line.png", "anna", "p2"),
        ("val/val/p/line.png", "val", "p"),
        ("val/anna/line.png", "anna", ""),
        ("elsewhere/line.png", "anna", ""),
    ],
)
def test_page_lies_between_writer_and_image(path: str, writer: str, page: str) -> None:
    assert page_of(path, writer) == page


def test_names_of_all_kinds_come_back(tmp_path: Path) -> None:
    writers = ['a,"b"', "كاتب", "\udcff", "x\ny"]
    paths = [f"val/{writer}/p 1/l.png" for writer in writers]
    found = [(3.0, 0.5, 0.25, 0.0)] * 4
    write_predictions(tmp_path, paths, range(4), writers, found)
    lines = read_predictions(tmp_path)
    assert [line.writer for line in lines] == ['a,"b"', "كاتب", "\\udcff", "x\ny"]
    assert {line.guess for line in lines} == {"x\ny"}
    assert {line.page_guess for line in lines} == {'a,"b"'}
    assert lines[2].path == "val/\\udcff/p 1/l.png"


@pytest.mark.parametrize("content", [b"", b"a,b\n", b"\xff\xfe", b"path,writer\n1,2\n"])
def test_what_is_not_ours_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_bytes(content)
    assert read_predictions(tmp_path) == []
    assert read_predictions(tmp_path / "missing") == []


def test_a_probability_that_is_none_is_not_believed(tmp_path: Path) -> None:
    write_predictions(tmp_path, ["val/a/l.png"], [0], ["a"], [(0.0, 0.5, 0.5, 0.0)])
    path = tmp_path / "predictions.csv"
    header, row = csv.reader(path.read_text().splitlines())
    path.write_text(",".join(header) + "\n" + ",".join(row).replace("0.50000", "nan") + "\n")
    assert read_predictions(tmp_path) == []
