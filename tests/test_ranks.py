"""Several processes that train one trial together, on the CPU over gloo."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import RealChild, faulty, norms_over_groups
from test_search import PruneTrial, Run, run, trials_of
from torch import Tensor, nn

import train
from data import LineSet
from train import training_step
from writer_search.config import TrialConfig
from writer_search.processes import parent as processes
from writer_search.processes import runner as runner_module
from writer_search.processes.causes import Cause, Kind
from writer_search.study import draws
from writer_search.study import loop as loop_module
from writer_search.study.store import open_study
from writer_search.training import evaluation
from writer_search.training import ranks as ranks_module
from writer_search.training.batches import EpochImages, Lines, strip_on
from writer_search.training.checkpoints import load_model
from writer_search.training.evaluation import evaluate, own_logits
from writer_search.training.optimisation import build_model
from writer_search.training.ranks import ALONE, Ranks
from writer_search.training.state import TrainingState

__all__ = ["run"]  # the fixture

CPU = torch.device("cpu")
WITH_COHOG = ("--fix", "with_cohog=true", "--fix", "cohog_directions=8")  # a quick one


def history_of(directory: Path, number: int = 0) -> list[dict[str, Any]]:
    lines = (directory / f"trial_{number:03d}" / "history.jsonl").read_text().splitlines()
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def weights_of(directory: Path, number: int = 0) -> dict[str, Tensor]:
    saved = torch.load(directory / f"trial_{number:03d}" / "final_model.pth", weights_only=True)
    weights: dict[str, Tensor] = saved["model"]
    return weights


# ------------------------------------------------------------------- the parts, in this process


def test_shares_cover_a_batch() -> None:
    for size in (2, 3, 5):
        for batch in range(size, 24):
            shares = [Ranks(rank, size).rows(batch) for rank in range(size)]
            assert torch.equal(torch.cat(shares), torch.arange(batch))
            counts = [len(share) for share in shares]
            assert max(counts) - min(counts) <= 1
            assert max(counts) == ALONE.largest_share(batch) or size > 1
            assert max(counts) == Ranks(0, size).largest_share(batch)
            circled = [Ranks(rank, size).rows(batch, with_neighbour=True) for rank in range(size)]
            for share, wider in zip(shares, circled, strict=True):
                assert torch.equal(wider[1:], share)
                assert wider[0] == (share[0] - 1) % batch
    assert ALONE.rows(7, with_neighbour=True) == slice(None)


@pytest.mark.parametrize("geometry", [0.0, 1.0])
@pytest.mark.parametrize(("batch", "with_neighbour"), [(7, True), (24, False), (24, True)])
def test_images_of_a_share_are_those_of_the_batch(
    geometry: float, batch: int, with_neighbour: bool, data: LineSet
) -> None:
    lines = Lines.of(data, "train", strip_on(data, CPU))
    order = torch.arange(2 * batch).view(2, batch) % len(lines)
    whole = EpochImages.draw(lines, order, 32, geometry, 1.0, seed=3)
    for rank in range(3):
        rows = Ranks(rank, 3).rows(batch, with_neighbour)
        own = EpochImages.draw(lines, order, 32, geometry, 1.0, seed=3, rows=rows)
        for number in range(2):
            images, labels = whole.batch(number)
            own_images, own_labels = own.batch(number)
            assert torch.equal(own_images, images[rows])
            assert torch.equal(own_labels, labels[rows])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.3])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_gradients_of_the_ranks_average_to_those_of_one(
    size: int,
    mixup_alpha: float,
    micro_batch: int | None,
    config: TrialConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "CLIP_NORM", 1e9)
    config = replace(config, dropout=0.0, mixup_alpha=mixup_alpha)
    images, labels = torch.randn(8, 1, 16, 32), torch.arange(8) % 4

    def gradients(ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
        state = TrainingState.start(config, 4, CPU)
        state.ranks = ranks
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # its statistics are of the images at hand
        rows = ranks.rows(8, mixup_alpha > 0)
        loss = training_step(state, config, images[rows], labels[rows], micro_batch, 8)
        return loss, [p.grad for p in state.model.parameters() if p.grad is not None]

    loss, wanted = gradients(ALONE)
    losses, found = zip(*(gradients(Ranks(rank, size)) for rank in range(size)), strict=True)
    torch.testing.assert_close(sum(losses), loss)
    means = [sum(parts) / size for parts in zip(*found, strict=True)]
    torch.testing.assert_close(means, wanted)


def test_ranks_send_gradients_alone_and_share_batch_norm_on_gpus(
    config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        ranks_module, "DistributedDataParallel", lambda model, **named: given.update(named)
    )
    model = build_model(config, 4)
    Ranks(0, 2).replicated(model)
    assert given == {"gradient_as_bucket_view": True, ranks_module.SYNC_BUFFERS: False}
    kinds = {
        place: [type(m) for m in Ranks(0, 2).prepared(model, torch.device(place)).modules()]
        for place in ("cpu", "cuda")
    }
    assert nn.SyncBatchNorm not in kinds["cpu"]
    assert nn.SyncBatchNorm in kinds["cuda"]


class Apart(Ranks):
    """A rank whose sums are made by the test."""

    def add_up(self, tensor: Tensor) -> None:
        pass


def test_each_window_is_validated_by_one_rank(
    config: TrialConfig, data: LineSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 4)
    lines = Lines.of(data, "val", strip_on(data, CPU))
    model = TrainingState.start(config, 4, CPU).average
    checks: list[int] = []
    with torch.inference_mode():
        whole = own_logits(model, config, lines, 4)
        parts = [
            own_logits(model, config, lines, 4, lambda r=r: checks.append(r), Apart(r, 3))
            for r in range(3)
        ]
    torch.testing.assert_close(sum(parts), whole)
    assert checks.count(0) == checks.count(1) == checks.count(2) > 1, "all check as often"


# --------------------------------------------------------- through the real worker, with processes


@pytest.mark.parametrize("size", [2, 3])
def test_trial_of_several_ranks_agrees_with_one(
    size: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: LineSet
) -> None:
    """Without batch norm and dropout, which see the images of one rank, up to rounding."""
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "without_batch_norm"}))
    flags = ["--fix", "dropout=0", "--fix", "mixup_alpha=0.3", *WITH_COHOG]
    assert run(*flags, n_trials="1", checkpoint_dir=str(tmp_path / "one")) == 0
    assert run(*flags, "--gpus_per_trial", str(size), n_trials="1") == 0
    config = json.loads((tmp_path / "c" / "trial_000" / "config.json").read_text())
    assert config["ranks"] == size
    for found, wanted in zip(history_of(tmp_path / "c"), history_of(tmp_path / "one"), strict=True):
        for name in ("per_writer", "macro_top5"):
            assert found.pop(name) == wanted.pop(name)
        assert found == pytest.approx(wanted, rel=1e-4), "metrics of the same lines"
    torch.testing.assert_close(
        weights_of(tmp_path / "c"), weights_of(tmp_path / "one"), rtol=1e-3, atol=1e-5
    )
    take_back = norms_over_groups()
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 4)
    try:
        path = tmp_path / "c" / "trial_000" / "final_model.pth"
        model, trial_config, writers = load_model(path)
        lines = Lines.of(data, "val", strip_on(data, CPU))
        again = evaluate(model, trial_config, lines, writers)
    finally:
        take_back()
    last = history_of(tmp_path / "c")[-1]
    assert again.macro_top1 == last["macro_top1"]
    assert again.loss == pytest.approx(last["loss"], rel=1e-12), "each line once, exactly"


def test_trials_of_ranks_at_once_repeat_bit_for_bit(run: Run, tmp_path: Path) -> None:
    """Batch norm, dropout and mixup included; two trials of two ranks do not meet each other."""
    flags = ["--gpus_per_trial", "2", "--sampler", "random", "--fix", "mixup_alpha=0.3"]
    assert run(*flags, "--n_jobs", "2") == 0
    assert run(*flags, checkpoint_dir=str(tmp_path / "again")) == 0
    for number in range(2):
        assert history_of(tmp_path / "c", number) == history_of(tmp_path / "again", number)
        one, other = weights_of(tmp_path / "c", number), weights_of(tmp_path / "again", number)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fault", ["signal_search", "signal_search_late"])
def test_interrupted_ranks_continue_as_if_never_broken(
    fault: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--gpus_per_trial", "2", "--continue_interrupted", *WITH_COHOG]
    assert run(*flags, n_trials="1", checkpoint_dir=str(tmp_path / "whole")) == 0
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: fault}))
    assert run(*flags, n_trials="1") == 143
    assert (tmp_path / "c" / "trial_000" / "latest_checkpoint.pth").exists()
    monkeypatch.setattr(runner_module, "ChildProcess", RealChild)
    assert run(*flags, n_trials="1") == 0
    assert history_of(tmp_path / "c", 1) == history_of(tmp_path / "whole")
    one, other = weights_of(tmp_path / "c", 1), weights_of(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("seconds", [0.0, 0.016])
def test_pruning_ends_all_ranks(
    run: Run,
    tmp_path: Path,
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also where the answer comes epochs of five batches later, of which ranks meet at some."""
    hear_report = loop_module.Search.hear_report

    def hear(search: loop_module.Search, *told: Any) -> None:
        time.sleep(seconds)
        hear_report(search, *told)

    monkeypatch.setattr(loop_module.Search, "hear_report", hear)
    monkeypatch.setattr(draws, "make_pruner", lambda name, epochs: PruneTrial(0))
    assert run("--gpus_per_trial", "2", "--fix", "batch_size=5", epochs="4") == 0
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["PRUNED", "COMPLETE"]
    assert "Traceback" not in (tmp_path / "c" / "trial_000" / "train.rank1.log").read_text()
    assert "trial   0 | pruned at epoch 1" in capfd.readouterr().out


def test_rank_that_fails_ends_the_trial_with_its_own_cause(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One search: a rank raises, one is killed, one hangs; the next trial starts by itself."""
    monkeypatch.setattr(processes, "LAST_WORDS_SECONDS", 2.0)
    faults = {0: "rank_1_raises", 1: "rank_1_is_killed", 2: "rank_1_hangs", 3: "raise_error"}
    monkeypatch.setattr(runner_module, "ChildProcess", faulty(faults))
    assert run("--gpus_per_trial", "2", n_trials="5", epochs="1") == 0
    directory = tmp_path / "c"
    assert [state for _, state, _ in trials_of(directory)] == [*["FAIL"] * 4, "COMPLETE"]
    logs = [(directory / f"trial_00{n}" / "error.log").read_text() for n in range(4)]
    assert "cause:  rank 1: RuntimeError: the cat is on the keyboard" in logs[0]
    assert "in action" in logs[0], "its traceback"
    assert "cause:  rank 1: killed by SIGKILL" in logs[1]
    assert "cause:  rank 1: hung: the other ranks waited for it in vain" in logs[2]
    assert "end of train.rank1.log" in logs[2]
    assert "in sleep_for_ever" in logs[2], "where it hung"
    assert "the cat is on the keyboard" in logs[3]
    assert "Traceback" not in capfd.readouterr().err


def test_out_of_memory_in_one_rank_halves_the_images_of_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "rank_1_out_of_memory"}))
    flags = ["--gpus_per_trial", "2", "--fix", "batch_size=16"]
    assert run(*flags, n_trials="1", epochs="3") == 0
    (trial,) = open_study(tmp_path / "c").get_trials()
    assert trial.state.name == "COMPLETE"
    assert trial.user_attrs["micro_batch"] == 4, "half of a rank's share of 8"
    assert "out of memory: started again with 4 images at once" in capfd.readouterr().out
    assert len(history_of(tmp_path / "c")) == 3


def test_more_ranks_than_images_are_refused(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--gpus_per_trial", "9") == 2
    assert capfd.readouterr().err == (
        "error: --gpus_per_trial 9 is more than a batch has images: 8\n"
    )
    assert not (tmp_path / "c").exists()


class Scripted:
    """Stands in for ChildProcess: a process that has said some things and ended, or that hangs."""

    def __init__(self, messages: list[processes.Message], code: int | None) -> None:
        self.connection, self.theirs = Pipe()
        for message in messages:
            self.theirs.send(message)
        if code is not None:
            self.theirs.close()
        self.code, self.asked = code, False

    def receive(self) -> processes.Message | None:
        try:
            message: processes.Message = self.connection.recv()
        except EOFError:
            return None
        return message

    def ask_where(self) -> None:
        self.asked = True

    def end(self, seconds: float = 10.0) -> int | None:
        return self.code


@pytest.mark.parametrize(
    ("others", "kind", "cause"),
    [
        (([("done", {"metrics": {}})], 0), "done", None),
        (
            ([("progress", {}), ("failed", {"cause": Cause(Kind.OTHER, "rank 0: a cat")})], 0),
            "failed",
            "rank 0: a cat",
        ),
        (([("lost", {"cause": Cause(Kind.OTHER, "rank 0: alone")})], 0), "failed", "rank 1: alone"),
        (([], -9), "died", "rank 0: killed by SIGKILL"),
        (([("report", {})], None), "died", "rank 0: hung"),
    ],
)
@pytest.mark.parametrize("word", ["lost", "SIGABRT"])
def test_word_that_another_rank_is_lost_is_traced_to_it(
    others: tuple[list[processes.Message], int | None],
    kind: str,
    cause: str | None,
    word: str,
    config: TrialConfig,
    data: LineSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "LAST_WORDS_SECONDS", 0.1)
    ranks = [
        Scripted(*others),
        Scripted([("lost", {"cause": Cause(Kind.OTHER, "rank 1: alone")})], 0)
        if word == "lost"
        else Scripted([], -signal.SIGABRT),  # NCCL's watchdog ends a rank that waits in vain
    ]
    if word == "SIGABRT" and cause == "rank 1: alone":
        kind, cause = "died", "rank 1: killed by SIGABRT"
    waiting = iter(ranks)
    job = processes.Job(config, data, tmp_path, 1, ranks=2)
    group = processes.TrialProcesses(job, lambda work, job: next(waiting))  # type: ignore[arg-type, return-value]
    message = group.receive(ranks[1].connection)
    assert message is not None
    assert message[0] == kind
    assert cause is None or message[1]["cause"].text.startswith(cause)
    assert ranks[0].asked == ("hung" in str(cause))


def test_a_state_saved_within_an_epoch_has_the_loss_of_all_ranks(
    config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And training goes on with each rank's own."""
    state = TrainingState.start(config, 4, torch.device("cpu"))
    state.ranks = Ranks(0, 2)
    state.loss_sum += 1.5
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.add_(2.0))
    for _ in range(2):
        assert state.contents()["loss_sum"] == 3.5
    assert state.loss_sum == 1.5


def test_ranks_are_told_only_what_rank_0_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> None:
        raise KeyError

    assert ALONE.shared(call) is call
    sent: list[int] = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda code, op: sent.append(int(code)))
    first: Callable[[], None] = Ranks(0, 2).shared(call, ValueError, KeyError)
    with pytest.raises(KeyError):
        first()
    Ranks(1, 2).shared(call, ValueError, KeyError)()
    assert sent == [3, 0]
    with pytest.raises(KeyError):
        Ranks(0, 2).shared(call, ValueError)()
    assert sent == [3, 0], "what is not foreseen ends this rank, and with it the others"
    assert Ranks(0, 2).shared(lambda: True, ValueError)() is True
    assert Ranks(0, 2).shared(lambda: False, ValueError)() is False
    assert sent == [3, 0, 1, 0]


def test_ranks_meet_at_every_fourth_check_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def check(number: int) -> None:
        called.append(number)
        if number == 5:
            raise KeyError

    sent: list[int] = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda code, op: sent.append(int(code)))
    first = Ranks(0, 2).shared(check, KeyError, every=4)
    for number in range(7):
        first(number)
    assert sent == [0]
    with pytest.raises(KeyError):
        first(7)
    assert sent == [0, 2]
    assert called == [0, 1, 2, 3, 4, 5], "once it has raised, it waits for the others"
    for number in range(8, 12):
        first(number)
    assert sent == [0, 2, 0]
