"""Every key, every bad value and every impossible pair of config.py, against its one line."""

import datetime
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config import SCHEMA, check, convert, describe_keys, flatten, nest, parse_override, read_yaml
from data_types import InputError

ROOT = Path(__file__).parent.parent
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


def message(function, *arguments) -> str:
    """The text of the InputError that `function` raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def checked(**keys) -> dict:
    """The whole config of some flat keys, `section__key=value`."""
    return check(("test", {name.replace("__", "."): value for name, value in keys.items()}))


# --- Defaults and layers ----------------------------------------------------------------------------------------------


def test_defaults_are_valid_and_are_what_nothing_gives():
    """No layer at all gives every key of the schema with its default; converting a default changes nothing."""
    assert flatten(check(), "") == {name: key.default for name, key in SCHEMA.items()}
    for name, key in SCHEMA.items():
        assert convert(name, key.default) == key.default and key.meaning


def test_later_layers_win_and_an_unknown_key_names_its_layer():
    """The file below, the command line above, defaults for the rest; no layer is changed."""
    file, line = {"training.steps": 70, "training.seed": 1}, {"training.steps": 80}
    config = check(("a.yaml", file), ("command line", line))
    assert (config["training"]["steps"], config["training"]["seed"], config["training"]["batch_size"]) == (80, 1, 64)
    assert file == {"training.steps": 70, "training.seed": 1}
    text = message(check, ("a.yaml", {}), ("command line", {"training.step": 1}))
    assert text == "command line: unknown key training.step; did you mean training.steps?"


def test_what_check_gives_is_a_fixed_point():
    """A checkpoint's config, flattened and checked again, is the same."""
    config = checked(rollout__reward=["a.py:f", "b.py:g"], training__learning_rate="1e-4", model__depth=2)
    assert check(("checkpoint", flatten(config, "checkpoint"))) == config


@pytest.mark.parametrize("path", sorted(ROOT.glob("config*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_pass(path):
    """Every shipped config is valid; what it sets is what comes out."""
    flat = flatten(check((path.name, read_yaml(str(path)))), "")
    for name, value in read_yaml(str(path)).items():
        assert flat[name] == ({value: 1.0} if name == "rollout.reward" and isinstance(value, str) else value)


def test_there_are_shipped_configs():
    """The glob above finds the quick start at least."""
    assert (ROOT / "config_digits.yaml").is_file()


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("training.learning_rate", "1e-4", 1e-4),  # what YAML makes of 1e-4
        ("training.learning_rate", 1, 1.0),
        ("training.betas", ["9e-1", 0], [0.9, 0.0]),
        ("data.mean", [0, 0, 1], [0.0, 0.0, 1.0]),
        ("model.dropout", 0, 0.0),
        ("model.num_classes", None, None),
        ("data.eval_dir", None, None),
        ("training.run_name", "run 1.5", "run 1.5"),
        ("model.compile", True, True),
        ("training.seed", 2**70, 2**70),
        ("rollout.reward", "classification_reward", {"classification_reward": 1.0}),
        ("rollout.reward", ["a", "b.py:f"], {"a": 1.0, "b.py:f": 1.0}),
        ("rollout.reward", {"a": 2, "b.py:f": "-5e-1"}, {"a": 2.0, "b.py:f": -0.5}),
    ],
)
def test_good_values(name, value, expected):
    """The value, in the type the key asks for."""
    result = convert(name, value)
    assert result == expected and type(result) is type(expected)
    if isinstance(result, (list, dict)):
        assert all(type(x) is float for x in (result.values() if isinstance(result, dict) else result))


NULL = "or null"
WHOLE, NUMBER, LIST, REWARD = "a whole number", "a number", "a list of", "a list or a mapping name: weight of"
BAD_VALUES = [
    ("training.steps", "ten", f"{WHOLE} >= 1"),
    ("training.steps", "10", f"{WHOLE} >= 1"),
    ("training.steps", True, f"{WHOLE} >= 1"),
    ("training.steps", 10.0, f"{WHOLE} >= 1"),
    ("training.steps", 0, f"{WHOLE} >= 1"),
    ("training.steps", None, f"{WHOLE} >= 1"),
    ("training.steps", [1], f"{WHOLE} >= 1"),
    ("training.steps", {"a": 1}, f"{WHOLE} >= 1"),
    ("training.steps", datetime.date(2024, 1, 2), f"{WHOLE} >= 1"),
    ("training.seed", -1, f"{WHOLE} >= 0"),
    ("model.num_classes", 0, f"{WHOLE} >= 1 {NULL}"),
    ("model.dropout_blocks", 0, f"{WHOLE} >= 1 {NULL}"),
    ("training.micro_batch_size", 0, f"{WHOLE} >= 1 {NULL}"),
    ("training.learning_rate", "fast", f"{NUMBER} > 0"),
    ("training.learning_rate", True, f"{NUMBER} > 0"),
    ("training.learning_rate", None, f"{NUMBER} > 0"),
    ("training.learning_rate", math.nan, f"{NUMBER} > 0"),
    ("training.learning_rate", math.inf, f"{NUMBER} > 0"),
    ("training.learning_rate", "nan", f"{NUMBER} > 0"),
    ("training.learning_rate", 10**400, f"{NUMBER} > 0"),
    ("training.learning_rate", 0, f"{NUMBER} > 0"),
    ("training.learning_rate", [1e-3], f"{NUMBER} > 0"),
    ("training.max_grad_norm", -1.0, f"{NUMBER} > 0"),
    ("training.clip_low", 1, f"{NUMBER} >= 0 and < 1"),
    ("training.clip_high", -0.1, f"{NUMBER} >= 0"),
    ("model.dropout", 1.0, f"{NUMBER} >= 0 and < 1"),
    ("model.dropout", -0.1, f"{NUMBER} >= 0 and < 1"),
    ("model.compile", "yes", "true or false"),
    ("model.compile", 1, "true or false"),
    ("data.augment", None, "true or false"),
    ("data.train_dir", 5, "a text"),
    ("data.train_dir", None, "a text"),
    ("data.eval_dir", False, f"a text {NULL}"),
    ("data.cache", "sometimes", "auto | always | never"),
    ("data.cache", True, "auto | always | never"),
    ("rollout.action", "greedy", "sample | argmax"),
    ("rollout.advantage", "ppo", "grpo | rloo | maxrl"),
    ("training.objective", "Grpo", "grpo | supervised"),
    ("training.dtype", "float16", "auto | float32 | bfloat16"),
    ("training.run_name", "a/b", f"the name of a folder {NULL}"),
    ("training.run_name", "..", f"the name of a folder {NULL}"),
    ("training.run_name", "", f"the name of a folder {NULL}"),
    ("training.run_name", 5, f"the name of a folder {NULL}"),
    ("data.mean", [0.5, 0.5], f"{LIST} three numbers"),
    ("data.mean", 0.5, f"{LIST} three numbers"),
    ("data.mean", [0.5, 0.5, True], f"{LIST} three numbers"),
    ("data.mean", [0.5, 0.5, math.nan], f"{LIST} three numbers"),
    ("data.mean", [0.5, 0.5, None], f"{LIST} three numbers"),
    ("data.mean", None, f"{LIST} three numbers"),
    ("data.std", [1, 1, 0], f"{LIST} three numbers > 0"),
    ("data.std", [], f"{LIST} three numbers > 0"),
    ("training.betas", [0.9, 1.0], f"{LIST} two numbers >= 0 and < 1"),
    ("training.betas", [0.9, 0.99, 0.999], f"{LIST} two numbers >= 0 and < 1"),
    ("rollout.reward", [], f"{REWARD} at least one name {NULL}"),
    ("rollout.reward", {}, f"{REWARD} at least one name {NULL}"),
    ("rollout.reward", 5, f"{REWARD} at least one name {NULL}"),
    ("rollout.reward", [5], f"{REWARD} at least one name {NULL}"),
    ("rollout.reward", [["a"]], f"{REWARD} at least one name {NULL}"),
    ("rollout.reward", {"a": "much"}, f"{REWARD} at least one name {NULL}"),
    ("rollout.reward", {"a": None}, f"{REWARD} at least one name {NULL}"),
    ("rollout.reward", {"a": True}, f"{REWARD} at least one name {NULL}"),
    ("rollout.reward", {"a": math.inf}, f"{REWARD} at least one name {NULL}"),
]


@pytest.mark.parametrize("name, value, expected", BAD_VALUES, ids=lambda value: repr(value)[:24])
def test_bad_values(name, value, expected):
    """The line names the key, the value and what was expected."""
    assert message(check, ("file", {name: value})) == f"{name}: {value!r} is not allowed; expected {expected}"


def test_every_key_but_the_optional_refuses_null():
    """null is what a key without a value is in YAML; only where it means something is it allowed."""
    for name, key in SCHEMA.items():
        if key.optional:
            assert convert(name, None) is None
        else:
            assert message(convert, name, None).startswith(f"{name}: None is not allowed; expected ")


# --- Pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"model__image_size": 20}, "model.image_size: 20 is not a multiple of model.patch_size: 16"),
        ({"model__num_heads": 5}, "model.embed_dim: 192 is not a multiple of model.num_heads: 5"),
        ({"model__mlp_ratio": 0.005}, "model.mlp_ratio: 0.005 of embed_dim 192 leaves no hidden unit"),
        ({"model__dropout_blocks": 13}, "model.dropout_blocks: 13 is more than model.depth: 12"),
        ({"training__freeze_blocks": 13}, "training.freeze_blocks: 13 is more than model.depth: 12"),
        (
            {"rollout__action": "argmax", "model__dropout": 0, "rollout__num_mc_samples": 1},
            "rollout.action: argmax explores by dropout alone; raise model.dropout above 0",
        ),
        (
            {"rollout__action": "argmax", "rollout__num_mc_samples": 1},
            "rollout.action: argmax needs rollout.num_mc_samples >= 2",
        ),
        (
            {"model__dropout": 0},
            "rollout.num_mc_samples: 4 passes without dropout are all the same; set it to 1 or model.dropout above 0",
        ),
        (
            {"training__micro_batch_size": 65},
            "training.micro_batch_size: 65 is more than training.batch_size: 64",
        ),
        (
            {"training__min_learning_rate": 0.01},
            "training.min_learning_rate: 0.01 is above training.learning_rate: 0.001",
        ),
    ],
)
def test_impossible_pairs(keys, expected):
    """Values that are fine alone and impossible together."""
    assert message(lambda: checked(**keys)) == expected


@pytest.mark.parametrize(
    "keys",
    [
        {"model__image_size": 32, "model__dropout_blocks": 12},
        {"training__freeze_blocks": 12, "training__layer_decay": 1e-3},
        {"model__mlp_ratio": 1 / 192},
        {"model__dropout": 0, "rollout__num_mc_samples": 1},
        {"rollout__action": "argmax", "rollout__num_mc_samples": 2},
        {"rollout__num_mc_samples": 2, "rollout__actions_per_sample": 1},
        {"rollout__num_mc_samples": 1, "rollout__actions_per_sample": 1, "training__objective": "supervised"},
        {"training__micro_batch_size": 64},
        {"training__steps": 1, "training__min_learning_rate": 1e-3},  # shorter than its warm-up
    ],
)
def test_pairs_at_the_border_are_possible(keys):
    """One step from the impossible: allowed, and handed through."""
    flat = flatten(checked(**keys), "")
    assert {name: flat[name.replace("__", ".")] for name in keys} == keys


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, end",
    [
        ("training.lerning_rate", "did you mean training.learning_rate?"),
        ("train.learning_rate", "did you mean training.learning_rate?"),
        ("learning_rate", "did you mean training.learning_rate?"),
        ("model.steps", "did you mean training.steps?"),  # the right name in the wrong section
        ("rollout.num_mc_sample", "did you mean rollout.num_mc_samples?"),
        ("zzzz.qqqq", "--help lists the keys"),
        ("a\nb.qqqq", "--help lists the keys"),
    ],
)
def test_unknown_keys(name, end):
    """The nearest known key is named, if one is near."""
    assert message(check, ("f.yaml", {name: 1})) == f"f.yaml: unknown key {' '.join(name.split())}; {end}"


# --- Files and overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "cannot be read (No such file or directory)"),
        (b"\xff\xfe\x00", "cannot be read (not UTF-8)"),
        (b"training: {steps: [", "not valid YAML (while parsing a flow"),
        (b"a: 1\n b: 2", "not valid YAML (mapping values are not allowed here"),
        (b"x: !!python/object/apply:os.system [ls]", "not valid YAML (could not determine a constructor for the tag"),
        (b"x: 2024-99-99", "not valid YAML (month must be in 1..12)"),
        (b"x: " + b"[" * 3000, "not valid YAML (maximum recursion depth exceeded"),
        (b"- model\n- data", "should hold sections of keys, not list"),
        (b"just text", "should hold sections of keys, not str"),
        (b"model: 5", "model: should be a section of keys"),
        (b"training: [steps, 5]", "training: should be a section of keys"),
        (b"steps: 5", "steps: should be a section of keys; did you mean training.steps?"),
        (b"5: 5", "5: should be a section of keys; --help lists the keys"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bad_files(tmp_path, content, expected):
    """Missing, not UTF-8, not YAML, not sections: one line that begins with the file's name."""
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    text = message(read_yaml, str(path))
    assert text == f"{path}: {expected}" or ("(" in expected and text.startswith(f"{path}: {expected}"))


def test_a_folder_is_no_file(tmp_path):
    """--config some/folder."""
    assert message(read_yaml, str(tmp_path)) == f"{tmp_path}: cannot be read (Is a directory)"


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"model:\n", b"{}", b"model: {}\ndata: null\n"])
def test_empty_files_are_the_defaults(tmp_path, content):
    """A file, or a section, that sets nothing."""
    (tmp_path / "c.yaml").write_bytes(content)
    assert read_yaml(str(tmp_path / "c.yaml")) == {}
    assert check(("c.yaml", read_yaml(str(tmp_path / "c.yaml")))) == check()


@pytest.mark.parametrize(
    "content, expected",
    [
        ("classification_reward", {"classification_reward": 1.0}),
        ("[a.py:f, b.py:g]", {"a.py:f": 1.0, "b.py:g": 1.0}),
        ("{a.py:f: 1, 'b.py:g': 1e-2}", {"a.py:f": 1.0, "b.py:g": 0.01}),
    ],
)
def test_reward_forms_of_a_file(tmp_path, content, expected):
    """A name, a list, a mapping to weights, as YAML has them."""
    (tmp_path / "c.yaml").write_text(f"rollout:\n  reward: {content}\n", encoding="utf-8")
    assert check(("c.yaml", read_yaml(str(tmp_path / "c.yaml"))))["rollout"]["reward"] == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("training.learning_rate=1e-4", ("training.learning_rate", "1e-4")),  # a number after `check`
        ("training.steps=5", ("training.steps", 5)),
        ("model.num_classes=null", ("model.num_classes", None)),
        ("model.num_classes=", ("model.num_classes", None)),
        ("model.compile=true", ("model.compile", True)),
        ("training.betas=[0.9, 0.95]", ("training.betas", [0.9, 0.95])),
        ("rollout.reward={a.py:f: 2}", ("rollout.reward", {"a.py:f": 2})),
        ("data.train_dir=a=b", ("data.train_dir", "a=b")),
        ("=5", ("", 5)),
    ],
)
def test_overrides(text, expected):
    """section.key=value, the value in YAML."""
    assert parse_override(text) == expected


def test_an_override_of_1e_4_is_a_number():
    """YAML takes 1e-4 for a text; the config does not."""
    config = check(("command line", dict([parse_override("training.learning_rate=1e-4")])))
    assert config["training"]["learning_rate"] == 0.0001


@pytest.mark.parametrize(
    "text, expected",
    [
        ("training.steps", "training.steps: not an option; keys are overridden as section.key=value"),
        ("two\nlines", "two lines: not an option; keys are overridden as section.key=value"),
        ("training.steps=[", "training.steps=[: not valid YAML (while parsing a flow node expected the node content"),
        ("a=\n\t- {", "a= - {: not valid YAML (while scanning"),
        ("a=2024-99-99", "a=2024-99-99: not valid YAML (month must be in 1..12)"),
    ],
)
def test_bad_overrides(text, expected):
    """No equals sign, or not YAML after it."""
    assert message(parse_override, text).startswith(expected)


# --- Properties -------------------------------------------------------------------------------------------------------


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["1e-4", "nan", "auto", "sample", "argmax", "a\nb", "-0", ".inf", "1_0"])
    | st.binary(max_size=4)
    | st.dates()
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(SCALARS, v, max_size=3), max_leaves=6
)


@EXAMPLES
@given(st.dictionaries(st.sampled_from(sorted(SCHEMA)), st.integers()))
def test_flatten_and_nest_are_inverse(flat):
    """Sections of keys and flat names are two forms of one thing."""
    assert flatten(nest(flat), "") == flat
    assert nest(flatten(nest(flat), "")) == nest(flat)


@settings(EXAMPLES, max_examples=25)
@given(st.data())
def test_any_value_of_any_key_gives_a_config_or_one_line(data):
    """Each key in turn meets whatever YAML can hold."""
    for name in SCHEMA:
        value = data.draw(VALUES)
        try:
            result = convert(name, value)
        except InputError as error:
            assert len(str(error).splitlines()) == 1 and str(error).startswith(f"{name}: ")
        else:
            assert result is None and SCHEMA[name].optional or type(result) is SCHEMA[name].kind
            assert result is None or SCHEMA[name].valid(result)
            assert convert(name, result) == result


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
@given(VALUES | st.dictionaries(st.text(max_size=9) | SCALARS, st.dictionaries(SCALARS, SCALARS, max_size=2)))
def test_any_file_gives_a_config_or_one_line(tree):
    """Whatever a YAML file may hold as a whole."""
    try:
        assert check(("fuzz", flatten(tree, "fuzz"))) == check()  # only one that sets nothing gets through
    except InputError as error:
        assert len(str(error).splitlines()) == 1


@EXAMPLES
@given(st.text(max_size=30))
def test_any_override_gives_a_pair_or_one_line(text):
    """Whatever is typed on the command line."""
    try:
        name, _ = parse_override(text)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert text.startswith(f"{name}=")


# --- Help -------------------------------------------------------------------------------------------------------------


def test_help_lists_every_key_with_its_default_and_meaning():
    """One entry per key; its default reads back as YAML."""
    lines = describe_keys().split("\n")
    assert len(lines) == 2 * len(SCHEMA)
    for (name, key), head, body in zip(SCHEMA.items(), lines[::2], lines[1::2]):
        shown, equals, default = head.strip().partition(" = ")
        assert (shown, equals, yaml.safe_load(default)) == (name, " = ", key.default)
        assert body == f"      {key.meaning}" + (f" [{key.rule}]" if key.rule else "")
