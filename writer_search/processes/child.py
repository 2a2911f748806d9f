"""What a child process does: run a trial, or measure a model on the test lines."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from train import train
from writer_search.common.cores import WaitingThreads
from writer_search.common.text import one_line
from writer_search.processes.causes import Cause, Kind, of_error
from writer_search.processes.messages import (
    CONTINUE,
    PRUNE,
    STOP,
    THREADS,
    Job,
    Message,
    TestQuestion,
    obey_in_thread,
    reply,
)
from writer_search.training.device_errors import is_device_fault, is_out_of_memory
from writer_search.training.metrics import Metrics
from writer_search.training.outcomes import DivergedError, Pruned, Stopped
from writer_search.training.ranks import is_lost, join
from writer_search.training.test_split import measure_test_split

PROGRESS_SECONDS = 0.5  # a trial tells its progress at most so often


class SearchLine:
    """The child's end of the pipe; ends the whole process when the search process is gone."""

    def __init__(self, connection: Connection, log: Path) -> None:
        self._connection, self._log = connection, log
        self._has_trained = False
        self.threads: int | None = None  # that the search has ordered, until the next batch
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._awaits_answer = False
        self._stop = threading.Event()
        self._last_progress = 0.0
        obey_in_thread(connection, self._obey)

    def _obey(self, order: str) -> None:
        if order.startswith(THREADS):
            self.threads = int(order.removeprefix(THREADS))
            return
        if order == STOP:
            self._stop.set()
        self._answers.put(order)

    def stop(self, *_: object) -> None:
        """Let the trial save its state and end at its next batch. A handler of signals."""
        self._stop.set()

    def send(self, kind: str, **content: Any) -> None:
        """Send a message; when nobody listens, `obey_in_thread` is about to end this process."""
        with contextlib.suppress(OSError):
            self._connection.send((kind, content))

    def report(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Send an epoch's metrics. Raises Pruned or Stopped, by the answer to those before.

        Training goes on until this one's answer is there: the search stores the value before, or
        may be busy with another trial, and a GPU would have nothing to do.
        """
        self.send("report", epoch=epoch, metrics=metrics, again=not self._has_trained)
        self._hear(wait=True)
        self._awaits_answer = True

    def _hear(self, wait: bool) -> None:
        """Do what the answer to the last report says, if it is there, or wait for it."""
        if not self._awaits_answer:
            return
        try:
            answer = self._answers.get(wait)
        except queue.Empty:
            return
        if answer == CONTINUE:
            self._awaits_answer = False
            return
        self._answers.put(answer)  # ranks meet only now and then: it may be asked for again
        raise Pruned if answer == PRUNE else Stopped

    def check(self, progress: float) -> None:
        """Raise Stopped, or Pruned, when the search said so; tell it now and then how far this is.

        Pruned may come batches after the epoch that decided it, an epoch at the most.
        """
        self._has_trained = True
        if self._stop.is_set():
            self.send("progress", progress=progress)
            raise Stopped
        self._hear(wait=False)
        now = time.monotonic()
        if now - self._last_progress > PROGRESS_SECONDS:
            self._last_progress = now
            self.send("progress", progress=progress)
            with contextlib.suppress(OSError):
                os.utime(self._log)  # a sign of life, for `--status`


def run_trial(connection: Connection, job: Job) -> None:
    """Run one trial to its end, and send how it ended as the last message.

    A rank above 0 that ended as rank 0 did says nothing and exits with 0.
    """
    ended: Message | None = None
    try:
        with _output_to(job.log):
            ended = _run(connection, job)
    except OSError as error:  # no log can be opened or written, no thread be started
        with contextlib.redirect_stderr(io.StringIO()):  # it would be the search's own
            ended = ended or _outcome(error, job)
    kind, content = ended
    if job.rank == 0 or kind not in ("done", "pruned", "stopped"):
        with contextlib.suppress(OSError):  # nobody listens: the search is gone
            connection.send((kind, content))
    if job.ranks > 1:
        os._exit(0)  # a group's end may wait for ranks that are gone: measured 30 s and more


def _run(connection: Connection, job: Job) -> Message:
    """Run one trial to its end; say how it ended. Raises OSError where no thread starts."""
    line = SearchLine(connection, job.log)
    # A batch system signals each process of a job, and kills what is left after a while.
    signal.signal(signal.SIGTERM, line.stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    try:
        metrics = _train(job, line)
        assert metrics is not None, "a search has validation lines"
        return "done", {"metrics": metrics.row()}
    except BaseException as error:
        return _outcome(error, job)


def _train(job: Job, line: SearchLine) -> Metrics | None:
    torch.set_num_threads(job.threads)
    device = open_device(job.gpu)
    line.send("started", gpu=job.gpu)
    check: Callable[[float], None] = line.check
    if job.gives_way:
        check = _giving_way(job.threads, line)
    ranks = join(job.rank, job.ranks, job.port, job.listener, device)
    return train(
        job.config,
        job.data,
        job.trial_dir,
        line.report,
        check,
        device=device,
        continue_from=job.continue_from,
        micro_batch=job.micro_batch,
        ranks=ranks,
        sharing=job.sharing,
    )


def _giving_way(threads: int, line: SearchLine) -> Callable[[float], None]:
    """Make a check before each batch that also leaves cores to programs that come up, and back."""
    waiting = WaitingThreads(threads)

    def check(progress: float) -> None:
        line.check(progress)
        ordered, line.threads = line.threads, None
        if ordered is not None:
            waiting.threads = ordered
            torch.set_num_threads(ordered)
        elif (fewer := waiting.fewer()) is not None:
            torch.set_num_threads(fewer)
            line.send("threads", threads=fewer)

    return check


class DeviceError(Exception):
    """A device that cannot be used: which, and why."""

    def __init__(self, gpu: str, cause: str) -> None:
        super().__init__(f"GPU {gpu}: {cause}")
        self.gpu, self.cause = gpu, cause


def open_device(gpu: str | None) -> str:
    """Make this process see its own device alone, and touch it. Raises DeviceError."""
    if gpu is None:
        return "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when torch first touches a device
    try:
        torch.zeros(1, device="cuda").cpu()
    except Exception as error:
        raise DeviceError(gpu, one_line(f"{type(error).__name__}: {error}")) from error
    return "cuda"


def _outcome(error: BaseException, job: Job) -> tuple[str, dict[str, Any]]:
    """Turn how a trial ended into a message: kind, cause in one line, traceback."""
    if isinstance(error, Pruned):
        return "pruned", {}
    if isinstance(error, Stopped):
        return "stopped", {}
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):  # on a full disk; the cause is sent all the same
        print(text, file=sys.stderr, flush=True)
    if isinstance(error, DeviceError):
        return "device_failed", {"gpu": error.gpu, "cause": error.cause, "traceback": text}
    if is_device_fault(error) and job.gpu is not None:
        said = one_line(f"{type(error).__name__}: {error}")
        return "device_fault", {"gpu": job.gpu, "cause": said, "traceback": text}
    cause = of_error(error, one_line(f"{type(error).__name__}: {error}"), text)
    if isinstance(error, DivergedError):
        cause = Cause(Kind.NOT_FINITE, one_line(error.what), error.epoch, traceback=text)
    elif is_out_of_memory(error):
        cause = Cause(Kind.OUT_OF_MEMORY, f"out of memory: {one_line(error)}", traceback=text)
    if job.ranks > 1:
        cause = replace(cause, text=f"rank {job.rank}: {cause.text}")
    if is_lost(error) and cause.kind is not Kind.OUT_OF_MEMORY:
        return "lost", {"cause": cause}
    return "failed", {"cause": cause}


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send the process's output, that of libraries and of a crash included, to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT)  # says where this is
    yield
    sys.stdout.flush()
    sys.stderr.flush()


def measure_on_test(connection: Connection, question: TestQuestion) -> None:
    """Send ("measured", metrics with intervals) or ("failed", …) of a model on the test lines."""

    def measure() -> Message:
        try:
            torch.set_num_threads(question.threads)
            device = torch.device(open_device(question.gpus[0] if question.gpus else None))
            return "measured", measure_test_split(question.model_file, question.data, device)
        except Exception as error:  # told in a line: the search's results stand without it
            return "failed", {"cause": one_line(f"{type(error).__name__}: {error}")}

    reply(connection, measure)
