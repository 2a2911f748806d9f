"""A short run of the chaos: the real command, random faults, nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).with_name("chaos.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_rounds_of_chaos_lose_nothing(tmp_path: Path) -> None:
    played = subprocess.run(
        [sys.executable, str(CHAOS), "--rounds", "3", "--keep", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert played.returncode == 0, played.stdout + played.stderr
    outcome = json.loads(played.stdout.splitlines()[-1])
    assert outcome["violations"] == 0
    assert outcome["rounds"] == 4, "the last one undisturbed"
