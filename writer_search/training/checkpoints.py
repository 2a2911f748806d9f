"""A trial's checkpoints and models on disk: each whole, and bound to what it belongs to.

A checkpoint is what a trial goes on from, a model what predicts. Both name the configuration and
the data that they are of, and are refused for others.
"""

from __future__ import annotations

import json
import pickle
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

import torch
from torch.utils.serialization import config as serialization

from data import LineSet
from model import WriterModel
from writer_search.common.errors import UserError
from writer_search.common.files import write_text, write_whole
from writer_search.common.text import one_line
from writer_search.config import TrialConfig
from writer_search.lines.decoding import INK_DEVIATION, VERSION
from writer_search.training.certainty import NEVER
from writer_search.training.copies import CPU, TensorCopies, unpacked
from writer_search.training.metrics import row_of

CHECKPOINT_FORMAT = 4  # counts up when going on from older ones would give another result

LATEST, BEST = "latest_checkpoint.pth", "best_model.pth"
PREVIOUS = "previous_best_model.pth"  # until a checkpoint names the new one

LEAST_SECONDS, MOST_SECONDS = 1.0, 60.0  # between two saved states
SHARE = 0.01  # of the training time that saving its state may take
# A process that has just begun may follow a kill, and what was killed once is soon killed again.
YOUNG_SECONDS, YOUNG_TIMES = 60.0, 2.0
SHARE_OF_HISTORY = 0.001
# Seconds that training takes longer for each that the writing thread computes, where no core is
# free: saves of resnet_thin with 4 ms of copying and 10 ms of computing cost 18 ms, with a standard
# error of 6 (2 cores, 12 pairs of trainings with a save each 0.4 s and without, 2026-11-27).
SLOWDOWN = 2.0
ASSUMED_RATE = 400 * 2**20  # bytes of a state a second, until a save has been measured
# How a model's lines were decoded: it is used with such lines alone. This program still reads those
# that earlier versions read rightly as they did.
PREPROCESSING = {"version": VERSION, "ink_deviation": INK_DEVIATION}
PREPROCESSINGS = [{**PREPROCESSING, "version": version} for version in range(1, VERSION + 1)]


class CheckpointMismatchError(Exception):
    """A checkpoint belongs to another configuration or to other data."""


# ------------------------------------------------------------------------------- when to save


class SaveTimes:
    """Decides when a state is saved: as often as costs a share of the training, or each minute.

    Twice as often in a training's first minute.

    cost: the seconds that a save is expected to cost the training, until some have been measured.
    The median of the last three counts: one that had to wait for a busy core says little.
    """

    def __init__(self, cost: float, share: float = SHARE) -> None:
        self._costs, self._share = deque([cost], maxlen=3), share
        self._took = 0.0  # from the copy to the disk
        self._born = self._began = self._asked = time.monotonic()

    def interval(self, batch: float = 0.0, is_young: bool = False) -> float:
        """Give the seconds from one save to the next, with batches that take so long.

        A kill may also cost the batch to come, and what is still on its way to the disk.
        is_young: in the training's first minute.
        """
        share = self._share * (YOUNG_TIMES if is_young else 1.0)
        cheap = max(LEAST_SECONDS, median(self._costs) / share)
        return min(cheap, MOST_SECONDS - self._took - batch)

    def is_due(self) -> bool:
        """Tell it before a batch; to be asked before each one."""
        now = time.monotonic()
        batch, self._asked = now - self._asked, now
        is_young = now - self._born < YOUNG_SECONDS
        return now - self._began >= self.interval(batch, is_young)

    def begin(self) -> None:
        self._began = time.monotonic()

    def end(self, cost: float, took: float) -> None:
        """Note what a save has cost the training, and how long it took to be on the disk."""
        self._costs.append(cost)
        self._took = took


# -------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """Saves a trial's state while it trains: latest_checkpoint.pth, the best model, the history.

    What is to be written is copied, and a thread writes it: training waits for the copy, and, where
    the disk takes longer than `SaveTimes` allows, less is saved. Each file appears whole, and they
    do in order. The best model is kept in memory until a state is saved that has it for its best,
    so that both advance together. The `with` block ends once all is written. Of ranks one writes.

    device: where the state is.   expected: its bytes, as far as they are known before the first.
    Raises ValueError where the lines have another height than the configuration: a model would be
    saved that is asked about others than it has learnt.
    """

    def __init__(
        self,
        trial_dir: Path,
        config: TrialConfig,
        data: LineSet,
        is_writer: bool = True,
        device: torch.device = CPU,
        expected: int = 0,
    ) -> None:
        if data.line_height != config.line_height:
            both = f"line_height={config.line_height}, and the lines' is {data.line_height}"
            raise ValueError(f"{both}: give load_lines the configuration's")
        self._trial_dir, self._config, self._data = trial_dir, config, data
        self._is_writer = is_writer
        self.times = SaveTimes(expected / ASSUMED_RATE)
        self._history_times = SaveTimes(0.0, SHARE_OF_HISTORY)
        self._host = TensorCopies(device, on_host=True)
        self._host_best = TensorCopies(device, on_host=True)
        self._kept = TensorCopies(device, on_host=False)
        self._best: dict[str, Any] | None = None  # what best_model.pth does not have yet
        self._saved: tuple[int, int] | None = None  # epoch and step of the last state
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def take_over(self, old_dir: Path) -> dict[str, Any]:
        """Give what `save` had saved in a trial's directory; its best model and history come along.

        Raises CheckpointMismatchError when it belongs to another configuration or other data, and
        FileNotFoundError when there is none.
        """
        checkpoint = load_checked(old_dir / LATEST, self._config, self._data)
        if self._is_writer and checkpoint["best"] is not None:
            source, own = self._best_of(old_dir, checkpoint["best"]), self._trial_dir / BEST
            if source != own:
                content = source.read_bytes()
                write_whole(own, lambda file: file.write(content))
        if self._is_writer:
            (self._trial_dir / PREVIOUS).unlink(missing_ok=True)
            write_history(self._trial_dir, checkpoint["history"])
        self._saved = checkpoint["epoch"], checkpoint["step"]
        return checkpoint

    def _best_of(self, old_dir: Path, best: dict[str, Any]) -> Path:
        """Find the best model that belongs to a checkpoint: a kill may have come between them."""
        previous = old_dir / PREVIOUS
        if previous.exists():
            model = load_checked(previous, self._config, self._data)
            if model["metrics"] == row_of(best):
                return previous
        load_checked(old_dir / BEST, self._config, self._data)  # or it is refused
        return old_dir / BEST

    # ---------------------------------------------------------------------------------- training

    def is_due(self, epoch: int, step: int) -> bool:
        """Tell, before each batch, whether to save the state, which has come so far.

        Raises what the last writing raised: a state that cannot be saved ends the trial.
        """
        if not self._is_writer:
            return False
        due = self.times.is_due()
        if self._writing is not None and self._writing.done():
            self.wait()
        return due and self._writing is None and (epoch, step) != self._saved

    def save(self, contents: Callable[[], dict[str, Any]], *, at_once: bool = False) -> None:
        """Have a state written; at_once: it is on the disk when this returns.

        `contents` gives it, on each rank. Raises what this or the last writing raised.
        """
        self.wait()
        self.times.begin()
        started = time.perf_counter()
        state = contents()
        here = state["epoch"], state["step"]
        is_there = here == self._saved and (self._trial_dir / LATEST).exists()
        if self._is_writer and not is_there:
            taken = self._host.take(state)
            best = None if self._best is None else self._host_best.take(self._best)
            self._best, self._saved = None, here
            waited = time.perf_counter() - started
            self._writing = self._thread.submit(self._write, waited, taken, best)
        if at_once:
            self.wait()

    def end_epoch(self, history: list[dict[str, Any]], best: WriterModel | None) -> None:
        """Have the history written, for `--status`; keep the model in mind if it is the best."""
        if best is not None and self._is_writer:
            self._best = self._kept.take(best.state_dict())
        if self._is_writer and self._writing is None and self._history_times.is_due():
            self._history_times.begin()
            self._writing = self._thread.submit(self._write_history, list(history))

    def finish(self, history: list[dict[str, Any]], best: dict[str, Any] | None) -> None:
        """Write what of the best model and the history is not there; a last state has no use."""
        self.wait()
        if self._is_writer:
            if self._best is not None and best is not None:
                self._write_best(self._best, best)
            write_history(self._trial_dir, history)

    def wait(self) -> None:
        """Wait until all is on the disk. Raises what its writing raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    # ----------------------------------------------------------------------------- in the thread

    def _write(self, waited: float, state: dict[str, Any], best: dict[str, Any] | None) -> None:
        # The checkpoint last: what it says is the best, and has been, is there then.
        started, computed = time.perf_counter(), time.thread_time()
        copying = self._host.wait() + (self._host_best.wait() if best is not None else 0.0)
        if best is not None:
            self._write_best(best, state["best"])
        write_history(self._trial_dir, state["history"])
        checkpoint = {**self._host.packed(state), **_binding(self._config, self._data)}
        # Checksums would take most of the time; `load_checked` does without.
        with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            write_tensors(self._trial_dir / LATEST, checkpoint)
        if best is not None:
            (self._trial_dir / PREVIOUS).unlink(missing_ok=True)
        cost = waited + copying + SLOWDOWN * (time.thread_time() - computed)
        self.times.end(cost, waited + time.perf_counter() - started)

    def _write_best(self, weights: dict[str, Any], row: dict[str, Any]) -> None:
        path, previous = self._trial_dir / BEST, self._trial_dir / PREVIOUS
        _write_model(path, weights, self._config, self._data, row_of(row), previous)

    def _write_history(self, history: list[dict[str, Any]]) -> None:
        computed = time.thread_time()
        write_history(self._trial_dir, history)
        self._history_times.end(time.thread_time() - computed, 0.0)


def load_checked(path: Path, config: TrialConfig, data: LineSet) -> dict[str, Any]:
    """Load a file of `save` or `save_model`, refusing one of another configuration or data."""
    # A checkpoint has no checksums: they would take most of the time that saving it costs.
    loaded: dict[str, Any] = unpacked(read_tensors(path, is_summed=path.name != LATEST))
    for name, wanted in _binding(config, data).items():
        if loaded.get(name) != wanted:
            raise CheckpointMismatchError(
                f"{path} belongs to another {name}: {loaded.get(name)!r} instead of {wanted!r}"
            )
    return loaded


# ------------------------------------------------------------------------------------------ models


def save_model(
    path: Path, model: WriterModel, config: TrialConfig, data: LineSet, row: dict[str, Any]
) -> None:
    """Write a model with all that its use needs: weights, configuration, names of writers."""
    _write_model(path, model.state_dict(), config, data, row)


def _write_model(
    path: Path,
    weights: dict[str, Any],
    config: TrialConfig,
    data: LineSet,
    row: dict[str, Any],
    previous: Path | None = None,
) -> None:
    saved = {
        "model": {name: tensor.cpu() for name, tensor in weights.items()},
        "writers": list(data.writers),
        "epoch": row["epoch"],
        "metrics": row,
        "preprocessing": PREPROCESSING,
        **_binding(config, data),
    }
    write_tensors(path, saved, previous)


def load_model(path: Path) -> tuple[WriterModel, TrialConfig, tuple[str, ...]]:
    """Load a saved model for use: the model, its configuration and its writers' names.

    Raises UserError, in one line, for whatever is not a model of this program.
    """
    return load_for_prediction(path)[:3]


def load_for_prediction(
    path: Path,
) -> tuple[WriterModel, TrialConfig, tuple[str, ...], float | None]:
    """Load a saved model as `load_model` does, and the probability from which on it is sure.

    None where its file does not tell: it was not validated, or an earlier version wrote it.
    """
    saved = _load_saved_model(path)
    try:
        config = TrialConfig.from_dict(saved["config"])
        writers = tuple(map(str, saved["writers"]))
        if len(writers) < 2:
            raise ValueError("it knows fewer than two writers")
        # Built without ImageNet weights: its own follow.
        model = WriterModel(replace(config, pretrained=False), len(writers))
        model.load_state_dict(saved["model"])
    except Exception as error:  # nearly anything, where a file holds nearly anything
        raise UserError(f"{path} is not a model of this program: {one_line(error, 150)}") from None
    metrics = saved.get("metrics")
    sure_from = metrics.get("sure_from") if isinstance(metrics, dict) else None
    # 0 is an earlier version's word for "everywhere", also far below all that was validated.
    is_known = isinstance(sure_from, float) and 0 < sure_from <= NEVER
    model = model.to(memory_format=torch.channels_last).eval()
    return model, config, writers, sure_from if is_known else None


def _load_saved_model(path: Path) -> dict[str, Any]:
    """Read a file of `save_model`. Raises UserError; runs nothing that the file holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on files that are not its own
            saved = read_tensors(path, is_summed=False)
            if not (isinstance(saved, dict) and "optimizer" in saved):
                require_whole(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; give a best_model.pth or final_model.pth"
        ) from None
    except pickle.UnpicklingError:  # torch's own advice, to load it all the same, is a bad one
        raise UserError(
            f"{path} is not a model of this program: refused, it does not hold tensors and plain "
            "values alone"
        ) from None
    except Exception as error:
        cause = one_line(f"{type(error).__name__}: {error}", 150)
        raise UserError(f"{path} is not a model of this program: {cause}") from None
    if isinstance(saved, dict) and "optimizer" in saved:
        raise UserError(
            f"{path} is the checkpoint of a trial under way, not a model; "
            "give a best_model.pth or final_model.pth"
        )
    if not isinstance(saved, dict) or not {"model", "config", "writers"} <= saved.keys():
        raise UserError(f"{path} is not a model of this program: it has no writers' names")
    if saved.get("preprocessing", PREPROCESSING) not in PREPROCESSINGS:
        raise UserError(
            f"{path} was trained on lines that were prepared in another way "
            f"({one_line(saved['preprocessing'], 100)}); use the version of the program it is from"
        )
    return saved


# ------------------------------------------------------------------------------------------- files


class _ErrorKeeper:
    """A file that remembers why it could not be written: torch.save hides a full disk."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def read_tensors(path: Path, is_summed: bool = True) -> Any:
    """Read what `write_tensors` wrote; runs nothing that it holds.

    is_summed: whether the file has checksums: then every byte of it is checked. Raises nearly
    anything where the file is not whole.
    """
    if is_summed:
        require_whole(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def require_whole(path: Path) -> None:
    """Raise ValueError when a file's checksums, which torch leaves unread, are wrong."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the file is damaged: {damaged} has another checksum")


def write_tensors(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write what `torch.load` reads, whole; see `write_whole`. Raises OSError."""

    def write(file: BinaryIO) -> None:
        keeper = _ErrorKeeper(file)
        try:
            torch.save(content, keeper)  # type: ignore[arg-type]
        except Exception:
            if keeper.error is not None:
                raise keeper.error from None
            raise

    write_whole(path, write, previous)


def write_history(trial_dir: Path, history: list[dict[str, Any]]) -> None:
    """Write history.jsonl: a line per epoch."""
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in history]
    write_text(trial_dir / "history.jsonl", "".join(lines))


def _binding(config: TrialConfig, data: LineSet) -> dict[str, Any]:
    """Name what a checkpoint belongs to."""
    return {
        "format": CHECKPOINT_FORMAT,
        "config_hash": config.hash(),
        "data_fingerprint": data.fingerprint,
        "config": config.to_dict(),
    }
