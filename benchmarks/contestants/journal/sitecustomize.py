"""Python runs this as it starts, where the directory stands in PYTHONPATH: the journal of training.

Every process that imports `train` appends a line to a file for each step, validation and saving
done. The contestants' own records of what was trained are not used.
"""

import importlib.abc
import importlib.util
import os
import sys
import time


class _Watching(importlib.abc.MetaPathFinder):
    """Lets `train` be imported as ever, then wraps what trains."""

    def find_spec(self, name, path, target=None):
        if name != "train":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_watch(module):
                execute(module)
                _watch(module)

            spec.loader.exec_module = execute_and_watch
        return spec


def _watch(train):
    """Wrap the functions by which every training goes: its marks are in `accounting.Mark`."""
    train_epoch, training_step, validate, save = (
        *(train.train_epoch, train.training_step),
        *(train.validate, train.Checkpoints.save),
    )
    journal = os.open(os.environ["GOODPUT_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    launch = os.environ["GOODPUT_LAUNCH"]

    def mark(config, kind, number, loss=0.0):
        words = (time.monotonic(), launch, os.getpid(), config.learning_rate, kind, number, loss)
        os.write(journal, (" ".join(map(str, words)) + "\n").encode())

    def watched_epoch(state, config, *others, **named):
        mark(config, "begin", state.step)
        return train_epoch(state, config, *others, **named)

    def watched_step(state, config, *others, **named):
        loss = training_step(state, config, *others, **named)
        mark(config, "step", state.step)
        return loss

    def watched_validation(state, config, *others, **named):
        metrics = validate(state, config, *others, **named)
        mark(config, "validation", state.epoch, metrics.loss)
        return metrics

    def watched_saving(checkpoints, *others, **named):
        began = time.monotonic()
        save(checkpoints, *others, **named)
        mark(checkpoints._config, "saved", 0, time.monotonic() - began)  # which is no training

    train.train_epoch, train.training_step = watched_epoch, watched_step
    train.validate, train.Checkpoints.save = watched_validation, watched_saving


if "GOODPUT_JOURNAL" in os.environ:
    sys.meta_path.insert(0, _Watching())
