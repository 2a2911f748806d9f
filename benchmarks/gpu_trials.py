"""Checks of `benchmarks.gpu` that train trials: kills, ranks, saving, several at once, prediction.

What is not to share a process, or is to die, runs in a child of the check's own process, which is
forked from a server that has torch imported, as trials are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import queue
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import train as train_program
from benchmarks.gpu_checks import (
    Asked,
    Found,
    Setting,
    asked,
    difference,
    ready,
    weights_of,
    without_tf32,
)
from train import train, train_epoch, training_step
from writer_search.common.text import one_line
from writer_search.config import TrialConfig
from writer_search.processes.child import open_device
from writer_search.processes.messages import obey_in_thread
from writer_search.processes.parent import ChildProcess
from writer_search.processes.questions import BUSY
from writer_search.training import checkpoints as saving
from writer_search.training.checkpoints import Checkpoints, SaveTimes
from writer_search.training.device_errors import is_out_of_memory
from writer_search.training.outcomes import Stopped
from writer_search.training.ranks import ALONE, Ranks, join
from writer_search.training.state import TrainingState

CHILD_SECONDS = 60.0
TRIALS = (1, 2, 3, 4)  # at once
WITHIN = 0.95  # of the best rate: fewer trials at once are better
RANK_IMAGES, RANK_WRITERS = 8, 20


def compute_alike() -> None:
    """Let torch take algorithms that give the same in each run; before CUDA is up."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


# ------------------------------------------------------------------------------ kill and continue


@dataclass(frozen=True)
class Part:
    """A part of a trial. kill_in: the epoch, counted from 0, within which it is killed."""

    setting: Setting
    directory: Path
    is_deterministic: bool
    kill_in: int | None = None


def kill_and_continue(setting: Setting) -> Found:
    """Kill a trial within its second and its third epoch, and compare with one that was not killed.

    As deterministic as torch can be, where weights have to be equal, and by default, where the
    difference is told, beside that of two trials that were not killed. Of `tiny`, whose operations
    all have a deterministic form.
    """
    value: dict[str, Any] = {"went_on_at": []}
    for name, is_alike in (("deterministic", True), ("default", False)):
        whole, again, killed = (setting.work / name / kind for kind in ("whole", "again", "killed"))
        run_part(Part(setting, whole, is_alike))
        for kill_in in (1, 2, None):
            run_part(Part(setting, killed, is_alike, kill_in))
        value[name] = difference(final_weights(killed), final_weights(whole))
        if not is_alike:
            run_part(Part(setting, again, is_alike))
            value["default_unbroken"] = difference(final_weights(again), final_weights(whole))
        began = [float(line) for line in (killed / "began").read_text().split()]
        value["went_on_at"].append(began[1:])
    goes_on = all(len(at) == 2 and 1 < at[0] < 2 < at[1] < 3 for at in value["went_on_at"])
    return Found(value["deterministic"] == 0 and goes_on, value, 0)


def run_part(part: Part) -> None:
    """Train a part of a trial in a child. Raises RuntimeError where it does not end as it is to."""
    if part.kill_in is None:
        asked(train_part, part)
        return
    try:
        asked(train_part, part)
    except RuntimeError as error:
        if "SIGKILL" in str(error):
            return
        raise
    raise RuntimeError("the trial to be killed came to its end")


def final_weights(trial: Path) -> Tensor:
    saved = torch.load(trial / "final_model.pth", weights_only=True)["model"]
    return torch.cat([tensor.double().flatten() for tensor in saved.values()])


def train_part(part: Part) -> None:
    """Train three epochs, from a checkpoint where there is one, saving before each batch."""
    if part.is_deterministic:
        compute_alike()
    save, is_due = Checkpoints.save, Checkpoints.is_due

    def save_and_wait(files: Checkpoints, contents: Any, **_: Any) -> None:
        save(files, contents, at_once=True)

    def is_due_at_each_batch(files: Checkpoints, *where: int) -> bool:
        files.wait()  # while the history is being written, nothing else is
        return is_due(files, *where)

    within: list[float] = []  # of the epoch to be killed in, without its beginning
    begun: list[float] = []

    def check(progress: float) -> None:
        if not begun:
            with open(part.directory / "began", "a") as file:
                file.write(f"{progress}\n")
        begun.append(progress)
        if part.kill_in is not None and part.kill_in < progress < part.kill_in + 1:
            within.append(progress)
            if len(within) > 1:  # a state within the epoch is saved
                os.kill(os.getpid(), signal.SIGKILL)

    setting, trial = part.setting, part.directory
    config = replace(setting.config("tiny"), epochs=3, patience=3)
    has_saved = (trial / "latest_checkpoint.pth").exists()
    with (
        mock.patch.object(SaveTimes, "is_due", return_value=True),
        mock.patch.object(Checkpoints, "save", save_and_wait),
        mock.patch.object(Checkpoints, "is_due", is_due_at_each_batch),
    ):
        train(
            config,
            setting.data(config),
            trial,
            check=check,
            device=setting.device,
            continue_from=trial if has_saved else None,
        )


# ------------------------------------------------------------------------------------------ ranks


@dataclass(frozen=True)
class RankStep:
    """A step that a rank takes. size: of the group; 0: there is none."""

    setting: Setting
    gpu: str | None
    rank: int = 0
    size: int = 0
    port: int = 0
    listener: socket.socket | None = None


def one_rank(setting: Setting) -> float:
    """Give how far a step in a group of one rank is from a step without a group."""
    gpu = next(iter(setting.gpus), None)
    steps = [RankStep(setting, gpu, size=size) for size in (0, 1)]
    alone, in_group = (torch.from_numpy(asked(step_of_rank, step)["weights"]) for step in steps)
    return difference(in_group, alone)


def two_ranks(setting: Setting) -> float:
    """Give how far the gradients of two ranks are from those of one process."""
    gpus = setting.gpus[:2] or (None, None)
    wanted = torch.from_numpy(asked(step_of_rank, RankStep(setting, gpus[0]))["gradients"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ranks = [
            Asked(step_of_rank, RankStep(setting, gpu, rank, 2, port, None if rank else listener))
            for rank, gpu in enumerate(gpus)
        ]
    found = [torch.from_numpy(rank.answer()["gradients"]) for rank in ranks]
    return max(difference(own, wanted) for own in found)


def step_of_rank(step: RankStep) -> dict[str, Any]:
    """Take one step on this rank's share of a batch; give gradients and weights."""
    without_tf32()
    if step.size < 2:
        compute_alike()
    setting = step.setting
    config = setting.config(dropout=0.0, backbone="tiny", precision="float32", mixup_alpha=0.0)
    place = torch.device(open_device(step.gpu))
    ranks, state = grouped(step, config, place)
    # On the CPU, batch norm takes its statistics from the images of a rank.
    state.model.train(place.type == "cuda")
    generator = torch.Generator().manual_seed(0)
    shape = (RANK_IMAGES, 1, config.line_height, config.crop_width)
    images = torch.randn(shape, generator=generator).to(place)
    labels = torch.arange(RANK_IMAGES, device=place) % RANK_WRITERS
    rows = ranks.rows(RANK_IMAGES)
    training_step(state, config, images[rows], labels[rows], None, RANK_IMAGES)
    gradients = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
    found = {"gradients": torch.cat(gradients), "weights": weights_of(state.model)}
    # Arrays: tensors would travel through shared memory.
    return {name: own.cpu().numpy() for name, own in found.items()}


def grouped(
    step: RankStep, config: TrialConfig, place: torch.device
) -> tuple[Ranks, TrainingState]:
    """Meet the other ranks. A group of one process trains in it as those of several do."""
    if step.size > 1:
        ranks = join(step.rank, step.size, step.port, step.listener, place.type)
        return ranks, TrainingState.start(config, RANK_WRITERS, place, ranks)
    state = TrainingState.start(config, RANK_WRITERS, place)
    if step.size == 1:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # type: ignore[attr-defined]
        backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        state.replicated = Ranks(0, 2).replicated(state.model)
    return ALONE, state


# ----------------------------------------------------------------------------------------- saving


def checkpoints(setting: Setting) -> Found:
    """Compare a trial's epochs with those of one that does not save its state, in alternation.

    The first save comes after a second, not after the minute that it is expected to be worth.
    """
    taken: dict[bool, list[float]] = {True: [], False: []}
    saves = 0
    for number in range(4):
        is_saving = number % 2 == 0
        seconds, saved = seconds_of_epoch(setting, setting.work / f"saving_{number}", is_saving)
        taken[is_saving].append(seconds)
        saves += saved
    ratio = sum(taken[True]) / sum(taken[False])
    value = {"ratio": ratio, "saves": saves}
    return Found(ratio <= 1.05 if saves else None, value, 1.05)


def seconds_of_epoch(setting: Setting, directory: Path, is_saving: bool) -> tuple[float, int]:
    """Train for some seconds; give those of an epoch on average, and how often it was saved."""
    config, ends, saves = setting.config(), [], 0
    save = Checkpoints.save

    def report(epoch: int, row: dict[str, Any]) -> None:
        ends.append(time.perf_counter())
        if len(ends) > 1 and ends[-1] - ends[0] > setting.seconds:
            raise Stopped

    def counted(files: Checkpoints, contents: Any, **more: Any) -> None:
        nonlocal saves
        saves += not more  # the last one, at the stop, is after what is timed
        save(files, contents, **more)

    with (
        suppress(Stopped),
        mock.patch.object(saving, "ASSUMED_RATE", 1e18),
        mock.patch.object(Checkpoints, "save", counted),
        mock.patch.object(SaveTimes, "is_due", SaveTimes.is_due if is_saving else never),
    ):
        train(config, setting.data(config), directory, report, device=setting.device)
    return (ends[-1] - ends[0]) / (len(ends) - 1), saves


def never(times: SaveTimes) -> bool:
    return False


# -------------------------------------------------------------------------------- several at once


def trials_at_once(setting: Setting) -> Found:
    """Measure images a second of one to four trials at once; all have to get the same weights."""
    rates: dict[str, float] = {}
    digests: set[str] = set()
    value: dict[str, Any] = {"images_per_second": rates}
    for number in TRIALS:
        answers = all_at_once(setting, number)
        failed = [one for one in answers if "cause" in one]
        if failed and (number == 1 or not all(one["is_full"] for one in failed)):
            raise RuntimeError(f"{number} trial(s) at once: {failed[0]['cause']}")
        if failed:
            value["no_room_for"] = number
            break
        rates[str(number)] = sum(one["rate"] for one in answers)
        digests |= {one["weights"] for one in answers}
    lines = len(setting.data(setting.config()).select("train"))
    value |= {"same_weights": len(digests) == 1, "best": best_number(rates), "lines": lines}
    return Found(len(digests) == 1, value, "the same weights")


def all_at_once(setting: Setting, number: int) -> list[dict[str, Any]]:
    """Train in so many children at the same time; give what each has to say in the end."""
    children = [ChildProcess("benchmarks.gpu_trials:one_of_many", setting) for _ in range(number)]
    try:
        answers = [heard(child) for child in children]
        if all(kind == "ready" for kind, _ in answers):
            for child in children:
                child.order("go")
            answers = [heard(child) for child in children]
        return [content for _, content in answers]
    finally:
        for child in children:
            child.kill()
            child.end()


def heard(child: ChildProcess) -> Any:
    """Wait for a child's next message; a cause where none comes."""
    message = child.receive() if child.connection.poll(CHILD_SECONDS) else None
    return message or ("failed", {"cause": "one has died, or is silent", "is_full": False})


def one_of_many(connection: Connection, setting: Setting) -> None:
    """Train a few steps with the same result as the others; then epochs for some seconds."""
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    obey_in_thread(connection, orders.put)
    torch.set_num_threads(1)
    compute_alike()
    try:
        digest = digest_of_steps(setting)
        torch.use_deterministic_algorithms(False)  # slower, and no trial has it
        config = setting.config()
        state, lines, steps = ready(setting, config, setting.place)
        train_epoch(state, config, lines, steps, lambda progress: None)
        connection.send(("ready", {}))
        orders.get(timeout=CHILD_SECONDS)
        rate = rate_of(setting.seconds, state, config, lines, steps)
        connection.send(("rate", {"rate": rate, "weights": digest}))
    except Exception as error:
        text = one_line(f"{type(error).__name__}: {error}")
        is_full = is_out_of_memory(error) or BUSY.search(text) is not None
        connection.send(("failed", {"cause": text, "is_full": is_full}))


def digest_of_steps(setting: Setting) -> str:
    """Train three steps of `tiny`, each with the batches of an epoch; digest the weights."""
    config = setting.config("tiny")
    state, lines, steps = ready(setting, config, setting.place)
    train_epoch(state, config, lines, min(3, steps), lambda progress: None)
    return hashlib.sha256(weights_of(state.model).numpy().tobytes()).hexdigest()


def rate_of(
    seconds: float, state: TrainingState, config: TrialConfig, lines: Any, steps: int
) -> float:
    """Train for so many seconds; give the images a second."""
    first, started = state.step, time.perf_counter()

    def check(progress: float) -> None:
        if time.perf_counter() - started > seconds:
            raise Stopped

    with suppress(Stopped):
        while True:
            state.epoch += 1
            train_epoch(state, config, lines, steps, check)
    state.loss_sum.item()  # it waits for the device
    images = (state.step - first) * min(config.batch_size, len(lines))
    return images / (time.perf_counter() - started)


def best_number(rates: Mapping[str, float]) -> int:
    """Give the smallest number of trials at once whose rate is within 5 % of the best."""
    enough = WITHIN * max(rates.values())
    return min(int(number) for number, rate in rates.items() if rate >= enough)


# ------------------------------------------------------------------------------------- prediction


def prediction(setting: Setting) -> Found:
    """Let the command predict with a trained model, on the device and on the CPU."""
    trial = setting.work / "prediction"
    config = replace(setting.config("resnet_thin"), epochs=8, patience=8)
    train(config, setting.data(config), trial, device=setting.device)
    there, here = (
        predicted(trial / "best_model.pth", setting.root / "val", device)
        for device in (setting.device, "cpu")
    )
    return compared(there, here)


def predicted(model: Path, images: Path, device: str) -> list[dict[str, Any]]:
    """Run `train.py --predict`; give its guesses of lines."""
    text = io.TextIOWrapper(io.BytesIO())
    words = ["--predict", str(images), "--model", str(model), "--device", device, "--json"]
    with redirect_stdout(text):
        code = train_program.main(words)
    text.seek(0)
    said = text.read()
    if code:
        raise RuntimeError(f"train.py --predict --device {device} ended with exit code {code}")
    lines: list[dict[str, Any]] = json.loads(said)["lines"]
    return lines


def compared(there: list[dict[str, Any]], here: list[dict[str, Any]]) -> Found:
    """Compare guesses: the same writer where the margin is clear, and how probable."""
    apart, others = 0.0, 0
    for own, wanted in zip(there, here, strict=True):
        known = {wanted["writer"]: wanted["probability"]}
        known[wanted["runner_up"]] = wanted["runner_up_probability"]
        apart = max(apart, abs(own["probability"] - known.get(own["writer"], 0.0)))
        is_clear = wanted["probability"] - wanted["runner_up_probability"] > 0.04
        others += is_clear and own["writer"] != wanted["writer"]
    value = {"lines": len(here), "other_writers": others, "probability_apart": apart}
    return Found(others == 0 and apart <= 0.02, value, {"other_writers": 0, "apart": 0.02})
