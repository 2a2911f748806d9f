"""Files of an earlier version open in this one: a study, its trials, checkpoints and models.

`assets/search_of_november_2026.tar.gz` was written before the code moved into a package, with
torch 2.14.1 and Optuna 5.0.0: two complete trials and a confirmation, one trial that SIGTERM
stopped in epoch 10 of 40, and one that `kill -9` of the search left running in epoch 6.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from hyperparameter_search import main
from train import main as train_main
from writer_search.results.rows import read_database, read_history

ASSET = Path(__file__).parent / "assets" / "search_of_november_2026.tar.gz"
FIXED = ("backbone=tiny", "line_height=16", "crop_width=32", "batch_size=8", "precision=float32")


@pytest.fixture
def search_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ASSET) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "search"


def argv(*more: str) -> list[str]:
    fixed = [word for value in FIXED for word in ("--fix", value)]
    return [
        *("--data_root", "lines", "--checkpoint_dir", "search", "--use_all_writers"),
        *("--weights", "none", "--device", "cpu", "--patience", "9999", "--epochs", "40"),
        *(*fixed, *more),
    ]


def states(search_dir: Path) -> list[str]:
    return [row.state for row in read_database(search_dir / "optuna_study.db").rows]


def test_a_search_goes_on_from_its_old_checkpoints(
    search_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = (search_dir / "trial_001" / "final_model.pth").read_bytes()
    seen = {n: read_history(search_dir / f"trial_{n:03d}") for n in (2, 3)}
    assert main(argv("--n_trials", "4", "--continue_interrupted")) == 0
    assert "RESUMING EXISTING STUDY" in capsys.readouterr().out
    assert states(search_dir) == ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert (search_dir / "trial_001" / "final_model.pth").read_bytes() == finished
    for old, new in ((2, 4), (3, 5)):
        history = read_history(search_dir / f"trial_{new:03d}")
        assert len(history) == 40
        saved = [row for row in seen[old] if row["epoch"] <= len(seen[old]) - 1]
        assert history[: len(saved)] == saved, "no epoch is trained twice"


def test_old_trials_rebuild_the_study(search_dir: Path) -> None:
    before = read_database(search_dir / "optuna_study.db").rows
    (search_dir / "optuna_study.db").unlink()
    assert main(["--checkpoint_dir", "search", "--recover"]) == 0
    after = read_database(search_dir / "optuna_study.db").rows
    assert [row.params for row in after] == [row.params for row in before]
    assert [row.value for row in after] == [row.value for row in before]


def test_status_and_models_are_read(search_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint_dir", "search", "--status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["number"] == 0
    for model in sorted(search_dir.glob("**/*_model.pth")):
        images = [
            "lines/test/" + str(next(Path("lines/test").rglob("*.png")).relative_to("lines/test"))
        ]
        assert train_main(["--predict", *images, "--model", str(model), "--json"]) == 0
        (line,) = json.loads(capsys.readouterr().out)["lines"]
        assert line["image"] == images[0]


def test_an_old_trial_is_trained_again(search_dir: Path) -> None:
    config = search_dir / "trial_000" / "config.json"
    out = search_dir.parent / "again"
    command = ["--config", str(config), "--data_root", "lines", "--output_dir", str(out)]
    assert train_main(command) == 0
    new, old = (read_history(directory) for directory in (out, config.parent))
    assert new[0]["train_loss"] == pytest.approx(old[0]["train_loss"], rel=1e-4)
    assert len(new) == len(old)
