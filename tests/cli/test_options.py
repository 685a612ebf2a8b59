"""The file of --config: what is read, what is refused, and that nothing in it makes a command hang or fail badly."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ummrm import MergeConfig, UpcycleConfig
from ummrm.cli.errors import UserError
from ummrm.cli.options import read_layers, read_options

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + below] * 9)}]\n" for name, below in zip("bcdefghi", "abcdefgh", strict=True)
)


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "anchors and aliases are not allowed, and line 1 has one"),
        ("num_experts: [", "can't be read: ParserError"),
        ("num_experts: 3\nnum_experts: 4\n", "the key 'num_experts' is given twice"),
        ("- num_experts\n", "must hold a mapping of UpcycleConfig fields (such as `num_experts: 7`), got a list"),
        ("", "got a NoneType"),
        ("a: !!python/object/apply:os.system [true]\n", "can't be read"),
        ("[" * 5000, "can't be read"),
        ("a: 2001-99-99\n", "can't be read"),
        (f"a: {'9' * 5000}\n", "can't be read"),
        ("? [a]\n: b\n", "can't be read"),
        (b"\xff\xfe\x00", "can't be read"),
        ("#" * 100_000, "must be a short file"),
        ("<<: {num_experts: 3}\n", "can't be read"),
    ],
)
def test_a_file_that_is_no_plain_mapping(text, message, tmp_path):
    with pytest.raises(UserError) as error:
        read_options(written(tmp_path / "options.yaml", text))
    assert message in str(error.value) and str(tmp_path) in str(error.value) and len(str(error.value)) < 900


def test_a_file_that_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"pipe": "is not one", "none": "is not there", ".": "is not one"}.items():
        with pytest.raises(UserError, match=f"--config must be a file .* {message}"):
            read_options(tmp_path / name)


def test_json_and_yaml_say_the_same(tmp_path):
    fields = UpcycleConfig(layers=(0, 3)).to_dict()
    assert read_options(written(tmp_path / "a.json", json.dumps(fields))) == fields
    assert read_options(written(tmp_path / "a.yaml", json.dumps(fields, indent=1))) == fields
    with pytest.raises(UserError, match="given twice"):
        read_options(written(tmp_path / "b.json", '{"gate": "fixed", "gate": "fixed"}'))


def test_the_file_is_refused_before_any_work(models, refused):
    written(models / "options.yaml", "num_expert: 3\n")
    assert "unknown field(s) num_expert" in refused("upcycle", "none", "out", "--config", "options.yaml")
    written(models / "options.yaml", BOMB)
    assert "aliases are not allowed" in refused("upcycle", "none", "out", "--config", "options.yaml")
    assert "--layers must be" in refused("upcycle", "none", "out", "--layers", "first")
    assert "--seed" in refused("upcycle", "none", "out", "--seed", -1)
    assert "--dtype" in refused("merge", "none", "out", "--dtype", "float8")
    assert "`num_experts` must be an integer of at least 1, got 0" in refused("upcycle", "none", "out", "-e", 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({1: 2, "gate": "fixed", None: 3}, "unknown field(s) 1, None; known are"),
        ({"jitter_eps": 10**400}, "`jitter_eps` must be a number in [0, 1], got 1000"),
        ({"num_experts": -(10**5000)}, "got a number of over 4300 digits"),
        ({"router": "x" * 10**6}, "`router` must be one of 'linear', 'mlp', got 'xxx"),
        ({"layers": {"a": 1}}, "`layers` must be"),
    ],
)
def test_values_of_any_size_and_kind(fields, message):
    with pytest.raises(ValueError) as error:
        UpcycleConfig.from_dict(fields)
    assert message in str(error.value) and len(str(error.value)) < 800


def test_layers():
    assert [read_layers(text) for text in ("all", "2", "3,", "3,7, 11")] == ["all", 2, [3], [3, 7, 11]]
    for text in ("", ",", "first", "1.5", "9" * 5000):
        with pytest.raises(UserError, match="--layers must be"):
            read_layers(text)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just("all")
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(SCALARS, v, max_size=3), max_leaves=8
)
NAMES = st.sampled_from([*UpcycleConfig().to_dict(), *MergeConfig().to_dict()])
SOUP = st.text(alphabet=st.sampled_from(list("ab01:-?[]{},&*!|>'\"%@`#<~.eE_ \n\t")), max_size=60)


def check_fields(data):
    """A mapping becomes a configuration or one clear ValueError."""
    for cls in (UpcycleConfig, MergeConfig):
        try:
            config = cls.from_dict(data)
        except ValueError as error:
            assert str(error).startswith(f"{cls.__name__}: ") and len(str(error)) < 2000
        else:
            assert cls.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def check_text(path, text):
    try:
        data = read_options(written(path, text))
    except UserError:
        data = {}
    check_fields(data)


def check_soup(tmp_path, examples):
    common = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

    @settings(max_examples=examples, **common)
    @given(data=st.dictionaries(NAMES | SCALARS, VALUES, max_size=5))
    def fields_of_any_kind(data):
        check_fields(data)

    @settings(max_examples=examples, **common)
    @given(text=SOUP | st.binary(max_size=40), name=st.sampled_from(["o.yaml", "o.json"]), repeat=st.integers(1, 300))
    def text_of_any_kind(text, name, repeat):
        check_text(tmp_path / name, text * repeat)

    fields_of_any_kind()
    text_of_any_kind()


def test_nothing_in_a_file_makes_it_fail_badly(tmp_path):
    check_soup(tmp_path, 40)


@pytest.mark.full
def test_nothing_in_a_file_makes_it_fail_badly_at_length(tmp_path):
    check_soup(tmp_path, 3000)
