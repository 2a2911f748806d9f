"""Which model a search gives its user: the best trial's, or that of a confirmation's winner.

Reads and copies files only.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from writer_search.common.files import is_there, read_dict, write_whole
from writer_search.results.rows import Row, best_row, directory_of

CONFIRM = "confirm"


@dataclass(frozen=True)
class Chosen:
    """A model: `trial` is the search's, whose configuration it has; `directory` holds the file."""

    trial: int
    directory: Path
    is_confirmed: bool

    @property
    def name(self) -> str:
        where = f" ({CONFIRM}/{self.directory.name})" if self.is_confirmed else ""
        return f"trial {self.trial}{where}"


def read_confirmation(checkpoint_dir: Path, rows: Sequence[Row]) -> dict[str, Any] | None:
    """Read summary/confirmation.json; None where there is none, or trials have come since."""
    found = read_dict(checkpoint_dir / "summary" / "confirmation.json")
    complete = [row.number for row in rows if row.state == "COMPLETE"]
    return found if found.get("of_trials") == complete else None


def chosen_model(checkpoint_dir: Path, rows: Sequence[Row]) -> Chosen | None:
    """Choose: by the confirmation where there is one, else the best trial; None without any."""
    confirmation = read_confirmation(checkpoint_dir, rows)
    if confirmation is not None:
        winner = confirmation["winner"]
        return Chosen(winner["trial"], checkpoint_dir / winner["directory"], True)
    best = best_row(rows)
    if best is None:
        return None
    return Chosen(best.number, directory_of(best.number, best.attributes, checkpoint_dir), False)


def best_copy(checkpoint_dir: Path) -> Path:
    """Give the file that a user takes as the search's model."""
    return checkpoint_dir / "summary" / "best_model.pth"


def publish(checkpoint_dir: Path, chosen: Chosen | None) -> Path | None:
    """Copy the chosen model to summary/best_model.pth; None when there is none."""
    if chosen is None or not is_there(chosen.directory / "best_model.pth"):
        return None
    target = best_copy(checkpoint_dir)
    with open(chosen.directory / "best_model.pth", "rb") as model:
        write_whole(target, lambda file: shutil.copyfileobj(model, file))
    return target
