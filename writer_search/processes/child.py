"""What a child process does: run a trial, measure a model, or find out what the machine can do."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from model import WeightsUnavailableError, WriterModel, ensure_imagenet_weights
from train import DivergedError, Pruned, Stopped, line_logits, train
from writer_search.common.cores import WaitingThreads
from writer_search.common.files import UserError, one_line
from writer_search.config import BACKBONES, BACKBONES_BY_TIER
from writer_search.processes.devices import visible_entries
from writer_search.processes.parent import (
    PRUNE,
    STOP,
    THREADS,
    Job,
    MachineQuestion,
    Message,
    TestQuestion,
    obey_in_thread,
)
from writer_search.training.batches import Lines, strip_on
from writer_search.training.bootstrap import INTERVAL_METHOD, Pages, count_pages, intervals
from writer_search.training.checkpoints import load_model
from writer_search.training.metrics import Metrics, compute_metrics
from writer_search.training.ranks import is_lost, join

TEST_METRICS = ("macro_top1", "micro_top1", "macro_top5", "page_macro_top1", "loss")
PROGRESS_SECONDS = 0.5  # a trial tells its progress at most so often

# ----------------------------------------------------------------------------------------- trials


class SearchLine:
    """The child's end of the pipe; ends the whole process when the search process is gone."""

    def __init__(self, connection: Connection, log: Path) -> None:
        self._connection, self._log = connection, log
        self._has_trained = False
        self.threads: int | None = None  # that the search has ordered, until the next batch
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
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
        """Send an epoch's metrics and wait for the answer. Raises Pruned or Stopped."""
        self.send("report", epoch=epoch, metrics=metrics, again=not self._has_trained)
        answer = self._answers.get()
        if answer == PRUNE:
            raise Pruned
        if answer == STOP:
            raise Stopped

    def check(self, progress: float) -> None:
        """Raise Stopped when the search asked for it; tell it now and then how far this is."""
        self._has_trained = True
        if self._stop.is_set():
            raise Stopped
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
    line = SearchLine(connection, job.log)
    # A batch system signals each process of a job, and kills what is left after a while.
    signal.signal(signal.SIGTERM, line.stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    with _output_to(job.log):
        try:
            metrics = _train(job, line)
            assert metrics is not None, "a search has validation lines"
            kind, content = "done", {"metrics": asdict(metrics)}
        except BaseException as error:
            kind, content = _outcome(error, job)
        if job.rank == 0 or kind not in ("done", "pruned", "stopped"):
            line.send(kind, **content)
    if job.ranks > 1:
        os._exit(0)  # a group's end may wait for ranks that are gone: measured 30 s and more


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
    print(text, file=sys.stderr, flush=True)
    if isinstance(error, DeviceError):
        return "device_failed", {"gpu": error.gpu, "cause": error.cause, "traceback": text}
    cause = one_line(
        error if isinstance(error, DivergedError) else f"{type(error).__name__}: {error}"
    )
    kind = "lost" if is_lost(error) else "failed"
    if _is_out_of_memory(error):
        kind, cause = "out_of_memory", f"out of memory: {one_line(error)}"
    if job.ranks > 1:
        cause = f"rank {job.rank}: {cause}"
    return kind, {"cause": cause, "traceback": text}


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell a device, or a host, that has no memory left for this batch."""
    host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return host or isinstance(error, (torch.OutOfMemoryError, MemoryError))


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


# ------------------------------------------------------------------------------------------- test


def measure_on_test(connection: Connection, question: TestQuestion) -> None:
    """Send ("measured", metrics with intervals) or ("failed", …) of a model on the test lines."""
    obey_in_thread(connection, lambda order: None)  # downloads end with the search, too
    try:
        answer: Message = ("measured", _measure(question))
    except Exception as error:  # told in a line: the search's results stand without it
        answer = ("failed", {"cause": one_line(f"{type(error).__name__}: {error}")})
    with contextlib.suppress(OSError):
        connection.send(answer)


def _measure(question: TestQuestion) -> dict[str, Any]:
    torch.set_num_threads(question.threads)
    device = torch.device(open_device(question.gpus[0] if question.gpus else None))
    model, config, writers = load_model(question.model_file)
    lines = Lines.of(question.data, "test", strip_on(question.data, device), device)
    with torch.inference_mode():
        output = line_logits(model.to(device), config, lines, len(writers))
    logits = output.double().cpu().numpy()
    if not np.isfinite(logits).all():
        raise DivergedError("the model's output on the test lines is not finite")
    labels, numbers = lines.labels.cpu().numpy(), lines.pages.cpu().numpy()
    metrics, pages = (
        compute_metrics(logits, labels, numbers, writers),
        count_pages(logits, labels, numbers),
    )
    return {
        **{name: getattr(metrics, name) for name in TEST_METRICS},
        "intervals": intervals(pages),
        "interval_method": INTERVAL_METHOD,
        "lines": len(labels),
        "pages": len(pages.labels),
        "writers_with_one_page": int((np.bincount(pages.labels) == 1).sum()),
        "writers_without_test_lines": sorted(set(writers) - set(metrics.per_writer)),
        "per_writer": {
            name: _of_writer(pages, writers.index(name), share)
            for name, share in metrics.per_writer.items()
        },
    }


def _of_writer(pages: Pages, label: int, share: float) -> dict[str, Any]:
    own = pages.labels == label
    return {
        "top1": share,
        "lines": int(pages.lines[own].sum()),
        "pages": int(own.sum()),
        "page_top1": float(pages.page_right[own].mean()),
    }


# ---------------------------------------------------------------------------------------- machine


def answer_question(connection: Connection, question: MachineQuestion) -> None:
    """Send ("machine", …) or ("mistake", …): devices, tier, weights, precision, versions."""
    obey_in_thread(connection, lambda order: None)  # downloads end with the search, too
    torch.set_num_threads(question.threads)
    try:
        answer: Message = ("machine", _describe_machine(question))
    except UserError as error:
        answer = ("mistake", {"cause": str(error)})
    with contextlib.suppress(OSError):  # nobody waits for it any more
        connection.send(answer)


def _describe_machine(question: MachineQuestion) -> dict[str, Any]:
    gpus = _visible_gpus(question.device)
    tier = "gpu" if gpus else "cpu"
    weights, why = _decide_weights(question, tier)
    backbones = question.backbones or BACKBONES_BY_TIER[tier, weights == "imagenet"]
    return {
        "gpus": gpus,
        "device_names": [torch.cuda.get_device_name(i) for i in range(len(gpus))],
        "tier": tier,
        "weights": weights,
        "weights_why": why,
        "precision": {
            name: _faster_precision(name, tier) for name in (backbones if question.measure else ())
        },
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda if gpus else None,
        },
    }


def _visible_gpus(device: str) -> list[str]:
    """Give the entries of CUDA_VISIBLE_DEVICES that trials may use; none for the CPU."""
    if device == "cpu":
        return []
    count = torch.cuda.device_count()
    if count == 0:
        if device != "auto":
            raise UserError(
                f"--device {device}: torch {torch.__version__} sees no CUDA device here; "
                "use --device cpu, or install torch for your CUDA driver"
            )
        return []
    entries = visible_entries(os.environ.get("CUDA_VISIBLE_DEVICES"), count)
    if ":" in device:
        number = int(device.partition(":")[2])
        if number >= count:
            raise UserError(f"--device {device}: there are {count} CUDA device(s), from cuda:0")
        return [entries[number]]
    return entries


def _decide_weights(question: MachineQuestion, tier: str) -> tuple[str, str]:
    """Decide between ImageNet weights and none, once per study; also say why."""
    if question.weights == "none":
        return "none", ""
    backbones = question.backbones or BACKBONES_BY_TIER[tier, True]
    without = [name for name in backbones if not BACKBONES[name]]
    why = f"there are no ImageNet weights for {without[0]}" if without else ""
    try:
        for name in [] if without else backbones:
            ensure_imagenet_weights(name)
    except WeightsUnavailableError as error:
        why = f"ImageNet weights cannot be had: {one_line(error)}"
    if not why:
        return "imagenet", ""
    if question.weights == "imagenet":
        raise UserError(
            f"--weights imagenet: {why}; mend that, or begin a "
            "search with --weights none or other backbones"
        )
    return "none", why


def _faster_precision(backbone: str, tier: str) -> str:
    """Measure whether a backbone trains faster in bfloat16 here.

    A GPU with native bfloat16 always does. On CPUs it ranges from twice as fast (with AVX-512 or
    AMX units for it) to 14 times slower (an AMD EPYC without them), and depends on the backbone.
    """
    if tier == "gpu":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    # A whole network would take minutes on a CPU that only emulates bfloat16. Sizes matter: a small
    # convolution measured slower where the networks made of it were 1.6 times as fast.
    convolution = torch.nn.Conv2d(64, 64, 3, padding=1)
    if _bfloat16_time(convolution, torch.randn(8, 64, 32, 128)) > 1.2:
        return "float32"
    share = _bfloat16_time(WriterModel(backbone, 8), torch.randn(16, 1, 64, 256))
    return "bfloat16" if share < 0.9 else "float32"


def _bfloat16_time(module: torch.nn.Module, images: torch.Tensor) -> float:
    """Measure the time in bfloat16 as a share of that in float32."""
    module = module.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    return _seconds(module, images, True) / _seconds(module, images, False)


def _seconds(module: torch.nn.Module, images: torch.Tensor, bfloat16: bool) -> float:
    """Time a forward and backward pass: the best of three, after one to warm up."""
    measured = []
    for _ in range(4):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = module(images)
        output.float().sum().backward()
        measured.append(time.perf_counter() - started)
    return min(measured[1:])
