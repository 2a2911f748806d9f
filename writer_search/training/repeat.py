"""Trains a search's trial again, outside of the search: to repeat it, or for the final model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data import LineSet, find_lines, load_lines
from model import WeightsUnavailableError, ensure_imagenet_weights
from writer_search.common.cores import usable_cores
from writer_search.common.errors import UserError
from writer_search.common.files import content_hash, read_json, remove_temporaries, write_json
from writer_search.common.locks import DirectoryLock
from writer_search.common.provenance import provenance
from writer_search.common.signals import Interrupted, StopSignals
from writer_search.common.text import counted, duration, epoch_value, one_line, percent
from writer_search.config import TrialConfig, half_batch
from writer_search.lines.layout import SPLITS
from writer_search.lines.report import describe_report
from writer_search.lines.walk import LeftOut
from writer_search.training.checkpoints import LATEST, CheckpointMismatchError, load_checked
from writer_search.training.device_errors import is_out_of_memory
from writer_search.training.optimisation import emulates_bfloat16
from writer_search.training.outcomes import Stopped


@dataclass(frozen=True)
class Original:
    """The trial that is trained again, as its config.json and metrics.json have it.

    threads: no more than this machine has cores.
    """

    config: TrialConfig
    data_fingerprint: str
    threads: int
    micro_batch: int | None
    on_gpu: bool
    settings: dict[str, Any]  # of its search
    value: float | None  # the best epoch's; None where metrics.json is not there
    best_epoch: int | None
    train_on: str = "train"  # train+val: it was such a training itself, of so many epochs


@dataclass(frozen=True)
class Retraining:
    """What is asked for. `config_file` is a trial's config.json."""

    config_file: Path
    data_root: Path
    output_dir: Path
    train_on: str | None  # None: as the original was
    other_data: bool
    cache_dir: Path
    device: str  # auto is the kind that the trial had


def read_original(config_file: Path) -> Original:
    """Read a trial's config.json, and metrics.json where it is beside. Raises UserError."""
    try:
        found = read_json(config_file)
        config = TrialConfig.from_dict(found["config"])
        original = Original(
            config,
            str(found["data_fingerprint"]),
            # More than there are cores would wait for one another: 19 times as long with 64 on 2.
            min(int(found["threads"]), usable_cores()),
            _images_at_once(found, config),
            found["device"] != "cpu",
            dict(found["settings"]),
            None,
            None,
        )
        original.settings["data"]["writers"]
        if found.get("train_on") == "train+val":
            last = None if found["last_epoch"] is None else int(found["last_epoch"])
            return replace(original, train_on="train+val", best_epoch=last)
    except OSError as error:
        raise UserError(f"--config cannot be read: {one_line(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--config {config_file} is not the config.json of a trial: "
            f"{one_line(f'{type(error).__name__}: {error}', 150)}"
        ) from None
    try:
        metrics = read_json(config_file.with_name("metrics.json"))
        if metrics["config_hash"] == config.hash() and metrics["best"] is not None:
            value, epoch = float(metrics["value"]), int(metrics["best"]["epoch"])
            return replace(original, value=value, best_epoch=epoch)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a trial that was cut off, or its configuration alone
    return original


def _images_at_once(found: dict[str, Any], config: TrialConfig) -> int | None:
    """Give the images that one device of the trial had at once; None: the whole batch.

    One process trains it here: what several GPUs had shared may not fit on one.
    """
    ranks = int(found.get("ranks") or 1)
    if found["micro_batch"] is not None or ranks == 1:
        return None if found["micro_batch"] is None else int(found["micro_batch"])
    return -(-config.batch_size // ranks)


def split_seed(recorded: dict[str, Any]) -> int:
    """Give the seed that lines were split by, as a study's settings describe them."""
    split = str(recorded.get("split", "given"))
    return int(split.rpartition(" ")[2]) if split.startswith("by seed ") else 0


def find_data(wanted: Retraining, original: Original) -> LineSet:
    """Find and decode the trial's lines. Raises UserError when they are other ones."""
    recorded = original.settings["data"]
    seed = split_seed(recorded)
    writers = None if wanted.other_data else int(recorded["writers"])
    left_out = LeftOut()
    lines = find_lines(wanted.data_root, writers, seed, left_out)
    data = load_lines(
        wanted.data_root, lines, original.config.line_height, wanted.cache_dir, left_out
    )
    whole = with_validation_lines(data)
    trained_on = whole if original.train_on == "train+val" else data
    if trained_on.fingerprint != original.data_fingerprint and not wanted.other_data:
        raise UserError(
            f"--data_root {wanted.data_root} holds other lines than the trial had (fingerprint "
            f"{trained_on.fingerprint}, the trial's is {original.data_fingerprint}); give the same "
            "lines, or --other_data to train on these"
        )
    for warning in describe_report(data.report, "data_report.json"):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return data if wanted.train_on == "train" else whole


def with_validation_lines(data: LineSet) -> LineSet:
    """Let the validation lines train as well: nothing is held out but the test lines."""
    splits = data.splits.copy()
    splits[splits == SPLITS.index("val")] = SPLITS.index("train")
    return replace(data, splits=splits, fingerprint=content_hash([data.fingerprint, "train+val"]))


def retrain(wanted: Retraining, stop: StopSignals, train: Callable[..., object]) -> None:
    """Train again, or go on where an earlier run of the same was stopped.

    `train` is the function of train.py.

    Writes what `train` does, config.json and data_report.json into the output directory.
    Raises UserError, Interrupted.
    """
    original = read_original(wanted.config_file)
    wanted = replace(wanted, train_on=wanted.train_on or original.train_on)
    data = find_data(wanted, original)
    last_epoch = original.best_epoch if wanted.train_on == "train+val" else None
    device = device_like(wanted.device, original.on_gpu)
    record = describe(wanted, original, data, last_epoch, device)
    is_finished = refuse_foreign(wanted.output_dir, record)
    if is_finished:
        print(f"{wanted.output_dir} has finished already: nothing to do")
        print("\n".join(closing_lines(wanted, original)))
        return
    checkpoint = wanted.output_dir / LATEST
    goes_on = checkpoint.exists()
    if goes_on:
        check_checkpoint(checkpoint, original.config, data)
    try:
        wanted.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir cannot be made: {one_line(error)}") from None
    with DirectoryLock(wanted.output_dir), stop.deferred():
        remove_temporaries(wanted.output_dir)
        write_json(wanted.output_dir / "config.json", record)
        write_json(wanted.output_dir / "data_report.json", data.report)
        for line in opening_lines(wanted, original, data, last_epoch, device, goes_on):
            print(line, flush=True)
        run(wanted, original, data, last_epoch, device, stop, train)
    print("\n".join(closing_lines(wanted, original)))


def run(
    wanted: Retraining,
    original: Original,
    data: LineSet,
    last_epoch: int | None,
    device: torch.device,
    stop: StopSignals,
    train: Callable[..., object],
) -> None:
    """Train, with a line for each epoch. Raises Interrupted once all is saved.

    Out of memory, it goes on with half the images at once, as a search does.
    """
    epochs = last_epoch or original.config.most_epochs
    best: list[float] = []

    def report(epoch: int, row: dict[str, Any]) -> None:
        facts = [f"epoch {epoch:2d}/{epochs}", f"loss {row['train_loss']:.3f}"]
        if "macro_top1" in row:
            best[:] = [max([*best, row["macro_top1"]])]
            value = epoch_value(row["macro_top1"], row.get("network_macro_top1"))
            facts += [value, f"best {percent(best[0])}"]
        print(" | ".join([*facts, duration(row["seconds"])]), flush=True)

    def check(progress: float) -> None:
        if stop.name is not None:
            raise Stopped

    fetch_weights(original.config)
    warn_of_emulation(original.config, device)
    torch.set_num_threads(original.threads)  # another number sums in another order

    def train_with(micro_batch: int | None) -> None:
        has_saved = (wanted.output_dir / LATEST).exists()
        train(
            original.config,
            data,
            wanted.output_dir,
            report,
            check,
            device=str(device),
            continue_from=wanted.output_dir if has_saved else None,
            micro_batch=micro_batch,
            last_epoch=last_epoch,
        )

    images = original.micro_batch
    try:
        while (images := fitting(train_with, images, original.config)) is not None:
            if device.type == "cuda":
                torch.cuda.empty_cache()
            note_smaller(wanted.output_dir, images)
    except Stopped:
        raise Interrupted(str(stop.name), began=True) from None
    except OSError as error:
        raise UserError(f"--output_dir {wanted.output_dir}: {one_line(error)}") from None


def warn_of_emulation(config: TrialConfig, device: torch.device) -> None:
    """Warn of a device that has no bfloat16 in hardware, where the trial computed in it."""
    if config.precision == "bfloat16" and emulates_bfloat16(device):
        print(
            f"warning: the trial computed in bfloat16, which this {device} only emulates: it takes "
            "many times as long, or fails",
            file=sys.stderr,
        )


def fitting(
    train_with: Callable[[int | None], None], micro_batch: int | None, config: TrialConfig
) -> int | None:
    """Train; give the images at once to try next where memory ran out, None when it is done."""
    try:
        train_with(micro_batch)
    except (RuntimeError, MemoryError) as error:
        smaller = half_batch(config, micro_batch or config.batch_size)
        if not is_out_of_memory(error) or smaller is None:
            raise
        return smaller  # the error goes, and with it all that the training held
    return None


def note_smaller(output_dir: Path, micro_batch: int) -> None:
    """Say that fewer images are on the device at once, also in config.json."""
    print(f"out of memory: goes on with {micro_batch} images at once", flush=True)
    record = read_json(output_dir / "config.json")
    write_json(output_dir / "config.json", record | {"micro_batch": micro_batch})


def fetch_weights(config: TrialConfig) -> None:
    """Have ImageNet weights at hand where a training needs them. Raises UserError otherwise."""
    if not config.pretrained:
        return
    try:
        ensure_imagenet_weights(config.backbone)
    except WeightsUnavailableError as error:
        raise UserError(
            f"ImageNet weights of {config.backbone} are not available: {one_line(error)}; the "
            "trial started from them: fix that, then run the same command"
        ) from None


def device_like(name: str, on_gpu: bool) -> torch.device:
    """Give the device of a name; auto takes the kind that the trial had, if it is here.

    Raises UserError.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        why = "there is none" if count == 0 else on_gpu and why_unusable("cuda")
        if on_gpu and why:
            print(f"warning: the trial ran on a GPU; here {why}: using the CPU", file=sys.stderr)
        return torch.device("cuda" if on_gpu and not why else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees {counted(count, 'CUDA device')}"
        )
    if device.type == "cuda" and (why := why_unusable(name)):
        raise UserError(f"--device {name}: {why}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what asks for no device asks this one, as for bfloat16
    return device


def why_unusable(device: str) -> str:
    """Say why a GPU that is counted cannot compute; nothing when it can."""
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # RuntimeError, AssertionError: an old driver, a full or sick GPU
        return f"it cannot be used ({one_line(f'{type(error).__name__}: {error}', 150)})"
    return ""


def describe(
    wanted: Retraining,
    original: Original,
    data: LineSet,
    last_epoch: int | None,
    device: torch.device,
) -> dict[str, Any]:
    """Describe the training as a trial's config.json does, so that it can be repeated as well."""
    on_gpu = device.type == "cuda"
    machine = {
        "device_names": [torch.cuda.get_device_name(device)] if on_gpu else [],
        "versions": {
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "cuda": torch.version.cuda if on_gpu else None,
        },
    }
    settings = original.settings
    if wanted.other_data:  # by its own lines this training can be repeated
        recorded = settings["data"]
        own = data.described(wanted.data_root, split_seed(recorded))
        settings = {**settings, "data": {**recorded, **own}}
    return {
        "repeats": str(wanted.config_file),
        "train_on": wanted.train_on,
        "last_epoch": last_epoch,
        "config": original.config.to_dict(),
        "config_hash": original.config.hash(),
        "data_fingerprint": data.fingerprint,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "threads": original.threads,
        "micro_batch": original.micro_batch,
        "settings": settings,
        **provenance(wanted.data_root, machine),
    }


OF_A_TRAINING = (
    *("metrics.json", "history.jsonl", "best_model.pth", "final_model.pth"),
    *("optuna_study.db", "summary"),
)


def refuse_foreign(output_dir: Path, record: dict[str, Any]) -> bool:
    """Raise UserError when the directory holds something else; tell whether all is done there."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file, not a directory")
    known = output_dir / "config.json"
    if not known.exists():
        for name in OF_A_TRAINING:
            if (output_dir / name).exists():
                raise UserError(
                    f"--output_dir {output_dir} holds {name}: give a directory of its own"
                )
        return False
    try:
        found = read_json(known)
        if "number" in found:
            raise UserError(f"--output_dir {output_dir} is a search's trial: give another")
        names = ("config_hash", "data_fingerprint", "train_on", "last_epoch")
        other = [name for name in names if found[name] != record[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{known} cannot be read: {one_line(error)}; give another") from None
    if other:
        raise UserError(
            f"--output_dir {output_dir} holds another training: {other[0]} is "
            f"{found[other[0]]}, not {record[other[0]]}; give a directory of its own"
        )
    return (output_dir / "metrics.json").exists()


def check_checkpoint(checkpoint: Path, config: TrialConfig, data: LineSet) -> None:
    """Raise UserError when a checkpoint cannot be gone on from."""
    try:
        load_checked(checkpoint, config, data)
    except CheckpointMismatchError as error:
        raise UserError(f"{error}; give another --output_dir") from None
    except Exception as error:  # nearly anything, where a file is damaged
        raise UserError(
            f"{checkpoint} cannot be read ({one_line(type(error).__name__)}); "
            "remove it to begin again"
        ) from None


def opening_lines(
    wanted: Retraining,
    original: Original,
    data: LineSet,
    last_epoch: int | None,
    device: torch.device,
    goes_on: bool,
) -> list[str]:
    """Say what is about to be trained, on what."""
    counts = [(split, len(data.select(split))) for split in SPLITS]
    lines = ", ".join(f"{count} {split}" for split, count in counts)
    lasting = counted(original.config.most_epochs, "epoch")
    if wanted.train_on == "train+val" and last_epoch is None and not original.config.is_fitted:
        lasting += ", since no metrics.json beside that tells which one was best"
    if last_epoch is not None:
        lasting = (
            f"{counted(last_epoch, 'epoch')}, after which the trial's validation value was best"
        )
    return [
        f"{'Going on with' if goes_on else 'Training'} the configuration of {wanted.config_file}",
        f"{len(data.writers)} writers | lines: {lines} | {data.line_height} px | {device}, "
        f"{counted(original.threads, 'thread')} | {lasting}",
    ]


def closing_lines(wanted: Retraining, original: Original) -> list[str]:
    """Say what came of it, next to what the trial had."""
    if wanted.train_on == "train+val":
        return [
            "Trained on the validation lines as well: no honest validation value is left, and no "
            "epoch was chosen. Only test lines can tell how good this model is.",
            f"Final model: {wanted.output_dir / 'final_model.pth'}",
        ]
    metrics = read_json(wanted.output_dir / "metrics.json")
    value, epoch = metrics["value"], metrics["best"]["epoch"]
    lines = [f"Best validation macro top-1: {percent(value)} at epoch {epoch}"]
    if original.value is not None and not wanted.other_data:
        had = f"{percent(original.value)} at epoch {original.best_epoch}"
        is_same = (value, epoch) == (original.value, original.best_epoch)
        lines.append(
            f"The trial had {had}: "
            + ("the same" if is_same else "not the same, as with other threads or versions")
        )
    return [*lines, f"Best model: {wanted.output_dir / 'best_model.pth'}"]
