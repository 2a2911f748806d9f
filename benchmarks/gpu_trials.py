"""Checks of `benchmarks.gpu` that train: kills, ranks, memory, several trials, a real search."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from threading import Event, Thread
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks import trial_start
from benchmarks.gpu_checks import Found, Setting, difference, epochs_of, nvidia_smi, ready
from train import train, training_step
from writer_search.training.checkpoints import Checkpoints
from writer_search.training.device_errors import is_device_fault
from writer_search.training.ranks import Ranks
from writer_search.training.repeat import fitting

SPAWN = get_context("spawn")
TRIALS = (1, 2, 3, 4)  # at once
SECONDS_OF_TRIALS = 8.0
WITHIN = 0.95  # of the best rate: fewer trials at once are better


# ------------------------------------------------------------------------------ kill and continue


def kill_and_continue(setting: Setting) -> Found:
    """Kill a trial within its second epoch, go on, and compare with one that was not killed.

    Twice: as deterministic as torch can be, where weights have to be equal, and by default, where
    the difference is told. Of `tiny`, whose operations all have a deterministic form.
    """
    value = {
        name: killed_and_whole(setting, setting.work / name, name == "deterministic")
        for name in ("deterministic", "default")
    }
    return Found(value["deterministic"] == 0, value, 0)


def killed_and_whole(setting: Setting, directory: Path, is_deterministic: bool) -> float:
    """Give the largest difference between the weights of a trial that was killed and of another."""
    weights = []
    for name in ("whole", "killed"):
        trial = directory / name
        if name == "killed":
            process = SPAWN.Process(target=trained, args=(setting, trial, is_deterministic, True))
            process.start()
            process.join()
            if process.exitcode != -signal.SIGKILL:
                raise RuntimeError(f"the trial to be killed ended with {process.exitcode}")
        process = SPAWN.Process(target=trained, args=(setting, trial, is_deterministic, False))
        process.start()
        process.join()
        saved = torch.load(trial / "final_model.pth", weights_only=True)["model"]
        weights.append(torch.cat([t.double().flatten() for t in saved.values()]))
    return difference(*weights)


def trained(setting: Setting, trial: Path, is_deterministic: bool, is_killed: bool) -> None:
    """Train two epochs, from a checkpoint where there is one."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(is_deterministic)

    def check(progress: float) -> None:
        if is_killed and progress > 1:
            os.kill(os.getpid(), signal.SIGKILL)

    config = replace(setting.config("tiny"), epochs=2, patience=2)
    has_saved = (trial / "latest_checkpoint.pth").exists()
    train(
        config,
        setting.data(config),
        trial,
        check=check,
        device=setting.device,
        continue_from=trial if has_saved else None,
    )


# ------------------------------------------------------------------------------------------ ranks


def one_rank(setting: Setting) -> Found:
    """Compare a step in a group of one rank with a step without a group.

    With two GPUs or more also trains a trial of two ranks by the real command, to its end.
    """
    config = setting.config(dropout=0.0, backbone="tiny", precision="float32")
    weights = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)  # type: ignore[attr-defined]
    backend = "gloo" if setting.device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    images = torch.randn(8, 1, config.line_height, config.crop_width, device=setting.place)
    labels = torch.zeros(8, dtype=torch.long, device=setting.place)
    for is_grouped in (False, True):
        state, _, _ = ready(setting, config, setting.place)
        if is_grouped:
            state.replicated = Ranks(0, 2).replicated(state.model)  # a group, of this process alone
        training_step(state, config, images, labels)
        weights.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    dist.destroy_process_group()
    apart = difference(*weights)
    value: dict[str, Any] = {"one_rank": apart, "two_ranks_complete": None}
    if setting.device == "cuda" and torch.cuda.device_count() > 1:
        code, _ = searched(setting, "ranks", 1, "--gpus_per_trial", "2")
        value["two_ranks_complete"] = code == 0
    return Found(apart == 0 and value["two_ranks_complete"] is not False, value, 0)


# ------------------------------------------------------------------------------------------ speed


def checkpoints(setting: Setting) -> Found:
    """Compare epochs of a trial that saves its state with epochs of one that does not."""
    config = replace(setting.config(), epochs=6, patience=6)
    data = setting.data(config)

    def median_epoch(name: str) -> float:
        ends: list[float] = []
        train(
            config,
            data,
            setting.work / f"saving_{name}",
            lambda epoch, row: ends.append(time.perf_counter()),
            device=setting.device,
        )
        return median(later - sooner for sooner, later in pairwise(ends[1:]))

    with_saving = median_epoch("with")
    with mock.patch.object(Checkpoints, "is_due", return_value=False):
        without = median_epoch("without")
    ratio = with_saving / without
    return Found(ratio <= 1.05, ratio, 1.05)


def trials_at_once(setting: Setting) -> Found:
    """Measure images a second of one to four trials at once; all have to get the same weights."""
    rates, sums = {}, set()
    for number in TRIALS:
        barrier, queue = SPAWN.Barrier(number), SPAWN.Queue()
        arguments = (setting, barrier, queue, SECONDS_OF_TRIALS)
        processes = [SPAWN.Process(target=one_of_many, args=arguments) for _ in range(number)]
        for process in processes:
            process.start()
        answers = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        rates[str(number)] = sum(rate for rate, _ in answers)
        sums |= {weight for _, weight in answers}
    value = {"images_per_second": rates, "weights_differ": len(sums) > 1}
    return Found(len(sums) == 1, value, "the same weights")


def one_of_many(setting: Setting, barrier: Any, queue: Any, limit: float) -> None:
    """Train the same few steps as the others; then count images for some seconds, all at once."""
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    config = setting.config()
    state, _, _ = ready(setting, config, setting.place)
    state.model.train()
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, 1, config.line_height, config.crop_width)
    images = torch.randn(shape, generator=generator).to(setting.place)
    labels = torch.zeros(config.batch_size, dtype=torch.long, device=setting.place)
    for _ in range(3):
        training_step(state, config, images, labels)
    weight = float(sum(p.detach().double().abs().sum() for p in state.model.parameters()))
    barrier.wait(60)
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < limit:
        training_step(state, config, images, labels).item()
        steps += 1
    queue.put((steps * config.batch_size / (time.perf_counter() - started), weight))


def best_number(rates: Mapping[str, float]) -> int:
    """Give the smallest number of trials at once whose rate is within 5 % of the best."""
    enough = WITHIN * max(rates.values())
    return min(int(number) for number, rate in rates.items() if rate >= enough)


def start(setting: Setting) -> Found:
    """Measure the time from a trial's end to the next one's first batch, in a real search."""
    events: list[tuple[str, float]] = []
    with trial_start.noted_messages(events):
        code, _ = searched(setting, "start", 4)
    found = median(trial_start.spans_of(events))
    return Found(code == 0 and found <= 1.5, found, 1.5)


def idle(setting: Setting) -> Found:
    """Measure how much of the time of a real search a GPU idles, by nvidia-smi."""
    busy: list[float] = []
    over = Event()

    def sample() -> None:
        while not over.wait(0.2):
            busy.extend(float(n) for n in nvidia_smi("--query-gpu=utilization.gpu") if n.isdigit())

    thread = Thread(target=sample)
    thread.start()
    code, _ = searched(setting, "idle", 4, "--n_jobs", "2", backbone="resnet18")
    over.set()
    thread.join()
    share = 1 - mean(busy) / 100 if busy else None
    return Found(None if share is None else code == 0 and share <= 0.3, share, 0.3)


def searched(
    setting: Setting, name: str, trials: int, *more: str, backbone: str = "tiny"
) -> tuple[int, Path]:
    """Run the real command; give its exit code and its directory."""
    from hyperparameter_search import main as search

    directory = setting.work / name
    fixed = {"backbone": backbone} | {k: setting.values[k] for k in setting.values}
    words = [
        *("--data_root", str(setting.root), "--cache_dir", str(setting.work / "cache")),
        *("--checkpoint_dir", str(directory), "--n_trials", str(trials), "--epochs", "2"),
        *("--use_all_writers", "--weights", "none", "--pruner", "none"),
        *("--device", setting.device, *more),
        *(word for key, value in fixed.items() for word in ("--fix", f"{key}={value}")),
    ]
    with trial_start.silent():
        return search(words), directory


# ------------------------------------------------------------------------------------------ faults


def out_of_memory(setting: Setting, room: float = 0.02) -> Found:
    """Let a trial run out of memory, and go on with fewer images at once until they fit.

    room: the share of a GPU's memory that this process may have.
    """
    config = replace(setting.config(), epochs=1, patience=1, batch_size=64)
    if setting.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(room)
    data, tried = setting.data(config), [config.batch_size]

    def train_with(micro_batch: int | None) -> None:
        directory = setting.work / "memory"
        train(config, data, directory, device=setting.device, micro_batch=micro_batch)

    images: int | None = None
    while (images := fitting(train_with, images, config.batch_size)) is not None:
        tried.append(images)
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    if len(tried) == 1:
        return Found(None, "memory did not run out: nothing was learnt", "halved")
    return Found((setting.work / "memory" / "metrics.json").exists(), tried, "halved")


def device_fault(setting: Setting) -> Found:
    """Let one of two processes read beyond its data; the other one, and a third, have to end well.

    The error has to be told from a mistake of the program, for which the GPU is not to be blamed.
    """
    queue = SPAWN.Queue()
    kinds = ("faulty", "well", "afterwards")
    processes = {k: SPAWN.Process(target=computes, args=(setting, k, queue)) for k in kinds}
    for kind in ("faulty", "well"):
        processes[kind].start()
    answers = dict(queue.get(timeout=60) for _ in range(2))
    processes["faulty"].join()
    processes["afterwards"].start()
    answers |= dict([queue.get(timeout=60)])
    for process in processes.values():
        process.join()
    wanted = {"faulty": "fault", "well": "well", "afterwards": "well"}
    return Found(answers == wanted, answers, wanted)


def computes(setting: Setting, kind: str, queue: Any) -> None:
    """Train an epoch, or read beyond the end of a tensor; tell how it ended."""
    try:
        epoch, state, _ = epochs_of(setting, setting.config("tiny"))
        epoch()
        if kind == "faulty":
            beyond = torch.full((4,), 10**6, device=setting.place)
            state.loss_sum.new_zeros(4)[beyond].sum().item()
        queue.put((kind, "well"))
    except Exception as error:
        # On the CPU the same mistake is an IndexError.
        is_fault = is_device_fault(error) or isinstance(error, IndexError)
        queue.put((kind, "fault" if is_fault else json.dumps(str(error))))
