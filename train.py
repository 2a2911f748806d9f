"""One trial: train a writer-identification model on decoded lines, and measure it.

`train` knows neither the search nor the command line, and runs from a notebook:

    lines = find_lines(Path("lines"))
    data = load_lines(Path("lines"), lines, 64, default_cache_dir())
    config = TrialConfig(seed=0, epochs=20, patience=10, backbone="resnet_thin")
    metrics = train(config, data, Path("my_trial"))

Run as a program, it predicts with a model, or trains a search's trial again.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports: the end, no traceback

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Torch takes seconds to import: --help and mistakes in the command are answered before.
    from writer_search.train_flags import tell_before_torch

    tell_before_torch(sys.argv[1:])

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import LineSet, default_cache_dir
from model import classification_loss, mix_images
from writer_search.common.errors import UserError, place_errors_told, told
from writer_search.common.files import write_json
from writer_search.common.output import lasting_output
from writer_search.common.place import open_standard_streams, require_directories
from writer_search.common.signals import Interrupted, StopSignals
from writer_search.common.text import one_line
from writer_search.config import STEPS_BETWEEN_RANKS, Improvement, TrialConfig
from writer_search.lines.predictions import write_predictions
from writer_search.train_flags import parse_train_args
from writer_search.training.batches import EpochImages, Lines, epoch_order, strip_on
from writer_search.training.checkpoints import (
    LATEST,
    PREVIOUS,
    Checkpoints,
    load_for_prediction,
    save_model,
)
from writer_search.training.checkpoints import (
    load_model as load_model,  # for those who use a model from Python
)
from writer_search.training.device_errors import is_out_of_memory
from writer_search.training.evaluation import evaluate, own_logits
from writer_search.training.fitting import describe, fit
from writer_search.training.metrics import OF_THE_BEST, Metrics, row_of
from writer_search.training.optimisation import (
    autocast,
    derived_seed,
    derived_seeds,
    schedule,
    seed_generator,
    set_learning_rate,
    steps_per_epoch,
    update_average,
)
from writer_search.training.outcomes import DivergedError, Pruned, Stopped
from writer_search.training.prediction import as_csv, as_json, as_table, predict
from writer_search.training.ranks import ALONE, Ranks
from writer_search.training.repeat import Retraining, device_like, retrain
from writer_search.training.state import TrainingState

CLIP_NORM = 1.0
AVERAGE_STEPS = 8  # it moves after so many: each move takes a hundredth of a step on a CPU
CHECK_LOSS_STEPS = 20  # the loss is read from the device this often, to end a diverged trial


Report = Callable[[int, dict[str, Any]], None]
Check = Callable[[float], None]


# -------------------------------------------------------------------------------------- the story


def train(
    config: TrialConfig,
    data: LineSet,
    trial_dir: Path,
    report: Report = lambda epoch, metrics: None,
    check: Check = lambda progress: None,
    *,
    device: str = "cpu",
    continue_from: Path | None = None,
    micro_batch: int | None = None,
    last_epoch: int | None = None,
    ranks: Ranks = ALONE,
    sharing: int = 1,
) -> Metrics | None:
    """Train one configuration and return the best epoch's validation metrics.

    `report(epoch, metrics)` is called after each epoch, epochs counted from 1; `check(progress)`
    before each batch, progress in epochs. Either may raise to end the trial: the state is then in
    `latest_checkpoint.pth`, as it is once a minute or more often (`SaveTimes`). `continue_from` is
    a trial directory whose checkpoint to go on from: its epochs are reported again, none is
    trained again, and the result is what it would have been without the break. `micro_batch`
    bounds the images on a device at once; gradients are accumulated to the same batch.
    `last_epoch` ends early, on the learning rates of the whole. Without validation lines no epoch
    is the best, and None is returned. `ranks` are the processes that train this trial together,
    each calling this function; what rank 0 raises, all raise. `sharing` trials share the device.

    Writes history.jsonl, latest_checkpoint.pth, best_model.pth, final_model.pth and, last,
    metrics.json into `trial_dir`. Raises DivergedError, CheckpointMismatchError, ValueError.
    """
    trial_dir.mkdir(parents=True, exist_ok=True)
    report = ranks.shared(report, Pruned, Stopped)
    place = torch.device(device)
    strip = strip_on(data, place, sharing)
    training, validation = (Lines.of(data, split, strip, place) for split in ("train", "val"))
    state = TrainingState.start(config, len(data.writers), place, ranks)
    steps = 1 if config.is_fitted else steps_per_epoch(config, len(training))

    with Checkpoints(trial_dir, config, data, ranks.is_first, place, state.nbytes) as checkpoints:
        if continue_from is not None:
            state.load(checkpoints.take_over(continue_from))
            for row in state.history:  # whoever judges the trial has to know what it had shown
                report(row["epoch"], row)
        check = saving(check, checkpoints, state)
        while not is_finished(state, config, last_epoch):
            state.started = time.perf_counter()
            try:
                if config.is_fitted:
                    fit_at_once(state, config, training, check)
                else:
                    train_epoch(state, config, training, steps, check, micro_batch)
                metrics = validate(state, config, validation, data.writers, check, micro_batch)
                end_epoch(state, config, checkpoints, metrics, steps, len(training))
                report(state.epoch, state.history[-1])
            except (Pruned, Stopped) as outcome:
                # Nothing is saved by giving up what is done, unless it was pruned an epoch ago.
                if isinstance(outcome, Pruned) or not is_finished(state, config, last_epoch):
                    checkpoints.save(state.contents, at_once=True)
                    raise
        checkpoints.finish(state.history, state.best)
    return finish(state, config, data, trial_dir)


def saving(check: Check, checkpoints: Checkpoints, state: TrainingState) -> Check:
    """Give a check that also saves the state, on all ranks, when it is time to."""

    def check_and_ask(progress: float) -> bool:
        check(progress)
        return checkpoints.is_due(state.epoch, state.step)

    is_due = state.ranks.shared(check_and_ask, Stopped, Pruned, every=STEPS_BETWEEN_RANKS)

    def check_and_save(progress: float) -> None:
        if is_due(progress):
            checkpoints.save(state.contents)

    return check_and_save


def train_epoch(
    state: TrainingState,
    config: TrialConfig,
    lines: Lines,
    steps: int,
    check: Check,
    micro_batch: int | None = None,
) -> None:
    """Train the rest of an epoch: all of it, or what a stop in its middle left over."""
    if config.with_cohog and state.step == 0:
        fit_descriptor(state, config, lines, check)
    ranks, epoch = state.ranks, state.epoch
    rng = np.random.default_rng([config.seed, 1, epoch])
    order = epoch_order(lines.labels.cpu().numpy(), config.sampler_alpha, rng)
    batch_size = min(config.batch_size, len(lines))
    drawn = EpochImages.draw(
        lines,
        torch.from_numpy(order[: steps * batch_size]).view(steps, batch_size),
        config.crop_width,
        config.augment_geometry,
        config.augment_photometry,
        derived_seed(config.seed, 2, epoch),
        ranks.rows(batch_size, mixes(config)),
    )
    # Of dropout: its masks are a rank's own.
    step_seeds = derived_seeds([config.seed, 4, epoch, ranks.rank], steps)
    state.model.train()
    while state.step < (epoch + 1) * steps:
        check(state.step / steps)
        number = state.step - epoch * steps
        seed_generator(lines.device, step_seeds[number])
        images, labels = drawn.batch(number)
        set_learning_rate(state.optimizer, schedule(state.step, config.epochs * steps))
        state.loss_sum += training_step(state, config, images, labels, micro_batch, batch_size)
        state.step += 1
        done = number + 1
        if done % AVERAGE_STEPS == 0 or done == steps:
            covered = (done - 1) % AVERAGE_STEPS + 1
            update_average(state.pairs, state.step, config.epochs * steps, covered)
        if state.step % CHECK_LOSS_STEPS == 0:
            require_finite_loss(state)
    require_finite_loss(state)


def fit_at_once(state: TrainingState, config: TrialConfig, lines: Lines, check: Check) -> None:
    """Train a descriptor without a network: one fit is all the training that it has.

    None where a break came after it, in the validation.
    """
    if state.step > state.epoch:
        return
    loss = fit_descriptor(state, config, lines, check)
    state.loss_sum += loss.to(state.loss_sum) / state.ranks.size
    state.step += 1
    require_finite_loss(state)


def fit_descriptor(state: TrainingState, config: TrialConfig, lines: Lines, check: Check) -> Tensor:
    """Describe all lines and fit the descriptor's classifier to them. Returns its mean loss, ().

    Ranks all do the same.
    """
    model, average = (own.beside or own for own in (state.model, state.average))
    descriptions, line = describe(model, lines, config.cohog_variation, lambda: check(0.0))
    labels, pages = lines.labels.cpu()[line], lines.pages.cpu()[line]
    writers = len(model.classifier.get_parameter("bias"))
    fitted = fit(config, descriptions, labels, pages, writers, lambda: check(0.0))
    fitted.give_to(model)
    fitted.give_to(average)
    return F.cross_entropy(fitted.logits(descriptions), labels)


def training_step(
    state: TrainingState,
    config: TrialConfig,
    images: Tensor,
    labels: Tensor,
    micro_batch: int | None = None,
    batch: int | None = None,
) -> Tensor:
    """Take one step on a batch: (batch, 1, height, width), (batch,). Returns its mean loss, ().

    Where ranks share the batch, `batch` is the size of the whole, the images are this rank's (with
    mixup also the one before them), and what is returned is this rank's part of the sum.
    """
    ranks, batch = state.ranks, batch or len(images)
    share, mixed_in = None, labels.roll(1)
    if mixes(config):
        rng = np.random.default_rng([config.seed, 3, state.step])
        share = float(rng.beta(config.mixup_alpha, config.mixup_alpha))
        images = mix_images(images, share)
        if ranks.size > 1:
            images, labels, mixed_in = images[1:], labels[1:], mixed_in[1:]
    images = images.contiguous(memory_format=torch.channels_last)
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=images.device)
    # As many parts on all ranks: batch norm may take its statistics over the ranks.
    number = math.ceil(ranks.largest_share(batch) / micro_batch) if micro_batch else 1
    parts = torch.tensor_split(torch.arange(len(images), device=images.device), number)
    for part in parts:
        last = part is parts[-1]
        with nullcontext() if last else ranks.accumulating(state.replicated):
            with autocast(config, images.device):
                logits = state.replicated(images[part] if micro_batch else images)
            loss = classification_loss(logits, config, labels[part])
            if share is not None:
                other = classification_loss(logits, config, mixed_in[part])
                loss = share * loss + (1 - share) * other
            loss = loss * (len(part) / batch)
            # Times their number, since the gradients of all ranks are averaged.
            (loss * ranks.size).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    nn.utils.clip_grad_norm_(state.model.parameters(), CLIP_NORM)
    state.optimizer.step()
    return total


def mixes(config: TrialConfig) -> bool:
    """Tell whether each image is mixed with its neighbour in the batch."""
    return config.mixup_alpha > 0 and config.loss == "cross_entropy"


def end_epoch(
    state: TrainingState,
    config: TrialConfig,
    checkpoints: Checkpoints,
    metrics: Metrics | None,
    steps: int,
    num_lines: int,
) -> None:
    """Note the epoch's metrics, and keep the model when it is the best so far."""
    epoch, seconds = state.epoch + 1, state.seconds_of_epoch()
    images = num_lines if config.is_fitted else steps * min(config.batch_size, num_lines)
    state.ranks.add_up(state.loss_sum)
    row = {
        "epoch": epoch,
        "train_loss": state.loss_sum.item() / steps,
        **(metrics.row() if metrics is not None else {}),
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
        "threads": torch.get_num_threads(),
    }
    if not config.is_fitted:
        share = schedule(state.step - 1, config.epochs * steps)
        row["learning_rate"] = config.learning_rate * share
    state.history.append(row)
    state.epoch = epoch
    state.seconds, state.started = 0.0, time.perf_counter()
    state.loss_sum.zero_()
    is_best = metrics is not None and (state.best is None or _merit(row) > _merit(state.best))
    if is_best and metrics is not None:
        kept = {name: getattr(metrics, name) for name in OF_THE_BEST}
        state.best = row | {n: torch.from_numpy(v) for n, v in kept.items() if v is not None}
    checkpoints.end_epoch(state.history, state.average if is_best else None)


def _merit(row: dict[str, Any]) -> tuple[float, float]:
    """Order epochs by macro top-1, equal ones by their loss.

    Few validation lines make many epochs equal, and the first of them is the least trained.
    """
    return row["macro_top1"], -row["loss"]


def finish(
    state: TrainingState, config: TrialConfig, data: LineSet, trial_dir: Path
) -> Metrics | None:
    """Write what a finished trial leaves, and give its best metrics."""
    if state.ranks.is_first:
        _write_results(state, config, data, trial_dir)
    if state.best is None:
        return None
    found = {n: state.best[n] for n in Metrics.__dataclass_fields__ if n in state.best}
    return Metrics(**found | {n: found[n].numpy() for n in OF_THE_BEST if n in found})


def _write_results(
    state: TrainingState, config: TrialConfig, data: LineSet, trial_dir: Path
) -> None:
    """Write the last model and the metrics; metrics.json last, since it says that all is there."""
    final, best = state.history[-1], state.best
    save_model(trial_dir / "final_model.pth", state.average, config, data, final)
    if best is not None:
        if "predictions" in best:  # a state that an earlier version saved has none
            lines = data.select("val")
            write_predictions(
                trial_dir,
                [data.paths[line] for line in lines],
                data.labels[lines],
                data.writers,
                best["predictions"].tolist(),
            )
        pairs = best["confusion"].tolist()
        best = {**row_of(best), "confusion": {"writers": list(data.writers), "pairs": pairs}}
    write_json(
        trial_dir / "metrics.json",
        {
            "value": best["macro_top1"] if best is not None else None,
            "best": best,
            "final": final,
            "epochs": state.epoch,
            "config_hash": config.hash(),
            "data_fingerprint": data.fingerprint,
        },
    )
    for name in (LATEST, PREVIOUS):  # nobody goes on from here
        (trial_dir / name).unlink(missing_ok=True)


def is_finished(state: TrainingState, config: TrialConfig, last_epoch: int | None = None) -> bool:
    """Tell whether all epochs are done, or `patience` of them without an improvement."""
    most = config.most_epochs
    if state.epoch >= min(most, last_epoch or most):
        return True
    if state.best is None:
        return False
    return state.epoch - Improvement.of(state.history).epoch >= config.patience


def validate(
    state: TrainingState,
    config: TrialConfig,
    lines: Lines,
    writers: tuple[str, ...],
    check: Check,
    micro_batch: int | None = None,
) -> Metrics | None:
    """Measure the average of the weights on the validation lines; None where there are none."""
    state.ranks.buffers_of_first(state.average)
    if not len(lines):
        return None
    progress = state.epoch + 1
    how = (lambda: check(progress), state.ranks)
    if state.described is None and state.average.beside is not None:
        state.described = own_logits(state.average.beside, config, lines, len(writers), *how)
    return evaluate(
        state.average, config, lines, writers, *how, micro_batch, described=state.described
    )


def require_finite_loss(state: TrainingState) -> None:
    if not math.isfinite(state.loss_sum.item()):
        raise DivergedError("the training loss is not finite", state.epoch + 1)


# ------------------------------------------------------------------------------------ the command

EXIT_OK, EXIT_INCOMPLETE, EXIT_USAGE = 0, 1, 2


def predict_command(args: argparse.Namespace) -> int:
    """Predict and print: results to stdout, images that cannot be read to stderr."""
    device = device_like(args.device, torch.cuda.is_available())
    model, config, writers, sure_from = load_for_prediction(args.model)
    predictions = predict(model, config, writers, args.predict, device, sure_from)
    for name, cause in predictions.skipped.items():
        print(f"not read: {one_line(name)}: {cause}", file=sys.stderr)
    for name, doubt in predictions.doubtful.items():
        print(f"warning: {one_line(name)}: {doubt}", file=sys.stderr)
    if not predictions.lines:
        raise UserError("--predict: no image could be read")
    show = as_json if args.json else as_csv if args.csv else as_table
    print(show(predictions))
    return EXIT_INCOMPLETE if predictions.skipped else EXIT_OK


def retrain_command(args: argparse.Namespace, stop: StopSignals) -> int:
    """Train a trial again."""
    wanted = Retraining(
        config_file=args.config,
        data_root=args.data_root,
        output_dir=args.output_dir,
        train_on=args.train_on,
        other_data=args.other_data,
        cache_dir=args.cache_dir or default_cache_dir(),
        device=args.device,
    )
    try:
        retrain(wanted, stop, train)
    except (DivergedError, RuntimeError, MemoryError) as error:
        if not isinstance(error, DivergedError) and not is_out_of_memory(error):
            raise
        print(f"error: the training failed: {one_line(error)}", file=sys.stderr)
        return EXIT_INCOMPLETE
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_standard_streams()
    with lasting_output():
        try:
            require_directories()
            args = parse_train_args(sys.argv[1:] if argv is None else argv)
            with place_errors_told(), StopSignals() as stop:
                return predict_command(args) if args.predict else retrain_command(args, stop)
        except UserError as error:
            print(told(error), file=sys.stderr)
            return EXIT_USAGE
        except Interrupted as error:
            saved = ": everything is saved; the same command goes on" if error.began else ""
            print(f"stopped by {error}{saved}", file=sys.stderr)
            return error.exit_code


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
