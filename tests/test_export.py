"""export.py: the exported file is the deterministic network, and runs without this repo."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, make_folders, make_scenes, message, refused
from PIL import Image

import predict
import train
from build import build_model, configure
from checkpoint import load_checkpoint
from config import flatten
from detection_task import decode_boxes
from export import export_model

TASKS = ["classification", "segmentation", "detection"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(task: str) -> str:
    """A run of one step of the tiny config."""
    keys = [f"task={task}", "training.steps=1", "data.eval_dir=null", f"training.run_name={task}"]
    if task != "classification":
        make_scenes.main(["--train", "20", "--eval", "4", "--size", "16", "--out", "scenes"])
        keys += ["data.train_dir=scenes/train", "model.image_size=16"]
    assert train.main(["--config", "tiny.yaml", *keys]) == 0
    return f"ckpt/{task}"


@pytest.mark.parametrize("task", TASKS)
def test_the_file_is_the_deterministic_network(folder, capsys, task):
    """For one, two and five images: class probabilities of the image, of each pixel, of each patch with its box; the
    metadata says classes, size and shapes."""
    run = trained(task)
    capsys.readouterr()
    assert predict.main([run, "--export", "model.pt2"]) == 0
    state = load_checkpoint(Path(run))
    task = configure(("run", flatten(state["config"], "")))[1]
    model = build_model(task, len(state["classes"]), torch.device("cpu"))
    model.load_state_dict(state["model"])
    size, classes = task.config["model"]["image_size"], state["classes"]
    extra = {"metadata.json": ""}
    network = torch.export.load("model.pt2", extra_files=extra).module()
    for count in (1, 2, 5):
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        found, outputs = network(images), task.network(model)(images).detach()
        if task.config["task"] == "detection":
            boxes = decode_boxes(outputs[..., -4:], 4).clamp(0, 16)
            expected = {"boxes": boxes, "probabilities": outputs[..., :-4].softmax(-1)}
        else:
            expected = {"probabilities": outputs.softmax(-1)}
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
            assert not found[name].requires_grad
    shapes = {name: list(tensor.shape[1:]) for name, tensor in expected.items()}
    about = {"task": task.config["task"], "classes": classes, "height": size, "width": size, "outputs": shapes}
    assert json.loads(extra["metadata.json"]) == about
    assert capsys.readouterr().out.startswith(f"model.pt2: uint8 images [B, 3, {size}, {size}] -> ")
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    if about["task"] == "classification":
        the_documented_lines_find_what_predict_finds(run, capsys)


def the_documented_lines_find_what_predict_finds(run: str, capsys) -> None:
    """docs/deploy.md's program, in a process that cannot import this repo, on model.pt2 of the run; `predict.py` on its
    checkpoint without dropout."""
    Image.open(next(Path("eval").glob("*/*.png"))).save("photo.png")
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.S)
    assert len(program.splitlines()) <= 13
    result = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    state = torch.load(f"{run}/last.pt", weights_only=True)
    state["config"]["model"]["dropout"], state["config"]["rollout"]["num_mc_samples"] = 0.0, 1
    torch.save(state, "dry.pt")
    capsys.readouterr()
    assert predict.main(["dry.pt", "photo.png", "--json"]) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    name, probability = result.stdout.split()
    assert name == image["class"] and float(probability) == pytest.approx(image["probability"], abs=1e-4)


def test_what_cannot_be_exported(folder, capsys, monkeypatch):
    """One line: a file that exists or has another ending, images beside it, a folder that is not there, a task of one's
    own whose computation depends on numbers."""
    run = trained("classification")
    Path("taken.pt2").touch()
    for name in ("taken.pt2", "model.pt"):
        text = refused(capsys, predict.main, run, "--export", name)
        assert text == f"--export {name}: nothing is overwritten; name a new file that ends in .pt2"
    text = refused(capsys, predict.main, run, "eval", "--export", "a.pt2")
    assert text == "--export a.pt2: it writes the model and predicts nothing; drop the images or folder"
    text = refused(capsys, predict.main, run, "--export", "none/a.pt2")
    assert text == "none/a.pt2: there is no folder none; make it, or name another file with --export"
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    task = configure(("tiny", flatten(config, "")))[1]
    assert TINY["model"]["image_size"] == 8
    model = build_model(task, 3, torch.device("cpu"))
    monkeypatch.setattr(task, "deployed", lambda outputs: {"x": outputs if float(outputs.sum()) > 0 else -outputs})
    text = message(export_model, model, task, ["a", "b", "c"], Path("b.pt2"))
    assert text.startswith("--export: the task cannot be recorded by torch.export (")
    assert not Path("b.pt2").exists()
