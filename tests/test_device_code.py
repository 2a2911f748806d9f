"""Training on a device: what is there meets nothing on the host, and numbers are as on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import far_device
import pytest
import torch
from far_device import FAR, FarDevice

import train as train_module
from data import LineSet
from train import train
from writer_search.config import TrialConfig
from writer_search.training import batches, evaluation
from writer_search.training.batches import EpochImages, Lines
from writer_search.training.checkpoints import load_model
from writer_search.training.outcomes import Stopped
from writer_search.training.prediction import predict
from writer_search.training.test_split import measure_test_split


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the name of a device that stands in for a GPU."""
    optimizer = import_module("torch.optim.optimizer")
    monkeypatch.setattr(
        optimizer, "_get_fused_kernels_supported_devices", lambda: [FAR.type, "cpu"]
    )
    for module in (train_module, evaluation):
        monkeypatch.setattr(module, "autocast", lambda config, device: contextlib.nullcontext())
    # Inference tensors cannot be of a subclass.
    logits: Any = evaluation.own_logits
    for module in (train_module, evaluation):
        monkeypatch.setattr(module, "own_logits", torch.no_grad()(logits.__wrapped__))
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    with FarDevice():
        yield FAR.type


@pytest.mark.parametrize("room", [True, False], ids=["strip there", "strip on the host"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"micro_batch": 4},
        {"mixup_alpha": 0.3, "micro_batch": 4},
        {"loss": "cosface", "pooling": "attention", "dropout": 0.0},
        {"backbone": "resnet_thin", "pooling": "gem", "augment_geometry": 0.0},
        {"augment_photometry": 0.0, "with_cohog": True, "cohog_sizes": 3},
    ],
    ids=lambda values: ", ".join(values) or "default",
)
def test_trial_on_a_device_is_that_on_the_cpu(
    device: str,
    room: bool,
    values: dict[str, Any],
    data: LineSet,
    config: TrialConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = 10 * data.strip.nbytes if room else 1
    monkeypatch.setattr(batches, "free_memory", lambda place: free if place == FAR else None)
    micro_batch = values.get("micro_batch")
    config = dataclasses.replace(config, **{k: v for k, v in values.items() if k != "micro_batch"})
    far_device.done.clear()
    there = train(config, data, tmp_path / "there", device=device, micro_batch=micro_batch)
    assert far_device.done["aten::convolution"] > 0
    if not config.with_cohog:  # which counts pairs by the same operation
        is_cut_there = far_device.done["aten::index_select"] > 0
        assert is_cut_there == room, "crops are cut where the strip is"
    here = train(config, data, tmp_path / "here", micro_batch=micro_batch)
    assert there == here


@pytest.mark.filterwarnings("ignore:.*is a no-op")  # what torch thinks of this stand-in
def test_trial_goes_on_on_a_device(
    device: str, data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    def check(progress: float) -> None:
        if progress > 1:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, data, tmp_path / "broken", check=check, device=device)
    # What is saved is of no device: a trial may go on on another.
    there, here = (
        train(config, data, tmp_path / place, device=place, continue_from=tmp_path / "broken")
        for place in (device, "cpu")
    )
    assert there == here == train(config, data, tmp_path / "whole")


def test_model_is_used_on_a_device(
    device: str,
    data: LineSet,
    lines_root: Path,
    config: TrialConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(config, data, tmp_path, device=device)
    model_file = tmp_path / "best_model.pth"
    measured = measure_test_split(model_file, data, torch.device("cpu"))
    predict_on: Any = predict.__wrapped__  # type: ignore[attr-defined]
    with torch.no_grad():
        guesses = [
            predict_on(*load_model(tmp_path / "best_model.pth"), [lines_root / "test"], place)
            for place in (FAR, torch.device("cpu"))
        ]
    assert guesses[0] == guesses[1]
    assert measure_test_split(model_file, data, torch.device(device)) == measured


@pytest.mark.parametrize("strip_device", [FAR, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([7, 0, 1])], ids=["plain", "mixup"])
def test_rank_makes_its_images_on_a_device(
    device: str, strip_device: torch.device, rows: slice | torch.Tensor, data: LineSet
) -> None:
    made = []
    for strip_place, place in ((strip_device, FAR), (torch.device("cpu"), torch.device("cpu"))):
        lines = Lines.of(data, "train", torch.from_numpy(data.strip).to(strip_place), place)
        drawn = EpochImages.draw(lines, torch.arange(16).view(2, 8), 32, 1.0, 1.0, 0, rows)
        made.append(drawn.batch(1))
        assert {tensor.device for tensor in made[-1]} == {place}
    for there, here in zip(*made, strict=True):
        assert torch.equal(there.cpu(), here)
