"""Every key, every kind of bad value and every impossible pair of config.py, against its one line."""

import datetime
import math

import pytest
import yaml
from conftest import ROOT, message
from hypothesis import given, settings
from hypothesis import strategies as st

from build import configure, schema_of
from config import SCHEMA, SIZES, check, convert, describe_keys, flatten, parse_override, read_yaml
from data_types import InputError
from train import parse

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
ALL_KEYS = schema_of()  # those of the three tasks, too
NULLS = {name for name, key in ALL_KEYS.items() if key.default is None} | {"data.eval_dir", *SIZES}  # that take null

# --- Defaults and layers ----------------------------------------------------------------------------------------------


def test_defaults_are_valid_and_are_what_nothing_gives():
    """No layer at all gives every key with its default; converting a default changes nothing."""
    assert flatten(check(schema=ALL_KEYS), "") == {name: key.default for name, key in ALL_KEYS.items()}
    for name, key in ALL_KEYS.items():
        assert convert(name, key.default, key) == key.default and key.meaning


def test_later_layers_win_and_what_comes_out_is_a_fixed_point():
    """The file below, the command line above, defaults for the rest; no layer is changed. A checkpoint's config,
    flattened and checked again, is the same."""
    file = {"training.steps": 70, "training.seed": 1, "rollout.reward": ["a.py:f", "b.py:g"], "model.dropout": "1e-4"}
    config = check(("a.yaml", file), ("command line", {"training.steps": 80}))
    assert [config["training"][key] for key in ("steps", "seed", "batch_size")] == [80, 1, 64]
    assert file["training.steps"] == 70 and config["model"]["dropout"] == 1e-4
    assert check(("checkpoint", flatten(config, "checkpoint"))) == config
    nulls = check(("a.yaml", file | {"model.depth": 5}), ("command line", dict.fromkeys(SIZES)))["model"]
    assert nulls == config["model"] | {"depth": 5}  # a size of null is as if left out


@pytest.mark.parametrize("path", sorted(ROOT.glob("config*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_pass(path):
    """Each is valid; what it sets is what comes out."""
    keys = read_yaml(str(path))
    flat = flatten(configure((path.name, keys))[0], "")
    for key, value in keys.items():
        assert flat[key] == ({value: 1.0} if key == "rollout.reward" and value else value)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("training.learning_rate", "1e-4", 1e-4),  # what YAML makes of 1e-4
        ("training.learning_rate", 1, 1.0),
        ("training.betas", ["9e-1", 0], [0.9, 0.0]),
        ("training.seed", 2**70, 2**70),
        ("model.pos_embed_antialias", True, "true"),
        ("model.pos_embed_antialias", False, "false"),
        ("rollout.reward", "classification_reward", {"classification_reward": 1.0}),
        ("rollout.reward", ["a", "b.py:f"], {"a": 1.0, "b.py:f": 1.0}),
        ("rollout.reward", {"a": 2, "b.py:f": "-5e-1"}, {"a": 2.0, "b.py:f": -0.5}),
    ],
)
def test_good_values(name, value, expected):
    """The value, in the type the key asks for."""
    result = convert(name, value, SCHEMA[name])
    assert result == expected and type(result) is type(expected)
    if isinstance(result, (list, dict)):
        assert all(type(x) is float for x in (result.values() if isinstance(result, dict) else result))


WHOLE, NUMBER, REWARD = "a whole number", "a number", "a list or a mapping name: weight of at least one name or null"
PIXELS = "(divide those of pixels from 0 to 255 by 255)"
QUOTE = "; YAML reads this as {}: put it in quotes (on a command line \"{}='…'\")"
KINDS = {int: "a number", bool: "true or false", datetime.date: "a date"}
BAD_VALUES = {
    "training.steps": (f"{WHOLE} >= 1", ["ten", "10", True, 10.0, 0, [1], {"a": 1}]),
    "training.seed": (f"{WHOLE} >= 0", [-1]),
    "model.num_classes": (f"{WHOLE} >= 1 or null", [0]),
    "model.dropout_blocks": (f"{WHOLE} >= 0 or null", [-1, True]),
    "model.positions": ("learned | rotary or null", ["none", True]),
    "model.pos_embed_antialias": ("auto | true | false", ["yes", 1]),
    "training.learning_rate": (f"{NUMBER} > 0", ["fast", True, math.nan, math.inf, "nan", 10**400, 0, [1e-3]]),
    "training.clip_low": (f"{NUMBER} >= 0 and < 1", [1, -0.1]),
    "training.clip_high": (f"{NUMBER} >= 0", [-0.1]),
    "training.layer_decay": (f"{NUMBER} > 0 and <= 1", [0, 1.1]),
    "model.compile": ("true or false", ["yes", 1]),
    "data.train_dir": ("a text", [5]),
    "data.eval_dir": ("a text or null", [False]),
    "data.cache": ("auto | always | never", ["sometimes", True]),
    "data.on_bad_image": ("error | skip", ["drop"]),
    "rollout.action": ("sample | argmax | all", ["greedy"]),
    "rollout.advantage": ("grpo | rloo | maxrl", ["ppo"]),
    "training.objective": ("grpo | supervised", ["Grpo"]),
    "training.dtype": ("auto | float32 | bfloat16", ["float16"]),
    "training.run_name": ("the name of a folder or null", ["a/b", "..", "", 5, False, datetime.date(2026, 11, 25)]),
    "data.mean": (
        f"a list of three numbers >= 0 and <= 1 {PIXELS}",
        [[0.5, 0.5], 0.5, [0.5, 0.5, True], [0.5, 0.5, math.nan], [0, 0, None], [123.7, 116.3, 103.5], [0, 0, -0.1]],
    ),
    "data.std": (f"a list of three numbers > 0 and <= 1 {PIXELS}", [[1, 1, 0], [], [58.4, 57.1, 57.4]]),
    "training.betas": ("a list of two numbers >= 0 and < 1", [[0.9, 1.0], [0.9, 0.99, 0.999]]),
    "rollout.reward": (
        REWARD,
        [[], {}, 5, [5], [["a"]], *({"a": weight} for weight in ("much", None, True, math.inf))],
    ),
    "detection.box_std": (f"{NUMBER} > 0", [0]),
    "detection.supervised_loss": ("log_prob | iou", ["l1"]),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values(name):
    """The line names the key, the value and what was expected."""
    expected, values = BAD_VALUES[name]
    for value in values:
        text = message(check, ("file", {name: value}), schema=ALL_KEYS)
        shown = "2026-11-25" if isinstance(value, datetime.date) else repr(value)
        hint = QUOTE.format(KINDS[type(value)], name) if ALL_KEYS[name].kind is str and type(value) in KINDS else ""
        assert text == f"{name}: {shown} is not allowed; expected {expected}{hint}"


def test_yaml_is_read_as_people_mean_it(tmp_path):
    """A key or section given twice, and numbers in another base than ten, are asked back, with file and line."""
    file = tmp_path / "c.yaml"
    for text, expected in (
        ("data: {}\ntraining:\n  steps: 5\n  seed: 1\n  steps: 6", "line 5: steps is there twice, first in line 3"),
        ("data: {}\ntraining: {}\nmodel: {}\ndata:\n  cache: auto", "line 4: data is there twice, first in line 1"),
        ("rollout:\n  reward:\n    a: 1\n    a: 2", "line 4: a is there twice, first in line 3"),
        ("training: {seed: 1, seed: 2}", "line 1: seed is there twice, first in line 1"),
    ):
        file.write_text(text)
        assert message(read_yaml, str(file)) == f"{file}: {expected}; remove one"
    for text, value in (("0100", "64"), ("0x10", "16"), ("0b11", "3"), ("1:30", "90"), ("-1:30.5", "-90.5")):
        file.write_text(f"training: {{steps: {text}}}")
        line = f"YAML reads {text} as {value}, in another base: write what is meant in base ten, or '{text}' for a text"
        assert message(read_yaml, str(file)) == f"{file}: {line}"
        assert message(parse_override, f"training.run_name={text}") == f"training.run_name={text}: {line}"
    file.write_text("training: {steps: 1_000, seed: 0, learning_rate: 0.5}")
    assert read_yaml(str(file)) == {"training.steps": 1000, "training.seed": 0, "training.learning_rate": 0.5}


def test_a_tilde_is_the_home_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in (
        "data.train_dir",
        "data.eval_dir",
        "model.checkpoint_path",
        "training.ckpt_dir",
        "training.log_dir",
        "data.token_cache_dir",
    ):
        assert convert(name, "~/x", ALL_KEYS[name]) == "/home/me/x"
    assert convert("rollout.reward", ["~/r.py:f"], ALL_KEYS["rollout.reward"]) == {"/home/me/r.py:f": 1.0}
    args = parse(["--config", "~/c.yaml", "--resume", "~/ckpt"])
    assert (args.config, args.resume) == ("/home/me/c.yaml", "/home/me/ckpt")


def test_null_is_allowed_where_it_means_something():
    """It is what a key without a value is in YAML."""
    for name in ALL_KEYS.keys() - NULLS:
        assert message(convert, name, None, ALL_KEYS[name]).startswith(f"{name}: None is not allowed; expected ")
    assert {convert(name, None, ALL_KEYS[name]) for name in NULLS} == {None}


# --- Pairs ------------------------------------------------------------------------------------------------------------

ARGMAX, ONE_PASS = {"rollout.action": "argmax"}, {"rollout.num_mc_samples": 1}


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"model.image_size": 20}, "model.image_size: 20 is not a multiple of model.patch_size: 16"),
        ({"model.num_heads": 5}, "model.embed_dim: 192 is not a multiple of model.num_heads: 5"),
        ({"model.mlp_ratio": 0.005}, "model.mlp_ratio: 0.005 of 192 leaves no hidden unit"),
        (
            {"model.positions": "rotary", "model.num_heads": 32},
            "model.positions: rotary needs an embed_dim / num_heads that is a multiple of 4",
        ),
        ({"model.dropout_blocks": 13}, "model.dropout_blocks: 13 is more than model.depth: 12"),
        ({"training.freeze_blocks": 13}, "training.freeze_blocks: 13 is more than model.depth: 12"),
        (ARGMAX | {"model.dropout": 0}, "rollout.action: argmax explores by dropout alone: "),
        (ARGMAX | ONE_PASS, "rollout.action: argmax explores by dropout alone: "),
        ({"model.dropout": 0}, "rollout.num_mc_samples: 4 passes without dropout are all the same; "),
        ({"training.micro_batch_size": 65}, "training.micro_batch_size: 65 is more than training.batch_size: 64"),
        ({"training.min_learning_rate": 1}, "training.min_learning_rate: 1.0 is above training.learning_rate: 0.001"),
    ],
)
def test_impossible_pairs(keys, expected):
    """Values that are fine alone and impossible together."""
    assert message(check, ("test", keys)).startswith(expected)


@pytest.mark.parametrize(
    "keys",
    [
        {"model.image_size": 32, "model.dropout_blocks": 12, "model.mlp_ratio": 1 / 192},
        {"training.freeze_blocks": 12, "training.micro_batch_size": 64, "training.min_learning_rate": 1e-3},
        ONE_PASS | {"model.dropout": 0, "rollout.actions_per_sample": 1, "training.steps": 1},
        ARGMAX | {"rollout.num_mc_samples": 2, "rollout.actions_per_sample": 1},
    ],
)
def test_pairs_at_the_border_are_possible(keys):
    """One step from the impossible: allowed, and handed through."""
    flat = flatten(check(("test", keys)), "")
    assert {name: flat[name] for name in keys} == keys


# --- Names, files and overrides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, end",
    [
        ("training.lerning_rate", "did you mean training.learning_rate?"),
        ("learning_rate", "did you mean training.learning_rate?"),
        ("model.steps", "did you mean training.steps?"),  # the right name in the wrong section
        ("a\nb.qqqq", "--help lists the keys"),
    ],
)
def test_unknown_keys(name, end):
    """The layer that has it, and the nearest known key, if one is near."""
    text = message(check, ("f.yaml", {}), ("command line", {name: 1}))
    assert text == f"command line: unknown key {' '.join(name.split())}; {end}"


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "cannot be read (No such file or directory)"),
        (b"\xff\xfe\x00", "cannot be read (not UTF-8)"),
        (b"training: {steps: [", "not valid YAML (while parsing a flow"),
        (b"x: !!python/object/apply:os.system [ls]", "not valid YAML (could not determine a constructor for the tag"),
        (b"x: 2024-99-99", "not valid YAML (month must be in 1..12)"),
        (b"x: " + b"[" * 3000, "not valid YAML (maximum recursion depth exceeded"),
        (b"- model\n- data", "should hold sections of keys, not list"),
        (b"model: 5", "model: should be a section of keys"),
        (b"steps: 5", "steps: should be a section of keys; did you mean training.steps?"),
        (b"5: 5", "5: should be a section of keys; --help lists the keys"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bad_files(tmp_path, content, expected):
    """Missing, not UTF-8, not YAML, not sections: one line that begins with the file's name. One that sets nothing is
    fine."""
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    assert message(read_yaml, str(path)).startswith(f"{path}: {expected}")
    assert message(read_yaml, str(tmp_path)) == f"{tmp_path}: cannot be read (Is a directory)"
    for empty in (b"", b"# nothing\n", b"model:\n", b"{}"):
        path.write_bytes(empty)
        assert read_yaml(str(path)) == {}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("training.learning_rate=1e-4", ("training.learning_rate", "1e-4")),  # a number after `check`
        ("model.num_classes=", ("model.num_classes", None)),
        ("training.betas=[0.9, 0.95]", ("training.betas", [0.9, 0.95])),
        ("rollout.reward={a.py:f: 2}", ("rollout.reward", {"a.py:f": 2})),
        ("data.train_dir=a=b", ("data.train_dir", "a=b")),
        ("training.steps = 5", ("training.steps", 5)),
        ("=5", "=5: not an option; keys are overridden as section.key=value"),
        ("two\nlines", "two lines: not an option; keys are overridden as section.key=value"),
        ("training.steps=[", "training.steps=[: not valid YAML (while parsing a flow node expected the node content"),
        ("a=\n\t- {", "a= - {: not valid YAML (while scanning"),
        ("a=2024-99-99", "a=2024-99-99: not valid YAML (month must be in 1..12)"),
    ],
)
def test_overrides(text, expected):
    """section.key=value, the value in YAML."""
    if isinstance(expected, tuple):
        assert parse_override(text) == expected
    else:
        assert message(parse_override, text).startswith(expected)


# --- Properties -------------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["1e-4", "nan", "auto", "sample", "argmax", "a\nb", "-0", ".inf", "1_0"])
    | st.binary(max_size=4)
    | st.dates()
)
VALUES = st.recursive(SCALARS, lambda values: st.lists(values) | st.dictionaries(SCALARS, values), max_leaves=6)


@settings(EXAMPLES, max_examples=25)
@given(st.data())
def test_any_value_of_any_key_gives_a_value_or_one_line(data):
    """Each key in turn meets whatever YAML can hold."""
    for name, key in ALL_KEYS.items():
        try:
            result = convert(name, data.draw(VALUES), key)
        except InputError as error:
            assert len(str(error).splitlines()) == 1 and str(error).startswith(f"{name}: ")
        else:
            own = not isinstance(key.kind, type) or type(result) is key.kind
            assert name in NULLS if result is None else own and key.valid(result)
            assert convert(name, result, key) == result


@EXAMPLES
@given(st.dictionaries(st.sampled_from(sorted(SCHEMA)), VALUES, max_size=4))
def test_any_layer_gives_a_config_or_one_line(layer):
    """A whole layer, pairs included: a config that holds every key and passes again, or InputError."""
    try:
        config = check(("fuzz", layer))
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert list(flatten(config, "")) == list(SCHEMA)
        assert check(("again", flatten(config, "")), ("nothing", {})) == config


@EXAMPLES
@given(st.text(max_size=30))
def test_any_override_gives_a_pair_or_one_line(text):
    """Whatever is typed on the command line."""
    try:
        name, _ = parse_override(text)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert text.partition("=")[0].strip() == name and "=" in text


# --- Help -------------------------------------------------------------------------------------------------------------


def test_help_lists_every_key_with_its_default_and_meaning():
    """One entry per key; its default reads back as YAML."""
    lines = describe_keys(ALL_KEYS).split("\n")
    assert len(lines) == 2 * len(ALL_KEYS)
    for (name, key), head, body in zip(ALL_KEYS.items(), lines[::2], lines[1::2]):
        shown, _, default = head.strip().partition(" = ")
        assert (shown, yaml.safe_load(default)) == (name, key.default)
        assert body == f"      {key.meaning}" + (f" [{key.rule}]" if key.rule else "")
