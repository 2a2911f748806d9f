"""What the terminal shows, from the first second to the last line; and what it refuses."""

from __future__ import annotations

import io
import os
import re
import select
import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_search import Run, arguments, run, trials_of  # noqa: F401

from hyperparameter_search import main
from train import main as train_main
from writer_search.common import output
from writer_search.common.errors import UserError, told
from writer_search.common.files import read_signed, write_signed
from writer_search.common.place import keep_apart
from writer_search.common.text import counted, short_duration
from writer_search.config import TrialConfig
from writer_search.flag_values import time_span
from writer_search.flags import build_parser
from writer_search.processes.machine import _describe_machine
from writer_search.processes.messages import MachineQuestion
from writer_search.results.progress import EpochFacts, Progress
from writer_search.results.rows import Row
from writer_search.results.tables import count_line, hyperparameter_lines, next_line
from writer_search.space import default_space, fixed_of, narrow, outside_of
from writer_search.study import preparation
from writer_search.study.changes import refuse_changes
from writer_search.training.certainty import NEVER, sure_from
from writer_search.training.prediction import Guess, Predictions, as_table, marked

# ---------------------------------------------------------------------------------------- streams


class Terminal(io.StringIO):
    """A terminal; `screen` plays what is written: carriage return, up, erase to the end."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        lines, row, column = [""], 0, 0
        for piece in re.findall(r"\x1b\[\d*[AJ]|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if piece == "\r":
                column = 0
            elif piece == "\n":
                row, column = row + 1, 0
                lines += [""] * (row == len(lines))
            elif piece.endswith("A") and piece.startswith("\x1b"):
                row -= int(piece[2:-1])
            elif piece == "\x1b[J":
                lines = [*lines[:row], lines[row][:column]]
            else:
                lines[row] = lines[row][:column] + piece + lines[row][column + len(piece) :]
                column += len(piece)
        return lines


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Lead both streams to one terminal of 80 columns, as the commands have them."""
    one = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    monkeypatch.setattr(sys, "stdout", output._Lasting(one))
    monkeypatch.setattr(sys, "stderr", output._Lasting(one))
    return one


def test_steps_are_told_with_their_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)
    output.live.begin("importing torch")
    assert terminal.screen == ["importing torch ..."]
    print("warning: a word between", file=sys.stderr)
    output.live.begin("measuring bfloat16")
    output.live.end()
    first, second, third, last = terminal.screen
    assert first == "warning: a word between"
    assert re.fullmatch(r"importing torch \.\.\. \d\.\d s", second)
    assert re.fullmatch(r"measuring bfloat16 \.\.\. \d\.\d s", third)
    assert last == ""


def test_stream_that_would_block_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program with the same end of a pipe or terminal may set it not to block."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    with open(writing, "w") as stream, open(reading, "rb", buffering=0) as reader:
        monkeypatch.setattr(sys, "stdout", output._Lasting(stream))
        print("cut off, perhaps", flush=True)
        while os.read(reader.fileno(), 4096) == b"x" * 4096:
            if not select.select([reader], [], [], 0)[0]:
                break
        print("trial   1 | complete", flush=True)
        assert reader.read(1000).endswith(b"trial   1 | complete\n")


def test_steps_in_a_log_are_plain_lines(capfd: pytest.CaptureFixture[str]) -> None:
    """Also where both streams lead to one file: no warning stands within a step's line."""
    with output.lasting_output():
        output.live.begin("importing torch")
        printed = capfd.readouterr().out
        assert printed == "importing torch ...", "at once, not when it is done"
        output.live.begin("decoding lines")
        print("warning: a word between", file=sys.stderr)
        output.live.end()
        output.live.begin("never ended")
    printed, problems = capfd.readouterr()
    pattern = (
        r" \d\.\d s\ndecoding lines \.\.\.\ndecoding lines \.\.\. \d\.\d s\nnever ended \.\.\.\n"
    )
    assert re.fullmatch(pattern, printed)
    assert problems == "warning: a word between\n"


def test_first_word_comes_before_anything_slow(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    steps: list[str] = []
    begin = output.live.begin
    monkeypatch.setattr(output.live, "begin", lambda s: (steps.append(s), begin(s)))
    assert run(n_trials="1") == 0
    order = ["importing Optuna", "finding lines", "importing torch", "decoding lines"]
    assert [step for step in steps if step in order] == [order[0], *order]
    printed = capfd.readouterr().out
    assert "\r" not in printed
    assert printed.index("decoding lines ...") < printed.index("STARTING NEW")


# --------------------------------------------------------------------------------------- progress


def facts(best: float = 0.8129, left: tuple[float, float] | None = (6720.0, 7800.0)) -> EpochFacts:
    return EpochFacts(0.812, 0.8066, (best, 4), 12.4, left)


def test_epoch_s_line_has_what_a_network_gets_right_alone() -> None:
    assert "| val macro top-1 80.66% | best" in facts().line()
    line = replace(facts(), network=0.5).line()
    assert "| val macro top-1 80.66% (network alone 50.00%) | best" in line


def test_progress_is_one_line_above_which_others_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)
    progress = Progress(2, 12)
    progress.start(7, 30)
    assert terminal.screen == ["trial 7 | epoch 0.0/30 | 2/12 complete"]
    progress.epoch(7, 12, 30, facts())
    line = "trial 7 | epoch 12.0/30 | val 80.66% | best 81.29% (trial 4) | left 1h52m-2h10m"
    assert terminal.screen == [line]
    assert len(line) < 80
    progress.line("trial   7 | out of memory: started again")
    assert terminal.screen == ["trial   7 | out of memory: started again", line]
    progress.start(8, 30)
    assert terminal.screen[1:] == [
        "trial 7 | epoch 12.0/30 | val 80.66%",
        "trial 8 | epoch 0.0/30",
        "best 81.29% (trial 4) | 2/12 complete | left 1h52m-2h10m",
    ]
    progress.end(7, "complete | val macro top-1 80.66% | 5 min 2 s", 3)
    progress.end(8, "pruned at epoch 3 | 37.0 s", 3)
    progress.close()
    assert terminal.screen == [
        "trial   7 | out of memory: started again",
        "trial   7 | complete | val macro top-1 80.66% | 5 min 2 s",
        "trial   8 | pruned at epoch 3 | 37.0 s",
        "",
    ]


@pytest.mark.parametrize("columns", [70, 80, 100, 120])
def test_progress_keeps_what_matters_in_any_width(columns: int) -> None:
    progress = Progress(0, 1000)
    progress.start(123, 100)
    progress.epoch(123, 100, 100, facts(1.0, (47 * 3600 + 59 * 60, 5 * 86400)))
    (line,) = progress.lines(columns)
    assert len(line) < columns
    for part in ("trial 123", "epoch 100", "/100", "val 80.66%", "best 100.00%", "left ", "5d0h"):
        assert part in line
    assert ("0/1000 complete" in line) == (columns == 120)


def test_epoch_in_a_log_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0, 2)
    progress.start(7, 30)
    progress.advance(7, 0.5)
    progress.epoch(7, 3, 30, facts())
    assert capfd.readouterr().out == (
        "trial   7 | epoch  3/30 | loss 0.812 | val macro top-1 80.66% | best 81.29% (trial 4) | "
        "12.4 s | left 1 h 52 min to 2 h 10 min\n"
    )


def test_words_of_numbers() -> None:
    assert [counted(n, "trial") for n in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]
    assert counted(2, "process", "processes") == "2 processes"
    times = [short_duration(s) for s in (9.6, 61, 3599, 6720, 47.99 * 3600, 49 * 3600)]
    assert times == ["10s", "1m", "1h00m", "1h52m", "47h59m", "2d1h"]


def test_long_facts_wrap_at_the_terminal_s_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_terminal(monkeypatch)
    parts = [f"a fact of some length, number {number}" for number in range(6)]
    lines = output.wrapped(parts, " | ")
    assert len(lines) == 3
    assert max(map(len, lines)) < 80
    assert " ".join(lines) == " | ".join(parts), "nothing is lost"


# ------------------------------------------------------------------------------------- last words


def row(number: int, state: str, **attributes: Any) -> Row:
    when = datetime(2026, 1, 1, tzinfo=UTC)
    value = 0.5 if state == "COMPLETE" else None
    return Row(number, state, value, {}, when, when, attributes)


def test_interrupted_is_no_failure() -> None:
    rows = [row(0, "COMPLETE"), row(1, "FAIL"), row(2, "FAIL", interrupted=True)]
    assert count_line(rows[:2]) == "Completed trials: 1 | pruned: 0 | failed: 1"
    assert count_line(rows) == "Completed trials: 1 | pruned: 0 | failed: 1 | interrupted: 1"


@pytest.mark.parametrize(
    ("complete", "wanted", "exhausted", "active", "said"),
    [
        (3, 4, False, False, "1 of 4 trials still missing: the same command runs it."),
        (0, 1, False, False, "1 of 1 trial still missing: the same command runs it."),
        (1, 4, False, True, "3 of 4 trials still to run."),
        (1, 4, True, False, "3 of 4 trials still missing, but the space has no other"),
        (
            7,
            4,
            False,
            False,
            "7 trials complete, more than --n_trials 4 asks for: a number above 7",
        ),
        (4, 4, False, False, "All trials are complete: the same command with a higher"),
        (0, None, False, False, "The same command goes on."),  # rebuilt, and no run since
    ],
)
def test_what_comes_next(
    complete: int, wanted: int | None, exhausted: bool, active: bool, said: str
) -> None:
    assert next_line(complete, wanted, exhausted, active).startswith(said)


def test_fixed_hyperparameters_are_shown_as_such() -> None:
    space = narrow(default_space("cpu", False), {"backbone": "resnet18", "dropout": 0.3}, {})
    params = {"learning_rate": 0.002, "weight_decay": 0.05, "label_smoothing": 0.1, "mixup": False}
    params |= {"augment_geometry": 1.0, "augment_photometry": 1.0}
    fixed = fixed_of(space.to_dict(), params)
    assert (fixed["backbone"], fixed["dropout"], fixed["crop_width"]) == ("resnet18", 0.3, 256)
    assert not fixed.keys() & (params.keys() | {"margin", "cohog_reach", "pretrained"})
    assert fixed.keys() <= TrialConfig.__dataclass_fields__.keys()
    *drawn, last = hyperparameter_lines(params, space.to_dict())
    assert len(drawn) == len(params)
    assert last.startswith("  fixed: backbone resnet18, ")
    assert fixed_of({"of": "another version"}, params) == {}


def test_last_words_and_status_name_what_there_is(
    run: Run,  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(n_trials="1") == 0
    printed = capfd.readouterr().out
    summary = tmp_path / "c" / "summary"
    for name, path in (("Model", summary / "best_model.pth"), ("Report", summary / "report.html")):
        assert f"\n{name}: {path}\n" in printed
        assert path.is_file()
    assert "\n  fixed: backbone tiny, line_height 16, " in printed
    assert main(["--status", "--checkpoint_dir", str(tmp_path / "c")]) == 0
    assert "\n  fixed: backbone tiny, line_height 16, " in capfd.readouterr().out
    assert main(["--compare", str(tmp_path / "c"), str(tmp_path / "c")]) == 0
    assert re.search(r"\n  backbone +tiny \(fixed\)", capfd.readouterr().out)


# ------------------------------------------------------------------------------ a finished search


def test_finished_search_needs_no_torch(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0
    capfd.readouterr()

    def asked(*_: Any) -> None:
        raise AssertionError("it asks the machine")

    monkeypatch.setattr(preparation, "ask_machine", asked)
    assert run() == 0
    printed = capfd.readouterr().out
    assert "importing torch" not in printed
    assert "All trials are complete" in printed
    assert run(n_trials="1") == 0
    assert "2 trials complete, more than --n_trials 1 asks for" in capfd.readouterr().out
    with pytest.raises(AssertionError, match="it asks the machine"):
        run(n_trials="3")


def test_search_that_only_seems_finished_goes_on(
    run: Run,  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The database says so, and a trial's record does not."""
    assert run(n_trials="2") == 0
    record = tmp_path / "c" / "trial_001" / "trial.json"
    write_signed(record, {**read_signed(record), "state": "FAIL", "value": None})
    assert run(n_trials="2") == 0
    printed, problems = capfd.readouterr()
    assert "its trial 1 is not as it was recorded" in problems
    assert "Remaining trials: 1\n" in printed
    states = [state for _, state, _ in trials_of(tmp_path / "c")]
    assert states == ["COMPLETE", "FAIL", "COMPLETE"]


def test_what_the_machine_answers_is_plain_text() -> None:
    """A TorchVersion would make the search process import torch, to read it."""

    question = MachineQuestion((), "none", ("tiny",), False, 1)
    versions = _describe_machine(question)["versions"]
    assert {type(value) for value in versions.values()} == {str, type(None)}


# ------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 90), ("0.5", 0.5), ("1e3", 1000), ("90s", 90), ("90m", 5400), ("2h", 7200)),
        *(("1h30m", 5400), ("1d", 86400), ("1d12h", 129600), ("1.5h", 5400), ("1h 30m", 5400)),
    ],
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert time_span(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-3", "h", "30m1h", "2hours", "inf", "nan", "0h"])
def test_times_that_are_none(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--data_root", "x", "--checkpoint_dir", str(tmp_path)]
    assert main([*flags, f"--trial_timeout={text}"]) == 2
    assert "is not a time above 0: give 90m, 2h, 1h30m, 1d" in capfd.readouterr().err


def test_help_fits_a_screen_and_help_all_has_everything(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = {}
    for flag in ("--help", "--help_all", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            main([flag])
        assert ended.value.code == 0
        shown[flag] = capfd.readouterr().out
    assert shown["--help"].count("\n") <= 42
    known = set(build_parser()._option_string_actions) - {"-h"}
    named = {flag: set(re.findall(r"(?<![\w-])--\w+", text)) for flag, text in shown.items()}
    assert known <= named["--help_all"]
    assert 12 <= len(named["--help"] & known) <= 20
    assert shown["--help_all"] == shown["--help-all"]


@pytest.mark.parametrize(("command", "name"), [(main, "hyper"), (train_main, "train.py")])
def test_version(command: Any, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command(["--version"])
    assert ended.value.code == 0
    printed = capfd.readouterr().out
    assert re.fullmatch(rf"{name}.*commit .*; Python 3\.\d+.*, torch \d.*, optuna \d.*\n", printed)


# --------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("place", ["", "runs", "train", "train/writer_01/runs", "by_link/runs"])
def test_checkpoint_dir_within_the_lines_is_refused(
    place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines"
    (lines / "train" / "writer_01").mkdir(parents=True)
    (tmp_path / "by_link").symlink_to(lines)
    directory = tmp_path / place if place.startswith("by_link") else lines / place
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments(lines, directory)) == 2
    printed, problem = capfd.readouterr()
    assert printed == ""
    assert problem.count("\n") == 1
    assert "lies within the line images" in problem
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_lines_and_searches_that_do_not_meet_are_fine(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    (tmp_path / "lines" / "train").mkdir(parents=True)
    scans.mkdir()
    (tmp_path / "lines" / "train" / "writer_01").symlink_to(scans)
    keep_apart(tmp_path / "runs" / "a", tmp_path / "lines")
    keep_apart(tmp_path / "lines2", tmp_path / "lines")
    keep_apart(tmp_path, tmp_path / "lines")  # harmless: the search writes elsewhere in it
    with pytest.raises(UserError, match="lies within the line images"):
        keep_apart(scans / "runs", tmp_path / "lines")  # a writer's directory is a link
    with pytest.raises(UserError, match="where the search writes"):
        keep_apart(tmp_path / "c", tmp_path / "c" / "summary" / "lines")


def settings(**changes: Any) -> dict[str, Any]:
    tier, weights = changes.get("tier", "cpu"), changes.get("weights", "none")
    fix = {"backbone": "tiny", **changes.pop("fix", {})}
    return {
        "data": {"fingerprint": "abc", "writers": 4, "lines": {"train": 8, "val": 4}},
        "epochs": 4,
        "tier": tier,
        "weights": weights,
        "precision": {fix["backbone"]: "float32"},
        "space": narrow(default_space(tier, weights == "imagenet"), fix, {}).to_dict(),
        **changes,
    }


def changes_told(wanted: dict[str, Any], directory: Path) -> list[str]:
    with pytest.raises(UserError) as raised:
        refuse_changes(settings(), wanted, directory)
    assert "started with other settings" in told(raised.value)
    return list(raised.value.details)


def test_changed_settings_are_told_by_their_flags(tmp_path: Path) -> None:
    refuse_changes(settings(), settings(), tmp_path)
    data = {"fingerprint": "def", "writers": 5, "lines": {"train": 10, "val": 5}}
    fix = {"backbone": "resnet18", "learning_rate": 0.003}
    assert changes_told(settings(epochs=6, data=data, fix=fix), tmp_path) == [
        "--num_writers_subset, --use_all_writers (writers): 4 in the study, 5 now",
        "--epochs: 4 in the study, 6 now",
        "--fix backbone: tiny in the study, resnet18 now",
        "--fix or --space learning_rate: 0.0005 to 0.005 (log) in the study, 0.003 now",
        "changed as a consequence: the lines' fingerprint, the number of train lines, the number "
        "of val lines, precision of resnet18, precision of tiny",
    ]


def test_what_follows_from_weights_and_lines_is_told_last(tmp_path: Path) -> None:
    first, last = changes_told(settings(weights="imagenet"), tmp_path)
    assert first == "--weights: none in the study, imagenet now"
    assert last == "changed as a consequence: backbone_lr_mult, learning_rate, pretrained"
    data = {**settings()["data"], "fingerprint": "def"}
    assert changes_told(settings(data=data), tmp_path) == [
        "--data_root (fingerprint of the lines): abc in the study, def now"
    ]


def test_recorded_command_can_be_pasted(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["/some where/hyperparameter_search.py", "--epochs", "2", "--fix", "backbone=a 'b"]
    monkeypatch.setattr(sys, "argv", words)
    assert run(n_trials="1") == 0
    assert run(n_trials="2", epochs="3") == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("  the study was last run by: ")
    assert shlex.split(line.partition(": ")[2]) == [sys.executable, *words]


def test_fix_outside_of_the_known_range_is_a_warning(
    run: Run,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    space = default_space("cpu", False)
    assert outside_of(space, {"dropout": 0.5, "mixup_alpha": 0, "batch_size": 4000}) == []
    assert outside_of(space, {"margin": 0.9}) != [], "searched only on demand"
    assert run("--fix", "learning_rate=0.5", n_trials="1") == 0
    warning = capfd.readouterr().err
    assert warning == (
        "warning: --fix learning_rate=0.5 is outside of the range that is searched by default, "
        "0.0005 to 0.005\n"
    )


# ------------------------------------------------------------------------------------- certainty


def test_certainty_is_where_nine_of_ten_are_right() -> None:
    """A thousand lines that are right as often as their probability says."""
    generator = np.random.default_rng(0)
    probabilities = generator.uniform(0.2, 1.0, 4000)
    right = generator.random(4000) < probabilities
    assert 0.85 < sure_from(probabilities, right) < 0.94
    order = generator.permutation(4000)
    assert sure_from(probabilities[order], right[order]) == sure_from(probabilities, right)


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ([1, 1, 1, 1], 0.2),  # of what is below the least certain line nothing is known
        ([0, 0, 0, 0], NEVER),
        ([0, 1, 1, 1], 0.4),
        ([0, 0, 1, 1], 0.6),
        ([1, 0, 1, 1], 0.6),
        ([1, 1, 1, 0], NEVER),
    ],
)
def test_certainty_of_few_probabilities(right: list[int], expected: float) -> None:
    """Ten lines of each."""
    probabilities = np.repeat([0.2, 0.4, 0.6, 0.8], 10)
    assert sure_from(probabilities, np.repeat(np.array(right, bool), 10)) == expected
    assert sure_from(np.full(20, 0.7), np.arange(20) > 0) == 0.7, "equals are judged together"


def test_lucky_line_is_no_certainty() -> None:
    """One right line above fifty of which four in five are right."""
    probabilities = np.append(np.full(50, 0.7), 0.8)
    assert sure_from(probabilities, np.append(np.arange(50) % 5 > 0, True)) == NEVER
    assert sure_from(np.full(7, 0.7), np.ones(7, bool)) == NEVER
    assert sure_from(np.full(8, 0.7), np.ones(8, bool)) == 0.7


@pytest.mark.parametrize(
    ("certain", "marks", "said"),
    [
        (0.6, 1, "1 of 2 lines unsure: below 60.0 %, a guess is not backed by"),
        (NEVER, 2, "2 of 2 lines unsure: too few validation lines were right, or"),
        (None, 0, "How often such guesses are wrong is not known"),
    ],
)
def test_unsure_lines_are_marked(certain: float | None, marks: int, said: str) -> None:
    guesses = [
        marked(Guess(f"{p}.png", "page", 1, "w1", p, "w2", 1 - p), certain) for p in (0.5, 0.9)
    ]
    lines, _, note = as_table(Predictions(guesses, guesses[:0], {}, {}, certain)).split("\n\n")
    assert sum(line.endswith("  unsure") for line in lines.splitlines()) == marks
    assert note.startswith(said)


def test_model_says_what_it_is_unsure_of(
    run: Run,  # noqa: F811
    lines_root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A model of two epochs knows nothing: its validation says so, and its predictions do."""
    assert run(n_trials="1") == 0
    model = str(tmp_path / "c" / "summary" / "best_model.pth")
    capfd.readouterr()
    flags = ["--model", model, "--device", "cpu"]
    assert train_main(["--predict", str(lines_root / "val"), *flags]) == 0
    printed = capfd.readouterr().out
    found = re.search(r"(\d+) of 12 lines unsure: (below|too few)", printed)
    assert found is not None
    assert printed.count("  unsure\n") == int(found[1])
    assert int(found[1]) > 0
