"""Claim: a step, a validation batch and the meeting of ranks do no needless operations.

    python -m benchmarks.operations [--backbones resnet_thin resnet18]

Counts, on the CPU, the operations that would each be a kernel on a GPU: all but views and mere
allocations. A GPU waits for the host where these are many and small. Synthetic lines, bfloat16, the
default batch of a GPU at a tenth of its size: the count does not depend on it.

JSON: step_NAME: operations of a training step; average_NAME: of a move of the average;
validation_NAME: of a batch of windows.
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
            return count(lambda: evaluation.line_logits(state.average, config, own, writers))

    one, two = (replace(few, widths=torch.full_like(few.widths, 64 * n)) for n in (1, 2))
    with mock.patch.object(evaluation, "EVALUATION_BATCH", 1):
        # What is done once for all batches is left out.
        validation = validate(two) - validate(one)
    return {
        "step": count(lambda: training_step(state, config, images, labels)),
        "average": count(lambda: update_average(pairs, 8, 100)),
        "validation": validation,
    }


if __name__ == "__main__":
    raise SystemExit(main())
