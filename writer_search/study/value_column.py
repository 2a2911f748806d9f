"""`SELECT trial_id, state, value FROM trials` on the study's database, as its users know it.

Optuna moved the values to a table of their own long ago. It names the columns that it reads and
writes, so one more does it no harm; triggers keep it equal to Optuna's own, in one transaction.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from writer_search.results.rows import connect

VALUE = (
    "(SELECT v.value FROM trial_values v WHERE v.trial_id = trials.trial_id ORDER BY v.objective)"
)
TRIGGERS = {
    f"value_of_trial_{name}": f"CREATE TRIGGER value_of_trial_{name} AFTER {event} ON trial_values "
    f"BEGIN UPDATE trials SET value = {VALUE} WHERE trial_id = {row}.trial_id; END"
    for name, event, row in (
        ("inserted", "INSERT", "NEW"),
        ("updated", "UPDATE", "NEW"),
        ("deleted", "DELETE", "OLD"),
    )
}


def add_value_column(database: Path) -> None:
    """Give the table of trials a column of their values, where it is not there or not kept.

    An upgrade by Optuna that builds the table anew drops triggers: they are made again then.
    """
    with closing(connect(database)) as connection:
        connection.isolation_level = None  # transactions as they are written here
        if _is_kept(connection):
            return
        connection.execute("BEGIN IMMEDIATE")
        if "value" not in _columns(connection):
            connection.execute("ALTER TABLE trials ADD COLUMN value FLOAT")
        for name, statement in TRIGGERS.items():
            connection.execute(f"DROP TRIGGER IF EXISTS {name}")
            connection.execute(statement)
        connection.execute(f"UPDATE trials SET value = {VALUE}")
        connection.execute("COMMIT")


def _columns(connection: sqlite3.Connection) -> set[str]:
    return {row[1] for row in connection.execute("PRAGMA table_info(trials)")}


def _is_kept(connection: sqlite3.Connection) -> bool:
    """Tell whether the column, the triggers and every value are as they should be."""
    found = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
    if "value" not in _columns(connection) or not TRIGGERS.items() <= dict(found).items():
        return False
    wrong = connection.execute(f"SELECT 1 FROM trials WHERE value IS NOT {VALUE} LIMIT 1")
    return wrong.fetchone() is None
