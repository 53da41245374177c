"""What the README says, against the code."""

import inspect
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import experiments
import predict
from config import SCHEMA, check, parse_override, read_yaml
from train import parse
from vit_model import VisionTransformer

README = Path("README.md").read_text(encoding="utf-8")


def commands(script: str = "train.py") -> list[list[str]]:
    """Every command of the README's bash blocks that runs the script, as argv."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    return [line[line.index(script) + 1 :] for line in lines if script in line]


def test_the_config_table_is_the_schema():
    """Each key stands there once, in order, with its default."""
    rows = re.findall(r"^\| `(task|(?:model|data|rollout|detection|training)\.\w+)` \| `(.*?)` \|", README, re.M)
    assert [(name, yaml.safe_load(default)) for name, default in rows] == [
        (n, key.default) for n, key in SCHEMA.items()
    ]


def test_the_reward_shown_is_the_one_that_was_run():
    """The code block is the source of the experiments' reward."""
    shown = re.search(r"```python\n(.*?)```", README, re.S).group(1).strip()
    functions = (experiments.cheque_cost, experiments.cheque_reward)
    assert shown == "\n\n\n".join(inspect.getsource(function).strip() for function in functions)


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_the_commands_are_valid(argv):
    """Flags, config files and keys exist, and the config that results passes the check."""
    args = parse(argv) if "--help" not in argv else None
    if args:
        check((args.config, read_yaml(args.config)), ("README", dict(map(parse_override, args.overrides))))


@pytest.mark.parametrize("argv", commands("predict.py"), ids=" ".join)
def test_the_commands_that_predict_are_valid(argv):
    """Flags exist, images or --evaluate are given, and the run is one that another command leaves behind."""
    args = predict.parse(argv)
    assert bool(args.images) != bool(args.evaluate) and all(map(os.path.exists, args.images))
    runs = {Path(parse(train_argv).config).stem for train_argv in commands() if "--help" not in train_argv}
    assert args.checkpoint in {f"ckpt/{name}" for name in runs}


def test_the_sizes_are_those_of_the_models():
    """Each row is a model that can be built and has as many parameters as it says, at 224 x 224 with 1000 classes."""
    rows = re.findall(r"^\| ViT-(\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+).* \| ([\d.]+) M \|$", README, re.M)
    assert [row[0] for row in rows] == ["Ti", "S", "B", "L"]
    for name, embed_dim, depth, num_heads, patch_size, millions in rows:
        sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "patch_size": patch_size}
        sizes = {key: int(value) for key, value in sizes.items()}
        check(("README", {f"model.{key}": value for key, value in sizes.items()}))
        with torch.device("meta"):
            model = VisionTransformer(**sizes, num_classes=1000)
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == millions, name


def test_links_lead_somewhere():
    """Files linked in the README exist, and so do the files that it calls by name."""
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README) + re.findall(r"`(\w+\.(?:py|yaml))`", README):
        assert Path(target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]+@", README)
    assert len(commands()) > 5 and len(commands("predict.py")) > 2
