"""What several test files use: small folders, comparisons, and the state of the process put back after each test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small models, and several processes share the cores

import importlib.util
import shutil
import signal
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch.distributions import Distribution

from data_types import InputError

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TINY = {
    "model": {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "dropout_blocks": 1},
    "data": {"train_dir": "train", "eval_dir": "eval", "num_workers": 0},
    "rollout": {"num_mc_samples": 2, "actions_per_sample": 4},
    "training": {"steps": 12, "batch_size": 16, "warmup_steps": 3, "device": "cpu", "seed": 7}
    | {"log_interval": 5, "eval_interval": 6, "save_interval": 3, "keep_checkpoints": 9},
}


def load_script(path: str) -> ModuleType:
    """A script of this repo that is in no folder to import from."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_scenes = load_script("data/make_scenes.py")


LONGEST = [
    "test_distributed.py",
    "test_train.py",
    "test_task.py",
    "test_predict.py",
    "test_export.py",
    "test_vit_model.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that the two processes of a whole run end together."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def process_state():
    """What `train.main` changes in the process is put back; one thread, as the models are tiny. What a test draws does
    not depend on the tests before it."""
    handlers, threads = [signal.getsignal(number) for number in SIGNALS], torch.get_num_threads()
    validate = Distribution._validate_args
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    for number, handler in zip(SIGNALS, handlers):
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    Distribution.set_default_validate_args(validate)


def make_folders(root: Path) -> None:
    """train (3 classes x 8 of the bundled digits), eval (3 x 4) and tiny.yaml in `root`."""
    for split, count in (("train", 8), ("eval", 4)):
        for name in "014":
            (root / split / name).mkdir(parents=True)
            for path in sorted((ROOT / "data" / split / name).glob("*.png"))[:count]:
                shutil.copy(path, root / split / name)
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))


def same(a, b) -> bool:
    """Equal bit for bit, types included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def files(directory: Path) -> dict[str, bytes]:
    """Everything in the folder, hidden files too."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def message(function, *arguments, **options) -> str:
    """The text of the InputError that `function` raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def refused(capsys, main, *arguments: str) -> str:
    """The one line on stderr of a command, `train.main` or `predict.main`, that exits with 2, without its name."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].split(": ", 1)[1]


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of transformers' ViTForImageClassification under timm's names."""
    renamed = {
        "cls_token": state["vit.embeddings.cls_token"],
        "pos_embed": state["vit.embeddings.position_embeddings"],
    }
    modules = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    for i in range(sum(name.endswith("q_proj.weight") for name in state)):
        parts = {"norm1": "layernorm_before", "attn.proj": "attention.o_proj", "norm2": "layernorm_after"}
        for new, old in (parts | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
            modules[f"blocks.{i}.{new}"] = f"vit.layers.{i}.{old}"
        for kind in ("weight", "bias"):
            qkv = [state[f"vit.layers.{i}.attention.{x}_proj.{kind}"] for x in "qkv"]
            renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    return renamed | {f"{n}.{kind}": state[f"{o}.{kind}"] for n, o in modules.items() for kind in ("weight", "bias")}


class NoTraining:
    """Of a tool's runs: notes what would be trained and what is asked for, and trains nothing."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.trained, self.seen = [], []

    def train(self, run):
        self.trained.append(run)
        return True

    def judge(self, run):
        return {}
