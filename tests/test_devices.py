"""GPUs divided between trials, and set aside when they fail: on the CPU, with fake ones."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import RealChild
from test_search import Run, run, trials_of

from writer_search.common.errors import UserError
from writer_search.processes import runner as runner_module
from writer_search.processes.devices import Devices, divide, visible_entries
from writer_search.processes.machine import _visible_gpus
from writer_search.study import preparation
from writer_search.study.store import open_study

__all__ = ["run"]  # the fixture


@pytest.mark.parametrize(
    ("visible", "count", "entries"),
    [
        (None, 2, ["0", "1"]),
        (None, 0, []),
        ("", 0, []),
        ("2,3", 2, ["2", "3"]),
        (" 3 , 1 ", 2, ["3", "1"]),
        ("1,-1,2", 1, ["1"]),  # CUDA stops at what names no device
        ("GPU-8932f937-d72c,GPU-14", 2, ["GPU-8932f937-d72c", "GPU-14"]),
        ("MIG-aa,MIG-bb,MIG-cc", 1, ["MIG-aa", "MIG-bb", "MIG-cc"]),  # one of them to a process
        ("MIG-GPU-8932/1/0", 1, ["MIG-GPU-8932/1/0"]),
    ],
)
def test_entries_of_cuda_visible_devices(
    visible: str | None, count: int, entries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visible_entries(visible, count) == entries
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _visible_gpus("auto") == entries
    assert _visible_gpus("cpu") == []
    if entries:
        assert _visible_gpus("cuda:0") == entries[:1]
    else:
        with pytest.raises(UserError, match="sees no CUDA device"):
            _visible_gpus("cuda")


@pytest.mark.parametrize(
    ("gpus", "n_jobs", "per_trial", "slots"),
    [
        ([], None, 1, [()]),
        ([], 3, 2, [(), (), ()]),
        (["a", "b"], None, 1, [("a",), ("b",)]),
        (["a", "b"], 1, 1, [("a",)]),
        (["a", "b"], 5, 1, [("a",), ("b",), ("a",), ("b",), ("a",)]),
        (["a", "b", "c", "d", "e"], None, 2, [("a", "b"), ("c", "d")]),
        (["a", "b", "c"], 2, 3, [("a", "b", "c"), ("a", "b", "c")]),
    ],
)
def test_slots(gpus: list[str], n_jobs: int | None, per_trial: int, slots: list[Any]) -> None:
    assert divide(gpus, n_jobs, per_trial) == tuple(slots)


def test_too_few_gpus() -> None:
    with pytest.raises(UserError, match=r"--gpus_per_trial 3: there are 2 GPU\(s\) here: a, b"):
        divide(["a", "b"], None, 3)


def test_a_start_between_two_failures_forgives() -> None:
    devices = Devices([("a",), ("b",), ("a",)])
    assert devices.free([]) == 0
    assert not devices.failed("a", "cold")
    assert devices.free([]) == 1, "one without failures first"
    devices.started("a")
    assert not devices.failed("a", "cold")
    assert devices.failed("a", "cold")
    assert devices.usable == [1]
    assert devices.free([1]) is None


class Started:
    """Stands in for ChildProcess: trials on fake GPUs; remembers which trial had which."""

    def __init__(self) -> None:
        self.on: dict[str, list[int]] = defaultdict(list)

    def __call__(self, work: str, job: Any) -> RealChild:
        if work.endswith("run_trial"):
            self.on[job.gpus[0]].append(int(job.trial_dir.name.partition("_")[2]))
            work = "faults:on_fake_gpu"
        return RealChild(work, job)


@pytest.fixture
def on_gpus(run: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command on a machine with GPUs of these names."""
    started = Started()
    ask = preparation.ask_machine

    def command(gpus: list[str], *more: str, **replaced: str) -> tuple[int, Started]:
        monkeypatch.setattr(runner_module, "ChildProcess", started)
        monkeypatch.setattr(
            preparation,
            "ask_machine",
            lambda *arguments: ask(*arguments) | {"gpus": gpus},
        )
        return run(*more, **replaced), started

    return command


def test_each_gpu_has_its_own_trial(
    on_gpus: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, started = on_gpus(["GPU-a", "GPU-b"], n_trials="4")
    assert code == 0
    assert started.on["GPU-a"][0] == 0
    assert started.on["GPU-b"][0] == 1
    assert sorted(started.on["GPU-a"] + started.on["GPU-b"]) == [0, 1, 2, 3]
    assert "GPU GPU-a, GPU GPU-b, 2 trial(s) at once, 1 thread(s) each" in capfd.readouterr().out
    config = json.loads((tmp_path / "c" / "trial_001" / "config.json").read_text())
    assert config["device"] == "GPU-b"


@pytest.mark.parametrize("bad", ["broken", "dying"])
def test_failing_gpu_is_set_aside_and_its_trials_run_on_another(
    bad: str, on_gpus: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, started = on_gpus([bad, "good"], n_trials="4", epochs="1")
    assert code == 0
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["COMPLETE"] * 4
    assert len(started.on[bad]) == 2, "no third trial starts there"
    assert set(started.on["good"]) == {0, 1, 2, 3}
    printed, problems = capfd.readouterr()
    cause = "initialization error" if bad == "broken" else "killed by SIGSEGV"
    assert problems.count("\n") == 1
    assert f"warning: GPU {bad} failed 2 times in a row and is set aside: " in problems
    assert cause in problems
    assert f"trial   0 | GPU {bad} failed at the start: " in printed


def test_no_gpu_left_stops_with_the_cause(
    on_gpus: Any, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _ = on_gpus(["broken1", "broken2"], n_trials="9", epochs="1")
    assert code == 3
    problems = capfd.readouterr().err
    assert "error: no device is left: GPU broken" in problems
    assert "Traceback" not in problems
    trials = open_study(tmp_path / "c").get_trials()
    assert {trial.state.name for trial in trials} == {"FAIL"}
    assert len(trials) <= 3, "no trial is used up for nothing"
    log = (tmp_path / "c" / "trial_000" / "error.log").read_text()
    assert "cause:  no device is left: GPU broken" in log
    code, _ = on_gpus(["good"], "--continue_interrupted", n_trials="2", epochs="1")
    assert code == 0
    params = [json.dumps(t.params) for t in open_study(tmp_path / "c").get_trials()]
    assert params[len(trials)] == params[0], "its hyperparameters are not lost"
