"""Every configuration value is checked, and the error says what is allowed."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ummrm import MergeConfig, UpcycleConfig
from ummrm.config import BALANCING_LOSSES, GATES, ROUTER_NOISES, ROUTERS

BAD_UPCYCLE = [
    ({"num_experts": 0}, r"`num_experts` must be an integer of at least 1, got 0"),
    ({"num_experts": 7.0}, r"`num_experts` must be an integer"),
    ({"num_experts": True}, r"`num_experts` must be an integer"),
    ({"num_experts_per_tok": 0}, r"`num_experts_per_tok` must be an integer of at least 1"),
    ({"num_experts": 3, "num_experts_per_tok": 4}, r"`num_experts_per_tok` must be at most num_experts=3 .* got 4"),
    ({"num_shared_experts": 0}, r"`num_shared_experts` must be an integer of at least 1"),
    ({"gate": "sigmoid"}, r"`gate` must be one of 'shared_complement', 'fixed', got 'sigmoid'"),
    ({"fixed_shared_weight": 1.5}, r"`fixed_shared_weight` must be a number in \[0, 1\], got 1.5"),
    ({"fixed_shared_weight": float("nan")}, r"`fixed_shared_weight` must be a number"),
    ({"router": "conv"}, r"`router` must be one of 'linear', 'mlp'"),
    ({"router_noise": "gumbel"}, r"`router_noise` must be one of None, 'jitter', 'learned'"),
    ({"jitter_eps": -0.1}, r"`jitter_eps` must be a number in \[0, 1\]"),
    ({"router_init_std": -1}, r"`router_init_std` must be a number of at least 0"),
    ({"expert_noise": "big"}, r"`expert_noise` must be a number of at least 0, got 'big'"),
    ({"balancing_loss": "none"}, r"`balancing_loss` must be one of 'switch', 'cv_squared'"),
    ({"balancing_loss_coef": -1}, r"`balancing_loss_coef` must be a number of at least 0"),
    ({"z_loss_coef": float("inf")}, r"`z_loss_coef` must be a number of at least 0"),
    ({"layers": "some"}, r"`layers` must be \"all\", a positive integer n"),
    ({"layers": 0}, r"`layers` must be"),
    ({"layers": []}, r"`layers` must be"),
    ({"layers": [0, 0]}, r"`layers` must be .*distinct"),
    ({"layers": [0.5]}, r"`layers` must be"),
    ({"layers": None}, r"`layers` must be"),
]
BAD_MERGE = [
    ({"shared_share": 1.1}, r"`shared_share` must be a number in \[0, 1\], got 1.1"),
    ({"shared_share": 1.0, "learn_shared_share": True}, r"`shared_share` must be strictly between 0 and 1"),
    ({"learn_shared_share": 1}, r"`learn_shared_share` must be True or False, got 1"),
    ({"alpha_init": "random"}, r"`alpha_init` must be one of 'uniform', 'routing'"),
    ({"alpha_per": "model"}, r"`alpha_per` must be one of 'layer', 'projection'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_UPCYCLE)
def test_bad_upcycle_values(arguments, message):
    with pytest.raises(ValueError, match="UpcycleConfig: " + message):
        UpcycleConfig(**arguments)


@pytest.mark.parametrize(("arguments", "message"), BAD_MERGE)
def test_bad_merge_values(arguments, message):
    with pytest.raises(ValueError, match="MergeConfig: " + message):
        MergeConfig(**arguments)


@pytest.mark.parametrize(
    ("layers", "num_layers", "chosen"),
    [("all", 3, (0, 1, 2)), (1, 3, (0, 1, 2)), (2, 5, (1, 3)), ([2, 0], 3, (0, 2)), ((-1,), 4, (3,))],
)
def test_layer_selection(layers, num_layers, chosen):
    assert UpcycleConfig(layers=layers).layer_indices(num_layers) == chosen


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], r"indices in \[-4, 3\] for this model, got \[4\]"),
        (5, "at most the model's 4 layers"),
        ([0, -4], "name each layer once"),
    ],
)
def test_layers_that_do_not_fit_the_model(layers, message):
    with pytest.raises(ValueError, match=message):
        UpcycleConfig(layers=layers).layer_indices(4)


@pytest.mark.parametrize(
    "config",
    [
        UpcycleConfig(),
        UpcycleConfig(num_experts=4, num_experts_per_tok=1, layers=(1, 3), router_noise="learned", gate="fixed"),
        MergeConfig(),
        MergeConfig(shared_share=0.75, learn_shared_share=True, alpha_init="routing", alpha_per="projection"),
    ],
)
def test_dict_round_trip(config):
    assert type(config).from_dict(config.to_dict()) == config


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"unknown field\(s\) num_expert; known are .*num_experts"):
        UpcycleConfig.from_dict({"num_expert": 3})


# ---- any dictionary --------------------------------------------------------------------------------------------

REALS = st.floats(0, allow_infinity=False) | st.integers(0, 2**1000)
UPCYCLE = {
    "num_shared_experts": st.integers(1, 2**70),
    "gate": st.sampled_from(GATES),
    "fixed_shared_weight": st.floats(0, 1),
    "router": st.sampled_from(ROUTERS),
    "router_noise": st.sampled_from(ROUTER_NOISES),
    "jitter_eps": st.floats(0, 1),
    "router_init_std": REALS,
    "layers": st.just("all") | st.integers(1) | st.lists(st.integers(), min_size=1, unique=True).map(tuple),
    "expert_noise": REALS,
    "balancing_loss": st.sampled_from(BALANCING_LOSSES),
    "balancing_loss_coef": REALS,
    "z_loss_coef": REALS,
}
MERGE = {
    "shared_share": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "learn_shared_share": st.booleans(),
    "alpha_init": st.sampled_from(["uniform", "routing"]),
    "alpha_per": st.sampled_from(["layer", "projection"]),
}
EXPERTS = st.integers(1, 2**70).flatmap(
    lambda e: st.fixed_dictionaries({"num_experts": st.just(e), "num_experts_per_tok": st.integers(1, e)})
)
GOOD = st.builds(lambda e, rest: UpcycleConfig(**e, **rest), EXPERTS, st.fixed_dictionaries({}, optional=UPCYCLE))
GOOD |= st.fixed_dictionaries({}, optional=MERGE).map(lambda data: MergeConfig(**data))

NUMBERS = st.integers() | st.floats() | st.sampled_from([2**1024, -(10**400), 10**5000])  # floats end at 2^1024
VALUES = NUMBERS | st.none() | st.booleans() | st.sampled_from(["", "all", "linear"]) | st.lists(NUMBERS, max_size=2)


@st.composite
def hostile(draw):
    """A configuration class, and data for it: mostly a field's name with any value, or no dictionary at all."""
    cls = draw(st.sampled_from([UpcycleConfig, MergeConfig]))
    name = draw(st.sampled_from([*(field.name for field in dataclasses.fields(cls)), "", 0, None]))
    value = draw(VALUES)
    return cls, value if name is None else {name: value}


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.full)])
def test_any_configuration_survives_json_and_any_other_data_is_refused(examples):
    seeded = settings(max_examples=examples, derandomize=True, deadline=None, database=None)

    @seeded
    @given(GOOD)
    def survives(config):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @seeded
    @given(hostile())
    def refused(case):
        cls, data = case
        try:
            config = cls.from_dict(data)
        except (TypeError, ValueError):
            return
        assert cls.from_dict(config.to_dict()) == config

    survives()
    refused()
