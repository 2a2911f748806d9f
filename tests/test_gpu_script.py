"""`benchmarks.gpu` without a GPU: each check's logic on the CPU, verdicts, deadlines, advice."""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import train
from benchmarks import gpu, gpu_checks, gpu_searches, gpu_trials
from benchmarks.gpu_checks import Found, Setting
from writer_search.processes import machine, parent
from writer_search.processes.messages import Gpu
from writer_search.study import preparation
from writer_search.training import checkpoints

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
    "name", ["setup", "logits", "batches", "steps", "host_syncs", "prediction"]
)
def test_check_passes_on_the_cpu(name: str, setting: Setting) -> None:
    check = next(check for check in gpu.CHECKS if check.name == name)
    found = check.run(setting)
    assert found.passes, found
    json.dumps([found.value, found.bar])


@pytest.mark.parametrize("name", ["epoch_over_ceiling", "roofline", "host_strip", "checkpoints"])
def test_check_of_time_gives_a_number(
    name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = next(check for check in gpu.CHECKS if check.name == name)
    monkeypatch.setattr(gpu_checks, "ROUNDS", 1)
    monkeypatch.setattr(checkpoints, "LEAST_SECONDS", 0.05)
    value = check.run(replace(setting, seconds=0.3)).value
    numbers = value.values() if isinstance(value, dict) else [value]
    assert min(number for number in numbers if number is not None) > 0


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


def test_step_that_waits_for_the_device_is_noticed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = train.training_step

    def waiting(state: Any, *arguments: Any) -> Any:
        if state.epoch and state.step % 2:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return step(state, *arguments)

    assert gpu_checks.without_loss_check([1, 2, 3, 4], 17) == [1, 2, 4], "the 20th reads the loss"
    monkeypatch.setattr(train, "training_step", waiting)
    found = gpu_checks.host_syncs(setting)
    assert found.passes is False
    assert found.value["a_step"] == 1
    steps = found.value["steps"]
    assert found.value["an_epoch"] == sum(step % 2 for step in range(steps, 2 * steps))
    (place,) = found.value["where"]
    assert place.startswith("test_gpu_script.py:")


def test_graphed_model_is_trained_in_its_place(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Size] = []

    def graphed(model: torch.nn.Module, samples: tuple[torch.Tensor, ...]) -> Any:
        (sample,) = samples
        assert sample.is_contiguous(memory_format=torch.channels_last)
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()

        def call(images: torch.Tensor) -> Any:
            calls.append(images.shape)
            return model(images)

        return call

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    config = setting.config(precision="bfloat16")
    state, _, _ = gpu_checks.ready(setting, config, setting.place)
    images, labels = gpu_checks.a_batch(setting, config)
    gpu_checks.graph(state, config, images)
    train.training_step(state, config, images, labels)
    assert calls == [images.shape]


def test_cost_of_a_step_grows_with_its_images_alone(setting: Setting) -> None:
    config = setting.config()
    costs = [
        gpu_checks.cost_of_a_step(setting, replace(config, batch_size=size)) for size in (8, 16, 24)
    ]
    (flops, traffic) = zip(*costs, strict=True)
    assert flops[1] == 2 * flops[0]
    assert traffic[1] - traffic[0] == traffic[2] - traffic[1]
    assert traffic[1] < 2 * traffic[0], "weights are read once"


def test_a_killed_trial_goes_on(setting: Setting) -> None:
    found = gpu_trials.kill_and_continue(setting)
    assert found.passes
    for first, second in found.value.pop("went_on_at"):
        assert 1 < first < 2 < second < 3
    assert found.value == {"deterministic": 0.0, "default": 0.0, "default_unbroken": 0.0}


def test_trial_that_does_not_go_on_within_its_epoch_is_noticed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(part: gpu_trials.Part) -> None:
        part.directory.mkdir(parents=True, exist_ok=True)
        with open(part.directory / "began", "a") as file:
            file.write("0.0\n" if part.kill_in == 1 else "1.0\n")

    monkeypatch.setattr(gpu_trials, "run_part", run)
    monkeypatch.setattr(gpu_trials, "final_weights", lambda trial: torch.ones(2))
    assert gpu_trials.kill_and_continue(setting).passes is False


def test_several_trials_at_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_trials, "TRIALS", (1, 2))
    found = gpu_trials.trials_at_once(replace(setting, seconds=0.3))
    assert found.passes
    assert set(found.value["images_per_second"]) == {"1", "2"}
    assert found.value["best"] in (1, 2)
    rates = {"1": 100.0, "2": 190.0, "3": 199.0, "4": 150.0}
    assert gpu_trials.best_number(rates) == 2
    assert gpu_trials.best_number(rates | {"3": 201.0}) == 3


def test_trials_that_find_no_room_end_the_series(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, broken = {"cause": "out of memory", "is_full": True}, {"cause": "cat", "is_full": False}
    answers = {1: [{"rate": 5.0, "weights": "a"}], 2: [{}, full], 3: []}
    monkeypatch.setattr(gpu_trials, "all_at_once", lambda setting, number: answers[number])
    found = gpu_trials.trials_at_once(setting)
    assert found.passes
    assert found.value["no_room_for"] == 2
    assert found.value["best"] == 1
    answers[2] = [{"rate": 5.0, "weights": "b"}] * 2
    answers[3] = [full] * 3
    assert gpu_trials.trials_at_once(setting).passes is False, "other weights"
    for answers[2] in ([full, broken], [broken, broken]):
        with pytest.raises(RuntimeError, match="2 trial"):
            gpu_trials.trials_at_once(setting)
    answers[1] = [full]
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu_trials.trials_at_once(setting)


def test_other_predictions_are_noticed() -> None:
    guess = {"writer": "a", "probability": 0.6, "runner_up": "b", "runner_up_probability": 0.3}
    other = {**guess, "writer": "b", "probability": 0.31}
    close = {**guess, "probability": 0.45, "runner_up_probability": 0.44}
    assert gpu_trials.compared([guess], [{**guess, "probability": 0.61}]).passes
    assert gpu_trials.compared([{**guess, "probability": 0.63}], [guess]).passes is False
    assert gpu_trials.compared([other], [guess]).value["other_writers"] == 1
    assert gpu_trials.compared([{**other, "probability": 0.45}], [close]).passes
    assert gpu_trials.compared([{**guess, "writer": "c"}], [guess]).passes is False


# ----------------------------------------------------------------------------------- real searches


@pytest.fixture
def on_fake_gpu(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let searches of the script run on what is called a GPU of this name."""
    monkeypatch.setattr(machine, "_faster_precision", lambda *_: "float32")
    ask = preparation.ask_machine

    def use(gpu: str) -> Setting:
        monkeypatch.setattr(
            gpu_searches,
            "ChildProcess",
            lambda work, argument: parent.ChildProcess("faults:of_gpu_script", (work, argument)),
        )
        monkeypatch.setattr(
            preparation, "ask_machine", lambda *arguments: ask(*arguments) | {"gpus": [gpu]}
        )
        return setting

    return use


@pytest.mark.slow
def test_index_out_of_range_ends_one_trial_alone(on_fake_gpu: Any) -> None:
    found = gpu_searches.device_fault(on_fake_gpu("good"))
    assert found.passes, found
    assert "device-side assert" in found.value["cause"]


@pytest.mark.slow
def test_a_gpu_without_room_is_not_set_aside(on_fake_gpu: Any, tmp_path: Path) -> None:
    value = gpu_searches.refused_beside_another(on_fake_gpu("exclusive"))
    assert value == {"refused": 1, "exit_code": 0, "passes": True}
    assert (tmp_path / "filled").exists()


def test_memory_is_filled_but_for_a_little(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, mib = [1000 * 2**20], 2**20

    def empty(size: int, *, dtype: torch.dtype, device: str) -> int:
        if size > 300 * mib:  # no larger part is free in one piece
            raise torch.OutOfMemoryError("CUDA out of memory")
        free[0] -= size
        return size

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 2**33))
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    gpu_searches.fill(replace(setting, device="cuda"))
    assert gpu_searches.LEFT <= free[0] <= gpu_searches.LEFT + mib
    assert (setting.work / "filled").exists()


def test_where_nothing_is_refused_nothing_is_judged(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_searches, "searched", lambda *_, **__: (0, setting.work))
    assert gpu_searches.refused_beside_another(setting)["passes"] is None


@pytest.mark.slow
def test_memory_that_runs_out(on_fake_gpu: Any, setting: Setting) -> None:
    assert gpu_searches.halved_batch(setting)["passes"] is None, "nothing ran out"
    on_fake_gpu("good")
    found = gpu_searches.halved_batch(replace(setting, work=setting.work / "again"))
    assert found == {"images_at_once": 4, "passes": True}


@pytest.mark.slow
def test_ranks(setting: Setting) -> None:
    found = gpu_searches.ranks(setting)
    assert found.passes, found
    assert 0 < found.value["seconds_to_name"] < 10
    alone = replace(setting, device="cuda", gpus=("0",))
    with mock.patch.object(gpu_searches, "one_rank", return_value=0.0):
        found = gpu_searches.ranks(alone)
    assert found.passes
    assert found.value["two_ranks"] is None, "there is one GPU"


@pytest.mark.slow
def test_times_of_searches(
    on_fake_gpu: Any, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_searches.start(setting).value > 0
    assert gpu_searches.idle(setting).passes is None, "there is no nvidia-smi"
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 80\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    setting = replace(setting, work=tmp_path / "again", trials_at_once=2, images_per_second=1.0)
    found = gpu_searches.idle(setting)
    assert found.passes
    assert found.value["idle"] == pytest.approx(0.2)
    assert found.value["n_jobs"] == 2
    assert found.value["seconds"] > 0


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
    assert found["checks"]["b"]["value"] == "killed by SIGABRT"
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


def test_advice(setting: Setting) -> None:
    rates = {"1": 500.0, "2": 1000.0}
    setup = {"nvidia_smi": ["ok"], "shared_memory_mib": 10**4}
    found = {
        "setup": {"pass": True, "value": setup},
        "trials_a_gpu": {
            "pass": None,
            "value": {"images_per_second": rates, "best": 2, "lines": 1000},
        },
    }
    setting = gpu.taking_advice(replace(setting, gpus=("0", "1")), found)
    assert (setting.trials_at_once, setting.images_per_second) == (2, 1000.0)
    assert gpu.advice(found, setting, [], []) == {
        "trials_per_gpu": 2,
        "n_jobs": 4,
        "flags": "--n_jobs 4",
        "seconds_per_trial": 200.0,
        "warnings": [],
    }
    setup |= {"nvidia_smi": [], "shared_memory_mib": 64}
    first, second, third = gpu.advice(found, setting, [], ["GPU 2 is left out"])["warnings"]
    assert first == "GPU 2 is left out"
    assert second.startswith("nvidia-smi does not answer")
    assert third.startswith("/dev/shm is small")
    found = {"trials_a_gpu": {"pass": False, "value": "a crash"}}
    setting = gpu.taking_advice(replace(setting, images_per_second=None), found)
    said = gpu.advice(found, setting, [], [])
    assert said["n_jobs"] is None
    assert said["flags"] == ""
    assert said["warnings"] == ["trials_a_gpu: a crash"]


def test_later_checks_take_the_advice(setting: Setting) -> None:
    checks = [gpu.Check("trials_a_gpu", advising, 60), gpu.Check("idle", with_advice, 60)]
    assert gpu.run_all(checks, setting, [])["checks"]["idle"]["value"] == [3, 7.0]


def advising(setting: Setting) -> Found:
    return Found(True, {"best": 3, "images_per_second": {"3": 7.0}, "lines": 1})


def with_advice(setting: Setting) -> Found:
    return Found(True, [setting.trials_at_once, setting.images_per_second])


def test_what_else_uses_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.other_programs(["GPU-a"]) == [], "there is no nvidia-smi"
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *"-i GPU-b"*) exit 6;; esac\n'
        'case "$*" in *compute-apps*) echo a/game;; *) echo 9000, 80000;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu.other_programs(["GPU-a", "GPU-b"]) == ["a/game", "9000 of 80000 MiB are in use"]


def test_whole_command(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a GPU that is a name alone: what is printed, and the last line."""
    monkeypatch.setattr(gpu, "find_gpus", lambda device: ((Gpu("0", "a GPU", True),), ["hm"]))
    monkeypatch.setattr(gpu, "asked", lambda function, argument, seconds=60.0: "GPU-a")
    monkeypatch.setattr(gpu, "WRITERS", 2)
    monkeypatch.setattr(gpu, "PAGES", 3)
    monkeypatch.setattr(gpu, "in_a_child", lambda check, setting, seconds: check.run(setting))
    checks = (gpu.Check("a", with_precision, 9, is_quick=True), gpu.Check("b", failing, 9))
    monkeypatch.setattr(gpu, "CHECKS", checks)
    assert gpu.main(["--quick"]) == 0
    *_, flags, last = capfd.readouterr().out.splitlines()
    assert flags == "flags to use: not known, trials at once could not be measured"
    assert gpu.shown_flags({"trials_per_gpu": 1, "flags": ""}) == "none, the defaults are best"
    assert gpu.shown_flags({"trials_per_gpu": 2, "flags": "--n_jobs 4"}) == "--n_jobs 4"
    found = json.loads(last)
    assert found["ok"]
    assert found["checks"] == {"a": {"pass": True, "value": ["bfloat16", ["0"]], "bar": None}}
    assert found["advice"]["warnings"] == ["hm"]
    assert gpu.main([]) == 1
    assert not json.loads(capfd.readouterr().out.splitlines()[-1])["ok"]


def with_precision(setting: Setting) -> Found:
    return Found(True, [setting.precision, list(setting.gpus)])


def test_quick_checks() -> None:
    quick = [check.name for check in gpu.CHECKS if check.is_quick]
    assert quick == ["setup", "logits", "batches", "trials_a_gpu"]
    assert len(gpu.CHECKS) == 17
