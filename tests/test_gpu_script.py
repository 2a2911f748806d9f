"""`benchmarks.gpu` without a GPU: each check's logic on the CPU, verdicts, deadlines, advice."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from benchmarks import gpu, gpu_checks, gpu_trials
from benchmarks.gpu_checks import Found, Setting
from writer_search.processes import machine

VALUES = {"backbone": "tiny", "line_height": 16, "crop_width": 32, "batch_size": 8}


@pytest.fixture
def setting(lines_root: Path, tmp_path: Path) -> Setting:
    return Setting("cpu", lines_root, tmp_path, dict(VALUES), steps=3)


def test_without_a_gpu_it_says_so(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--quick"]) == 2
    printed, problems = capfd.readouterr()
    assert printed == ""
    assert problems.startswith("error: there is no GPU to measure: ")
    assert problems.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["setup", "logits", "batches", "steps", "host_syncs", "prediction", "ranks"]
)
def test_check_passes_on_the_cpu(name: str, setting: Setting) -> None:
    check = next(check for check in gpu.CHECKS if check.name == name)
    found = check.run(setting)
    assert found.passes, found
    json.dumps([found.value, found.bar])


@pytest.mark.parametrize("name", ["epoch_over_ceiling", "roofline", "host_strip", "checkpoints"])
def test_check_of_time_gives_a_number(name: str, setting: Setting) -> None:
    check = next(check for check in gpu.CHECKS if check.name == name)
    value = check.run(setting).value
    assert min(value.values() if isinstance(value, dict) else [value]) > 0


def test_a_wrong_number_fails() -> None:
    wanted = torch.tensor([[3.0, 1.0], [1.0, 1.001]])
    assert gpu_checks.names_agree(wanted + torch.tensor([0.01, 0.0]), wanted, 0.01)
    assert not gpu_checks.names_agree(wanted + torch.tensor([0.01, 0.0]), wanted, 0.0)
    assert not gpu_checks.names_agree(wanted.flip(1), wanted, 0.9)
    assert gpu_checks.difference(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) > 0.09


def test_device_that_computes_wrongly_is_noticed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = gpu_checks._answer
    monkeypatch.setattr(gpu_checks, "_answer", lambda *args: answer(*args) * 1.05)
    assert gpu_checks.logits(setting).passes is False
    weights = gpu_checks.weights_after
    threads = iter([0.0, 0.0, 1.0])
    monkeypatch.setattr(gpu_checks, "weights_after", lambda *args: weights(*args) + next(threads))
    assert gpu_checks.twenty_steps(setting).passes is False


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_trial_goes_on(setting: Setting) -> None:
    found = gpu_trials.kill_and_continue(setting)
    assert found == Found(True, {"deterministic": 0.0, "default": 0.0}, 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trials_at_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_trials, "TRIALS", (1, 2))
    monkeypatch.setattr(gpu_trials, "SECONDS_OF_TRIALS", 0.3)
    found = gpu_trials.trials_at_once(setting)
    assert found.passes
    assert set(found.value["images_per_second"]) == {"1", "2"}
    rates = {"1": 100.0, "2": 190.0, "3": 199.0, "4": 150.0}
    assert gpu_trials.best_number(rates) == 2
    assert gpu_trials.best_number(rates | {"3": 201.0}) == 3


def test_memory_that_runs_out(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_trials.out_of_memory(setting).passes is None, "nothing ran out"
    step = train.training_step

    def limited(state: Any, *arguments: Any) -> Any:
        if (arguments[-2] or arguments[-1]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(state, *arguments)

    monkeypatch.setattr(train, "training_step", limited)
    found = gpu_trials.out_of_memory(setting)
    assert found.passes
    assert found.value[-1] <= 6 < found.value[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fault_of_one_process(setting: Setting) -> None:
    assert gpu_trials.device_fault(setting).passes


@pytest.mark.slow
def test_checks_with_a_search(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_faster_precision", lambda *_: "float32")
    assert gpu_trials.start(setting).value > 0
    assert gpu_trials.idle(setting).value is None, "there is no nvidia-smi"


# -------------------------------------------------------------------------------------- verdicts


def passing(setting: Setting) -> Found:
    return Found(True, 1.0, 1)


def failing(setting: Setting) -> Found:
    return Found(False, 0.5, 1)


def crashing(setting: Setting) -> Found:
    os.abort()


def raising(setting: Setting) -> Found:
    raise RuntimeError("CUDA error: the cat")


def hanging(setting: Setting) -> Found:
    time.sleep(600)
    raise AssertionError


def test_a_crash_is_a_failure_and_what_was_not_reached_is_null(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    functions = {"a": passing, "b": crashing, "c": raising}
    checks = [gpu.Check(name, run, 60) for name, run in functions.items()]
    found = gpu.run_all(checks, setting, [])
    assert [own["pass"] for own in found["checks"].values()] == [True, False, False]
    assert found["checks"]["b"]["value"] == "its process ended with exit code -6"
    assert "the cat" in found["checks"]["c"]["value"]
    assert not found["ok"]
    assert len(found["advice"]["warnings"]) == 2
    hung = gpu.in_a_child(gpu.Check("h", hanging, 1), setting, 1.0)
    assert hung == Found(False, "no answer within 1 s")
    monkeypatch.setattr(gpu, "BUDGET_SECONDS", 0.0)
    found = gpu.run_all(checks, setting, [])
    assert {own["pass"] for own in found["checks"].values()} == {None}
    capfd.readouterr()


def test_times_are_not_judged_beside_other_programs(setting: Setting) -> None:
    checks = [gpu.Check("slow", failing, 60, is_timing=True), gpu.Check("right", passing, 60)]
    found = gpu.run_all(checks, setting, ["a game"])
    assert [own["pass"] for own in found["checks"].values()] == [None, True]
    assert found["advice"]["warnings"] == ["other programs use a GPU: a game"]


def test_advice() -> None:
    found = {
        "setup": {"pass": True, "value": {"gpus": [{}, {}]}},
        "trials_a_gpu": {"pass": True, "value": {"images_per_second": {"1": 1.0, "2": 1.9}}},
        "start": {"pass": True, "value": 0.7},
    }
    said = gpu.advice(found, [])
    assert said == {
        "trials_per_gpu": 2,
        "n_jobs": 4,
        "start_seconds": 0.7,
        "warnings": [],
    }
    assert gpu.advice({"trials_a_gpu": {"pass": False, "value": "a crash"}}, [])["n_jobs"] is None


def test_quick_checks() -> None:
    quick = [check.name for check in gpu.CHECKS if check.is_quick]
    assert quick == ["setup", "logits", "batches", "trials_a_gpu"]
    assert len(gpu.CHECKS) == 17
