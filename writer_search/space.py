"""What is searched: the space of hyperparameters, its defaults, and --fix and --space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from writer_search.common.errors import UserError
from writer_search.config import (
    BEFORE,
    COHOG,
    HEADS,
    LIMITS,
    LIMITS_BESIDE_THE_SPACE,
    OF_COHOG,
    Choice,
    Range,
    Rule,
    TrialConfig,
    Value,
)


class Suggester(Protocol):
    """What `suggest` needs of a trial: an Optuna Trial, a FixedTrial, or a draw not yet stored."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = ...) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = ...) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Space:
    """What a search draws (`searched`), and what it holds fixed for all its trials (`fixed`)."""

    searched: dict[str, Rule]
    fixed: dict[str, Value] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.searched or name in self.fixed

    def draw(self, trial: Suggester, name: str) -> Any:
        """Draw one hyperparameter, or give its fixed value."""
        rule = self.searched.get(name)
        if rule is None:
            return self.fixed[name]
        if isinstance(rule, Choice):
            return trial.suggest_categorical(name, rule.choices)
        if rule.integer:
            return trial.suggest_int(name, int(rule.low), int(rule.high), log=rule.log)
        return trial.suggest_float(name, rule.low, rule.high, log=rule.log)

    def to_dict(self) -> dict[str, Any]:
        """Describe the space for people and for comparing two searches."""
        described: dict[str, Any] = dict(self.fixed)
        for name, rule in self.searched.items():
            if isinstance(rule, Choice):
                described[name] = {"choices": list(rule.choices)}
            else:
                described[name] = {"low": rule.low, "high": rule.high, "log": rule.log}
        return described


def suggest(trial: Suggester, space: Space) -> dict[str, Value]:
    """Draw the hyperparameters of one trial: the values of all fields that a space can decide.

    Pure: the same trial and space give the same values. A conditional hyperparameter is asked for
    only where it acts, so that the sampler never learns from a value without effect.
    """
    values: dict[str, Value] = {}

    values["backbone"] = space.draw(trial, "backbone")
    values["line_height"] = space.fixed["line_height"]  # the cache has one height
    is_alone = values["backbone"] == COHOG
    if not is_alone and "with_cohog" in space:
        values["with_cohog"] = space.draw(trial, "with_cohog")
        if values["with_cohog"]:
            values["cohog_weight"] = space.draw(trial, "cohog_weight")

    # descriptor, alone or beside the network
    if is_alone or values.get("with_cohog"):
        values["cohog_reach"] = space.draw(trial, "cohog_reach")
        values["cohog_smoothing"] = space.draw(trial, "cohog_smoothing")
        values["cohog_edge"] = space.draw(trial, "cohog_edge")
        values["cohog_directions"] = space.draw(trial, "cohog_directions")
        values["cohog_variation"] = space.draw(trial, "cohog_variation")
        if "cohog_sizes" in space:
            values["cohog_sizes"] = space.draw(trial, "cohog_sizes")
        values["cohog_head"] = space.draw(trial, "cohog_head")
        if values["cohog_head"] == "softmax":
            values["cohog_penalty"] = space.draw(trial, "cohog_penalty")
    if is_alone:
        return values

    # model
    values["pooling"] = space.draw(trial, "pooling")
    values["dropout"] = space.draw(trial, "dropout")
    values["crop_width"] = space.draw(trial, "crop_width")

    # optimiser
    values["learning_rate"] = space.draw(trial, "learning_rate")
    values["weight_decay"] = space.draw(trial, "weight_decay")
    values["batch_size"] = space.draw(trial, "batch_size")
    if space.fixed["pretrained"]:
        values["backbone_lr_mult"] = space.draw(trial, "backbone_lr_mult")

    # data
    values["sampler_alpha"] = space.draw(trial, "sampler_alpha")
    values["augment_geometry"] = space.draw(trial, "augment_geometry")
    values["augment_photometry"] = space.draw(trial, "augment_photometry")

    # loss
    values["loss"] = space.draw(trial, "loss")
    values["label_smoothing"] = space.draw(trial, "label_smoothing")
    if values["loss"] == "cosface":
        values["margin"] = space.draw(trial, "margin")
        values["scale"] = space.draw(trial, "scale")
    elif "mixup_alpha" in space.fixed or space.draw(trial, "mixup"):
        values["mixup_alpha"] = space.draw(trial, "mixup_alpha")

    return values


class _InTurn:
    """Stands for a trial that takes the first option of each entry of `path`, and lengthens it."""

    def __init__(self, path: list[list[Value]]) -> None:
        self.values: dict[str, Value] = {}
        self._path = path

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> Any:
        return self._first(name, [float(low), float(high)])

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> Any:
        return self._first(name, list(range(low, high + 1)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._first(name, list(choices))

    def _first(self, name: str, options: list[Value]) -> Value:
        if len(self.values) == len(self._path):
            self._path.append(options)
        self.values[name] = self._path[len(self.values)][0]
        return self.values[name]


def every_draw(space: Space) -> Iterator[dict[str, Value]]:
    """Give all that can be drawn from a finite space; of a range without steps, its ends."""
    path: list[list[Value]] = []
    while True:
        draw = _InTurn(path)
        suggest(draw, space)
        yield draw.values
        while path and len(path[-1]) == 1:
            path.pop()
        if not path:
            return
        del path[-1][0]


def fixed_of(described: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Value]:
    """Give the hyperparameters that a trial had and that were not drawn, with their values.

    described: the space as `Space.to_dict` has it.   params: what was drawn. Empty where the space
    is another version's.
    """
    fixed = {name: value for name, value in described.items() if not isinstance(value, dict)}
    try:
        values = suggest(_InTurn([]), Space({}, {**fixed, **params}))
    except KeyError:
        return {}
    return {name: value for name, value in values.items() if name in fixed}


# The cache has one height; precision is measured once per study, unless --fix names it.
FIXED_ONLY = ("line_height", "precision")


# Evidence for the ranges: docs/defaults.md.
OPENED_BY_SPACE: dict[str, Rule] = {
    "backbone_lr_mult": Range(0.1, 1.0, log=True),
    "margin": Range(0.05, 0.4),
    "scale": Range(16.0, 64.0, log=True),
}


# Of networks; the descriptor stands beside them in every tier.
BACKBONES_BY_TIER: dict[tuple[str, bool], tuple[str, ...]] = {
    ("cpu", False): ("resnet_thin", "resnet18"),
    ("cpu", True): ("resnet18", "mobilenet_v3_small"),
    ("gpu", False): ("resnet_thin", "resnet18", "resnet34"),
    ("gpu", True): ("resnet18", "resnet34", "convnext_tiny"),
}


def default_space(tier: str, pretrained: bool) -> Space:
    """Give the default space of a tier ("cpu" or "gpu").

    It must not depend on the number of trials: a search that is extended keeps its space.
    """
    backbones = BACKBONES_BY_TIER[tier, pretrained]
    searched: dict[str, Rule] = {
        "backbone": Choice((COHOG, *backbones)),
        "learning_rate": Range(5e-5, 1e-3, log=True) if pretrained else Range(5e-4, 5e-3, log=True),
        "weight_decay": Range(1e-3, 0.3, log=True),
        "label_smoothing": Range(0.0, 0.2),
        "dropout": Range(0.0, 0.5),
        "augment_geometry": Range(0.5, 1.5),
        "augment_photometry": Range(0.5, 1.5),
        "mixup": Choice((False, True)),
        "mixup_alpha": Range(0.05, 0.4, log=True),
        "with_cohog": Choice((False, True)),
        "cohog_weight": Range(1.0, 8.0, log=True),
        "cohog_reach": Range(2, 6, integer=True),
        "cohog_smoothing": Range(0.6, 1.6),
        "cohog_edge": Range(0.3, 1.2),
        "cohog_variation": Range(0.5, 1.5),
        "cohog_head": Choice(HEADS),
        "cohog_penalty": Range(1e-5, 0.1, log=True),
    }
    if pretrained:
        searched["backbone_lr_mult"] = OPENED_BY_SPACE["backbone_lr_mult"]
    return Space(searched, {"pretrained": pretrained, **_fixed_defaults(tier, searched)})


def _fixed_defaults(tier: str, searched: Mapping[str, Rule]) -> dict[str, Value]:
    fixed: dict[str, Value] = {
        f.name: f.default
        for f in fields(TrialConfig)
        if f.name in LIMITS and f.name not in searched and isinstance(f.default, Value)
    }
    del fixed["precision"]  # measured once per study, not a hyperparameter
    fixed["cohog_sizes"] = 5
    if tier == "gpu":
        fixed.update(line_height=96, crop_width=512, batch_size=64)
    return fixed


def backbones_of(space: Space) -> tuple[str, ...]:
    """Name the backbones that trials of this space may have."""
    rule = space.searched.get("backbone")
    if isinstance(rule, Choice):
        return tuple(map(str, rule.choices))
    return (str(space.fixed["backbone"]),)


def networks_of(space: Space) -> tuple[str, ...]:
    """Name the backbones of this space that are networks."""
    return tuple(name for name in backbones_of(space) if name != COHOG)


def first_trials(space: Space) -> list[dict[str, Value]]:
    """Give the trials that every search begins with, so that no search ends below them.

    First the descriptor, which is there within a minute, then the network's defaults with the
    descriptor beside it: it takes as long as the network alone, and what that gets right is noted.
    """
    good = baseline(space)
    if "backbone" not in space.searched:
        return [good]
    network = [good] if networks_of(space) else []
    if COHOG in backbones_of(space):
        return [{**good, "backbone": COHOG}, *network]
    return network


def baseline(space: Space) -> dict[str, Value]:
    """Give the known-good values of the searched hyperparameters, moved into their ranges.

    Of backbones a network, where the space has one.
    """
    pretrained = bool(space.fixed["pretrained"])
    good: dict[str, Value] = {
        f.name: f.default for f in fields(TrialConfig) if isinstance(f.default, Value)
    }
    good |= {
        "backbone": "resnet18" if pretrained else "resnet_thin",
        "mixup": False,
        "mixup_alpha": 0.2,
        "with_cohog": True,
    }
    if pretrained:
        good |= {"learning_rate": 3e-4, "backbone_lr_mult": 0.5}
    nearest = {name: rule.nearest(good[name]) for name, rule in space.searched.items()}
    if nearest.get("backbone") == COHOG and networks_of(space):
        nearest["backbone"] = networks_of(space)[0]
    return nearest


def narrow(space: Space, fix: Mapping[str, Value], ranges: Mapping[str, Any]) -> Space:
    """Apply `--space` (name → JSON description of a range) and `--fix` (name → value) to a space.

    Raises UserError for a name that no trial has, a value out of its limits, a malformed range.
    """
    searched, fixed = dict(space.searched), dict(space.fixed)
    for name, description in ranges.items():
        rule = _parse_rule(name, description)
        searched[name] = rule
        fixed.pop(name, None)
        _open_conditions(name, searched, fixed)
    for name, value in fix.items():
        if name not in _searchable() | set(FIXED_ONLY):
            raise UserError(f"--fix {name}: unknown hyperparameter; known: {_names(*FIXED_ONLY)}")
        fixed[name] = _checked(f"--fix {name}", name, value)
        searched.pop(name, None)
    _settle_mixup(searched, fixed)
    narrowed = Space(searched, fixed)
    _settle_cohog(narrowed, set(fix) | set(ranges))
    return narrowed


def outside_of(space: Space, fix: Mapping[str, Value]) -> list[str]:
    """Warn, in a line each, of fixed values outside of what is known to be worth searching.

    space: the default one. Names that it does not search have no known range.
    """
    warnings = []
    for name, value in fix.items():
        rule = space.searched.get(name, OPENED_BY_SPACE.get(name))
        is_off = name == "mixup_alpha" and value == 0
        if isinstance(rule, Range) and value not in rule and not is_off:
            warnings.append(
                f"--fix {name}={value} is outside of the range that is searched by default, "
                f"{rule.low:g} to {rule.high:g}"
            )
    return warnings


def _settle_mixup(searched: dict[str, Rule], fixed: dict[str, Value]) -> None:
    """Bring the two names of mixup, whether and how much, to one answer.

    `--fix mixup=false` is the strength 0; a fixed strength leaves nothing to draw.
    """
    if fixed.get("mixup") is False or fixed.get("loss") == "cosface":
        searched.pop("mixup_alpha", None)
        fixed["mixup_alpha"] = 0.0
    if "mixup_alpha" in fixed:
        searched.pop("mixup", None)
        fixed.pop("mixup", None)


def _settle_cohog(space: Space, named: Set[str]) -> None:
    """Leave out the descriptor's names where no trial has it.

    Whoever chooses networks alone wants no descriptor beside them, unless it is named.
    """
    unused = {name for name, value in BEFORE.items() if space.fixed.get(name) == value}
    is_alone = COHOG in backbones_of(space)
    if not networks_of(space) or not (is_alone or "with_cohog" in named):
        unused.add("with_cohog")
    if "with_cohog" in unused:
        unused |= ({"cohog_weight"} if is_alone else set(OF_COHOG)) - named
    for name in unused:
        space.searched.pop(name, None)
        space.fixed.pop(name, None)


def _open_conditions(name: str, searched: dict[str, Rule], fixed: dict[str, Value]) -> None:
    """When cosface may be drawn, its margin and scale are drawn as well, unless told otherwise."""
    rule = searched[name]
    if name == "loss" and "cosface" in rule:
        for dependent in ("margin", "scale"):
            if dependent not in searched:
                searched[dependent] = OPENED_BY_SPACE[dependent]
                fixed.pop(dependent, None)


def _searchable() -> set[str]:
    return (set(LIMITS) - set(FIXED_ONLY)) | {"backbone", "mixup"}


def _names(*more: str) -> str:
    return ", ".join(sorted(_searchable() | set(more)))


def _limit(name: str) -> Rule:
    if name == "backbone":
        return LIMITS_BESIDE_THE_SPACE[name]
    return Choice((False, True)) if name == "mixup" else LIMITS[name]


def _checked(where: str, name: str, value: Any) -> Value:
    """Check one value and give it the type of its hyperparameter."""
    limit = _limit(name)
    if not isinstance(value, Value) or value not in limit:
        raise UserError(f"{where}: {value!r} is out of range; {name} is {limit}")
    if isinstance(limit, Choice):
        return limit.own(value)
    return int(value) if limit.integer else float(value)


def _parse_rule(name: str, description: Any) -> Rule:
    where = f"--space: {name}"
    if name in FIXED_ONLY:
        raise UserError(f"{where} is the same in all trials: give it by --fix {name}=...")
    if name not in _searchable():
        raise UserError(f"{where}: unknown hyperparameter; known: {_names()}")
    if not isinstance(description, dict):
        raise UserError(f'{where}: expected {{"low": …, "high": …}} or {{"choices": […]}}')
    if set(description) == {"choices"}:
        choices = description["choices"]
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{where}: choices must be a list of at least one value")
        checked = tuple(_checked(where, name, c) for c in choices)
        if len(set(checked)) < len(checked):
            raise UserError(f"{where}: a choice is named twice")
        return Choice(checked)
    return _parse_range(where, name, description)


def _parse_range(where: str, name: str, description: dict[str, Any]) -> Range:
    limit = _limit(name)
    if not {"low", "high"} <= set(description) <= {"low", "high", "log"}:
        raise UserError(
            f'{where}: expected {{"low": …, "high": …, "log": true or false}} or {{"choices": […]}}'
        )
    if not isinstance(limit, Range):
        raise UserError(f"{where}: {name} has no range; give choices ({limit})")
    low, high = (_checked(where, name, description[end]) for end in ("low", "high"))
    log = description.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log must be true or false, not {log!r}")
    if float(low) > float(high):
        raise UserError(f"{where}: low {low} is above high {high}")
    if log and float(low) <= 0:
        raise UserError(f"{where}: a logarithmic range needs low above 0, not {low}")
    return Range(float(low), float(high), log, limit.integer)


def parse_fix(assignments: list[str]) -> dict[str, Value]:
    """Read `NAME=VALUE` pairs; true and false, whole numbers and numbers are recognised."""
    fixed: dict[str, Value] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip() or not text.strip():
            raise UserError(f"--fix {assignment!r}: expected NAME=VALUE, as in --fix dropout=0.2")
        fixed[name.strip().replace("-", "_")] = parse_value(text.strip())
    return fixed


def parse_value(text: str) -> Value:
    """Read one value of the command line as bool, int, float or text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
