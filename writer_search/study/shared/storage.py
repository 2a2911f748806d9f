"""A PostgreSQL storage that several searches share: opening it, patience with it, its password."""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from urllib.parse import parse_qsl, unquote

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from sqlalchemy import exc
from sqlalchemy.engine import make_url

from writer_search.common.environment import count_in_utc
from writer_search.common.errors import UserError, root_of
from writer_search.common.signals import StopSignals
from writer_search.common.text import one_line

EXAMPLE = "postgresql+psycopg://user@host/database"
PATIENCE_SECONDS = 300.0  # so long an outage in the middle of a search is waited out
HURRIED_SECONDS = 5.0  # the same once a signal has asked for the end
SETTINGS_SECONDS = 60.0  # so long a study may stand without settings while its creator lives
RACES = 20  # processes that make the tables at once see each other's half-made ones
PASSING = ("already exists", "too many", "starting up")  # in a server's words, what soon passes
KEEPALIVE = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds; also where something was sent meanwhile
}  # libpq's: a network that swallows packets is noticed in a minute


class StorageUnreachableError(UserError):
    """The storage has not answered for longer than the search is patient."""

    passes = True


# --------------------------------------------------------------------------------------- passwords


def secrets_of(url: str) -> set[str]:
    """Give the password in a URL, also in one that is malformed, as written and as decoded."""
    found = re.match(r"[^:/]+://[^:/@]*:(.*)@", url)
    secrets = {found[1]} if found else set()
    # A password may stand in the query too, and libpq knows one for its key.
    secrets |= {v for k, v in parse_qsl(url.partition("?")[2]) if "pass" in k.lower()}
    raw = re.findall(r"[?&][^=&]*pass[^=&]*=([^&]*)", url, re.IGNORECASE)
    return {form for secret in [*secrets, *raw] for form in (secret, unquote(secret)) if form}


def hide_password(text: str, url: str | None) -> str:
    """Replace the password of a storage's URL by *** wherever it stands in a text."""
    for secret in sorted(secrets_of(url or ""), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    return text


def shown_url(url: str) -> str:
    """Give the URL without its password."""
    for secret in sorted(secrets_of(url), key=len, reverse=True):
        for opening, closing in ((":", "@"), ("=", "")):
            url = url.replace(f"{opening}{secret}{closing}", f"{opening}***{closing}")
    return url


# ----------------------------------------------------------------------------------------- opening


@contextmanager
def opened_storage(url: str, stop: StopSignals | None = None) -> Iterator[BaseStorage]:
    """Open a shared storage while the `with` block runs, making Optuna's tables where none are.

    Raises UserError, without the password: a URL that is none, a driver that is not installed, a
    server that does not answer.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = _open_database(url)
    try:  # with Optuna's cache
        yield cast(BaseStorage, PatientStorage(get_storage(database), url, stop))
    finally:
        database.engine.dispose()


def _open_database(url: str) -> RDBStorage:
    shown = shown_url(url)
    try:
        dialect = make_url(url).get_dialect()
    except (exc.ArgumentError, ValueError, ImportError):
        raise UserError(
            f"--storage {shown} is not the URL of a storage: expected, for example, {EXAMPLE}; "
            "special characters in a password are written as %40"
        ) from None
    if dialect.name == "sqlite":
        raise UserError(
            f"--storage {shown}: SQLite is for one search and the default without --storage; "
            "several need PostgreSQL"
        )
    if dialect.name != "postgresql":
        raise UserError(f"--storage {shown}: only PostgreSQL is supported: {EXAMPLE}")
    engine: dict[str, Any] = {"pool_pre_ping": True}
    if dialect.driver in ("psycopg", "psycopg2"):
        engine["connect_args"] = KEEPALIVE
    for attempt in range(RACES):
        try:
            return RDBStorage(url, engine_kwargs=engine)
        except ImportError:
            raise UserError(
                f"--storage {shown} needs its driver: pip install 'psycopg[binary]'"
            ) from None
        except (exc.SQLAlchemyError, StorageInternalError, RuntimeError, AssertionError) as error:
            if attempt == RACES - 1 or not _may_be_a_race(error):
                cause = hide_password(one_line(root_of(error)), url)
                raise UserError(f"--storage {shown} cannot be used: {cause}") from None
        time.sleep(random.uniform(0.1, 0.6))
    raise AssertionError("unreachable")


def _may_be_a_race(error: BaseException) -> bool:
    """Tell what others that make the tables or begin at this moment may have caused."""
    cause = _unwrapped(error)
    return not isinstance(cause, exc.OperationalError) or any(
        words in str(cause) for words in PASSING
    )


def _unwrapped(error: BaseException) -> BaseException | None:
    """Give SQLAlchemy's error, which Optuna wraps in one of its own."""
    return error.__cause__ if isinstance(error, StorageInternalError) else error


# ---------------------------------------------------------------------------------------- patience


class PatientStorage:
    """An Optuna storage that waits out an outage of its server.

    Each call is tried again for PATIENCE_SECONDS, then StorageUnreachableError is raised. All of
    Optuna's calls can be repeated but one: a new trial may exist although the answer was lost; who
    makes trials has to look for it.
    """

    def __init__(self, backend: BaseStorage, url: str, stop: StopSignals | None) -> None:
        self._backend, self._url, self._stop = backend, url, stop

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._backend, name)
        if name.startswith("__") or not callable(attribute):
            return attribute
        return partial(self._patiently, name, attribute)

    def _patiently(self, name: str, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        began: float | None = None
        pause = 0.2
        while True:
            try:
                return call(*args, **named)
            except UpdateFinishedTrialError:
                if began is None or name != "set_trial_state_values":
                    raise
                if self._backend.get_trial(args[0]).state != args[1]:
                    raise
                return True  # the answer that was lost had been to this very call
            except Exception as error:
                if not is_outage(error):
                    raise
                began = self._wait(began, pause, error)
                pause = min(10.0, 2 * pause)

    def _wait(self, began: float | None, pause: float, error: Exception) -> float:
        now = time.monotonic()
        cause = hide_password(one_line(root_of(error)), self._url)
        if began is None:
            began = now
            print(
                f"warning: {shown_url(self._url)} cannot be reached ({cause}); trying "
                f"again for {PATIENCE_SECONDS:g} s",
                file=sys.stderr,
                flush=True,
            )
        hurried = self._stop is not None and self._stop.name is not None
        if now - began > (HURRIED_SECONDS if hurried else PATIENCE_SECONDS):
            raise StorageUnreachableError(
                f"{shown_url(self._url)} cannot be reached ({cause}); running trials were told "
                "to save, nothing that was recorded is lost, and the same command goes on"
            ) from None
        deadline = now + pause * random.uniform(0.5, 1.0)
        while time.monotonic() < deadline and (hurried or not (self._stop and self._stop.name)):
            time.sleep(0.05)
        return began


def is_outage(error: BaseException) -> bool:
    """Tell an error that says nothing but that the server did not answer."""
    cause = _unwrapped(error)
    if isinstance(cause, (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)):
        return True
    if isinstance(cause, exc.PendingRollbackError):  # the connection broke within a transaction
        return True
    if isinstance(cause, exc.DBAPIError):
        return bool(cause.connection_invalidated)
    return False


# ----------------------------------------------------------------------------------------- a study


def find_study(storage: BaseStorage, name: str) -> optuna.Study | None:
    """Open the study of that name; None when there is none."""
    count_in_utc()
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def create_shared_study(storage: BaseStorage, name: str, settings: dict[str, Any]) -> bool:
    """Create the study with its settings; False when another search was first."""
    try:
        study = optuna.create_study(
            study_name=name, storage=storage, direction=StudyDirection.MAXIMIZE
        )
    except DuplicatedStudyError:
        return False
    study.set_user_attr("settings", settings)
    return True


def settings_of(storage: BaseStorage, name: str) -> dict[str, Any] | None:
    """Read the settings of the study that is to be gone on with; None for a new one.

    A study without settings has just been created by another search, which writes them next.
    """
    study = find_study(storage, name)
    deadline = time.monotonic() + SETTINGS_SECONDS
    while study is not None:
        settings: dict[str, Any] | None = study.user_attrs.get("settings")
        if settings is not None or time.monotonic() > deadline:
            return settings  # None: its creator died; who comes first writes them
        time.sleep(0.2)
    return None
