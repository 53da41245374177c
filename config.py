"""The configuration: what every key means, its default, what it may be. Checked as a whole before anything starts."""

import datetime
import difflib
import hashlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import yaml

from data_types import InputError


@dataclass(frozen=True)
class Key:
    """One row of the schema. kind: int, float, bool, str, list (of three floats), dict (of reward weights), or a
    function that returns what it makes of the value, and raises ValueError."""

    default: Any
    kind: type | Callable[[Any], Any]
    meaning: str
    rule: str = ""  # what the value must be, as the message says it
    valid: Callable[[Any], bool] = lambda value: True
    optional: bool = False  # null is allowed; so it is where it is the default
    path: bool = False  # of a file or folder: ~ is the user's home


def at_least(low: float) -> dict:
    return {"rule": f">= {low}", "valid": lambda value: value >= low}


def one_of(*choices: str) -> dict:
    return {"rule": " | ".join(choices), "valid": lambda value: value in choices}


POSITIVE = {"rule": "> 0", "valid": lambda value: value > 0}
FRACTION = {"rule": ">= 0 and < 1", "valid": lambda value: 0 <= value < 1}
UP_TO_ONE = {"rule": "> 0 and <= 1", "valid": lambda value: 0 < value <= 1}
CHANNELS = {
    "rule": "three numbers >= 0 and <= 1 (divide those of pixels from 0 to 255 by 255)",
    "valid": lambda value: len(value) == 3 and all(0 <= x <= 1 for x in value),
}
SPREADS = {
    "rule": "three numbers > 0 and <= 1 (divide those of pixels from 0 to 255 by 255)",
    "valid": lambda value: len(value) == 3 and all(0 < x <= 1 for x in value),
}
BETAS = {"rule": "two numbers >= 0 and < 1", "valid": lambda value: len(value) == 2 and all(0 <= x < 1 for x in value)}
NAMES = {"rule": "at least one name", "valid": lambda value: value and all(isinstance(name, str) for name in value)}
LOSSES = "cross_entropy | weighted | logit_adjusted | focal, of masks also dice | lovasz"  # each task has its own
NULL = {"optional": True}  # null is as if left out
FOLDER = {"rule": "the name of a folder", "valid": lambda value: value not in ("", ".", "..") and "/" not in value}


def read_size(value: Any) -> int | list[int]:
    """A side of a square, or [height, width]; equal ones are a square's."""
    sides = [value] if type(value) is int else value
    if (
        not isinstance(sides, list)
        or len(sides) not in (1, 2)
        or not all(type(side) is int and side > 0 for side in sides)
    ):
        raise ValueError
    return sides[0] if sides[0] == sides[-1] else sides


def read_augment(value: Any) -> bool | dict[str, Any]:
    """Whether images are mirrored, or what else is drawn for them, without what is off."""
    if isinstance(value, bool):
        return value
    crop, flip, color, turn = (value.get(name) for name in ("crop", "flip", "color", "rotate90"))
    found = {}
    if crop is not None:
        found["crop"] = low, high = [number(share) for share in crop]
        if not 0 < low <= high <= 1:
            raise ValueError
    if flip not in (None, False):
        found["flip"] = "h" if flip is True else flip
    if color is not None and number(color):
        found["color"] = number(color)
    if turn is not None and turn is not False:
        found["rotate90"] = turn
    unknown = value.keys() - {"crop", "flip", "color", "rotate90"}
    if unknown or found.get("flip", "h") not in ("h", "v", "hv") or not 0 <= found.get("color", 0) <= 1:
        raise ValueError
    if found.get("rotate90", True) is not True:
        raise ValueError
    return found or False


AUGMENT = "true, false, or {crop: [least share, greatest share], flip: h | v | hv, color: 0 to 1, rotate90: true}"
Schema = Mapping[str, Key]  # "section.key" -> what it may be
SCHEMA: dict[str, Key] = {  # of every run; a task has further keys of its own (`Task.keys`)
    "model.image_size": Key(
        224, read_size, "the input's side, or [height, width], pixels", rule="a whole number >= 1, or two"
    ),
    "model.patch_size": Key(16, int, "height and width of a patch, pixels; divides image_size", **at_least(1), **NULL),
    "model.embed_dim": Key(192, int, "width of the tokens", **at_least(1), **NULL),
    "model.depth": Key(12, int, "encoder blocks", **at_least(1), **NULL),
    "model.num_heads": Key(3, int, "attention heads; divides embed_dim", **at_least(1), **NULL),
    "model.mlp_ratio": Key(4.0, float, "hidden width of the MLP / embed_dim", **POSITIVE, **NULL),
    "model.registers": Key(0, int, "further tokens without a position (DINOv2's and DINOv3's)", **at_least(0), **NULL),
    "model.positions": Key(
        "learned", str, "an embedding that is added, or rotations (DINOv3's)", **one_of("learned", "rotary"), **NULL
    ),
    "model.norm_eps": Key(1e-6, float, "epsilon of the LayerNorms", **POSITIVE, **NULL),
    "model.dropout": Key(0.1, float, "probability of a zero in a mask", **FRACTION),
    "model.dropout_blocks": Key(
        None, int, "dropout in the last k blocks only; 0: before the head; null: everywhere", **at_least(0)
    ),
    "model.num_classes": Key(None, int, "null: the classes of data.train_dir", **at_least(1)),
    "model.checkpoint_path": Key(
        None, str, "weights to start from, a file or folder; patch_size to norm_eps are read from it", path=True
    ),
    "model.pos_embed_antialias": Key(
        "auto", str, "for another grid, antialias; auto: as the publisher does", **one_of("auto", "true", "false")
    ),
    "model.activation_checkpointing": Key(False, bool, "compute activations twice, which needs less memory"),
    "model.compile": Key(False, bool, "torch.compile the model"),
    "data.train_dir": Key("data/train", str, "folder of images, in the task's format", path=True),
    "data.eval_dir": Key("data/eval", str, "folder of the same classes; null: no evaluation", optional=True, path=True),
    "data.mean": Key([0.485, 0.456, 0.406], list, "mean of the red, green, blue channels in [0, 1]", **CHANNELS),
    "data.std": Key([0.229, 0.224, 0.225], list, "standard deviation of the channels", **SPREADS),
    "data.resize": Key(
        "stretch",
        str,
        "how an image of another shape fits into the input; letterbox: padded with the mean; crop: its middle",
        **one_of("stretch", "letterbox", "crop"),
    ),
    "data.augment": Key(
        False,
        read_augment,
        "true: mirror half of the training images left to right; or crops, flips, colours, rotations, with the targets",
        rule=AUGMENT,
    ),
    "data.num_workers": Key(1, int, "processes that decode images; 0: the main process", **at_least(0)),
    "data.on_bad_image": Key(
        "error", str, "skip: the next good one takes its place, up to 1 % or three", **one_of("error", "skip")
    ),
    "data.cache": Key("auto", str, "keep decoded images; auto: if they fit", **one_of("auto", "always", "never")),
    "data.cache_limit_gb": Key(4.0, float, "what fits into memory: decoded images, then tokens, in GB", **at_least(0)),
    "data.token_cache": Key(
        "auto",
        str,
        "keep the tokens that leave frozen blocks, in memory or in a file; keep: for later runs too",
        **one_of("auto", "keep", "never"),
    ),
    "data.token_cache_dir": Key(None, str, "folder of the files of tokens; null: training.ckpt_dir", path=True),
    "data.token_dtype": Key("float32", str, "numbers that are kept", **one_of("float32", "bfloat16")),
    "rollout.num_mc_samples": Key(4, int, "T, Monte Carlo Dropout passes per image", **at_least(1)),
    "rollout.actions_per_sample": Key(16, int, "A, actions drawn per pass (1 for action: argmax)", **at_least(1)),
    "rollout.action": Key(
        "sample",
        str,
        "draws from the policy, its mode, or each choice by its weight",
        **one_of("sample", "argmax", "all"),
    ),
    "rollout.max_choices": Key(1000, int, "the most choices of an element for action: all", **at_least(2)),
    "rollout.advantage": Key("maxrl", str, "advantage estimator", **one_of("grpo", "rloo", "maxrl")),
    "rollout.log_values": Key(False, bool, "of scores and credits climb the logarithm: what is rare is learned too"),
    "rollout.reward": Key(
        None,
        dict,
        "of the task, or path/to/file.py:function; several: a list, or name: weight; null: the task's first",
        **NAMES,
    ),
    "training.objective": Key("grpo", str, "learn from rewards, or from labels", **one_of("grpo", "supervised")),
    "training.supervised_loss": Key("cross_entropy", str, "of labels; for boxes that of the patches' classes", LOSSES),
    "training.steps": Key(1000, int, "batches of experience to learn from", **at_least(1)),
    "training.batch_size": Key(64, int, "images per step", **at_least(1)),
    "training.micro_batch_size": Key(None, int, "images at a time; null: batch_size", **at_least(1)),
    "training.learning_rate": Key(1e-3, float, "AdamW's, at its highest", **POSITIVE),
    "training.min_learning_rate": Key(0.0, float, "where the cosine ends", **at_least(0)),
    "training.warmup_steps": Key(50, int, "steps of linear warm-up, before the cosine", **at_least(0)),
    "training.weight_decay": Key(0.05, float, "of weight matrices; biases, norms, tokens have none", **at_least(0)),
    "training.layer_decay": Key(1.0, float, "learning rate of a block / of the next one", **UP_TO_ONE),
    "training.freeze_blocks": Key(
        0, int, "the embedding and the first k blocks are not trained; 0: all is", **at_least(0)
    ),
    "training.betas": Key([0.9, 0.999], list, "AdamW's", **BETAS),
    "training.max_grad_norm": Key(1.0, float, "gradients are clipped to this norm", **POSITIVE),
    "training.clip_low": Key(0.2, float, "the ratio is clipped below 1 - clip_low", **FRACTION),
    "training.clip_high": Key(0.28, float, "the ratio is clipped above 1 + clip_high", **at_least(0)),
    "training.update_epochs": Key(1, int, "optimizer steps per rollout", **at_least(1)),
    "training.kl_coef": Key(0.0, float, "weight of KL(policy || the model training started from)", **at_least(0)),
    "training.entropy_coef": Key(0.0, float, "weight of the entropy bonus", **at_least(0)),
    "training.label_coef": Key(0.0, float, "weight of the supervised loss beside the rewards'", **at_least(0)),
    "training.device": Key("auto", str, "auto (cuda, mps, cpu in this order), cpu, cuda, cuda:1, mps"),
    "training.dtype": Key("auto", str, "auto: bfloat16 where the GPU has it", **one_of("auto", "float32", "bfloat16")),
    "training.seed": Key(0, int, "all randomness is a function of it", **at_least(0)),
    "training.ckpt_dir": Key("ckpt", str, "checkpoints go to ckpt_dir/run_name", path=True),
    "training.log_dir": Key("logs", str, "TensorBoard events go to log_dir/run_name", path=True),
    "training.run_name": Key(None, str, "null: the config file's name", **FOLDER),
    "training.log_interval": Key(10, int, "steps between points in TensorBoard", **at_least(1)),
    "training.eval_interval": Key(100, int, "steps between evaluations", **at_least(1)),
    "training.best": Key(
        None,
        str,
        "chooses best.pt: a metric, as eval/nll, or a score of the confusion matrix; null: eval/reward, or the task's "
        "own metric where the reward is its first",
    ),
    "training.decide": Key(
        "argmax", str, "in evaluations; reward: the highest expected one", **one_of("argmax", "reward")
    ),
    "training.patience": Key(None, int, "ends the run after so many evaluations without a better one", **at_least(1)),
    "training.save_interval": Key(200, int, "steps between checkpoints", **at_least(1)),
    "training.keep_checkpoints": Key(3, int, "step_*.pt files to keep; last.pt and best.pt stay", **at_least(1)),
}
SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "registers", "positions", "norm_eps")
SIZES = tuple(f"model.{key}" for key in SIZES)  # what the file of model.checkpoint_path says
KINDS = {int: "a whole number", float: "a number", bool: "true or false", list: "a list of"}
KINDS |= {dict: "a list or a mapping name: weight of"}
READS = {
    int: "a number",
    float: "a number",
    bool: "true or false",
    datetime.date: "a date",
    datetime.datetime: "a date",
}


def flatten(nested: Any, source: str) -> dict[str, Any]:
    """{section: {key: value}, task: value} -> {"section.key": value, "task": value}. Raises InputError."""
    if not isinstance(nested, dict):
        raise InputError(f"{source}: should hold sections of keys, not {type(nested).__name__}")
    flat = {}
    for section, keys in nested.items():
        if section == "task":
            flat[section] = keys
            continue
        if keys is not None and not isinstance(keys, dict):
            hint = "" if section in nest(SCHEMA) else suggest(str(section), SCHEMA)
            raise InputError(f"{source}: {one_line(str(section))}: should be a section of keys{hint}")
        flat |= {f"{section}.{key}": value for key, value in (keys or {}).items()}
    return flat


def nest(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        section, dot, key = name.partition(".")
        if dot:
            nested.setdefault(section, {})[key] = value
        else:
            nested[name] = value
    return nested


def suggest(name: str, schema: Schema) -> str:
    """The nearest known key, as the end of a message."""
    near = difflib.get_close_matches(name, schema, 1, 0.4)
    same = [known for known in schema if known.split(".")[-1] == name.split(".")[-1]]
    return f"; did you mean {(same or near)[0]}?" if same or near else "; --help lists the keys"


def convert(name: str, value: Any, key: Key) -> Any:
    """`value` as the type and in the range that its key asks for; raises InputError."""
    takes_null = key.optional or key.default is None
    if value is None and takes_null:
        return None
    kind = KINDS.get(key.kind, "" if key.rule else "a text")
    wanted = " ".join(filter(None, [kind, key.rule, "or null" if takes_null else ""]))
    shown = value.isoformat() if isinstance(value, datetime.date) else repr(value)
    words = isinstance(value, bool) and str(value).lower() in key.rule.split(" | ")  # YAML's true and false among them
    if key.kind is str and type(value) in READS and not words:
        wanted += f"; YAML reads this as {READS[type(value)]}: put it in quotes (on a command line \"{name}='…'\")"
    error = InputError(f"{name}: {shown} is not allowed; expected {wanted}")
    value = str(value).lower() if words else value
    try:
        if key.kind is float:
            value = number(value)
        elif key.kind is list:
            value = [number(x) for x in value] if isinstance(value, list) else None
        elif key.kind is dict:
            names = [value] if isinstance(value, str) else value
            weights = names if isinstance(names, dict) else dict.fromkeys(names, 1.0)
            value = {os.path.expanduser(name): number(weight) for name, weight in weights.items()}
        elif key.path:
            value = os.path.expanduser(value)
        if not isinstance(key.kind, type):
            return key.kind(value)
        if type(value) is not key.kind or not key.valid(value):
            raise error
    except (TypeError, ValueError, OverflowError, AttributeError):
        raise error from None
    return value


def number(value: Any) -> float:
    """A finite float; YAML reads 1e-4 as a string, as it has no dot."""
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def check_pairs(config: dict[str, Any]) -> None:
    """Raises InputError for values that are impossible together."""
    size, patch_size = config["model.image_size"], config["model.patch_size"]
    for side in size if isinstance(size, list) else [size]:
        if side % patch_size:
            raise InputError(f"model.image_size: {side} is not a multiple of model.patch_size: {patch_size}")
    for name, relation, other in (
        ("model.embed_dim", "not a multiple of", "model.num_heads"),
        ("model.dropout_blocks", "more than", "model.depth"),
        ("training.freeze_blocks", "more than", "model.depth"),
        ("training.micro_batch_size", "more than", "training.batch_size"),
        ("training.min_learning_rate", "above", "training.learning_rate"),
    ):
        value, limit = config[name] or 0, config[other]
        if value % limit if relation == "not a multiple of" else value > limit:
            raise InputError(f"{name}: {value} is {relation} {other}: {limit}")
    if isinstance(size, list) and isinstance(config["data.augment"], dict) and "rotate90" in config["data.augment"]:
        raise InputError(f"data.augment: rotate90 needs a square input, not model.image_size: {size}")
    embed_dim, mlp_ratio = config["model.embed_dim"], config["model.mlp_ratio"]
    dropout, passes = config["model.dropout"], config["rollout.num_mc_samples"]
    if config["model.positions"] == "rotary" and embed_dim // config["model.num_heads"] % 4:
        raise InputError("model.positions: rotary needs an embed_dim / num_heads that is a multiple of 4")
    if embed_dim * mlp_ratio < 1:
        raise InputError(f"model.mlp_ratio: {mlp_ratio} of {embed_dim} leaves no hidden unit")
    if config["rollout.action"] == "argmax" and (dropout == 0 or passes < 2):
        hint = "raise model.dropout above 0 and num_mc_samples above 1"
        raise InputError(f"rollout.action: argmax explores by dropout alone: {hint}")
    if passes > 1 and dropout == 0:
        hint = "set it to 1 or model.dropout above 0"
        raise InputError(f"rollout.num_mc_samples: {passes} passes without dropout are all the same; {hint}")


def check(*layers: tuple[str, dict[str, Any]], schema: Schema = SCHEMA) -> dict[str, Any]:
    """(source, {"section.key": value}), … -> the whole nested config; a later layer wins, defaults fill the rest.

    Raises InputError, which names the layer's source for a key that is unknown.
    """
    flat = {}
    for source, layer in layers:
        for name in layer:
            if name not in schema:
                raise InputError(f"{source}: unknown key {one_line(name)}{suggest(name, schema)}")
        flat |= {name: value for name, value in layer.items() if value is not None or name not in SIZES}
    config = {name: convert(name, flat.get(name, key.default), key) for name, key in schema.items()}
    check_pairs(config)
    return nest(config)


def one_line(error: Exception | str) -> str:
    """The text of an exception, or a text, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


class Loader(yaml.SafeLoader):
    """YAML as people mean it: no key twice in a mapping, and no number in another base than ten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                where = f"{key.start_mark.name}: line {line}"
                raise InputError(f"{where}: {key.value} is there twice, first in line {lines[key.value]}; remove one")
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        construct = super().construct_yaml_int if node.tag.endswith("int") else super().construct_yaml_float
        value, text = construct(node), node.value.lstrip("+-")
        if ":" in text or text[:2].lower() in ("0x", "0b") or (node.tag.endswith("int") and text[:1] == "0" != text):
            hint = f"write what is meant in base ten, or '{node.value}' for a text"
            raise InputError(f"YAML reads {node.value} as {value}, in another base: {hint}")
        return value


for kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_number)


def read_yaml(path: str) -> dict[str, Any]:
    """The keys a config file sets, flat. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            nested = yaml.load(file, Loader)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', 'not UTF-8')})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML ({one_line(error)})") from None
    return flatten({} if nested is None else nested, path)


def parse_override(text: str) -> tuple[str, Any]:
    """ "section.key=value" of the command line -> (name, value). Raises InputError."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not (equals and name):
        raise InputError(f"{one_line(text)}: not an option; keys are overridden as section.key=value")
    try:
        return name, yaml.load(value, Loader)
    except InputError as error:
        raise InputError(f"{one_line(text)}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{one_line(text)}: not valid YAML ({one_line(error)})") from None


def load_file(path: str) -> ModuleType:
    """A user's Python file as a module, executed once as long as it does not change. It may import the modules beside
    it, but for those with the name of one of ours. A worker process finds it again by its path (`images.py`), since its
    name cannot be imported. Raises what the file raises."""
    if not path.endswith(".py"):
        raise ImportError("its name should end in .py")
    name = f"file_{hashlib.blake2b(os.path.abspath(path).encode(), digest_size=8).hexdigest()}"
    stat = os.stat(path)
    version = stat.st_mtime_ns, stat.st_size
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, and for good: a function may import when it is called
    if name in sys.modules and sys.modules[name].loaded_by_path == version:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    module.loaded_by_path = version
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_user_file(path: str, key: str) -> ModuleType:
    """`load_file`, with an InputError that names the config's key for whatever the file raises."""
    try:
        return load_file(path)
    except (Exception, SystemExit) as error:
        frames, own = traceback.extract_tb(error.__traceback__), os.path.abspath(path)
        lines = [frame.lineno for frame in frames if frame.filename == own]
        where = f", line {lines[-1]}" if lines else ""  # of an error in the file's syntax Python says it
        raise InputError(f"{key}: {path} cannot be loaded ({one_line(error)}{where})") from error


def describe(schema: Schema) -> Iterator[tuple[str, str, str]]:
    """Of each key the name, the default as YAML has it, and what it means with what it may be."""
    for name, key in schema.items():
        default = yaml.safe_dump(key.default, default_flow_style=True).split("\n")[0]
        yield name, default, key.meaning + (f" [{key.rule}]" if key.rule else "")


def describe_keys(schema: Schema) -> str:
    """The keys with their meaning and default, for --help."""
    return "\n".join(f"  {name} = {default}\n      {meaning}" for name, default, meaning in describe(schema))


def keys_table(schema: Schema) -> str:
    """The same as a markdown table, for docs/config.md."""
    lines = ["| key | default | what |", "|---|---|---|"]
    for name, default, meaning in describe(schema):
        lines.append("| `{}` | `{}` | {} |".format(name, default, meaning.replace("|", "\\|")))
    return "\n".join(lines)
