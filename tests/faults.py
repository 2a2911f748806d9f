"""Trials that go wrong, for tests: run in the child process instead of `worker.run_trial`."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from writer_search.processes import machine
from writer_search.processes import parent as processes
from writer_search.training import evaluation

RealChild = processes.ChildProcess


def faulty(faults: dict[int, str]) -> Callable[[str, Any], processes.ChildProcess]:
    """Make a stand-in for ChildProcess: trial number → name of a function below."""

    def start(work: str, job: Any) -> processes.ChildProcess:
        number = int(job.trial_dir.name.partition("_")[2]) if work.endswith("run_trial") else -1
        return RealChild(f"faults:{faults[number]}" if number in faults else work, job)

    return start


def _with_training_replaced(connection: Connection, job: Any, action: Callable[[], None]) -> None:
    """Run the real trial process around training that does something else."""
    from writer_search.processes import child as worker

    def train(*arguments: Any, **named: Any) -> None:
        action()

    worker.train = train  # type: ignore[assignment]
    worker.run_trial(connection, job)


def raise_error(connection: Connection, job: Any) -> None:
    def action() -> None:
        raise RuntimeError("the cat is on the keyboard")

    _with_training_replaced(connection, job, action)


def segfault(connection: Connection, job: Any) -> None:
    def action() -> None:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)

    _with_training_replaced(connection, job, action)


def kill_itself(connection: Connection, job: Any) -> None:
    """As the system's out-of-memory killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def kept_waiting(connection: Connection, job: Any) -> None:
    """Train for real; other programs take two of four cores after the first look."""
    from writer_search.processes import child as worker

    class Waiting:
        def __init__(self, threads: int) -> None:
            self._answers = iter([None, threads - 2])

        def fewer(self) -> int | None:
            return next(self._answers, None)

    worker.WaitingThreads = Waiting  # type: ignore[assignment,misc]
    worker.run_trial(connection, replace(job, threads=4, gives_way=True))


def exit_silently(connection: Connection, job: Any) -> None:
    """As a library does it that tells the log alone."""
    if hasattr(job, "log"):  # of a trial; a measurement has none
        job.log.write_text("libgomp: no\n\n")
    os._exit(7)


def _refuse_thread(_: Any) -> None:
    raise RuntimeError("can't start new thread")


def without_threads(connection: Connection, job: Any) -> None:
    from writer_search.processes import child as worker

    threading.Thread.start = _refuse_thread  # type: ignore[method-assign]
    worker.run_trial(connection, job)


def die_when_done(connection: Connection, job: Any) -> None:
    """Train for real and write all results, then be killed before a word of it."""
    from writer_search.processes import child as worker

    real_train = worker.train

    def train(*arguments: Any, **named: Any) -> None:
        real_train(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    worker.train = train  # type: ignore[assignment]
    worker.run_trial(connection, job)


def outlast_failures(connection: Connection, job: Any) -> None:
    """Train for real, but not before trial 2 has failed."""
    from writer_search.processes import child as worker

    log = job.trial_dir.parent / "trial_002" / "error.log"
    real_check = worker.SearchLine.check

    def check(line: Any, progress: float) -> None:
        for _ in range(6000):
            if log.exists():
                break
            time.sleep(0.01)
        real_check(line, progress)

    worker.SearchLine.check = check  # type: ignore[method-assign]
    worker.run_trial(connection, job)


def hang(connection: Connection, job: Any) -> None:
    """Ignores every order."""
    time.sleep(600)


def diverge(connection: Connection, job: Any) -> None:
    from writer_search.training.outcomes import DivergedError

    def action() -> None:
        raise DivergedError("the training loss is not finite in epoch 3")

    _with_training_replaced(connection, job, action)


def signal_search(connection: Connection, job: Any) -> None:
    """Send the search process SIGTERM at the trial's third batch, then go on as if nothing was."""
    _signal_at(connection, job, 2)


def signal_search_and_hang(connection: Connection, job: Any) -> None:
    """Send the search process SIGTERM in the second epoch, and answer nothing any more."""
    from writer_search.processes import child as worker

    calls = iter(range(10**9))
    real_check = worker.SearchLine.check

    def check(line: Any, progress: float) -> None:
        if next(calls) == 5:
            os.kill(job_parent(job), signal.SIGTERM)
            time.sleep(60)
        real_check(line, progress)

    worker.SearchLine.check = check  # type: ignore[method-assign]
    worker.run_trial(connection, job)


def job_parent(job: Any) -> int:
    """Find the search process by its lock file."""
    holder = (job.trial_dir.parent / "search.lock").read_text()
    return int(holder.split()[1])


def out_of_memory(connection: Connection, job: Any) -> None:
    """Out of memory with more than four images at once, at the trial's third batch.

    States are saved before each batch.
    """
    import torch

    from writer_search.processes import child as worker

    real_check = worker.SearchLine.check
    calls = iter(range(10**9))

    def check(line: Any, progress: float) -> None:
        if next(calls) == 2 and (job.micro_batch or job.config.batch_size) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        real_check(line, progress)

    worker.SearchLine.check = check  # type: ignore[method-assign]
    save_each_batch()
    worker.run_trial(connection, job)


def always_out_of_memory(connection: Connection, job: Any) -> None:
    import torch

    def action() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    _with_training_replaced(connection, job, action)


def on_fake_gpu(connection: Connection, job: Any) -> None:
    """Train on the CPU in a GPU's place.

    One that is called broken or dying fails at the start, exclusive has room for one process, sick
    fails in the second epoch. Where trial_dir's search has a file `cat`, trial 0 fails on all.
    States are saved before each batch.
    """
    import torch

    def fail() -> None:
        by_cat = job.trial_dir.name == "trial_000" and (job.trial_dir.parent / "cat").exists()
        if job.gpu.startswith("sick") or by_cat:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    open_fake_gpus(job)
    _in_the_second_epoch(connection, job, fail)


def report_without_an_answer(connection: Connection, job: Any) -> None:
    """Let a file `going_on` beside the trials say that the second epoch's training has begun."""
    from writer_search.processes import child as worker

    real_check = worker.SearchLine.check

    def check(line: Any, progress: float) -> None:
        if progress > 1:
            (job.trial_dir.parent / "going_on").touch()
        real_check(line, progress)

    worker.SearchLine.check = check  # type: ignore[method-assign]
    worker.run_trial(connection, job)


def save_each_batch(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let trials in this process save before each batch, and wait until that is on the disk."""
    from writer_search.training.checkpoints import Checkpoints, SaveTimes

    save, end_epoch = Checkpoints.save, Checkpoints.end_epoch

    def save_and_wait(files: Checkpoints, contents: Any, **_: Any) -> None:
        save(files, contents, at_once=True)

    def end_and_wait(files: Checkpoints, *more: Any) -> None:
        end_epoch(files, *more)
        files.wait()  # no state is saved while the last epoch's files are being written

    put(SaveTimes, "is_due", lambda times: True)
    put(Checkpoints, "save", save_and_wait)
    put(Checkpoints, "end_epoch", end_and_wait)


def killed_late(connection: Connection, job: Any) -> None:
    """As the system's out-of-memory killer does it, in the second epoch."""
    _in_the_second_epoch(connection, job, lambda: os.kill(os.getpid(), signal.SIGKILL))


def full_disk_late(connection: Connection, job: Any) -> None:
    """No room for a state in the second epoch."""

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "latest_checkpoint.pth")

    _in_the_second_epoch(connection, job, fail)


def _in_the_second_epoch(connection: Connection, job: Any, action: Callable[[], None]) -> None:
    from writer_search.processes import child as worker

    save_each_batch()
    real_check = worker.SearchLine.check

    def check(line: Any, progress: float) -> None:
        if progress > 1:
            action()
        real_check(line, progress)

    worker.SearchLine.check = check  # type: ignore[method-assign]
    worker.run_trial(connection, job)


def open_fake_gpus(job: Any) -> None:
    """Let what is called a GPU be the CPU, or fail as its name says."""
    from writer_search.processes import child as worker

    def open_device(gpu: str) -> str:
        if gpu.startswith("exclusive"):
            try:
                locked.append(os.open(job.trial_dir.parent / "gpu.lock", os.O_CREAT | os.O_RDWR))
                fcntl.flock(locked[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise worker.DeviceError(gpu, "CUDA-capable device(s) is/are busy") from None
        if gpu.startswith("broken"):
            raise worker.DeviceError(gpu, "RuntimeError: CUDA error: initialization error")
        if gpu.startswith("dying"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return "cpu"

    locked: list[int] = []
    worker.open_device = open_device


def of_gpu_script(connection: Connection, argument: Any) -> None:
    """Do what `benchmarks.gpu` lets a trial's process do, on the CPU in a GPU's place."""
    import torch

    from benchmarks import gpu_searches

    def read_beyond(device: str) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    work, own = argument
    gpu_searches.read_beyond = read_beyond
    module, _, function = work.partition(":")
    if function == "cramped_trial":
        open_fake_gpus(own[0])
        out_of_memory(connection, own[0])
        return
    open_fake_gpus(own)
    getattr(import_module(module), function)(connection, own)


def name_fake_device(connection: Connection, entry: str) -> None:
    """Answer as a GPU of this name would; the driver of one that is called old is too old."""
    from writer_search.processes.child import DeviceError

    def open_device(gpu: str) -> str:
        if gpu.startswith(("old", "full")):
            why = "driver too old" if gpu.startswith("old") else "CUDA error: out of memory"
            raise DeviceError(gpu, why)
        if gpu.startswith("dying"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if gpu.startswith("hanging"):
            time.sleep(600)
        return "cuda"

    if entry.startswith("crowded"):
        threading.Thread.start = _refuse_thread  # type: ignore[method-assign]
    machine.open_device = open_device
    machine.torch.cuda.is_bf16_supported = lambda **_: not entry.endswith("V100")  # type: ignore[assignment]
    machine.torch.cuda.get_device_name = lambda number: f"the {entry}"  # type: ignore[assignment]
    machine.name_device(connection, entry)


def list_fake_devices(connection: Connection, entries: Any) -> None:
    connection.send(("devices", {"entries": entries}))


def signal_itself(connection: Connection, job: Any) -> None:
    """Be sent SIGTERM in the second epoch, as a batch system sends it to each process of a job."""
    _signal_at(connection, job, 5, os.getpid())


def signal_search_late(connection: Connection, job: Any) -> None:
    """Send the search process SIGTERM in the second epoch."""
    _signal_at(connection, job, 5)


def signal_search_next(connection: Connection, job: Any) -> None:
    """Send the search process SIGTERM after one batch."""
    _signal_at(connection, job, 1)


def signal_search_first(connection: Connection, job: Any) -> None:
    """Send the search process SIGTERM before the first batch."""
    _signal_at(connection, job, 0)


def _signal_at(connection: Connection, job: Any, call: int, pid: int | None = None) -> None:
    from writer_search.processes import child as worker

    calls = iter(range(10**9))
    real_check = worker.SearchLine.check

    def check(line: Any, progress: float) -> None:
        if next(calls) == call:
            os.kill(pid or job_parent(job), signal.SIGTERM)
            time.sleep(0.0 if pid else 0.5)
        real_check(line, progress)

    worker.SearchLine.check = check  # type: ignore[method-assign]
    worker.run_trial(connection, job)


def slow_answer(connection: Connection, question: Any) -> None:
    """Take for ever over a question about the machine, as a download may."""

    machine._describe_machine = lambda *_: time.sleep(600)  # type: ignore[assignment]
    machine.answer_question(connection, question)


# ------------------------------------------------------------------- several ranks in one trial


def in_rank_1(job: Any, action: Callable[[], None]) -> None:
    """Let rank 1 do something at its third step."""
    import train

    real_step = train.training_step

    def step(state: Any, *arguments: Any, **named: Any) -> Any:
        if job.rank == 1 and state.step == 2:
            action()
        return real_step(state, *arguments, **named)

    train.training_step = step


def rank_1_raises(connection: Connection, job: Any) -> None:
    from writer_search.processes import child as worker

    def action() -> None:
        raise RuntimeError("the cat is on the keyboard")

    in_rank_1(job, action)
    worker.run_trial(connection, job)


def rank_1_is_killed(connection: Connection, job: Any) -> None:
    from writer_search.processes import child as worker

    in_rank_1(job, lambda: os.kill(os.getpid(), signal.SIGKILL))
    worker.run_trial(connection, job)


def rank_1_hangs(connection: Connection, job: Any) -> None:
    """Hang in rank 1, with a short time limit for all."""
    from writer_search.processes import child as worker
    from writer_search.training import ranks

    def sleep_for_ever() -> None:
        time.sleep(600)

    ranks.TIME_LIMIT = 3.0
    in_rank_1(job, sleep_for_ever)
    worker.run_trial(connection, job)


def rank_1_out_of_memory(connection: Connection, job: Any) -> None:
    """Out of memory in rank 1 with more than four images at once."""
    import torch

    from writer_search.processes import child as worker

    def action() -> None:
        if job.micro_batch is None or job.micro_batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    in_rank_1(job, action)
    worker.run_trial(connection, job)


def without_batch_norm(connection: Connection, job: Any) -> None:
    """Train a backbone whose norms take no statistics over images; validate in small batches."""
    from writer_search.processes import child as worker

    norms_over_groups()
    evaluation.EVALUATION_BATCH = 4
    worker.run_trial(connection, job)


def norms_over_groups() -> Callable[[], None]:
    """Give the tiny backbone group norms; returns what takes that back."""
    from torch import nn

    import model

    real = model.BUILDERS["tiny"]

    def build(pretrained: bool) -> tuple[nn.Module, int]:
        layers, channels = real(pretrained)
        return nn.Sequential(
            *(
                nn.GroupNorm(1, layer.num_features) if isinstance(layer, nn.BatchNorm2d) else layer
                for layer in layers.children()
            )
        ), channels

    model.BUILDERS["tiny"] = build
    return lambda: model.BUILDERS.update(tiny=real)


def tell_environment(connection: Connection, question: Any) -> None:
    connection.send(("environment", dict(os.environ)))
