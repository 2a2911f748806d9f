"""One of several searches without a training: claims trials and finishes them, as fast as it can.

Usage: claimer.py URL N_TRIALS CHECKPOINT_DIR none|interrupt|die. Prints a JSON object at its end:
numbers started, and the most trials that were ever complete or running at once.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from writer_search.common.files import write_json
from writer_search.common.locks import SharedLock
from writer_search.flags import STUDY_NAME
from writer_search.results.rows import trial_dir
from writer_search.space import default_space
from writer_search.study.draws import Drawer
from writer_search.study.shared.fleet import Fleet
from writer_search.study.shared.storage import create_shared_study, find_study, opened_storage
from writer_search.study.shared.supply import bury_dead


def main(storage: BaseStorage, n_trials: int, directory: Path, fault: str) -> None:
    create_shared_study(storage, STUDY_NAME, {})
    study = find_study(storage, STUDY_NAME)
    assert study is not None
    assert study.direction == StudyDirection.MAXIMIZE
    drawer = Drawer(default_space("cpu", False), "random", 0, salt=[os.getpid()])
    started: list[int] = []
    most = 0
    with SharedLock(directory) as lock:
        fleet = Fleet(study, drawer, n_trials, directory, lock, continued={})
        print("ready", flush=True)
        sys.stdin.readline()
        while True:
            trial = fleet.claim()
            if trial is not None:
                trial.set_user_attr("begun", True)
            trials = fleet.trials()
            most = max(most, _live(trials))
            if trial is not None:
                started.append(trial.number)
                (trial_dir(directory, trial.number)).mkdir()
                write_json(trial_dir(directory, trial.number) / "config.json", {})
                if fault == "die" and len(started) == 2:
                    os.kill(os.getpid(), 9)
                time.sleep(random.uniform(0, 0.02))
                if fault == "interrupt" and len(started) == 2:
                    trial.set_user_attr("interrupted", True)
                    study.tell(trial.number, state=TrialState.FAIL)
                else:
                    study.tell(trial.number, random.random())
            elif fleet.others_running(trials) or fleet.room(trials):
                bury_dead(fleet, trials)
                time.sleep(0.02)
            else:
                break
    print(json.dumps({"started": started, "most": most}))


def _live(trials: list) -> int:  # type: ignore[type-arg]
    """Count what is complete, or runs and has passed its claim."""
    states = (TrialState.COMPLETE, TrialState.RUNNING)
    return sum(t.state in states and "begun" in t.user_attrs for t in trials)


if __name__ == "__main__":
    with opened_storage(sys.argv[1]) as opened:
        main(opened, int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
