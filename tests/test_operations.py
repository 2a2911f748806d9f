"""Work that is left out without a change of any result: casts, counts, seeds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import operations
from data import LineSet
from model import UncountedBatchNorm2d
from writer_search.config import TrialConfig
from writer_search.training import evaluation
from writer_search.training.batches import Lines, strip_on
from writer_search.training.optimisation import build_model, seed_generator


def test_batch_norm_that_does_not_count_is_batch_norm(config: TrialConfig) -> None:
    model = build_model(config, 2)
    own = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert type(own) is UncountedBatchNorm2d
    own.reset_running_stats()
    plain = nn.BatchNorm2d(own.num_features)
    for _ in range(3):
        images = torch.randn(4, own.num_features, 6, 5)
        gradients = []
        for norm in (own, plain):
            norm.zero_grad()
            answer = norm(images)
            answer.square().sum().backward()
            gradients.append((answer, norm.weight.grad, norm.running_mean, norm.running_var))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    counted = [operations.count(lambda norm=norm: norm(images)) for norm in (own, plain)]
    assert counted[1] - counted[0] == {"aten::add_": 1}
    assert torch.equal(own.eval()(images), plain.eval()(images))
    assert own.state_dict().keys() == plain.state_dict().keys()


def test_weights_that_are_cast_once_answer_alike(
    data: LineSet, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, precision="bfloat16", backbone="resnet_thin", pooling="attention")
    model = build_model(config, len(data.writers))
    lines = Lines.of(data, "val", strip_on(data, torch.device("cpu")))
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 4)
    answers, counted = [], []
    for cast in (evaluation.cast_weights, lambda model: None):
        monkeypatch.setattr(evaluation, "cast_weights", cast)
        with torch.inference_mode():
            measure = partial(evaluation.own_logits, model, config, lines, len(data.writers))
            answers.append(measure())
            counted.append(operations.count(measure).total())
    assert torch.equal(*answers)
    assert counted[0] < 0.9 * counted[1]


def test_a_gpu_s_generator_is_seeded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    before = torch.default_generator.get_state()
    seed_generator(torch.device("cuda"), 5)
    seed_generator(torch.device("cuda:1"), 7)
    assert [generator.initial_seed() for generator in generators] == [5, 7]
    assert torch.equal(torch.default_generator.get_state(), before)
    assert [evaluation.windows_at_once(torch.device(d)) for d in ("cpu", "cuda")] == [64, 256]


def test_a_state_is_copied_without_waiting_and_its_values_not_at_all(
    data: LineSet,
) -> None:
    counted = operations.counts_of("resnet_thin", data)
    assert counted["saving"] == Counter(blocking=0, rows=0)
    tensors = counted["saving_once"]["blocking"]
    assert tensors > 200, "each of the model, its average and the optimiser"
    assert counted["saving_once"]["rows"] == 60
    waited_for = operations.BlockingCopies()
    with waited_for:
        torch.zeros(2).copy_(torch.ones(2))
        torch.zeros(2).copy_(torch.ones(2), non_blocking=True)
        torch.zeros(2).to("cpu", copy=True)
        torch.zeros(2).clone()
    assert waited_for.number == 3
