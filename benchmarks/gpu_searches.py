"""Checks of `benchmarks.gpu` by real searches: the time between trials, faults of a GPU."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from threading import Event, Thread
from typing import Any
from unittest import mock

import torch

import train as train_program
from benchmarks import trial_start
from benchmarks.gpu_checks import Asked, Found, Setting, a_batch, asked, nvidia_smi
from benchmarks.gpu_trials import one_rank, two_ranks
from train import training_step
from writer_search.common.files import read_dict
from writer_search.processes import child as trial_process
from writer_search.processes import runner
from writer_search.processes.child import SearchLine
from writer_search.processes.devices import Devices
from writer_search.processes.messages import Job
from writer_search.processes.parent import ChildProcess
from writer_search.training.device_errors import is_out_of_memory
from writer_search.training.state import TrainingState

HERE = "benchmarks.gpu_searches:"
SECONDS_OF_A_TRIAL = 12.0  # where the time between trials is to count
LEFT = 64 * 2**20  # bytes of a GPU's memory: too few for a context
PATIENCE = 30.0  # seconds that one trial waits for what happens to the other


def searched(
    setting: Setting,
    name: str,
    trials: int,
    *more: str,
    start: Callable[[str, Any], ChildProcess] | None = None,
    **fixed: Any,
) -> tuple[int, Path]:
    """Run the real command on one GPU; give its exit code and its directory.

    start: stands in for ChildProcess, for the processes of trials.   fixed: hyperparameters.
    """
    from hyperparameter_search import main as search

    directory = setting.work / name
    one = "cuda:0" if setting.device == "cuda" else setting.device
    fixed = {"backbone": "tiny"} | fixed | setting.values
    words = [
        *("--data_root", str(setting.root), "--cache_dir", str(setting.work / "cache")),
        *("--checkpoint_dir", str(directory), "--n_trials", str(trials), "--use_all_writers"),
        *("--weights", "none", "--pruner", "none", "--device", one),
        *(word for key, value in fixed.items() for word in ("--fix", f"{key}={value}")),
        *([] if "--epochs" in more else ["--epochs", "2"]),
        *more,
    ]
    with ExitStack() as stack:
        stack.enter_context(trial_start.silent())
        if start is not None:
            stack.enter_context(mock.patch.object(runner, "ChildProcess", start))
        return search(words), directory


def number_of(job: Job) -> int:
    return int(job.trial_dir.name.partition("_")[2])


def is_complete(directory: Path, number: int) -> bool:
    return (directory / f"trial_{number:03d}" / "metrics.json").exists()


def cause_of(directory: Path, number: int) -> str:
    """Give the cause that a failed trial's error.log names."""
    try:
        lines = (directory / f"trial_{number:03d}" / "error.log").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("cause:")), "")


# --------------------------------------------------------------------------------- between trials


def start(setting: Setting) -> Found:
    """Measure the time from a trial's end to the next one's first batch, one at a time."""
    events: list[tuple[str, float]] = []
    with trial_start.noted_messages(events):
        code, _ = searched(setting, "start", 4, "--n_jobs", "1")
    found = median(trial_start.spans_of(events))
    return Found(code == 0 and found <= 1.5, found, 1.5)


def idle(setting: Setting) -> Found:
    """Measure how long a GPU idles while a search of the advised number of trials runs on it.

    From the first trial's first batch to the last one's end, by nvidia-smi.
    """
    jobs = setting.trials_at_once
    config = setting.config()
    lines = len(setting.data(config).select("train"))
    rate = setting.images_per_second or 0.0
    epochs = str(max(2, round(SECONDS_OF_A_TRIAL * rate / jobs / lines)))
    flags = ["--n_jobs", str(jobs), "--epochs", epochs, "--patience", epochs]
    samples: list[tuple[float, float]] = []
    events: list[tuple[str, float]] = []
    with busy_noted(setting.uuids, samples), trial_start.noted_messages(events):
        code, _ = searched(setting, "idle", max(4, 2 * jobs), *flags, backbone=config.backbone)
    first = min((seconds for kind, seconds in events if kind == "start"), default=0.0)
    last = max((seconds for kind, seconds in events if kind == "end"), default=0.0)
    busy = [percent for seconds, percent in samples if first <= seconds <= last]
    share = 1 - mean(busy) / 100 if busy else None
    value = {"idle": share, "n_jobs": jobs, "seconds": last - first}
    return Found(None if share is None else code == 0 and share <= 0.3, value, 0.3)


@contextmanager
def busy_noted(uuids: Sequence[str], samples: list[tuple[float, float]]) -> Iterator[None]:
    """Note, meanwhile, when a GPU was busy for how many percent; nothing without nvidia-smi."""
    over = Event()
    words = ["--query-gpu=utilization.gpu", "-i", uuids[0] if uuids else "0"]

    def sample() -> None:
        while not over.wait(0.2):
            told = nvidia_smi(*words)
            samples.extend((time.perf_counter(), float(n)) for n in told if n.isdigit())

    thread = Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ------------------------------------------------------------------------------------------ ranks


def ranks(setting: Setting) -> Found:
    """Compare a group of one rank with none; with two GPUs two ranks with one, and kill one."""
    value: dict[str, Any] = {"one_rank": one_rank(setting), "two_ranks": None}
    passes = value["one_rank"] == 0
    # NCCL joins no instances of a divided GPU.
    gpus = [gpu for gpu in setting.gpus if "MIG" not in gpu]
    if setting.device == "cpu" or len(gpus) > 1:
        value["two_ranks"] = two_ranks(setting)
        value |= killed_rank(setting)
        in_time = value["seconds_to_name"] is not None and value["seconds_to_name"] <= 10
        passes = passes and value["two_ranks"] <= 1e-4 and in_time
    bar = {"one_rank": 0, "two_ranks": 1e-4, "seconds_to_name": 10}
    return Found(passes, value, bar)


def killed_rank(setting: Setting) -> dict[str, Any]:
    """Kill rank 1 of a trial of two while it trains; tell when the search has named it."""

    def begin(work: str, job: Job) -> ChildProcess:
        return ChildProcess(HERE + "dying_rank" if job.rank == 1 else work, job)

    flags = ["--device", "cuda" if setting.device == "cuda" else "cpu"]
    flags += ["--gpus_per_trial", "2", "--n_jobs", "1"]
    _, directory = searched(setting, "ranks", 1, *flags, start=begin)
    cause, log = cause_of(directory, 0), directory / "trial_000" / "error.log"
    is_named = cause.startswith("rank 1: killed by SIGKILL")
    took = log.stat().st_mtime - float((directory / "killed").read_text()) if is_named else None
    return {"cause": cause, "seconds_to_name": took}


def dying_rank(connection: Connection, job: Job) -> None:
    """Run a rank that is killed before its third step."""
    step = train_program.training_step

    def dying_step(state: TrainingState, *arguments: Any) -> Any:
        if state.step == 2:
            (job.trial_dir.parent / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return step(state, *arguments)

    train_program.training_step = dying_step
    trial_process.run_trial(connection, job)


# ----------------------------------------------------------------------------------------- memory


def out_of_memory(setting: Setting) -> Found:
    """Let a trial run out of memory; and let one find no room beside another one."""
    halved = halved_batch(setting)
    beside = refused_beside_another(setting)
    verdicts = [halved.pop("passes"), beside.pop("passes")]
    passes = False if False in verdicts else None if None in verdicts else True
    return Found(passes, {**halved, **beside}, "halved and complete; the GPU is not set aside")


def halved_batch(setting: Setting) -> dict[str, Any]:
    """Give a trial memory for three quarters of its batch; it has to go on with a part of it."""
    room = asked(room_for_three_quarters, setting)

    def begin(work: str, job: Job) -> ChildProcess:
        return ChildProcess(HERE + "cramped_trial", (job, room))

    config = setting.config()
    fixed = {name: getattr(config, name) for name in ("backbone", "batch_size", "crop_width")}
    code, directory = searched(setting, "memory", 1, start=begin, **fixed)
    images = read_dict(directory / "trial_000" / "config.json").get("micro_batch")
    is_well = code == 0 and is_complete(directory, 0)
    return {"images_at_once": images, "passes": is_well if images or not is_well else None}


def room_for_three_quarters(setting: Setting) -> float:
    """Measure the share of a GPU's memory between what a half and what a whole batch takes."""
    if setting.device != "cuda":
        return 1.0
    config = setting.config()
    state = TrainingState.start(config, 20, setting.place)
    state.model.train()
    images, labels = a_batch(setting, config)
    labels += torch.arange(len(labels), device=setting.place) % 20
    peaks = []
    for micro_batch in (config.batch_size // 2, None):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            training_step(state, config, images, labels, micro_batch)
        peaks.append(torch.cuda.max_memory_reserved())
    return sum(peaks) / 2 / torch.cuda.mem_get_info()[1]


def cramped_trial(connection: Connection, argument: tuple[Job, float]) -> None:
    """Run a trial that may have a share of the memory."""
    job, room = argument
    opened = trial_process.open_device

    def open_device(gpu: str | None) -> str:
        device = opened(gpu)
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(room)
        return device

    trial_process.open_device = open_device
    trial_process.run_trial(connection, job)


def refused_beside_another(setting: Setting) -> dict[str, Any]:
    """Fill a GPU's memory beside a trial, so that the next one's context does not open.

    That one has to wait for the first one's end, and the GPU must not be blamed.
    """
    directory = setting.work / "beside"
    fillers: list[Asked] = []
    refused: list[str] = []
    full = Devices.full

    def begin(work: str, job: Job) -> ChildProcess:
        if number_of(job) == 0:
            return ChildProcess(HERE + "live_trial", job)
        if not fillers and not refused:
            wait_for(directory / "live")
            fillers.append(Asked(fill, setting))
            wait_for(setting.work / "filled")
        return ChildProcess(work, job)

    def noted(devices: Devices, gpu: str) -> None:
        full(devices, gpu)
        refused.append(gpu)
        fillers.pop().give_up()
        (directory / "refused").touch()

    with mock.patch.object(Devices, "full", noted):
        code, _ = searched(setting, "beside", 2, "--n_jobs", "2", start=begin)
    for filler in fillers:  # nobody was refused
        filler.give_up()
    is_well = code == 0 and is_complete(directory, 0) and is_complete(directory, 1)
    return {"refused": len(refused), "exit_code": code, "passes": is_well if refused else None}


def live_trial(connection: Connection, job: Job) -> None:
    """Run a trial that waits after its first epoch until the other one was refused."""
    report = SearchLine.report
    directory = job.trial_dir.parent

    def reported(line: SearchLine, epoch: int, metrics: dict[str, Any]) -> None:
        (directory / "live").touch()  # it has all the memory that it wants
        report(line, epoch, metrics)
        if epoch == 1:
            wait_for(directory / "refused")

    with mock.patch.object(SearchLine, "report", reported):
        trial_process.run_trial(connection, job)


def wait_for(path: Path) -> None:
    """Wait until a file is there, but not for ever."""
    ends = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < ends:
        time.sleep(0.02)


def fill(setting: Setting) -> None:
    """Take what is left of a GPU's memory, and keep it until this process is killed."""
    held = []
    if setting.device == "cuda":
        size = torch.cuda.mem_get_info()[0] - LEFT
        while size > 2**20:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                size = torch.cuda.mem_get_info()[0] - LEFT
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                size //= 2
    (setting.work / "filled").touch()
    time.sleep(600)


# ----------------------------------------------------------------------------------------- faults


def device_fault(setting: Setting) -> Found:
    """Let one of two trials read beyond the end of a tensor; it alone may fail, at its second try.

    The second is for another GPU, where there is one: it is started if the fault was recognised.
    """
    begun: list[int] = []

    def begin(work: str, job: Job) -> ChildProcess:
        begun.append(number_of(job))
        return ChildProcess(HERE + "faulty_trial" if number_of(job) == 0 else work, job)

    code, directory = searched(setting, "fault", 3, "--n_jobs", "2", start=begin)
    value = {
        "exit_code": code,
        "cause": cause_of(directory, 0),
        "complete": [number for number in range(3) if is_complete(directory, number)],
        "starts": begun.count(0),
    }
    passes = code == 0 and value["complete"] == [1, 2] and value["starts"] == 2
    return Found(passes, value, "trial 0 fails at its second start, 1 and 2 are complete")


def faulty_trial(connection: Connection, job: Job) -> None:
    """Run a trial with an index out of range in its second epoch."""
    check = SearchLine.check

    def checked(line: SearchLine, progress: float) -> None:
        if progress > 1:
            read_beyond("cuda" if job.gpu is not None else "cpu")
        check(line, progress)

    with mock.patch.object(SearchLine, "check", checked):
        trial_process.run_trial(connection, job)


def read_beyond(device: str) -> None:
    """Let a kernel read beyond the end of its data, and cuDNN find out, which has its own words.

    On a CPU that is an IndexError.
    """
    image, kernel = torch.zeros(1, 1, 8, 8, device=device), torch.zeros(1, 1, 3, 3, device=device)
    index = torch.full((4,), 10**6, device=device)
    torch.zeros(4, device=device)[index].sum()
    time.sleep(1.0)  # until the kernel has run
    torch.nn.functional.conv2d(image, kernel).cpu()
