"""`train.py --predict`: the same guesses as validation, pages by averaging, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data import LineSet
from train import main, train
from writer_search.config import TrialConfig
from writer_search.training import prediction
from writer_search.training.checkpoints import load_for_prediction, load_model
from writer_search.training.outcomes import Stopped
from writer_search.training.prediction import predict

PROGRAM = Path(__file__).parents[1] / "train.py"


@pytest.fixture(scope="session")
def trial(data: LineSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished trial that learned a little, and the checkpoint of another under way."""
    directory = tmp_path_factory.mktemp("trained")
    config = TrialConfig(
        seed=1,
        epochs=12,
        patience=12,
        backbone="tiny",
        line_height=16,
        crop_width=32,
        batch_size=8,
        learning_rate=0.01,
    )

    def stop(epoch: int, row: dict[str, Any]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(config, data, directory, stop)
    shutil.copy(directory / "latest_checkpoint.pth", directory / "checkpoint.pth")
    train(config, data, directory)
    return directory


def predicted(capfd: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, Any, str]:
    code = main(["--predict", *map(str, argv), "--json", "--device", "cpu"])
    printed, problems = capfd.readouterr()
    return code, json.loads(printed) if printed else None, problems


@pytest.mark.parametrize("lines_at_once", [256, 5])
def test_guesses_are_validation_s(
    lines_at_once: int,
    trial: Path,
    lines_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """On the validation images, found by itself: the accuracies that the trial recorded."""
    monkeypatch.setattr(prediction, "LINES_AT_ONCE", lines_at_once)
    code, found, problems = predicted(
        capfd, lines_root / "val", "--model", trial / "best_model.pth"
    )
    assert (code, problems) == (0, "")
    best = json.loads((trial / "metrics.json").read_text())["best"]
    lines, pages = found["lines"], found["pages"]
    assert len(lines) == 12
    assert len(pages) == 4
    root = str(lines_root / "val")
    right = [g["writer"] == Path(os.path.relpath(g["page"], root)).parts[0] for g in lines]
    assert sum(right) / len(right) == pytest.approx(best["micro_top1"])
    assert sum(right) / len(right) > 0.3, "better than chance, which is 1 in 4"
    right = [g["writer"] == Path(os.path.relpath(g["page"], root)).parts[0] for g in pages]
    assert sum(right) / len(right) == pytest.approx(best["page_macro_top1"])
    for guess in [*lines, *pages]:
        assert guess["writer"] != guess["runner_up"]
        assert 1 >= guess["probability"] >= guess["runner_up_probability"] > 0
    assert [guess["lines"] for guess in pages] == [3] * 4


def test_page_averages_where_the_majority_of_its_lines_errs(
    trial: Path, lines_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lines lean to writer a, the third is sure of b: the page is b's."""
    images = sorted((lines_root / "val").rglob("*.png"))
    page = tmp_path / "page"
    page.mkdir()
    for image in images[:3]:
        shutil.copy(image, page / image.name)
    model, config, _ = load_model(trial / "best_model.pth")
    logits = torch.tensor([[1.0, 0.6, 0.0], [1.0, 0.6, 0.0], [0.0, 6.0, 0.0]])
    monkeypatch.setattr(prediction, "line_logits", lambda *_: logits)
    found = predict(model, config, ("a", "b", "c"), [page], torch.device("cpu"))
    assert [guess.writer for guess in found.lines] == ["a", "a", "b"]
    (guess,) = found.pages
    assert (guess.writer, guess.runner_up, guess.lines) == ("b", "a", 3)
    mean = torch.log_softmax(logits.double(), 1).mean(0)
    assert guess.probability == pytest.approx(float(mean.exp()[1] / mean.exp().sum()))
    assert found.lines[2].probability == pytest.approx(float(logits.double().softmax(1)[2, 1]))


def test_images_of_two_pages_with_one_name_stay_apart(
    trial: Path, lines_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Given one by one, twice, and by another way to the same directory: each image counts once."""
    one, other = sorted((lines_root / "val").rglob("line_001.png"))[:2]
    detour = one.parent / ".." / one.parent.name / one.name
    code, found, _ = predicted(capfd, one, other, one, detour, "--model", trial / "final_model.pth")
    assert code == 0
    assert [guess["image"] for guess in found["lines"]] == [str(one), str(other)]
    assert [guess["lines"] for guess in found["pages"]] == [1, 1]


def test_table_and_csv(trial: Path, lines_root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = sorted((lines_root / "test").rglob("line_001.png"))[0].parent
    argv = ["--predict", str(page), "--model", str(trial / "best_model.pth")]
    assert main([*argv, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert [bool(row["image"]) for row in rows] == [True, True, True, False]
    assert main(argv) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "writer", "probability", "runner-up", "probability"]
    assert lines[4] == ""
    assert lines[5].split()[:2] == ["page", "lines"]
    share = f"{100 * float(rows[3]['probability']):.1f}"
    assert lines[6].split()[:5] == [str(page), "3", rows[3]["writer"], share, "%"]
    assert len({line.rindex("%") for line in lines[1:4]}) == 1, "columns are aligned"


def test_images_that_cannot_be_read_are_named(
    trial: Path, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = sorted((lines_root / "val").rglob("line_001.png"))[0]
    page = tmp_path / "page"
    page.mkdir()
    shutil.copy(good, page / "a.png")
    (page / "broken.png").write_bytes(good.read_bytes()[:60])
    (page / "notes.txt").write_text("not asked about: in a directory images alone are meant")
    (tmp_path / "empty").mkdir()
    model = ["--model", str(trial / "best_model.pth")]
    code, found, problems = predicted(
        capfd, page, tmp_path / "none.png", page / "notes.txt", tmp_path / "empty", *model
    )
    assert code == 1
    assert [guess["image"] for guess in found["lines"]] == [str(page / "a.png")]
    names = ["broken.png", "none.png", "notes.txt", "empty"]
    assert len(problems.splitlines()) == 4
    assert all(any(f"{name}: " in line for line in problems.splitlines()) for name in names)
    assert len(found["skipped"]) == 4
    code, found, problems = predicted(capfd, page / "broken.png", *model)
    assert (code, found) == (2, None)
    assert problems.splitlines()[-1] == "error: --predict: no image could be read"


def test_threshold_of_an_earlier_version_that_marked_nothing_is_not_known(
    trial: Path, tmp_path: Path
) -> None:
    saved = torch.load(trial / "best_model.pth", weights_only=True)
    for sure_from, known in ((0.0, None), (0.6, 0.6)):
        saved["metrics"]["sure_from"] = sure_from
        torch.save(saved, tmp_path / "model.pth")
        assert load_for_prediction(tmp_path / "model.pth")[3] == known


def test_directory_that_cannot_be_read_costs_no_other(
    trial: Path,
    lines_root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = sorted((lines_root / "val").rglob("line_001.png"))[0]
    for page in ("one", "two"):
        (tmp_path / "pages" / page).mkdir(parents=True)
        shutil.copy(good, tmp_path / "pages" / page / "a.png")
    closed, scan = tmp_path / "pages" / "two", os.scandir

    def scandir(directory: Any) -> Any:
        if Path(directory) == closed:
            raise PermissionError(13, "Permission denied", str(directory))
        return scan(directory)

    monkeypatch.setattr("writer_search.lines.walk.os.scandir", scandir)
    model = ["--model", str(trial / "best_model.pth")]
    code, found, problems = predicted(capfd, tmp_path / "pages", *model)
    assert code == 1
    assert [guess["image"] for guess in found["lines"]] == [str(tmp_path / "pages/one/a.png")]
    assert f"{closed}: " in problems
    assert "Permission denied" in problems


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile_was_here",)


def test_file_that_is_no_model_is_refused_in_one_line(
    trial: Path,
    lines_root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = torch.load(trial / "best_model.pth", weights_only=True)
    files: dict[str, Any] = {
        "hostile.pth": {**saved, "writers": _Hostile()},
        "shape.pth": {**saved, "writers": saved["writers"] + ["one more"]},
        "config.pth": {**saved, "config": {**saved["config"], "crop_width": -1}},
        "kind.pth": {**saved, "writers": 7, "config": []},
        "format.pth": {**saved, "preprocessing": {"version": 0}},
        "list.pth": [1, 2],
    }
    for name, content in files.items():
        torch.save(content, name)
    Path("pickle.pth").write_bytes(pickle.dumps(_Hostile()))
    Path("text.pth").write_text("hello")
    Path("empty.pth").touch()
    Path("half.pth").write_bytes((trial / "best_model.pth").read_bytes()[:5000])
    shutil.copy(trial / "checkpoint.pth", "checkpoint.pth")
    Path("directory.pth").mkdir()
    expected = {
        "hostile.pth": "refused",
        "pickle.pth": "refused",
        "checkpoint.pth": "is the checkpoint of a trial under way, not a model",
        "missing.pth": "does not exist",
        "config.pth": "crop_width=-1 is out of range",
        "format.pth": "prepared in another way",
        "list.pth": "no writers' names",
    }
    for name in [*files, *expected, "text.pth", "empty.pth", "half.pth", "directory.pth"]:
        assert main(["--predict", str(lines_root), "--model", name]) == 2, name
        printed, problems = capfd.readouterr()
        assert printed == ""
        assert problems.count("\n") == 1, problems
        assert problems.startswith(f"error: {name} "), problems
        assert "weights_only" not in problems, "no advice to load it all the same"
        assert expected.get(name, "") in problems
    assert not Path("hostile_was_here").exists()


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "give --predict, to use a model, or --config"),
        (["--predict", "x.png"], "--model is missing"),
        (["--predict", "x", "--model", "m", "--json", "--csv"], "not allowed with"),
        (["--predict", "x", "--model", "m", "--device", "tpu"], "'tpu' is not auto"),
    ],
)
def test_mistakes(argv: list[str], problem: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    printed, problems = capfd.readouterr()
    assert printed == ""
    assert problem in problems
    assert problems.count("\n") == 1


@pytest.mark.slow
def test_program_writes_nothing(trial: Path, lines_root: Path, tmp_path: Path) -> None:
    argv = ["--predict", str(lines_root / "val"), "--model", str(trial / "best_model.pth")]
    run = subprocess.run(
        [sys.executable, str(PROGRAM), *argv, "--csv"],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert len(run.stdout.splitlines()) == 1 + 12 + 4
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_changed_bytes_is_refused(
    trial: Path, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((trial / "best_model.pth").read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 64):
        content[place] ^= 255
    (tmp_path / "changed.pth").write_bytes(content)
    code, _, problems = predicted(capfd, lines_root / "val", "--model", tmp_path / "changed.pth")
    assert code == 2
    assert "changed.pth is not a model of this program: " in problems
    assert "damaged" in problems or "CRC" in problems


def test_what_is_not_looked_at_or_odd_is_told(
    trial: Path, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = next((lines_root / "val").rglob("line_001.png")).parent
    shutil.copytree(page, tmp_path / "page")
    shutil.copytree(page, tmp_path / "page" / "@eaDir")
    (tmp_path / "page" / "photo.heic").write_bytes(b"photo")
    with Image.open(page / "line_001.png") as image:
        image.rotate(90, expand=True).save(tmp_path / "page" / "turned.png")
    code, found, problems = predicted(capfd, tmp_path / "page", "--model", trial / "best_model.pth")
    assert code == 1
    assert len(found["lines"]) == 4
    assert len(found["pages"]) == 1
    assert "1 .heic files (first " in problems
    assert "eaDir" not in problems
    (doubt,) = found["doubtful"].items()
    assert doubt[0].endswith("turned.png")
    assert "taller than wide" in doubt[1]
    assert doubt[1] in problems
