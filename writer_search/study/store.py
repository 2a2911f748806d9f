"""The Optuna study: opening it, and what it records about itself.

Only the search process touches the study, and only under the directory's lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection

from writer_search.common.environment import count_in_utc
from writer_search.common.errors import UserError, root_of
from writer_search.common.text import one_line
from writer_search.flags import STUDY_NAME
from writer_search.results.rows import DATABASE, OtherVersionError, connect
from writer_search.study.changes import refuse_changes
from writer_search.study.damage import is_half_made, is_unwritable
from writer_search.study.value_column import add_value_column


class DamagedError(UserError):
    """The database is damaged where only Optuna looks."""


def warm_up_storages() -> None:
    """Do what a study takes once, 1.5 s of it, while the fork server imports torch."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage="sqlite://")  # in memory
    study.enqueue_trial({})
    study.ask()


def open_study(checkpoint_dir: Path) -> optuna.Study:
    """Open the study in the checkpoint directory, or create it there.

    Raises UserError when the file cannot be used: DamagedError, OtherVersionError, or what the
    system keeps from being written.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what is damaged is told by this program
    count_in_utc()
    database = checkpoint_dir / DATABASE
    try:
        if database.exists() and is_half_made(database):
            database.unlink()
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{DATABASE}",  # its place is in `creator`: a URL cannot name every path
            engine_kwargs={"creator": partial(connect, database)},
        )
        study = optuna.create_study(
            study_name=STUDY_NAME,
            storage=storage,
            direction=StudyDirection.MAXIMIZE,
            load_if_exists=True,
        )
        study.get_trials(deepcopy=False)
        add_value_column(database)
    except Exception as error:  # nearly anything, where contents make no sense
        cause = f"{database} cannot be used ({one_line(root_of(error))})"
        if is_unwritable(error):
            raise UserError(f"{cause}; fix that, then run the same command") from None
        if type(error) is RuntimeError:  # Optuna's word on another version of its tables
            raise OtherVersionError(f"{database}: {one_line(error)}") from None
        raise DamagedError(f"{cause}; --recover rebuilds it from the trial directories") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return study


def record_settings(study: optuna.Study, settings: Mapping[str, Any], checkpoint_dir: Path) -> None:
    """Record what makes the study's trials comparable, or check it against what is recorded.

    Raises UserError with the differences: Optuna itself would accept most of them silently.
    """
    recorded = study.user_attrs.get("settings")
    if recorded is None:
        study.set_user_attr("settings", dict(settings))
        recorded = study.user_attrs["settings"]  # another search may have been first after all
    refuse_changes(recorded, settings, checkpoint_dir)
