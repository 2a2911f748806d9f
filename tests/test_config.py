"""The configuration of a trial, the search space, and the user's changes to it."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torchvision
from optuna.trial import FixedTrial

from model import BUILDERS
from writer_search.common.errors import UserError
from writer_search.config import (
    BACKBONES,
    COHOG,
    HEADS,
    LIMITS,
    LOSSES,
    OF_COHOG,
    POOLINGS,
    Choice,
    Range,
    Rule,
    TrialConfig,
    Value,
)
from writer_search.space import (
    BACKBONES_BY_TIER,
    Space,
    baseline,
    default_space,
    first_trials,
    narrow,
    parse_fix,
    parse_value,
    suggest,
)

SPACES = list(BACKBONES_BY_TIER)  # (tier, pretrained)
REQUIRED: dict[str, Any] = {"seed": 1, "epochs": 3, "patience": 2, "backbone": "tiny"}
CONDITIONAL = {"margin", "scale", "mixup_alpha", "backbone_lr_mult"}

# A value of each hyperparameter that is not its default.
OTHER: dict[str, Value] = {
    "backbone": "resnet34",
    "line_height": 80,
    "crop_width": 300,
    "batch_size": 48,
    "precision": "bfloat16",
    "pooling": "gem",
    "learning_rate": 0.00123,
    "backbone_lr_mult": 0.3,
    "weight_decay": 0.07,
    "label_smoothing": 0.11,
    "dropout": 0.33,
    "sampler_alpha": 0.25,
    "augment_geometry": 0.75,
    "augment_photometry": 1.25,
    "loss": "cosface",
    "margin": 0.15,
    "scale": 20.0,
    "mixup_alpha": 0.31,
    "with_cohog": True,
}
OTHER_OF_COHOG: dict[str, Value] = {
    "cohog_directions": 12,
    "cohog_reach": 5,
    "cohog_smoothing": 1.3,
    "cohog_edge": 0.4,
    "cohog_variation": 0.5,
    "cohog_sizes": 3,
    "cohog_head": "softmax",
    "cohog_penalty": 0.02,
}
OPENED_BY_SPACE: dict[str, Rule] = {
    "backbone_lr_mult": Range(0.1, 1.0, log=True),
    "sampler_alpha": Range(0.0, 1.0),
    "loss": Choice(LOSSES),
    "margin": Range(0.05, 0.4),
    "scale": Range(16.0, 64.0, log=True),
    "pooling": Choice(POOLINGS),
    "crop_width": Choice((192, 256, 512, 768)),
    "batch_size": Choice((16, 32, 64, 128)),
}
OPENED: dict[str, Any] = {
    name: {"choices": list(rule.choices)}
    if isinstance(rule, Choice)
    else {"low": rule.low, "high": rule.high, "log": rule.log}
    for name, rule in OPENED_BY_SPACE.items()
}


def refused(call: Any, *arguments: Any) -> str:
    """Return the message of the UserError that a call must raise, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def inside(rule: Rule) -> list[Value]:
    """Give the ends and the middle of a range, or all choices."""
    if isinstance(rule, Choice):
        return list(rule.choices)
    middle = math.sqrt(rule.low * rule.high) if rule.log else (rule.low + rule.high) / 2
    values = [rule.low, middle, rule.high]
    return [int(value) for value in values] if rule.integer else list(values)


def some_parameters(space: Space, **chosen: Value) -> dict[str, Any]:
    """Give a value to each searched hyperparameter, of backbones the last: a network."""
    return {name: inside(rule)[-1] for name, rule in space.searched.items()} | chosen


def draw(space: Space, **chosen: Value) -> tuple[dict[str, Value], set[str]]:
    """Return what `suggest` gives for parameters, and the names that it asked for."""
    trial = FixedTrial(some_parameters(space, **chosen))
    return suggest(trial, space), set(trial.params)


# --------------------------------------------------------------------------------- TrialConfig


def test_every_field_but_the_identity_of_a_trial_has_a_limit() -> None:
    named = {field.name for field in fields(TrialConfig)}
    assert named - set(LIMITS) == {"seed", "epochs", "patience", "backbone", "pretrained"}
    assert set(LIMITS) <= named


@pytest.mark.parametrize("name", LIMITS)
def test_values_at_the_limits_are_taken_and_beyond_refused(name: str) -> None:
    rule = LIMITS[name]
    for value in inside(rule):
        assert getattr(TrialConfig(**REQUIRED, **{name: value}), name) == value
    beyond: list[Any] = ["nonsense", None, [1], *([] if True in rule else [True])]
    if isinstance(rule, Range):
        beyond += [rule.low - 1, rule.high * 1.001 + 1, math.nan, math.inf, -math.inf, "1"]
        beyond += [rule.low + 0.5] if rule.integer else []
    for value in beyond:
        message = refused(lambda value=value: TrialConfig(**REQUIRED, **{name: value}))
        assert f"{name}={value}" in message
        assert str(rule) in message


def test_plain_values_make_the_same_configuration() -> None:
    config = TrialConfig(**REQUIRED, **{n: v for n, v in OTHER.items() if n not in REQUIRED})
    assert TrialConfig.from_dict(config.to_dict()) == config
    assert TrialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_plain_values_are_refused() -> None:
    assert "'dropuot'" in refused(TrialConfig.from_dict, {**REQUIRED, "dropuot": 0.1})
    incomplete = {name: value for name, value in REQUIRED.items() if name != "epochs"}
    assert "epochs" in refused(TrialConfig.from_dict, incomplete)


def test_hash_changes_with_every_field() -> None:
    config = TrialConfig(**REQUIRED)
    others: dict[str, Any] = {**OTHER, "seed": 2, "epochs": 4, "patience": 3, "pretrained": True}
    assert set(others) | set(OF_COHOG) == {field.name for field in fields(TrialConfig)}
    hashes = {replace(config, **{name: value}).hash() for name, value in others.items()}
    assert len(hashes | {config.hash()}) == len(others) + 1


def test_descriptor_s_values_are_part_of_its_own_configurations_alone() -> None:
    """A network's hash, which its checkpoints carry, is what it was before there were any."""
    network = TrialConfig(**REQUIRED)
    assert network.hash() == "db204deb620c4265"
    assert not set(network.to_dict()) & set(OF_COHOG)
    descriptor = replace(network, backbone=COHOG)
    assert descriptor.hash() == "bd2a422c025bacf8"
    assert replace(descriptor, with_cohog=True).hash() == descriptor.hash()
    both = replace(network, with_cohog=True)
    assert set(OTHER_OF_COHOG) == set(OF_COHOG) - {"cohog_weight"}
    others = [replace(descriptor, **{n: v}) for n, v in OTHER_OF_COHOG.items()]
    others += [replace(both, **{n: v}) for n, v in (OTHER_OF_COHOG | {"cohog_weight": 3.5}).items()]
    assert len({config.hash() for config in [descriptor, both, *others]}) == len(others) + 2
    for config in others:
        assert TrialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_hash_does_not_depend_on_the_order_of_values() -> None:
    values = TrialConfig(**REQUIRED).to_dict()
    turned = dict(reversed(values.items()))
    assert TrialConfig.from_dict(turned).hash() == TrialConfig.from_dict(values).hash()


# ---------------------------------------------------------------------------------------- suggest


@pytest.mark.parametrize(("tier", "pretrained"), SPACES)
def test_each_drawn_value_arrives(tier: str, pretrained: bool) -> None:
    space = default_space(tier, pretrained)
    for name, rule in space.searched.items():
        for value in inside(rule):
            chosen: dict[str, Value] = {"mixup": True}
            if name in OF_COHOG:
                is_alone = name != "cohog_weight"
                chosen = {"cohog_head": "softmax"} | ({"backbone": COHOG} if is_alone else {})
            values, asked = draw(space, **(chosen | {name: value}))
            if name == "mixup":
                assert ("mixup_alpha" in values) == value
            else:
                assert values[name] == value
            assert name in asked


@pytest.mark.parametrize("name", OPENED_BY_SPACE)
def test_each_opened_hyperparameter_arrives(name: str) -> None:
    closed = default_space("cpu", name == "backbone_lr_mult")
    opened = narrow(closed, {}, {"loss": {"choices": ["cosface"]}, name: OPENED[name]})
    for value in inside(OPENED_BY_SPACE[name]):
        values, asked = draw(opened, **{"loss": "cosface", name: value})
        assert values[name] == value
        assert name in asked


@pytest.mark.parametrize(("tier", "pretrained"), SPACES)
def test_all_opened_at_once_make_a_configuration(tier: str, pretrained: bool) -> None:
    space = narrow(default_space(tier, pretrained), {}, OPENED)
    for loss in ("cosface", "cross_entropy"):
        values, _ = draw(space, loss=loss)
        TrialConfig.from_dict({**REQUIRED, "pretrained": pretrained, **values})


def test_suggest_is_pure() -> None:
    space = narrow(default_space("gpu", True), {}, OPENED)
    before = space.to_dict()
    assert draw(space) == draw(space)
    assert space.to_dict() == before


@pytest.mark.parametrize("loss", ["cross_entropy", "cosface"])
@pytest.mark.parametrize("mixup", [False, True])
@pytest.mark.parametrize("pretrained", [False, True])
def test_conditional_hyperparameters_are_asked_for_only_where_they_act(
    loss: str, mixup: bool, pretrained: bool
) -> None:
    space = narrow(default_space("cpu", pretrained), {}, OPENED)
    values, asked = draw(space, loss=loss, mixup=mixup)
    expected = {"margin", "scale"} if loss == "cosface" else set()
    expected |= {"mixup_alpha"} if mixup and loss == "cross_entropy" else set()
    expected |= {"backbone_lr_mult"} if pretrained else set()
    assert set(values) & CONDITIONAL == expected
    assert asked & CONDITIONAL == expected
    assert ("mixup" in asked) == (loss == "cross_entropy")


@pytest.mark.parametrize(("tier", "pretrained"), SPACES)
@pytest.mark.parametrize("head", HEADS)
def test_a_descriptor_is_asked_for_its_own_hyperparameters_alone(
    tier: str, pretrained: bool, head: str
) -> None:
    space = default_space(tier, pretrained)
    values, asked = draw(space, backbone=COHOG, cohog_head=head)
    own = set(OF_COHOG) - {"cohog_weight", "cohog_penalty" if head == "lda" else ""}
    assert set(values) == own | {"backbone", "line_height"}
    assert asked == set(values) & set(space.searched)
    network = draw(space, with_cohog=False)[1]
    assert not network & set(OF_COHOG), "a network is not asked for them"
    values, asked = draw(space, with_cohog=True, cohog_head=head)
    assert own | {"with_cohog", "cohog_weight", "learning_rate"} <= set(values)
    assert own & set(space.searched) <= asked


@pytest.mark.parametrize(
    ("fix", "ranges", "names"),
    [
        ({}, {}, {"with_cohog", "cohog_reach"}),
        ({"with_cohog": False}, {}, {"cohog_reach"}),
        ({"backbone": COHOG}, {}, {"cohog_reach"}),
        ({"backbone": "resnet18"}, {}, set()),
        ({}, {"backbone": {"choices": ["resnet_thin", "resnet18"]}}, set()),
        ({"backbone": "resnet18", "with_cohog": True}, {}, {"with_cohog", "cohog_reach"}),
        (
            {"backbone": "resnet18"},
            {"with_cohog": {"choices": [False, True]}},
            {"with_cohog", "cohog_reach"},
        ),
    ],
)
def test_whoever_chooses_networks_alone_gets_no_descriptor_beside_them(
    fix: dict[str, Value], ranges: dict[str, Any], names: set[str]
) -> None:
    space = narrow(default_space("cpu", False), fix, ranges)
    assert {name for name in ("with_cohog", "cohog_reach") if name in space} == names


def test_a_choice_has_its_own_type() -> None:
    """3.0 is 3: as a number of sizes it would fail each trial."""
    usual = default_space("cpu", False)
    fixed = narrow(usual, {"cohog_sizes": 3.0}, {}).fixed["cohog_sizes"]
    choices = narrow(usual, {}, {"cohog_sizes": {"choices": [1.0, 5.0]}}).searched["cohog_sizes"]
    assert isinstance(fixed, int)
    assert str(choices) == "one of 1, 5"


# ------------------------------------------------------------------------ default space, baseline


def test_default_space_depends_on_tier_and_weights_alone() -> None:
    assert list(inspect.signature(default_space).parameters) == ["tier", "pretrained"]
    spaces = [default_space(*arguments) for arguments in SPACES]
    assert spaces == [default_space(*arguments) for arguments in SPACES]
    assert len({json.dumps(space.to_dict(), sort_keys=True) for space in spaces}) == len(SPACES)
    spaces[0].searched.clear()
    spaces[0].fixed.clear()
    assert default_space(*SPACES[0]).searched


@pytest.mark.parametrize(("tier", "pretrained"), SPACES)
def test_default_space_decides_each_hyperparameter_once(tier: str, pretrained: bool) -> None:
    space = default_space(tier, pretrained)
    assert not set(space.searched) & set(space.fixed)
    decided = set(space.searched) | set(space.fixed)
    assert decided == set(LIMITS) - {"precision"} | {"backbone", "pretrained", "mixup"}
    for name in set(space.searched) & set(LIMITS):
        assert all(value in LIMITS[name] for value in inside(space.searched[name]))


@pytest.mark.parametrize(("tier", "pretrained"), SPACES)
def test_baseline_is_a_trial_of_the_space(tier: str, pretrained: bool) -> None:
    space = default_space(tier, pretrained)
    good = baseline(space)
    assert set(good) == set(space.searched)
    values = suggest(FixedTrial(good), space)
    config = TrialConfig.from_dict({**REQUIRED, "pretrained": pretrained, **values})
    assert config.mixup_alpha == 0
    if not pretrained:
        assert config.learning_rate == TrialConfig(**REQUIRED).learning_rate


@pytest.mark.parametrize("name", sorted(set(LIMITS) - {"precision", "line_height"}))
def test_baseline_lies_inside_of_narrowed_ranges(name: str) -> None:
    rule = LIMITS[name]
    if isinstance(rule, Choice):
        descriptions: list[dict[str, Any]] = [{"choices": [choice]} for choice in rule.choices]
    else:
        low, middle, high = map(float, inside(rule))
        ends = [(low, low), (low, middle), (middle, high), (high, high)]
        descriptions = [{"low": int(a) if rule.integer else a, "high": b} for a, b in ends]
        descriptions += [{"choices": [high, low]}]
    for description in descriptions:
        space = narrow(default_space("cpu", True), {}, {name: description})
        good = baseline(space)
        assert all(good[n] in space.searched[n] for n in space.searched), (description, good[name])


@pytest.mark.parametrize(("tier", "pretrained"), SPACES)
def test_descriptor_comes_first_and_the_network_next(tier: str, pretrained: bool) -> None:
    space = default_space(tier, pretrained)
    descriptor, network = first_trials(space)
    assert network == baseline(space)
    values = suggest(FixedTrial(descriptor), space)
    default = TrialConfig(**{**REQUIRED, "backbone": COHOG, "cohog_sizes": 5})
    assert values["backbone"] == COHOG
    assert all(values[n] == getattr(default, n) for n in set(OF_COHOG) & set(values))
    both = suggest(FixedTrial(network), space)
    assert both["backbone"] != COHOG
    assert both["with_cohog"], "it takes no longer, and names more lines"


@pytest.mark.parametrize(
    ("fix", "ranges", "first"),
    [
        ({"backbone": "tiny"}, {}, [None]),
        ({"backbone": COHOG}, {}, [None]),
        ({}, {"backbone": {"choices": ["tiny", "resnet18"]}}, ["tiny"]),
        ({}, {"backbone": {"choices": [COHOG]}}, [COHOG]),
        ({}, {"backbone": {"choices": ["resnet18", COHOG]}}, [COHOG, "resnet18"]),
        ({}, {"backbone": {"choices": [COHOG, "resnet34"]}}, [COHOG, "resnet34"]),
    ],
)
def test_first_trials_are_of_backbones_that_the_space_has(
    fix: dict[str, Value], ranges: dict[str, Any], first: list[str | None]
) -> None:
    space = narrow(default_space("cpu", False), fix, ranges)
    assert [trial.get("backbone") for trial in first_trials(space)] == first


def test_a_space_without_the_descriptor_knows_nothing_of_it() -> None:
    """So a search that was begun before there was one has the space that it recorded."""
    for tier, pretrained in SPACES:
        networks = {"choices": list(BACKBONES_BY_TIER[tier, pretrained])}
        for fix, ranges in (({"backbone": "tiny"}, {}), ({}, {"backbone": networks})):
            space = narrow(default_space(tier, pretrained), dict(fix), dict(ranges))
            assert not set(space.to_dict()) & set(OF_COHOG)


def test_backbones_are_those_that_can_be_built() -> None:
    assert set(BACKBONES) == {*BUILDERS, COHOG}
    published = set(torchvision.models.list_models(torchvision.models))
    for name, has_weights in BACKBONES.items():
        assert has_weights == (name in published)
    for (_, pretrained), names in BACKBONES_BY_TIER.items():
        assert all(BACKBONES[name] or not pretrained for name in names)


# ------------------------------------------------------------------------------ --fix and --space


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"precision"}))
@pytest.mark.parametrize(("tier", "pretrained"), SPACES)
def test_a_fixed_hyperparameter_is_held(tier: str, pretrained: bool, name: str) -> None:
    fix = {name: OTHER[name]}
    if name in ("margin", "scale"):
        fix["loss"] = "cosface"
    space = narrow(default_space(tier, pretrained), fix, {})
    assert name not in space.searched
    assert space.fixed[name] == OTHER[name]
    values, asked = draw(space)
    assert name not in asked
    if name != "backbone_lr_mult" or pretrained:
        assert values[name] == OTHER[name]
    TrialConfig.from_dict({**REQUIRED, "pretrained": pretrained, **values})


def test_fix_wins_over_space() -> None:
    ranges = {"dropout": {"low": 0.1, "high": 0.2}, "loss": {"choices": ["cosface"]}}
    space = narrow(default_space("cpu", False), {"dropout": 0.4, "margin": 0.1}, ranges)
    values, asked = draw(space)
    assert (values["dropout"], values["margin"]) == (0.4, 0.1)
    assert not {"dropout", "margin"} & asked
    assert "scale" in asked


@pytest.mark.parametrize("mixup", [False, True])
def test_mixup_can_be_fixed(mixup: bool) -> None:
    space = narrow(default_space("cpu", False), {"mixup": mixup}, {})
    values, asked = draw(space)
    assert "mixup" not in asked
    assert ("mixup_alpha" in asked) == mixup
    assert (values["mixup_alpha"] == 0) == (not mixup)


def test_narrowing_leaves_the_first_space_alone() -> None:
    space = default_space("cpu", False)
    before = space.to_dict()
    narrow(space, {"dropout": 0.1}, {"pooling": {"choices": ["gem"]}})
    assert space.to_dict() == before


@pytest.mark.parametrize("order", [1, -1])
def test_opening_cosface_opens_what_it_reads(order: int) -> None:
    space = narrow(default_space("cpu", False), {}, {"loss": {"choices": ["cosface"]}})
    assert {"margin", "scale"} <= set(space.searched)
    own = {"loss": {"choices": ["cosface"]}, "margin": {"low": 0.1, "high": 0.11}}
    space = narrow(default_space("cpu", False), {}, dict(list(own.items())[::order]))
    assert space.searched["margin"] == Range(0.1, 0.11)


def test_values_take_the_type_of_their_hyperparameter() -> None:
    space = narrow(default_space("cpu", False), {"batch_size": 64.0, "dropout": 0}, {})
    assert isinstance(space.fixed["batch_size"], int)
    assert isinstance(space.fixed["dropout"], float)
    space = narrow(
        space, {}, {"batch_size": {"low": 16.0, "high": 64}, "dropout": {"choices": [0]}}
    )
    assert isinstance(draw(space)[0]["batch_size"], int)
    assert isinstance(draw(space)[0]["dropout"], float)


@pytest.mark.parametrize(
    ("fix", "names"),
    [
        ({"dropuot": 0.1}, "dropuot"),
        ({"seed": 1}, "seed"),
        ({"pretrained": True}, "pretrained"),
        ({"precision": "float16"}, "float16"),
        ({"dropout": 0.99}, "0.99"),
        ({"dropout": math.nan}, "nan"),
        ({"dropout": True}, "True"),
        ({"dropout": "much"}, "much"),
        ({"dropout": None}, "None"),
        ({"learning_rate": 0.0}, "0.0"),
        ({"learning_rate": math.inf}, "inf"),
        ({"batch_size": 32.5}, "32.5"),
        ({"batch_size": 1}, "1"),
        ({"mixup": 1}, "mixup"),
        ({"mixup": "yes"}, "yes"),
        ({"backbone": "resnet1000"}, "resnet1000"),
        ({"backbone": 18}, "18"),
        ({"pooling": "max"}, "max"),
        ({"loss": "hinge"}, "hinge"),
        ({"dropout": [0.1]}, "[0.1]"),
    ],
)
def test_malformed_fixes_are_refused(fix: dict[str, Any], names: str) -> None:
    message = refused(narrow, default_space("cpu", False), fix, {})
    assert f"--fix {next(iter(fix))}" in message
    assert names in message


@pytest.mark.parametrize(
    "description",
    [
        {"low": 0.3, "high": 0.2},
        {"low": 0.0, "high": 0.2, "log": True},
        {"low": math.nan, "high": 0.2},
        {"low": 0.1, "high": math.nan},
        {"low": 0.1, "high": math.inf},
        {"low": -0.1, "high": 0.2},
        {"low": 0.1, "high": 2},
        {"low": "0.1", "high": 0.2},
        {"low": True, "high": 0.2},
        {"low": None, "high": 0.2},
        {"low": [0.1], "high": 0.2},
        {"low": 0.1},
        {"high": 0.1},
        {"low": 0.1, "high": 0.2, "log": "yes"},
        {"low": 0.1, "high": 0.2, "log": 1},
        {"low": 0.1, "high": 0.2, "step": 0.1},
        {"low": 0.1, "high": 0.2, "choices": [0.1]},
        {"choices": []},
        {"choices": 0.1},
        {"choices": "0.1"},
        {"choices": {"0.1": 1}},
        {"choices": [0.1, 0.2, 0.1]},
        {"choices": [0, 0.0]},
        {"choices": [0.1, "0.2"]},
        {"choices": [0.1, None]},
        {"choices": [[0.1]]},
        {"choices": [math.nan]},
        {"choices": [2]},
        {"choices": [0.1], "default": 0.1},
        {},
        0.1,
        [0.1, 0.2],
        "0.1",
        None,
        True,
    ],
    ids=str,
)
def test_malformed_ranges_are_refused(description: Any) -> None:
    message = refused(narrow, default_space("cpu", False), {}, {"dropout": description})
    assert "--space: dropout" in message


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("dropuot", {"low": 0, "high": 1}),
        ("seed", {"low": 0, "high": 1}),
        ("line_height", {"choices": [64]}),
        ("precision", {"choices": ["float32"]}),
        ("backbone", {"low": 0, "high": 1}),
        ("backbone", {"choices": ["resnet18", "resnet1000"]}),
        ("backbone", {"choices": ["resnet18", "resnet18"]}),
        ("mixup", {"low": False, "high": True}),
        ("mixup", {"choices": [0, 1]}),
        ("pooling", {"low": "avg", "high": "gem"}),
        ("batch_size", {"low": 16.5, "high": 32}),
        ("batch_size", {"choices": [32, 32.0]}),
    ],
)
def test_ranges_that_no_trial_can_have_are_refused(name: str, description: Any) -> None:
    assert f"--space: {name}" in refused(
        narrow, default_space("cpu", False), {}, {name: description}
    )


def test_assignments_are_read() -> None:
    assert parse_fix(["dropout=0.2", " crop-width = 512", "loss=cosface", "mixup=False"]) == {
        "dropout": 0.2,
        "crop_width": 512,
        "loss": "cosface",
        "mixup": False,
    }
    assert parse_fix([]) == {}
    assert parse_fix(["dropout=0.1", "dropout=0.2"]) == {"dropout": 0.2}


@pytest.mark.parametrize("assignment", ["dropout", "dropout=", "=0.2", " = ", "", "dropout= "])
def test_malformed_assignments_are_refused(assignment: str) -> None:
    assert repr(assignment) in refused(parse_fix, [assignment])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("1", 1),
        ("-3", -3),
        ("1.0", 1.0),
        ("1e-3", 0.001),
        ("resnet18", "resnet18"),
        ("0x10", "0x10"),
        ("a=b", "a=b"),
    ],
)
def test_values_are_read(text: str, value: Value) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)
