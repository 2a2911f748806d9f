"""What one trial is: its configuration, what each value in it may be at all, and its patience.

Imports neither torch nor Optuna: the search process and the trial processes share this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from writer_search.common.errors import UserError
from writer_search.common.files import content_hash

Value = bool | int | float | str


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    choices: tuple[Value, ...]

    def __contains__(self, value: Value) -> bool:
        return any(
            value == c and isinstance(value, bool) == isinstance(c, bool) for c in self.choices
        )

    def own(self, value: Value) -> Value:
        """Give the choice that a value equals, in its own type: 3 for 3.0."""
        return self.choices[self.choices.index(value)]

    def __str__(self) -> str:
        return "one of " + ", ".join(str(c) for c in self.choices)

    def nearest(self, value: Value) -> Value:
        return value if value in self else self.choices[0]


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; `log` draws its logarithm uniformly."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __contains__(self, value: Value) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and (not self.integer or value == int(value))

    def __str__(self) -> str:
        return (
            f"{'a whole number' if self.integer else 'a number'} from {self.low:g} to {self.high:g}"
        )

    def nearest(self, value: Value) -> Value:
        inside = min(max(float(value), self.low), self.high)
        return int(inside) if self.integer else inside


Rule = Choice | Range

LOSSES = ("cross_entropy", "cosface")
POOLINGS = ("avg", "gem", "attention")
PRECISIONS = ("float32", "bfloat16")
HEADS = ("lda", "softmax")
COHOG = "cohog"  # the backbone without a network: a descriptor, and a head fitted at once

# What a value may be at all. The space that is searched lies within.
LIMITS: dict[str, Rule] = {
    "line_height": Range(8, 512, integer=True),
    "crop_width": Range(16, 4096, integer=True),
    "batch_size": Range(2, 4096, integer=True),
    "pooling": Choice(POOLINGS),
    "learning_rate": Range(1e-7, 1.0),
    "backbone_lr_mult": Range(0.0, 10.0),
    "weight_decay": Range(0.0, 10.0),
    "label_smoothing": Range(0.0, 0.9),
    "dropout": Range(0.0, 0.95),
    "sampler_alpha": Range(0.0, 1.0),
    "augment_geometry": Range(0.0, 4.0),
    "augment_photometry": Range(0.0, 4.0),
    "loss": Choice(LOSSES),
    "margin": Range(0.0, 1.0),
    "scale": Range(1.0, 256.0),
    "mixup_alpha": Range(0.0, 8.0),
    "precision": Choice(PRECISIONS),
    "with_cohog": Choice((False, True)),
    "cohog_weight": Range(0.0, 100.0),
    "cohog_directions": Range(2, 64, integer=True),
    "cohog_reach": Range(1, 64, integer=True),
    "cohog_smoothing": Range(0.3, 8.0),
    "cohog_edge": Range(0.0, 8.0),
    "cohog_variation": Range(0.0, 4.0),
    "cohog_sizes": Choice((1, 3, 5)),
    "cohog_head": Choice(HEADS),
    "cohog_penalty": Range(1e-8, 1e4),
}
OF_COHOG = tuple(name for name in LIMITS if name.startswith(f"{COHOG}_"))
# The values that stand for what trials were before there was a choice. They are not written into
# configurations and spaces, whose hashes and comparisons stay what they were.
BEFORE: dict[str, Value] = {"with_cohog": False, "cohog_sizes": 1}


# Every backbone by name, and whether ImageNet weights exist for it.
BACKBONES: dict[str, bool] = {
    COHOG: False,
    "tiny": False,
    "resnet_thin": False,
    "resnet18": True,
    "resnet34": True,
    "resnet50": True,
    "convnext_tiny": True,
    "efficientnet_v2_s": True,
    "mobilenet_v3_large": True,
    "mobilenet_v3_small": True,
}
LIMITS_BESIDE_THE_SPACE: dict[str, Rule] = {
    "seed": Range(0, 2**63, integer=True),
    "epochs": Range(1, 10**6, integer=True),
    "patience": Range(1, 10**6, integer=True),
    "backbone": Choice(tuple(BACKBONES)),
    "pretrained": Choice((False, True)),
}


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """All that decides a trial's result, and nothing else (no path, no device).

    Heights and widths are in pixels of the resized line; rates are per step.
    Raises UserError, naming the value, when a value is out of its limits.
    """

    seed: int
    epochs: int
    patience: int  # epochs without an improvement, see `Improvement`, before the trial ends
    backbone: str
    pretrained: bool = False  # ImageNet weights
    line_height: int = 64
    crop_width: int = 256  # of a training crop and of a validation window
    batch_size: int = 32
    precision: str = "float32"
    pooling: str = "avg"
    learning_rate: float = 2e-3  # at the peak
    backbone_lr_mult: float = 1.0
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    dropout: float = 0.2
    sampler_alpha: float = 0.5  # 0: lines as they come, 1: every writer equally often
    augment_geometry: float = 1.0
    augment_photometry: float = 1.0
    loss: str = "cross_entropy"
    margin: float = 0.2  # cosface alone reads margin and scale
    scale: float = 32.0
    mixup_alpha: float = 0.0  # 0: no mixup; cross_entropy alone mixes
    with_cohog: bool = False  # the descriptor beside a network
    cohog_weight: float = 2.5  # of its log-probabilities there; the network's have the weight 1
    # The descriptor's own, see `CoHOG`. Of the others it reads the seed and the line height alone.
    cohog_directions: int = 16
    cohog_reach: int = 3
    cohog_smoothing: float = 1.0
    cohog_edge: float = 0.6
    cohog_variation: float = 1.0  # of a line's variants, and of its size when it is asked
    cohog_sizes: int = 1  # in which a line is seen when it is asked
    cohog_head: str = "lda"
    cohog_penalty: float = 1e-3  # of softmax alone

    def __post_init__(self) -> None:
        for name, rule in (LIMITS | LIMITS_BESIDE_THE_SPACE).items():
            value = getattr(self, name)
            if value not in rule:
                raise UserError(f"{name}={value} is out of range: {name} is {rule}")

    def hash(self) -> str:
        """Name this configuration; a checkpoint carries it and no other configuration loads it."""
        return content_hash(self.to_dict())

    @property
    def is_fitted(self) -> bool:
        """Tell a trial that is fitted in one step from one that is trained in epochs."""
        return self.backbone == COHOG

    @property
    def most_epochs(self) -> int:
        """Say how many epochs it trains at most: one where it is fitted."""
        return 1 if self.is_fitted else self.epochs

    def to_dict(self) -> dict[str, Value]:
        """Give all that this backbone reads."""
        values: dict[str, Value] = asdict(self)
        unread: set[str] = {name for name, value in BEFORE.items() if values[name] == value}
        if self.is_fitted:
            unread |= {"with_cohog", "cohog_weight"}
        elif not self.with_cohog:
            unread |= set(OF_COHOG)
        for name in unread:
            del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialConfig:
        """Build a configuration from plain values. Raises UserError for an unknown one."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(
                f"unknown hyperparameter {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"incomplete trial configuration: {error}") from None


STEPS_BETWEEN_RANKS = 4  # before ranks hear whether to go on
SMALLEST_BATCH = 4  # images at once, below which a trial that is out of memory fails


def half_batch(config: TrialConfig, images: int) -> int | None:
    """Give half of the images that are on a device at once; None where that would not help.

    It is too little, or the trial is a descriptor, which halves what it describes by itself.
    """
    half = images // 2
    return half if half >= SMALLEST_BATCH and not config.is_fitted else None


@dataclass
class Improvement:
    """When a trial last did better than ever before, from which its patience counts.

    What is to be better is the trial's value or, of a network with a descriptor beside it, what the
    network gets right alone: the two together are good from the first epoch on, and become better
    only once the network has learned.
    """

    epoch: int = 0
    best: dict[str, float] = field(default_factory=dict)  # so far, of each of the two

    def note(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Take an epoch's metrics into account; those noted before change nothing."""
        for name in ("macro_top1", "network_macro_top1"):
            value = metrics.get(name)
            if value is not None and (name not in self.best or value > self.best[name]):
                self.best[name], self.epoch = value, epoch

    @classmethod
    def of(cls, history: Iterable[dict[str, Any]]) -> Improvement:
        found = cls()
        for row in history:
            found.note(row["epoch"], row)
        return found
