"""Claim: a step, a validation batch and the saving of a state do no needless operations.

    python -m benchmarks.operations [--backbones resnet_thin resnet18]

Counts, on the CPU, the operations that would each be a kernel on a GPU: all but views and mere
allocations. A GPU waits for the host where these are many and small. Synthetic lines, bfloat16, the
default batch of a GPU at a tenth of its size: the count does not depend on it.

JSON: step_NAME: operations of a training step; average_NAME: of a move of the average;
validation_NAME: of a batch of windows; saving_NAME: copies of a state that the host would wait for,
and rows of its history that are copied; saving_once_NAME: the same as it was once.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks import common
from train import training_step
from writer_search.training import evaluation
from writer_search.training.batches import Lines, strip_on
from writer_search.training.copies import TensorCopies
from writer_search.training.optimisation import update_average
from writer_search.training.state import TrainingState

ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::detach", "aten::alias")


class Operations(TorchDispatchMode):
    """Counts operations that are no views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.done: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        may_be_view = bool(aliases) and all(alias and not alias.is_write for alias in aliases)
        # `to` and its like are views only where nothing is to be done.
        is_view = may_be_view and not (isinstance(result, Tensor) and is_new(result, args))
        if not is_view and not func._schema.name.startswith(ALLOCATIONS):
            self.done[func._schema.name] += 1
        return result


def is_new(result: Tensor, arguments: Any) -> bool:
    """Tell whether a tensor has memory of its own."""
    given = [tensor for tensor in tree_iter(arguments) if isinstance(tensor, Tensor)]
    return result.data_ptr() != 0 and all(
        result.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in given
    )


class BlockingCopies(TorchDispatchMode):
    """Counts copies that the host waits for where they come from a GPU."""

    BY_DEFAULT = ("aten::_to_copy", "aten::copy_", "aten::clone")

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self.BY_DEFAULT:
            given = [argument.name for argument in func._schema.arguments][: len(args)]
            named = dict(zip(given, args, strict=True)) | (kwargs or {})
            self.number += not named.get("non_blocking", False)
        return func(*args, **(kwargs or {}))


def copies_of_a_save(
    take: Callable[[dict[str, Any]], dict[str, Any]], state: dict[str, Any]
) -> Counter[str]:
    """Count what a copy of a state for the disk takes, once its memory is there."""
    take(state)
    with BlockingCopies() as copies:
        taken = take(state)
    rows = zip(taken["history"], state["history"], strict=True)
    return Counter(blocking=copies.number, rows=sum(own is not row for own, row in rows))


def copied_once(value: Any) -> Any:
    """Copy a state as it was done at each epoch's end, before states were saved by time."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied_once(item) for key, item in value.items()}
    return [copied_once(item) for item in value] if isinstance(value, list) else value


def count(work: Callable[[], object]) -> Counter[str]:
    """Count the operations of a call."""
    with Operations() as operations:
        work()
    return operations.done


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_for(__doc__)
    common.add_data_flags(parser)
    parser.add_argument("--backbones", nargs="+", default=["resnet_thin", "resnet18"])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    print(common.describe_machine())
    found: dict[str, float | None] = {}
    with common.line_images(args) as (root, cache_dir):
        data = common.decoded(root, cache_dir, 32)
        for name in args.backbones:
            counted = counts_of(name, data)
            found |= {f"{what}_{name}": sum(own.values()) for what, own in counted.items()}
            for what, own in counted.items():
                rows = [[operation, number] for operation, number in own.most_common(8)]
                common.print_table(f"{name}, {what}", ["operation", "times"], rows)
    common.print_result(**found)
    return 0


def counts_of(backbone: str, data: Any) -> dict[str, Counter[str]]:
    """Count what a trial of a backbone does, after a step to warm up."""
    device = torch.device("cpu")
    config = common.trial_config(
        "cpu", backbone, precision="bfloat16", line_height=32, crop_width=64, batch_size=6
    )
    state = TrainingState.start(config, len(data.writers), device)
    state.model.train()
    images, labels = torch.randn(6, 1, 32, 64), torch.arange(6) % len(data.writers)
    training_step(state, config, images, labels)
    pairs = state.pairs
    lines = Lines.of(data, "val", strip_on(data, device))
    few = replace(
        lines, **{k: getattr(lines, k)[:1] for k in ("starts", "widths", "labels", "pages")}
    )

    def validate(own: Lines) -> Counter[str]:
        with torch.inference_mode():
            writers = len(data.writers)
            return count(lambda: evaluation.own_logits(state.average, config, own, writers))

    one, two = (replace(few, widths=torch.full_like(few.widths, 64 * n)) for n in (1, 2))
    with mock.patch.object(evaluation, "EVALUATION_BATCH", 1):
        # What is done once for all batches is left out.
        validation = validate(two) - validate(one)
    few_rows = [{"epoch": epoch, "per_writer": {"a": 1.0}} for epoch in range(60)]
    contents = {**state.contents(), "history": few_rows}
    return {
        "saving": copies_of_a_save(TensorCopies(device, on_host=True).take, contents),
        "saving_once": copies_of_a_save(copied_once, contents),
        "step": count(lambda: training_step(state, config, images, labels)),
        "average": count(lambda: update_average(pairs, 8, 100)),
        "validation": validation,
    }


if __name__ == "__main__":
    raise SystemExit(main())
