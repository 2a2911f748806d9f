"""A trial's checkpoints and models on disk: each whole, and bound to what it belongs to.

A checkpoint is what a trial goes on from, a model what predicts. Both name the configuration and
the data that they are of, and are refused for others.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from data import LineSet
from model import WriterModel
from writer_search.common.errors import UserError
from writer_search.common.files import write_text, write_whole
from writer_search.common.text import one_line
from writer_search.config import TrialConfig
from writer_search.lines.decoding import INK_DEVIATION, VERSION

CHECKPOINT_FORMAT = 4  # counts up when going on from older ones would give another result

# How a model's lines were decoded: it is used with such lines alone. This program still reads those
# that version 1 read rightly as it did.
PREPROCESSING = {"version": VERSION, "ink_deviation": INK_DEVIATION}
PREPROCESSINGS = (PREPROCESSING, {**PREPROCESSING, "version": 1})


class CheckpointMismatchError(Exception):
    """A checkpoint belongs to another configuration or to other data."""


# -------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """Writes a trial's state behind its training: latest_checkpoint.pth, the best model, history.

    What is to be written is copied, and a thread writes it: training waits only where the disk
    takes longer than an epoch. (With a ResNet-50 that was 2.5 s an epoch on a disk of 180 MB/s.)
    So what kills the process may cost the epoch that was just done, and never a file: each appears
    whole, and they do in order. The `with` block ends once all is written. Of ranks one writes.
    """

    def __init__(
        self, trial_dir: Path, config: TrialConfig, data: LineSet, is_writer: bool = True
    ) -> None:
        self._trial_dir, self._config, self._data = trial_dir, config, data
        self._is_writer = is_writer
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
        checkpoint = load_checked(old_dir / "latest_checkpoint.pth", self._config, self._data)
        if self._is_writer and old_dir != self._trial_dir and checkpoint["best"] is not None:
            load_checked(old_dir / "best_model.pth", self._config, self._data)
            content = (old_dir / "best_model.pth").read_bytes()
            write_whole(self._trial_dir / "best_model.pth", lambda file: file.write(content))
            write_history(self._trial_dir, checkpoint["history"])
        return checkpoint

    def save(self, contents: dict[str, Any], is_best: bool = False) -> None:
        """Have a state written; is_best: with its average, the best model so far.

        Raises what the last writing raised: a state that cannot be saved ends the trial.
        """
        self.wait()
        if self._is_writer:
            checkpoint = {**_copied(contents), **_binding(self._config, self._data)}
            self._writing = self._thread.submit(self._write, checkpoint, is_best)

    def wait(self) -> None:
        """Wait until all is on the disk. Raises what its writing raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, checkpoint: dict[str, Any], is_best: bool) -> None:
        # The checkpoint last: what it says is the best, and has been, is there then.
        history = checkpoint["history"]
        if is_best:
            path = self._trial_dir / "best_model.pth"
            _write_model(path, checkpoint["average"], self._config, self._data, history[-1])
        if history:
            write_history(self._trial_dir, history)
        write_tensors(self._trial_dir / "latest_checkpoint.pth", checkpoint)


def _copied(value: Any) -> Any:
    """Copy tensors in dictionaries and lists to the host, where nothing changes them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def load_checked(path: Path, config: TrialConfig, data: LineSet) -> dict[str, Any]:
    """Load a file of `save` or `save_model`, refusing one of another configuration or data."""
    loaded: dict[str, Any] = read_tensors(path)
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
    path: Path, weights: dict[str, Any], config: TrialConfig, data: LineSet, row: dict[str, Any]
) -> None:
    saved = {
        "model": weights,
        "writers": list(data.writers),
        "epoch": row["epoch"],
        "metrics": row,
        "preprocessing": PREPROCESSING,
        **_binding(config, data),
    }
    write_tensors(path, saved)


def load_model(path: Path) -> tuple[WriterModel, TrialConfig, tuple[str, ...]]:
    """Load a saved model for use: the model, its configuration and its writers' names.

    Raises UserError, in one line, for whatever is not a model of this program.
    """
    saved = _load_saved_model(path)
    try:
        config = TrialConfig.from_dict(saved["config"])
        writers = tuple(map(str, saved["writers"]))
        if len(writers) < 2:
            raise ValueError("it knows fewer than two writers")
        # Built without ImageNet weights: its own follow.
        model = WriterModel.of(replace(config, pretrained=False), len(writers))
        model.load_state_dict(saved["model"])
    except Exception as error:  # nearly anything, where a file holds nearly anything
        raise UserError(f"{path} is not a model of this program: {one_line(error, 150)}") from None
    return model.to(memory_format=torch.channels_last).eval(), config, writers


def _load_saved_model(path: Path) -> dict[str, Any]:
    """Read a file of `save_model`. Raises UserError; runs nothing that the file holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on files that are not its own
            saved = read_tensors(path)
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


def read_tensors(path: Path) -> Any:
    """Read what `write_tensors` wrote, every byte of it checked; runs nothing that it holds.

    Raises nearly anything where the file is not whole.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch itself leaves the checksums unread
        if damaged is not None:
            raise ValueError(f"the file is damaged: {damaged} has another checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write what `torch.load` reads, whole. Raises OSError."""

    def write(file: BinaryIO) -> None:
        keeper = _ErrorKeeper(file)
        try:
            torch.save(content, keeper)  # type: ignore[arg-type]
        except Exception:
            if keeper.error is not None:
                raise keeper.error from None
            raise

    write_whole(path, write)


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
