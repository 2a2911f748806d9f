"""GPUs divided between trials, and set aside when they fail: on the CPU, with fake ones."""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
from collections import defaultdict
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import RealChild
from test_search import Run, run, trials_of

from writer_search.common.errors import UserError
from writer_search.processes import machine, parent, questions
from writer_search.processes import runner as runner_module
from writer_search.processes.devices import Devices, divide, visible_entries
from writer_search.processes.machine import _visible_gpus
from writer_search.processes.messages import Gpu, MachineQuestion
from writer_search.study import preparation
from writer_search.study.store import open_study
from writer_search.training import optimisation
from writer_search.training.repeat import device_like

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
    with pytest.raises(UserError, match=r"--gpus_per_trial 3: only 2 GPUs here: a, b"):
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
    assert "GPU GPU-a, GPU GPU-b, 2 trials at once, 1 thread each" in capfd.readouterr().out
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


def test_gpu_on_which_a_trial_runs_is_not_set_aside_for_another(
    on_gpus: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, started = on_gpus(["exclusive"], "--n_jobs", "2", n_trials="4")
    assert code == 0
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["COMPLETE"] * 4
    printed, problems = capfd.readouterr()
    assert problems == ""
    assert "GPU exclusive has no room for another trial" in printed
    assert len(started.on["exclusive"]) > 4


def test_trial_goes_on_elsewhere_when_its_gpu_fails(
    on_gpus: Any, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, started = on_gpus(["sick", "good"], n_trials="4", epochs="3")
    assert code == 0
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["COMPLETE"] * 4
    assert len(started.on["sick"]) == 2, "no third trial starts there"
    printed, problems = capfd.readouterr()
    assert problems.count("\n") == 1
    assert "warning: GPU sick failed under 2 trials and is set aside: AcceleratorError" in problems
    assert "trial   0 | GPU sick failed, the trial starts again" in printed
    assert printed.count("trial   0 | epoch  1/3") == 1, "the first epoch is not trained again"
    own = json.loads((tmp_path / "c" / "trial_000" / "config.json").read_text())
    assert own["device"] == "good"


def test_trial_that_fails_on_two_gpus_is_at_fault_itself(
    on_gpus: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "cat").touch()
    code, started = on_gpus(["good", "fine"], n_trials="3", epochs="3")
    assert code == 0
    states = [state for _, state, _ in trials_of(tmp_path / "c")]
    assert states == ["FAIL", "COMPLETE", "COMPLETE"]
    assert started.on["good"].count(0) == started.on["fine"].count(0) == 1
    assert "set aside" not in capfd.readouterr().err
    log = (tmp_path / "c" / "trial_000" / "error.log").read_text()
    assert "cause:  AcceleratorError: CUDA error: unspecified launch failure" in log


def test_the_only_gpu_is_sick(
    on_gpus: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _ = on_gpus(["sick"], n_trials="9", epochs="3")
    assert code == 3
    assert "error: no device is left: GPU sick: AcceleratorError" in capfd.readouterr().err
    assert len(trials_of(tmp_path / "c")) == 2


def test_what_is_noted_against_a_gpu() -> None:
    devices = Devices([("a",), ("b",), ("a",)])
    assert not devices.faulted("a", 1, "ECC")
    assert devices.free([]) == 1, "one without failures first"
    assert devices.free([], {"b"}) == 0
    assert devices.free([1], {"a"}) is None, "it waits for the other one"
    devices.worked(["a"])
    assert not devices.faulted("a", 2, "ECC")
    devices.forgive(2)
    assert not devices.faulted("a", 3, "ECC")
    assert not devices.faulted("a", 3, "ECC"), "twice under the same trial is no evidence"
    devices.full("b")
    assert devices.free([], {"a"}) is None
    devices.ended(["b"])
    assert devices.free([], {"a"}) == 1
    assert devices.faulted("a", 4, "ECC")
    assert devices.usable == [1]
    assert devices.free([], {"b"}) == 1, "there is no other one"
    assert [devices.sharing(number) for number in range(3)] == [2, 1, 2]
    assert Devices([(), ()]).sharing(0) == 1


# ------------------------------------------------------------------------- before the first trial


@pytest.fixture
def gpus_found(monkeypatch: pytest.MonkeyPatch) -> Any:
    def find(*entries: str, device: str = "auto") -> Any:
        def start(work: str, argument: Any) -> RealChild:
            name = work.rpartition(":")[2]
            if name == "list_devices":
                return RealChild("faults:list_fake_devices", entries)
            return RealChild("faults:name_fake_device", argument)

        monkeypatch.setattr(questions, "ChildProcess", start)
        return questions.find_gpus(device)

    return find


def test_each_gpu_is_opened_and_named_by_a_process_of_its_own(gpus_found: Any) -> None:
    found, warnings = gpus_found("MIG-a", "V100", "GPU-c")
    assert found == (
        Gpu("MIG-a", "the MIG-a", True),
        Gpu("V100", "the V100", False),
        Gpu("GPU-c", "the GPU-c", True),
    )
    assert warnings == []
    assert machine._precision_on_gpus(("resnet18",), found) == {"resnet18": "float32"}
    assert machine._precision_on_gpus(("resnet18",), found[::2]) == {"resnet18": "bfloat16"}


def test_machine_without_room_for_a_thread_is_no_broken_gpu(gpus_found: Any) -> None:
    with pytest.raises(UserError, match=r"can't start new thread \(.*ulimit -u"):
        gpus_found("GPU-a", "crowded")


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_that_is_only_emulated_is_told(
    run: Run, emulated: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A search goes on on another node of a cluster, whose device has no bfloat16."""
    ask = preparation.ask_machine
    elsewhere: dict[str, Any] = {"without_bfloat16": []}
    monkeypatch.setattr(preparation, "ask_machine", lambda *given: ask(*given) | elsewhere)
    assert run("--fix", "precision=bfloat16", n_trials="1") == 0
    assert capfd.readouterr().err == ""
    elsewhere = {"without_bfloat16": ["Tesla T4"] if emulated else []}
    assert run("--fix", "precision=bfloat16", n_trials="2") == 0
    problems = capfd.readouterr().err
    assert ("compute in bfloat16, which Tesla T4 only emulates" in problems) == emulated
    gpus = (Gpu("0", "A100", True), Gpu("1", "Tesla T4", False))
    monkeypatch.setattr(optimisation, "has_bfloat16", lambda device: not emulated)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for these in (gpus, ()):
        question = MachineQuestion(these, "none", ("tiny",), False, 1)
        without = machine._describe_machine(question)["without_bfloat16"]
        assert without == (["Tesla T4"] if these else [machine.processor()] * emulated)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert machine._describe_machine(question)["without_bfloat16"] == [], "torch cannot tell"


def test_the_faster_precision_is_measured_once_for_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, begun = [], []

    def measure(backbone: str) -> str:
        measured.append(backbone)
        return "bfloat16" if backbone == "resnet18" else "float32"

    monkeypatch.setattr(machine, "_faster_precision", measure)
    memory = tmp_path / "cache" / "precision.json"

    def ask(*backbones: str, threads: int = 1) -> dict[str, str]:
        question = MachineQuestion((), "none", backbones, True, threads, memory)
        found: dict[str, str] = machine._describe_machine(question, begun.append)["precision"]
        return found

    assert ask("resnet18") == {"resnet18": "bfloat16"}
    both = {"resnet18": "bfloat16", "resnet34": "float32"}
    assert ask("resnet18", "resnet34") == ask("resnet18", "resnet34") == both
    assert measured == ["resnet18", "resnet34"]
    assert begun == ["measuring bfloat16"] * 2
    ask("resnet18", threads=2)
    assert measured[2:] == ["resnet18"], "with other threads it may be another one"
    memory.write_text("damaged")
    assert ask("resnet34") == {"resnet34": "float32"}
    memory.unlink()
    memory.mkdir()  # it cannot be written
    assert ask("resnet34") == {"resnet34": "float32"}
    assert measured[3:] == ["resnet34"] * 2


def test_gpus_that_do_not_open_are_left_out(
    gpus_found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "OPEN_SECONDS", 3.0)
    found, warnings = gpus_found("dying", "good", "old", "hanging")
    assert [gpu.entry for gpu in found] == ["good"]
    assert warnings == [
        "GPU dying cannot be used and is left out: killed by SIGSEGV",
        "GPU old cannot be used and is left out: driver too old",
        "GPU hanging cannot be used and is left out: no answer within 3 s",
    ]


def test_without_a_gpu_that_opens_auto_is_the_cpu(gpus_found: Any) -> None:
    assert gpus_found("old", device="cpu") == ((), [])
    why = "no GPU can be used, the search runs on the CPU: GPU old: driver too old"
    assert gpus_found("old") == ((), [why])
    with pytest.raises(UserError, match="--device cuda: GPU old: driver too old; fix"):
        gpus_found("old", device="cuda")
    with pytest.raises(UserError, match="GPU full: CUDA error: out of memory; fix or free it"):
        gpus_found("old", "full")


def test_mig_instances_do_not_train_one_trial_together() -> None:
    for gpus, names in ((["MIG-a", "MIG-b"], []), (["0", "1"], ["A100", "A100 MIG 1g.5gb"])):
        assert len(divide(gpus, None, 1, names)) == 2
        with pytest.raises(UserError, match="--gpus_per_trial 2: instances of a GPU"):
            divide(gpus, None, 2, names)


def test_retraining_takes_the_cpu_where_the_gpu_does_not_open(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch of tests has no CUDA: a GPU that is counted does not open."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_like("auto", on_gpu=True) == torch.device("cpu")
    assert "warning: the trial ran on a GPU; here it cannot be used" in capfd.readouterr().err
    with pytest.raises(UserError, match="--device cuda:0: it cannot be used"):
        device_like("cuda:0", on_gpu=False)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("writer_search.training.repeat.why_unusable", lambda name: "")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second = device_like("cuda:1", on_gpu=False)
    assert chosen == [second], "what asks for no device, as for bfloat16, asks this one"


def test_the_test_split_is_measured_where_a_device_works() -> None:
    devices = Devices([("a", "b"), ("c", "d")])
    assert devices.single() == ("a",)
    devices.set_aside["b"] = "cold"
    assert devices.single() == ("c",)
    devices.set_aside["c"] = "cold"
    assert devices.single() == ()


def test_process_that_outlives_sigkill_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unkillable:
        exitcode, kills, pid = None, 0, os.getpid()

        def join(self, seconds: float) -> None:
            assert seconds < 1

        def kill(self) -> None:
            self.kills += 1

    child = RealChild("faults:hang", None)
    real, child._process = child._process, Unkillable()  # type: ignore[assignment]
    monkeypatch.setattr(parent, "UNKILLABLE_SECONDS", 0.1)
    code = child.end(0.1)
    real.kill()
    real.join()
    assert code is None
    assert "hangs in a driver" in parent.exit_text(code)


def test_end_is_known_however_long_the_fork_server_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It imports torchvision, and meanwhile notices no end."""
    monkeypatch.setattr(parent, "UNKILLABLE_SECONDS", 0.1)
    child = RealChild("faults:exit_silently", None)
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGSTOP)
    goes_on = threading.Timer(1.5, os.kill, (server, signal.SIGCONT))
    goes_on.start()
    try:
        with pytest.raises(EOFError):
            child.connection.recv()  # it has ended
        assert child.end(0.1) == 7
    finally:
        goes_on.join()


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
