"""Several searches on one study, in one process: interleaved by hand, with clocks of our own."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from faults import faulty
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, PendingRollbackError
from test_search import Run, run

from hyperparameter_search import main
from writer_search.common.errors import UserError
from writer_search.common.files import write_json
from writer_search.common.locks import DirectoryLock, SharedLock, holder_is_dead
from writer_search.flags import STUDY_NAME
from writer_search.processes import runner as runner_module
from writer_search.processes.parent import TrialProcesses
from writer_search.results.rows import has_saved, rows_of, trial_dir
from writer_search.space import Space, default_space, narrow
from writer_search.study import loop as loop_module
from writer_search.study import outlook, records, unfinished
from writer_search.study.draws import Drawer, SpaceExhaustedError, params_key
from writer_search.study.shared import fleet as fleet_module
from writer_search.study.shared import storage as storage_module
from writer_search.study.shared import supply as shared_supply
from writer_search.study.shared.fleet import Fleet
from writer_search.study.shared.opening import refuse_strangers
from writer_search.study.shared.storage import (
    RACES,
    PatientStorage,
    StorageUnreachableError,
    create_shared_study,
    hide_password,
    is_outage,
    opened_storage,
    secrets_of,
    shown_url,
)
from writer_search.study.shared.supply import bury_dead
from writer_search.study.store import record_settings
from writer_search.study.unfinished import (
    checkpoint_to_continue,
    continue_interrupted,
    continued,
)

__all__ = ["run"]  # the fixture
URL = "postgresql+psycopg://me:s3cr%40t@db.example/lines"
OUTAGE = OperationalError("SELECT 1", {}, Exception("server closed the connection"))


@pytest.fixture
def memory() -> InMemoryStorage:
    backend = InMemoryStorage()
    assert create_shared_study(backend, STUDY_NAME, {})
    return backend


Member = Callable[..., Fleet]
NOTHING: Mapping[str, Container[int]] = {"draw": ()}  # is gone on with


@pytest.fixture
def member(memory: InMemoryStorage, tmp_path: Path) -> Member:
    """Make one more search of the study, with seeds of its own."""
    salts = iter(range(100))

    def make(n_trials: int, **more: Any) -> Fleet:
        study = optuna.load_study(study_name=STUDY_NAME, storage=more.pop("storage", memory))
        space = more.pop("space", default_space("cpu", False))
        drawer = Drawer(space, "random", 0, salt=[next(salts)])
        return Fleet(study, drawer, n_trials, tmp_path, **{"continued": NOTHING, **more})

    return make


def first_lets(other: Callable[[], object], fleet: Fleet, patch: pytest.MonkeyPatch) -> None:
    """Let another search act between a search's look at the study and its storing."""
    store = fleet._store

    def interrupted(template: FrozenTrial) -> Any:
        patch.undo()
        other()
        return store(template)

    patch.setattr(fleet, "_store", interrupted)


def tell(fleet: Fleet, trial: optuna.Trial | None, state: TrialState, **attributes: Any) -> None:
    assert trial is not None
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    fleet.study.tell(trial.number, 0.5 if state == TrialState.COMPLETE else None, state=state)


# ----------------------------------------------------------------------------------------- claims


def test_last_place_goes_to_the_smaller_number(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = member(1), member(1)
    quicker: list[optuna.Trial | None] = []
    first_lets(lambda: quicker.append(b.claim()), a, monkeypatch)
    assert a.claim() is None
    assert quicker[0] is not None
    assert quicker[0].number == 0
    trials = a.trials()
    assert [trial.state for trial in trials] == [TrialState.RUNNING, TrialState.FAIL]
    assert [row.number for row in rows_of(trials)] == [0], "the withdrawn one is none"
    assert a.claim() is None
    assert len(a.trials()) == 2, "without room nothing is stored"


def claims_another_draw(fleet: Fleet) -> tuple[FrozenTrial, FrozenTrial]:
    """Claim after another search had the same draw first; gives its trial and this one's."""
    trial = fleet.claim()
    assert trial is not None
    baseline, withdrawn, other = fleet.trials()
    assert (baseline.params, trial.number) == (withdrawn.params, 2)
    assert withdrawn.user_attrs["surplus"]
    assert params_key(other.params) != params_key(baseline.params)
    return baseline, other


def test_same_draw_is_drawn_again_by_the_larger_number(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin with the baseline."""
    a, b = member(3), member(3)
    first_lets(b.claim, a, monkeypatch)
    baseline, other = claims_another_draw(a)
    assert other.user_attrs["seed"] != baseline.user_attrs["seed"]


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_same_draw_of_a_search_that_is_interrupted_meanwhile_is_drawn_again(
    member: Member, monkeypatch: pytest.MonkeyPatch, continues: bool, ended: bool
) -> None:
    """The other search has noted the interruption, and has ended the trial or is about to."""
    a, b = (member(3, continued={} if continues else NOTHING) for _ in range(2))

    def meanwhile() -> None:
        trial = b.claim()
        assert trial is not None
        trial.set_user_attr("interrupted", True)
        if ended:
            b.study.tell(trial.number, state=TrialState.FAIL)

    first_lets(meanwhile, a, monkeypatch)
    claims_another_draw(a)


def space_of_two() -> Space:
    numbers = ("learning_rate", "weight_decay", "label_smoothing", "dropout")
    fix = dict.fromkeys(numbers, 0.01) | {"augment_geometry": 1.0, "augment_photometry": 1.0}
    pooling = {"pooling": {"choices": ["avg", "gem"]}}
    return narrow(default_space("cpu", False), {**fix, "backbone": "tiny", "mixup": False}, pooling)


def make_config(home: Path, trial: optuna.Trial) -> None:
    trial_dir(home, trial.number).mkdir(parents=True)
    write_json(trial_dir(home, trial.number) / "config.json", {})


def test_what_failed_in_an_earlier_run_is_drawn_again_where_there_is_nothing_else(
    member: Member,
) -> None:
    """By one search that has begun since, and not by the one in which it failed."""
    space = space_of_two()
    a = member(4, space=space)
    failed = a.claim()
    tell(a, failed, TrialState.FAIL)
    tell(a, a.claim(), TrialState.COMPLETE)
    with pytest.raises(SpaceExhaustedError):
        a.claim()
    b, c = member(4, space=space), member(4, space=space)
    again = b.claim()
    assert failed is not None
    assert again is not None
    assert again.params == failed.params
    for other in (a, c):
        with pytest.raises(SpaceExhaustedError):
            other.claim()


def test_place_of_a_trial_interrupted_meanwhile_is_its_continuation_s(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two see the last place. One takes it; before the other does, the trial that ran ends."""
    a, b, c = (member(2, continued={}) for _ in range(3))
    running = b.claim()
    trial_dir(tmp_path, 0).mkdir()
    write_json(trial_dir(tmp_path, 0) / "config.json", {})

    def meanwhile() -> None:
        assert c.claim() is not None
        tell(b, running, TrialState.FAIL, interrupted=True)

    first_lets(meanwhile, a, monkeypatch)
    trial = a.claim()
    assert trial is not None
    assert trial.user_attrs["continues"] == 0
    assert [t.user_attrs.get("surplus", False) for t in a.trials()] == [False, False, True, False]


def test_interrupted_trial_is_continued_once(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (member(2, continued={}) for _ in range(2))
    tell(a, a.claim(), TrialState.FAIL, interrupted=True)
    assert a.claim() is not None  # no directory: not within reach, so that it is a new draw
    assert "continues" not in a.trials()[1].user_attrs
    tell(a, a.study.ask(), TrialState.FAIL)
    trial_dir(tmp_path, 0).mkdir()
    write_json(trial_dir(tmp_path, 0) / "config.json", {})
    a.n_trials = a.allowed = b.n_trials = b.allowed = 5
    first_lets(b.claim, a, monkeypatch)
    assert a.claim() is not None
    continues = [
        t.user_attrs.get("continues") for t in a.trials() if not t.user_attrs.get("surplus")
    ]
    assert continues == [None, None, None, 0, None]
    assert a.trials()[3].params == a.trials()[0].params


def test_killed_trial_is_continued_by_the_next_run_alone(member: Member, tmp_path: Path) -> None:
    """In this one it would be killed again at once, as often as a search gives up after."""
    fleet = member(4, continued={})
    trial = fleet.claim()
    trial_dir(tmp_path, 0).mkdir()
    write_json(trial_dir(tmp_path, 0) / "config.json", {})
    tell(fleet, trial, TrialState.FAIL, resumable=True)
    for one, continues in ((fleet, None), (member(4, continued={}), 0)):
        claimed = one.claim()
        assert claimed is not None
        assert claimed.user_attrs.get("continues") == continues
    # It found the disk full before it had written a file.
    tell(fleet, claimed, TrialState.FAIL, resumable=True)
    claimed = member(4, continued={}).claim()
    assert claimed is not None
    assert claimed.user_attrs.get("continues") == 2, "what trial 0 has saved is within reach"
    (trial_dir(tmp_path, 0) / "latest_checkpoint.pth").touch()
    for own in (tmp_path, tmp_path / "of another search"):
        assert checkpoint_to_continue(fleet.study, own, claimed) == trial_dir(tmp_path, 0)


def test_known_good_first_trials_are_continued_without_asking(
    member: Member, tmp_path: Path
) -> None:
    first = member(9)
    fleet = member(9, continued=continued(False, default_space("cpu", False)))
    for number in range(3):
        trial_dir(tmp_path, number).mkdir()
        write_json(trial_dir(tmp_path, number) / "config.json", {})
        tell(first, first.claim(), TrialState.FAIL, interrupted=True)
    claimed = [trial for _ in range(3) if (trial := fleet.claim()) is not None]
    assert [trial.user_attrs.get("continues") for trial in claimed] == [0, 1, None]
    assert claimed[2].params != first.trials()[2].params, "what was drawn is given up"


def test_continuation_that_was_withdrawn_is_made_again(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = member(2, continued={}), member(2)
    tell(a, a.claim(), TrialState.FAIL, interrupted=True)
    trial_dir(tmp_path, 0).mkdir()
    write_json(trial_dir(tmp_path, 0) / "config.json", {})
    taken: list[optuna.Trial | None] = []
    first_lets(lambda: taken.extend((b.claim(), b.claim())), a, monkeypatch)
    assert a.claim() is None, "another search took the last places"
    assert a.trials()[-1].user_attrs["surplus"]
    tell(b, taken[0], TrialState.FAIL, interrupted=True)
    trial = a.claim()
    assert trial is not None
    assert trial.user_attrs.get("continues") == 0


def test_waiting_trial_of_a_copied_study_holds_nothing_up(member: Member, tmp_path: Path) -> None:
    """A local search made it to go on with an interrupted one; a fleet makes its own."""
    a = member(2, continued={})
    tell(a, a.claim(), TrialState.FAIL, interrupted=True)
    trial_dir(tmp_path, 0).mkdir()
    write_json(trial_dir(tmp_path, 0) / "config.json", {})
    assert continue_interrupted(a.study, {})
    mine = a.claim()
    assert mine is not None
    assert (mine.number, mine.user_attrs["continues"]) == (2, 0)
    assert not any(trial.user_attrs.get("surplus") for trial in a.trials())


def test_one_run_starts_what_was_missing_whoever_starts_it(member: Member) -> None:
    a, b = member(2), member(2)
    tell(a, a.claim(), TrialState.FAIL, failure="by itself")
    tell(b, b.claim(), TrialState.PRUNED)
    assert a.claim() is b.claim() is None
    again = member(2)
    trial = again.claim()
    assert trial is not None, "the same command runs them"
    assert again.claim() is not None
    assert again.claim() is None
    tell(again, trial, TrialState.FAIL, interrupted=True)
    assert again.claim() is not None, "somebody takes an interrupted one's place"


# --------------------------------------------------------------------------------- being alive


def test_silence_by_the_observer_s_own_clock(member: Member, tmp_path: Path) -> None:
    now = [0.0]
    a, b = member(9), member(9, clock=lambda: now[0])
    trial = a.claim()
    assert trial is not None
    make_config(tmp_path, trial)
    trial.set_user_attr("alive", "1970-01-01T00:00:00+00:00")  # its clock is wrong: no matter
    for now[0] in (0.0, 200.0, 400.0, 479.0):
        assert b.dead(b.trials()) == []
    a.sign(trial)
    for now[0] in (481.0, 700.0, 900.0, 960.0):
        assert b.dead(b.trials()) == [], "a sign was seen at 481 s"
    for now[0] in (1210.0, 1460.0, 1710.0, 1960.0):
        assert b.dead(b.trials()) == [], "who did not look for so long begins anew"
    for now[0] in (2200.0, 2400.0, 2439.0):
        assert b.dead(b.trials()) == []
    now[0] = 2441.0
    assert [t.number for t in b.dead(b.trials())] == [0]
    assert a.dead(a.trials()) == [], "nobody buries its own"


def test_the_dead_are_recorded_once_and_the_late_are_told(member: Member, tmp_path: Path) -> None:
    a, b, c = member(9), member(9), member(9)
    trial = a.claim()
    assert trial is not None
    trial.report(0.25, 1)
    (frozen,) = b.trials()
    line = b.bury(frozen)
    assert line == "trial 0 was cut off at epoch 2: recorded as interrupted"
    assert c.bury(frozen) is None
    (buried,) = b.trials()
    assert buried.state == TrialState.FAIL
    assert buried.user_attrs["interrupted"]
    assert f"(pid {os.getpid()} on " in buried.user_attrs["failure"]
    log = (tmp_path / "trial_000" / "error.log").read_text()
    assert "shows no sign of life" in log
    with pytest.raises(UpdateFinishedTrialError):
        a.sign(trial)


def test_trial_that_finished_under_a_dead_search_is_complete(
    member: Member, tmp_path: Path
) -> None:
    a, b = member(9), member(9)
    assert a.claim() is not None
    own = trial_dir(tmp_path, 0)
    own.mkdir()
    write_json(own / "config.json", {"config_hash": "x"})
    write_json(own / "metrics.json", {"config_hash": "x", "value": 0.75})
    b.checkpoint_dir = tmp_path / "of another search"
    b.checkpoint_dir.mkdir()
    assert b.bury(b.trials()[0]) == "trial 0 had finished with 75.00%: recorded"
    assert b.trials()[0].state == TrialState.COMPLETE


def test_directory_of_another_study_is_refused(
    member: Member, memory: InMemoryStorage, tmp_path: Path
) -> None:
    trial = member(3).claim()
    assert trial is not None
    trial_dir(tmp_path, 0).mkdir()
    config = trial_dir(tmp_path, 0) / "config.json"
    write_json(config, {"hyperparameters": trial.params})
    refuse_strangers(memory, STUDY_NAME, "postgresql://x/y", tmp_path)
    write_json(config, {"hyperparameters": {"learning_rate": 0.5}})
    with pytest.raises(UserError, match="does not have"):
        refuse_strangers(memory, STUDY_NAME, "postgresql://x/y", tmp_path)


def test_free_lock_on_the_same_host_tells_at_once(member: Member, tmp_path: Path) -> None:
    b = member(9)
    with suppress(MemoryError), SharedLock(tmp_path) as lock:
        a = member(9, lock=lock)
        trial = a.claim()
        assert trial is not None
        assert b.dead(b.trials()) == []
        with pytest.raises(UserError, match="in use by another search"):
            DirectoryLock(tmp_path).__enter__()
        assert lock.path is not None
        assert not holder_is_dead(lock.path)
        raise MemoryError  # it ends without having recorded its trial
    owner = trial.user_attrs["owner"]
    trial.set_user_attr("owner", {**owner, "host": "elsewhere"})
    assert b.dead(b.trials()) == [], "of another host's lock nobody can tell"
    trial.set_user_attr("owner", owner)
    assert [trial.number for trial in b.dead(b.trials())] == [0]
    bury_dead(b, b.trials())
    assert not list(tmp_path.glob("search-*.lock")), "what nobody needs any more is removed"
    assert not holder_is_dead(tmp_path / "of-another-host.lock")
    with DirectoryLock(tmp_path), pytest.raises(UserError, match="in use by another search"):
        SharedLock(tmp_path).__enter__()


@pytest.mark.parametrize(
    ("said", "attempts"),
    [
        ("connection failed: Connection refused", 1),
        ('database "lines" does not exist', 1),
        ("sorry, too many clients already", RACES),
        ('relation "studies" already exists', RACES),
    ],
)
def test_what_soon_passes_alone_is_tried_again(
    said: str, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(url: str, **_: Any) -> None:
        tried.append(url)
        raise OperationalError("", {}, Exception(said))

    monkeypatch.setattr("writer_search.study.shared.storage.RDBStorage", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    url = "postgresql+psycopg://me@host/lines"
    with (
        pytest.raises(UserError, match=f"cannot be used: {said}"),
        opened_storage(url),
    ):
        pass
    assert tried == [url] * attempts


# ---------------------------------------------------------------------------------------- outages


def broken_within_a_transaction() -> Exception:
    """Wrap as Optuna does what SQLAlchemy raises when a connection breaks before its rollback."""
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = PendingRollbackError(
        "Can't reconnect until invalid transaction is rolled back"
    )
    return error


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (OUTAGE, True),
        (broken_within_a_transaction(), True),
        (IntegrityError("INSERT", {}, Exception("duplicate key")), False),
        (StorageInternalError("no cause"), False),
        (ValueError("a bug"), False),
    ],
)
def test_outages_are_told_from_errors(error: Exception, outage: bool) -> None:
    assert is_outage(error) is outage


class Flaky(InMemoryStorage):
    """A storage whose calls fail as a server's do that is away."""

    def __init__(self) -> None:
        super().__init__()
        self.fail_after: dict[str, int] = {}  # calls by name that act, but whose answer is lost
        self.away = False

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        if name.startswith("_") or name in ("fail_after", "away") or not callable(attribute):
            return attribute

        def call(*args: Any, **named: Any) -> Any:
            if self.away:
                raise OUTAGE
            answer = attribute(*args, **named)
            if self.fail_after.get(name):
                self.fail_after[name] -= 1
                raise OUTAGE
            return answer

        return call


@pytest.fixture
def flaky() -> Flaky:
    backend = Flaky()
    assert create_shared_study(backend, STUDY_NAME, {})
    return backend


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module.random, "uniform", lambda low, high: 0.0)


def test_lost_answers_change_nothing(
    member: Member, flaky: Flaky, capfd: pytest.CaptureFixture[str]
) -> None:
    a = member(2, storage=PatientStorage(flaky, URL, None))
    flaky.fail_after = {"create_new_trial": 1, "get_all_trials": 2, "set_trial_user_attr": 1}
    trial = a.claim()
    assert trial is not None
    states = [(t.number, t.state, bool(t.user_attrs.get("surplus"))) for t in a.trials()]
    assert states == [(0, TrialState.RUNNING, False), (1, TrialState.FAIL, True)]
    flaky.fail_after = {"set_trial_state_values": 1}
    a.study.tell(trial.number, 0.5)
    assert a.trials()[0].value == 0.5
    problems = capfd.readouterr().err
    assert (
        "postgresql+psycopg://me:***@db.example/lines cannot be reached (server closed" in problems
    )
    assert "s3cr" not in problems


def test_trial_told_by_another_during_an_outage_is_not_taken_for_told(flaky: Flaky) -> None:
    patient = PatientStorage(flaky, URL, None)
    study = optuna.load_study(study_name=STUDY_NAME, storage=patient)  # type: ignore[arg-type]
    trial = study.ask()
    calls = iter([OUTAGE, UpdateFinishedTrialError()])

    def call(*_: Any) -> bool:
        raise next(calls)

    flaky.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        patient._patiently("set_trial_state_values", call, trial._trial_id, TrialState.COMPLETE)


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, flaky: Flaky) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 0.2)
    flaky.away = True
    with pytest.raises(StorageUnreachableError, match="lines cannot be reached") as caught:
        PatientStorage(flaky, URL, None).get_all_studies()
    assert "s3cr" not in str(caught.value)


# ---------------------------------------------------------------------------------- the password


@pytest.mark.parametrize(
    ("url", "shown", "secrets"),
    [
        (URL, "postgresql+psycopg://me:***@db.example/lines", {"s3cr%40t", "s3cr@t"}),
        ("mysql://u:a:b/c@d@host:3306/x", "mysql://u:***@host:3306/x", {"a:b/c@d"}),
        ("postgresql://host/x?password=pw%21&a=b", "postgresql://host/x?password=***&a=b", None),
        ("postgresql://me@host/x", "postgresql://me@host/x", set()),
    ],
)
def test_password_is_found_and_hidden(url: str, shown: str, secrets: set[str] | None) -> None:
    assert shown_url(url) == shown
    assert secrets is None or secrets_of(url) == secrets
    text = f"command --storage {url} | {url!r} | " + " and ".join(secrets_of(url))
    hidden = hide_password(text, url)
    assert not any(secret in hidden for secret in secrets_of(url))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+psycopg://me:s3cr%40t@127.0.0.1:1/lines", "cannot be used: "),
        ("postgresql+psycopg://me:s3cr@t/x:y@host/lines", "no URL of a storage|cannot be used"),
        ("postgresql+psycopg://me:s3cr@t@host:port/lines", "is not the URL of a storage"),
        ("nosuch://me:s3cr@t@host/lines", "is not the URL of a storage"),
        ("sqlite:///x.db", "SQLite is for one search and the default without --storage"),
        ("grpc://127.0.0.1:13000", "is not the URL of a storage"),
        ("mysql://me:s3cr%40t@host/lines", "only PostgreSQL is supported|no URL of a storage"),
    ],
)
def test_storage_that_cannot_be_used_is_told_in_a_line(
    url: str, said: str, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("psycopg")
    assert run("--storage", url) == 2
    out, problems = capfd.readouterr()
    assert len(problems.splitlines()) == 1
    assert any(part in problems for part in said.split("|"))
    assert "s3cr" not in out + problems
    assert not (tmp_path / "c").exists()


def test_study_name_needs_a_storage(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--study_name", "x") == 2
    assert "--study_name needs --storage" in capfd.readouterr().err


# ------------------------------------------------------------------------------ the whole command


@pytest.fixture
def shared(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Flaky]:
    """Run the command with --storage, on a storage in this process that can be away."""
    backend = Flaky()

    @contextmanager
    def opened(url: str, stop: Any = None) -> Iterator[Any]:
        yield PatientStorage(backend, url, stop)

    monkeypatch.setattr(storage_module, "opened_storage", opened)

    def command(*more: str, **replaced: str) -> int:
        return run("--storage", URL, *more, **replaced)

    return command, backend


def states_of(backend: Flaky) -> list[str]:
    (study,) = backend.get_all_studies()
    return [trial.state.name for trial in backend.get_all_trials(study._study_id)]


def test_search_on_a_shared_storage(
    shared: tuple[Run, Flaky],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, backend = shared
    monkeypatch.setattr("sys.argv", ["hyperparameter_search.py", "--storage", URL])
    assert command() == 0
    first, problems = capfd.readouterr()
    assert problems == ""
    assert "STARTING NEW HYPERPARAMETER SEARCH" in first
    shown = "postgresql+psycopg://me:***@db.example/lines, study writer_identification"
    assert f"Study database: {shown}\n" in first
    assert command(n_trials="3") == 0
    second = capfd.readouterr().out
    assert f"Study loaded from: {shown}\nCompleted trials: 2\n" in second
    assert "Remaining trials: 1\n" in second
    assert states_of(backend) == ["COMPLETE"] * 3
    assert main(["--status", "--storage", URL]) == 0
    status = capfd.readouterr().out
    assert status.startswith(f"{shown}: 0 trials running\n")
    assert "\nCompleted trials: 3 | " in status
    for path in (tmp_path / "c").rglob("*"):
        if path.is_file():
            assert b"s3cr" not in path.read_bytes(), path
    config = json.loads((tmp_path / "c" / "trial_000" / "config.json").read_text())
    assert config["command"][-1] == "postgresql+psycopg://me:***@db.example/lines"
    assert not (tmp_path / "c" / "optuna_study.db").exists()
    assert "s3cr" not in first + second + status
    assert command(epochs="3") == 2
    assert "epochs: 2 in the study, 3 now" in capfd.readouterr().err
    monkeypatch.chdir(tmp_path)  # trials know their directory from the root on
    assert command("--evaluate_test", n_trials="3", checkpoint_dir="c") == 0
    found = json.loads((tmp_path / "c" / "summary" / "test_metrics.json").read_text())
    assert found["directory"] == f"trial_{found['trial']:03d}"


def test_lost_study_is_rebuilt_in_the_storage(
    shared: tuple[Run, Flaky], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, backend = shared
    assert command() == 0
    (study,) = backend.get_all_studies()
    before = backend.get_all_trials(study._study_id)
    backend.delete_study(study._study_id)
    assert command() == 2
    assert "holds 2 trials, first trial 0, that study" in capfd.readouterr().err
    assert main(["--recover", "--storage", URL, "--checkpoint_dir", str(tmp_path / "c")]) == 0
    assert "rebuilt 2 of 2 trials" in capfd.readouterr().out
    (study,) = backend.get_all_studies()
    after = backend.get_all_trials(study._study_id)
    assert [(t.params, t.values, t.intermediate_values) for t in after] == [
        (t.params, t.values, t.intermediate_values) for t in before
    ]
    assert command(n_trials="3") == 0
    assert states_of(backend) == ["COMPLETE"] * 3
    assert command(checkpoint_dir=str(tmp_path / "d"), n_trials="4") == 0, "a node of its own"
    assert [path.name for path in (tmp_path / "d").glob("trial_*")] == ["trial_003"]


def test_rebuilding_beside_another_search_is_told(
    shared: tuple[Run, Flaky],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its trial has taken a number: those after it would stand under other ones."""
    command, backend = shared
    assert command() == 0
    (study,) = backend.get_all_studies()
    backend.delete_study(study._study_id)
    add = optuna.Study.add_trials

    def late(study: optuna.Study, trials: list[FrozenTrial]) -> None:
        study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING))
        add(study, trials)

    monkeypatch.setattr(optuna.Study, "add_trials", late)
    assert main(["--recover", "--storage", URL, "--checkpoint_dir", str(tmp_path / "c")]) == 2
    assert "another search has added trials" in capfd.readouterr().err


def test_best_trials_of_a_shared_study_are_confirmed_without_it(
    shared: tuple[Run, Flaky], run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, _ = shared
    assert command(n_trials="3") == 0
    assert command("--confirm_top", "2", n_trials="3") == 2
    assert "when the search has ended, leave that out" in capfd.readouterr().err
    assert run("--confirm_top", "2", "--confirm_seeds", "2", n_trials="3") == 0
    printed = capfd.readouterr()
    assert "it was rebuilt with 3 trials from their directories: 3 COMPLETE" in printed.err
    assert "Confirmed with 2 new seeds each" in printed.out
    assert (tmp_path / "c" / "summary" / "confirmation.json").exists()


def test_storage_that_stays_away_leaves_saved_trials(
    shared: tuple[Run, Flaky],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, backend = shared
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 0.3)
    hear_report = loop_module.Search.hear_report
    hear = TrialProcesses.receive
    sent_meanwhile = [("progress", {"progress": 1.1}), ("threads", {"threads": 1})]

    def cut(self: Any, running: Any, report: Any) -> None:
        backend.away = report.epoch == 1
        hear_report(self, running, report)

    def hear_of_it(self: TrialProcesses, connection: Any) -> Any:
        return sent_meanwhile.pop() if backend.away and sent_meanwhile else hear(self, connection)

    monkeypatch.setattr(loop_module.Search, "hear_report", cut)
    monkeypatch.setattr(TrialProcesses, "receive", hear_of_it)
    assert command(n_trials="1", epochs="3") == 2
    assert not sent_meanwhile
    problems = capfd.readouterr().err
    assert "running trials were told to save" in problems
    assert "s3cr" not in problems
    assert (tmp_path / "c" / "trial_000" / "latest_checkpoint.pth").exists()


@pytest.mark.parametrize("flags", [(), ("--requeue_exit_code", "99")])
def test_signal_during_an_outage_has_a_signal_s_exit_code(
    flags: tuple[str, ...],
    shared: tuple[Run, Flaky],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A batch system queues the job again by it."""
    command, backend = shared
    monkeypatch.setattr(storage_module, "HURRIED_SECONDS", 0.3)
    hear_report = loop_module.Search.hear_report

    def cut(self: Any, running: Any, report: Any) -> None:
        backend.away = True
        os.kill(os.getpid(), signal.SIGTERM)
        hear_report(self, running, report)

    monkeypatch.setattr(loop_module.Search, "hear_report", cut)
    assert command(*flags, n_trials="1", epochs="40") == (99 if flags else 143)
    problems = capfd.readouterr().err
    assert "cannot be reached" in problems
    assert "stopped by SIGTERM" in problems


def bury(trial: Any, study: optuna.Study) -> None:
    """As another search does it."""
    trial.set_user_attr("interrupted", True)
    study.tell(trial.number, state=TrialState.FAIL)


def test_trial_that_another_has_recorded_is_given_up(
    shared: tuple[Run, Flaky], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command, backend = shared
    hear_report = loop_module.Search.hear_report

    def late(self: Any, running: Any, report: Any) -> None:
        if running.number == 0:
            bury(running.trial, self.supply.study)
        hear_report(self, running, report)

    monkeypatch.setattr(loop_module.Search, "hear_report", late)
    assert command(n_trials="2") == 0
    assert "trial   0 | this search was silent" in capfd.readouterr().out
    assert states_of(backend) == ["FAIL", "COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("flags", [(), ("--requeue_exit_code", "99")])
def test_storage_lost_before_a_trial_starts_is_not_its_failure(
    flags: tuple[str, ...],
    shared: tuple[Run, Flaky],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also where it answers again, too late, and could record a failure."""
    command, backend = shared
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 0.3)

    def cut(study: optuna.Study, *_: Any) -> None:
        backend.away = True
        try:
            study.get_trials()
        finally:
            backend.away = False

    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "checkpoint_to_continue", cut)
        assert command(*flags, n_trials="1") == (99 if flags else 2)
    assert "nothing that was recorded is lost" in capfd.readouterr().err
    assert states_of(backend) == ["RUNNING"]
    assert not (tmp_path / "c" / "trial_000").exists()


@pytest.mark.parametrize("ending", ["complete", "continued", "failed", "stopped"])
def test_trial_that_another_has_recorded_may_end_in_any_way(
    ending: str,
    shared: tuple[Run, Flaky],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, backend = shared
    hear_end, hear_report = loop_module.Search.hear_end, loop_module.Search.hear_report

    def end(self: Any, running: Any, news: Any) -> None:
        if running.number == 0:
            bury(running.trial, self.supply.study)
            running.begun = 1.0 if ending == "continued" else running.begun
        hear_end(self, running, news)

    def report(self: Any, running: Any, report: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        hear_report(self, running, report)

    monkeypatch.setattr(loop_module.Search, "hear_end", end)
    if ending == "failed":
        monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "raise_error"}))
    if ending == "stopped":
        monkeypatch.setattr(loop_module.Search, "hear_report", report)
    code = command(n_trials="2", epochs="40" if ending == "stopped" else "2")
    said, problems = capfd.readouterr()
    assert "trial   0 | this search was silent" in said
    assert "Traceback" not in problems
    if ending == "stopped":
        assert (code, states_of(backend)) == (143, ["FAIL"])
    else:
        assert (code, states_of(backend)) == (0, ["FAIL", "COMPLETE", "COMPLETE"])


def test_trial_that_another_has_recorded_may_fail_to_start(
    shared: tuple[Run, Flaky], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was claimed, and the storage was away for long before its process was to start."""
    command, backend = shared
    start = runner_module.Runner.start

    def fail_once(self: Any, trial: Any, *more: Any) -> None:
        if trial.number == 0:
            bury(trial, trial.study)
            raise OSError("no process can be started")
        start(self, trial, *more)

    monkeypatch.setattr(runner_module.Runner, "start", fail_once)
    assert command(n_trials="2") == 0
    assert "trial   0 | this search was silent" in capfd.readouterr().out
    assert states_of(backend) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_displaced_trial_that_another_has_recorded_is_given_up(
    shared: tuple[Run, Flaky], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its GPU fails, none is left for it, and meanwhile it is taken for dead."""
    command, backend = shared
    loop = loop_module.Search.loop

    def displace(self: Any) -> None:
        self.start_next()
        (running,) = self.runner.running.values()
        self.runner.drop(running)
        self.runner.displaced.append(running)
        self.supply.study.tell(0, state=TrialState.FAIL)
        self.stop.name = "SIGTERM"

    monkeypatch.setattr(loop_module.Search, "loop", displace)
    assert command(n_trials="2") == 143
    assert "trial   0 | this search was silent" in capfd.readouterr().out
    monkeypatch.setattr(loop_module.Search, "loop", loop)
    assert command(n_trials="2") == 0
    assert states_of(backend) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_signs_of_life_are_written_while_trials_run(
    shared: tuple[Run, Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, backend = shared
    monkeypatch.setattr(shared_supply, "SIGN_SECONDS", 0.05)
    signs: list[str] = []
    monkeypatch.setattr(fleet_module, "_now", lambda: signs.append("") or str(len(signs)))
    assert command(n_trials="1", epochs="40") == 0
    (study,) = backend.get_all_studies()
    (trial,) = backend.get_all_trials(study._study_id)
    assert int(trial.user_attrs["alive"]) > 3


def test_search_waits_for_a_dead_one_s_trial_and_takes_its_place(
    shared: tuple[Run, Flaky],
    memory: InMemoryStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, backend = shared
    assert command(n_trials="1") == 0
    monkeypatch.setattr(shared_supply, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(shared_supply, "SIGN_SECONDS", 0.1)
    monkeypatch.setattr(fleet_module, "SILENT_FAR_SECONDS", 0.5)
    study = optuna.load_study(study_name=STUDY_NAME, storage=backend)
    drawer = Drawer(default_space("cpu", False), "random", 0, salt=[1])
    other = Fleet(study, drawer, 2, tmp_path / "elsewhere")
    assert other.claim() is not None  # and it is never heard of again
    assert command(n_trials="2") == 0
    assert "trial 1 was cut off at epoch 1: recorded as interrupted" in capfd.readouterr().out
    assert states_of(backend) == ["COMPLETE", "FAIL", "COMPLETE"]


def test_what_others_have_of_a_finite_space_is_waited_for(member: Member) -> None:
    """It may be interrupted, and is no reason to call the search finished."""
    a, b = (member(4, space=space_of_two()) for _ in range(2))
    tell(a, a.claim(), TrialState.COMPLETE)
    theirs = a.claim()
    supply = shared_supply.SharedSupply(b)
    supply.look()
    assert (supply.next(), supply.is_done()) == (None, False)
    assert supply._next_look(True) > 0, "it looks again at its usual pace"
    tell(a, theirs, TrialState.COMPLETE)
    with pytest.raises(SpaceExhaustedError):
        supply.next()


def test_what_another_gives_up_while_this_one_draws_is_no_end(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (member(4, space=space_of_two()) for _ in range(2))
    tell(a, a.claim(), TrialState.COMPLETE)
    theirs = a.claim()
    supply, claim = shared_supply.SharedSupply(b), b.claim

    def slow() -> optuna.Trial | None:
        try:
            return claim()
        finally:
            tell(a, theirs, TrialState.FAIL, interrupted=True)

    with monkeypatch.context() as patch:
        patch.setattr(b, "claim", slow)
        assert supply.next() is None
    assert supply._pause > 0
    assert supply.next() is not None, "it takes the interrupted one's place"


def test_search_that_has_all_it_wants_waits_for_no_other(member: Member) -> None:
    one, more = member(1), member(3)
    tell(more, more.claim(), TrialState.COMPLETE)
    assert more.claim() is not None
    assert shared_supply.SharedSupply(one).is_done()
    assert not shared_supply.SharedSupply(more).is_done()


def test_directory_that_nobody_may_see_is_out_of_reach(member: Member, tmp_path: Path) -> None:
    a, b = member(3), member(3)
    a.checkpoint_dir = tmp_path / ("x" * 300)  # an error for Path.exists, as one without a right
    trial = a.claim()
    assert trial is not None
    assert not b._is_within_reach(b.trials()[trial.number])
    assert not has_saved(trial_dir(a.checkpoint_dir, trial.number))


@pytest.mark.parametrize("fails", ["write_error_log", "write_record", "remove_temporaries"])
@pytest.mark.parametrize("has_finished", [True, False])
def test_trial_whose_directory_cannot_be_written_is_recorded_all_the_same(
    has_finished: bool,
    fails: str,
    member: Member,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = member(3), member(3)
    a.checkpoint_dir = tmp_path / "theirs"
    trial = a.claim()
    assert trial is not None
    own = trial_dir(a.checkpoint_dir, trial.number)
    make_config(a.checkpoint_dir, trial)
    if has_finished:
        monkeypatch.setattr(unfinished, "finished_value", {own: 0.75}.get)
    module: Any = records if fails == "write_record" else unfinished
    write = getattr(module, fails)

    def refused(directory: Path, *given: Any, **more: Any) -> None:
        if directory in (own, a.checkpoint_dir):
            raise PermissionError(errno.EACCES, "Permission denied")
        write(directory, *given, **more)

    monkeypatch.setattr(module, fails, refused)
    b.bury(b.trials()[trial.number])
    found = b.trials()[trial.number]
    assert found.state == (TrialState.COMPLETE if has_finished else TrialState.FAIL)
    assert found.value == (0.75 if has_finished else None)
    logs = [*tmp_path.rglob("error.log")]
    assert len(logs) == (not has_finished)


def test_trial_out_of_reach_has_longer_to_come_back(member: Member, tmp_path: Path) -> None:
    """It may have finished where only its own search can see it."""
    now = [0.0]
    a, b = member(3), member(3, clock=lambda: now[0])
    near, a.checkpoint_dir = a.claim(), tmp_path / "elsewhere"
    far = a.claim()
    assert near is not None
    assert far is not None
    make_config(tmp_path, near)
    found = []
    for _ in range(40):
        found += [trial.number for trial in b.dead(b.trials())]
        now[0] += 60.0
    assert found.count(near.number) > found.count(far.number) > 0


@pytest.mark.parametrize("home", ["c", "elsewhere"])
def test_signal_while_waiting_for_others(
    home: str, shared: tuple[Run, Flaky], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, backend = shared
    assert command(n_trials="1") == 0
    study = optuna.load_study(study_name=STUDY_NAME, storage=backend)
    drawer = Drawer(default_space("cpu", False), "random", 0, salt=[1])
    assert Fleet(study, drawer, 2, tmp_path / home).claim() is not None
    look, left = shared_supply.SharedSupply.look, outlook.seconds_left
    at_once = []

    def signalled(self: Any) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return look(self)

    def noted(*given: Any) -> Any:
        at_once.append(given[4])
        return left(*given)

    monkeypatch.setattr(outlook, "seconds_left", noted)
    monkeypatch.setattr(shared_supply.SharedSupply, "look", signalled)
    assert command(n_trials="2") == 143
    assert states_of(backend) == ["COMPLETE", "RUNNING"]
    assert at_once[-1] == 2, "the other search's trial too"
    page = (tmp_path / "c" / "summary" / "report.html").read_text()
    assert ("The search runs." in page) == (home == "c"), "the other one writes it as well"


@pytest.mark.parametrize("epochs", [8, 9])
def test_settings_that_another_search_records_meanwhile_hold(
    epochs: int, memory: InMemoryStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(storage=memory)
    record = study.set_user_attr
    monkeypatch.setattr(study, "set_user_attr", lambda name, _: record(name, {"epochs": 9}))
    is_refused = pytest.raises(UserError, match="other settings")
    with is_refused if epochs == 8 else nullcontext():
        record_settings(study, {"epochs": epochs}, tmp_path)


def test_unexpected_error_is_told_without_the_password(
    shared: tuple[Run, Flaky], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Libraries put the URL into what they raise."""
    command, _ = shared

    def broken(*_: Any) -> None:
        raise RuntimeError(f"could not parse {URL}, password 's3cr@t'")

    monkeypatch.setattr("writer_search.study.preparation.prepare_shared", broken)
    assert command() == 1
    said = capfd.readouterr().err
    assert "RuntimeError: could not parse postgresql+psycopg://me:***@db.example/lines" in said
    assert "s3cr" not in said
