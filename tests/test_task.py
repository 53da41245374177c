"""Tasks of a user: found in a file, trained, resumed, evaluated, used to predict; what is wrong with the file is one
line."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, make_folders, message, refused, same
from sklearn.metrics import f1_score, fbeta_score

import predict
import train
from build import configure, load_task, open_set
from checkpoint import load_checkpoint
from images import Loading, _BatchDecoder, stream_batches
from vision_task import Classification, Task

EXAMPLE = str(ROOT / "examples" / "multilabel_task.py")
TAGS = {"even": lambda k: k % 2 == 0, "above four": lambda k: k > 4, "has a loop": lambda k: k in (0, 6, 8, 9)}
BRIGHT = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "task.md").read_text(encoding="utf-8"), re.S).group(1)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    make_folders(tmp_path)
    (tmp_path / "bright.py").write_text(BRIGHT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RAW = """
import torch
from images import ImageDataset
from vision_task import Task

class Raw(ImageDataset):
    def __init__(self, root):
        self.root, self.image_size, self.classes, self.paths = root, 8, ["a", "b"], ["x.raw"]
    {}

class RawTask(Task):
    rewards, metrics = {{"r": lambda actions, *_: actions.float()}}, lambda *_: {{}}
    def open(self, root, classes=None):
        return Raw(root)
"""


@pytest.mark.parametrize("how", ["item", "__getitem__", "size"])
def test_files_that_a_data_set_reads_by_itself_need_no_image_header(folder, how):
    """They may be of any format; those that are decoded for it are looked at."""
    Path("x.raw").write_text("numbers")
    Path("raw.py").write_text(RAW.format(f"{how} = lambda *_: torch.zeros(3, 8, 8)"))
    task = configure(("raw.yaml", {"task": "raw.py"}))[1]
    if how == "size":
        assert message(open_set, task, ".").startswith("x.raw: not a readable image (")
    else:
        assert open_set(task, ".").paths == ["x.raw"]


def run(*arguments: str) -> int:
    return train.main(["--config", "tiny.yaml", *arguments])


# --- The example ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tagged(tmp_path_factory) -> Path:
    """The bundled digits with three tags, and a run of config_digits.yaml on them."""
    root = tmp_path_factory.mktemp("tags")
    for split in ("train", "eval"):
        (root / split).mkdir()
        rows = []
        for path in sorted((ROOT / "data" / split).rglob("*.png")):
            name = f"{path.parent.name}_{path.name}"
            shutil.copyfile(path, root / split / name)
            rows.append([name, *(int(holds(int(path.parent.name))) for holds in TAGS.values())])
        with open(root / split / "labels.csv", "w", newline="") as file:
            csv.writer(file).writerows([["file", *TAGS], *rows])
    keys = [f"data.train_dir={root}/train", f"data.eval_dir={root}/eval", f"task={EXAMPLE}", "training.steps=600"]
    keys += [f"training.ckpt_dir={root}/ckpt", f"training.log_dir={root}/logs", "training.run_name=tags"]
    keys += ["model.image_size=8", "model.patch_size=4"]
    assert train.main(["--config", str(ROOT / "config_digits.yaml"), *keys, "training.eval_interval=300"]) == 0
    return root


def test_tags_are_learned_from_the_f_score_of_their_set(tagged, capsys):
    """config_digits.yaml at 8x8, 600 steps: micro- and macro-F1 of at least 0.95 on the eval digits."""
    assert train.main(["--evaluate", str(tagged / "ckpt" / "tags")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    micro, macro = (float(line.split(f"{name} f1 ")[1].split()[0]) for name in ("micro", "macro"))
    assert micro >= 0.95 and macro >= 0.95 and load_checkpoint(tagged / "ckpt" / "tags")["best_metric"] >= micro - 1e-4


def test_tags_are_predicted_with_their_probabilities(tagged, tmp_path, capsys):
    """What predict.py says of the evaluation digits are the tags above one half, and they are as right as evaluated."""
    images = [str(path) for path in sorted((tagged / "eval").glob("*.png"))]
    capsys.readouterr()
    assert predict.main([str(tagged / "ckpt" / "tags"), *images, "--json", "--out", str(tmp_path / "out")]) == 0
    records = json.loads(capsys.readouterr().out)["images"]
    found = [[tag in record["tags"] for tag in TAGS] for record in records]
    assert found == [[record["probabilities"][tag] > 0.5 for tag in TAGS] for record in records]
    truth = [[holds(int(Path(path).name[0])) for holds in TAGS.values()] for path in images]
    assert f1_score(truth, found, average="micro") >= 0.95
    assert all(0 <= record["mutual_information"] <= record["predictive_entropy"] + 1e-6 for record in records)
    assert len(list((tmp_path / "out").glob("*.png"))) == len(images)
    assert predict.main([str(tagged / "ckpt" / "tags"), "--evaluate", str(tagged / "eval")]) == 0


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_f_scores_are_scikit_learns(beta):
    """The reward, and both metrics; 1 where there is no tag and none was found."""
    example, g = load_script("examples/multilabel_task.py"), torch.Generator().manual_seed(0)
    actions = torch.randint(2, (6, 2, 3, 4), generator=g).float()
    targets = torch.randint(2, (6, 4), generator=g).float()
    actions[0, 0, 0], targets[0] = 0, 0
    reward = example.f_beta_reward(actions, None, targets, {"beta": beta})
    for b, t, a in torch.cartesian_prod(torch.arange(6), torch.arange(2), torch.arange(3)).tolist():
        expected = fbeta_score(targets[b], actions[b, t, a], beta=beta, zero_division=1.0)
        assert reward[b, t, a] == pytest.approx(expected, abs=1e-6)
    assert reward[0, 0, 0] == 1
    probs = torch.rand(50, 4, generator=g)
    truth = torch.randint(2, (50, 4), generator=g).float()
    metrics = example.Multilabel.metrics(None, torch.stack([1 - probs, probs], -1), truth)
    for name in ("micro", "macro"):
        assert metrics[f"{name}_f1"] == pytest.approx(f1_score(truth, probs > 0.5, average=name), abs=1e-6)


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "line 1 should be file,<tag>,… with different tags, not empty"),
        ("name,a\n", "line 1 should be file,<tag>,… with different tags, not name,a"),
        ("file,a,a\n", "line 1 should be file,<tag>,… with different tags, not file,a,a"),
        ("file,a,b\nx.png,1\n", "line 2 has 1 values for 2 tags"),
        ("file,a\nx.png,1.0\n\n ./x.png,False\n", "line 4: x.png is there twice"),
        ("file,a\nx.png,yes\n", "line 2: 'yes' should be 0 or 1"),
        ("file,a\ny.png,1\n", "line 2: there is no file y.png beside it"),
        ("file,a\n", "no image in it; a line for each follows the header"),
        ("file,\xe9\n", "cannot be read"),
    ],
)
def test_mistakes_of_the_csv_are_one_line_each(tmp_path, text, told):
    example = load_script("examples/multilabel_task.py")
    shutil.copyfile(next((ROOT / "data/eval/3").glob("*.png")), tmp_path / "x.png")
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    assert message(example.TaggedImages, str(tmp_path), 8, 1.0).startswith(f"{tmp_path}/labels.csv: {told}")


def test_the_tags_of_another_folder_are_matched_by_name(tmp_path):
    """A byte-order mark, spaces, Windows line ends and another order of the columns change nothing."""
    example = load_script("examples/multilabel_task.py")
    shutil.copyfile(next((ROOT / "data/eval/3").glob("*.png")), tmp_path / "x.png")
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbffile, b,a\r\nx.png,0, 1\r\n")
    assert example.TaggedImages(str(tmp_path), 8, 1.0, ["a", "b"]).targets.tolist() == [[1, 0]]
    assert "in training they were a, c" in message(example.TaggedImages, str(tmp_path), 8, 1.0, ["a", "c"])


# --- Any task of a file -----------------------------------------------------------------------------------------------


def test_a_checkpoint_remembers_the_task_and_its_keys(folder, capsys):
    """Training, resuming, evaluating and predicting need the file's name once; a resumed run ends in the same bits."""
    keys = ["task=bright.py", "bright.limit=0.32", "rollout.reward=null"]
    assert run(*keys, "training.run_name=whole") == 0
    assert run(*keys, "training.steps=6", "training.run_name=half") == 0
    state = load_checkpoint(Path("ckpt/half"))
    assert state["config"]["task"] == "bright.py" and state["config"]["bright"] == {"limit": 0.32}
    assert state["classes"] == ["dark", "bright"]
    part = load_checkpoint(Path("ckpt/whole/step_000006.pt"))
    os.makedirs("ckpt/again")
    torch.save(part, "ckpt/again/last.pt")
    assert run("--resume", "ckpt/again") == 0
    whole, again = (load_checkpoint(Path("ckpt", name)) for name in ("whole", "again"))
    assert same(again["model"], whole["model"]) and same(again["optimizer"], whole["optimizer"])
    assert run("--evaluate", "ckpt/whole") == 0 and predict.main(["ckpt/whole", "eval"]) == 0


def test_a_file_that_has_moved_is_named_anew(folder, capsys):
    """One line says that it is gone; `task=` when resuming and `--task` when predicting take its place."""
    assert run("task=bright.py", "training.steps=3") == 0
    os.rename("bright.py", "moved.py")
    assert refused(capsys, train.main, "--resume", "ckpt/tiny").startswith("task: bright.py cannot be loaded (")
    assert refused(capsys, predict.main, "ckpt/tiny", "eval").startswith("task: bright.py cannot be loaded (")
    assert run("--resume", "ckpt/tiny", "task=moved.py", "training.steps=5") == 0
    assert predict.main(["ckpt/tiny", "eval", "--task", "moved.py"]) == 0


def test_targets_of_a_task_need_not_hold_every_class(folder):
    """They may be numbers of any meaning: what a run began with it goes on with."""
    keys = "task=bright.py", "bright.limit=2", "training.run_name=dark"
    assert run(*keys, "training.steps=1") == 0
    assert run("--resume", "ckpt/dark", "training.steps=2") == 0


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("t.py", "import nowhere_to_be_found", "t.py cannot be loaded (No module named 'nowhere_to_be_found', line 1)"),
        ("t.py", "def f(:", "t.py cannot be loaded (invalid syntax"),
        ("t.py", "x = 1", "t.py should define one Task, or be named as t.py:ClassName; it defines none"),
        ("t.py", BRIGHT + "class Other(Bright): pass\n", "t.py should define one Task, or be named as t.py:ClassName"),
        ("t.py:Nobody", BRIGHT, "t.py should define a Task Nobody; it defines Bright"),
        ("t.py", "from vision_task import Task\nclass Mine(Task): pass", "t.py: Mine lacks open, rewards, metrics"),
        ("t.py", BRIGHT + "    rewards = [len]\n", "t.py: Bright.rewards should map names to functions"),
        (
            "t.py",
            BRIGHT + "    keys = {'limit': Key(1.0, float, '')}\n",
            "Bright.keys: limit should be a new section.key",
        ),
        ("t.py", BRIGHT + "    keys = {'training.steps': Key(1, int, '')}\n", "keys: training.steps should be a new"),
        ("t.py", "import sys; sys.exit(0)", "t.py cannot be loaded (0, line 1)"),
        ("u.py", None, "u.py cannot be loaded (No such file or directory"),
        ("detecton", None, "'detecton' is not allowed; expected classification | segmentation | detection | path/to"),
        ("t.txt", "x", "'t.txt' is not allowed"),
    ],
)
def test_a_file_that_holds_no_task_is_one_line(folder, capsys, name, text, told):
    if text is not None:
        Path(name.split(":")[0]).write_text(text)
    text = refused(capsys, train.main, "--config", "tiny.yaml", f"task={name}")
    assert text.startswith("task: ") and told in text.replace("[Errno 2] ", "")
    assert not Path("ckpt").exists()


def test_tasks_are_found_by_class_name_and_imported_ones_do_not_count(folder):
    """A file of several tasks; `Classification`, which it imports, is none of them. Dataclasses find their module."""
    limit = "from dataclasses import dataclass\n@dataclass\nclass Limit:\n    value: 'float'\n"
    imported = "from vision_task import Classification\n"
    Path("two.py").write_text(f"{BRIGHT}{imported}{limit}class Other(Bright): best = 'eval/nll'\n")
    assert load_task("bright.py").__name__ == "Bright" and load_task("classification") is Classification
    assert load_task("two.py:Other").best == "eval/nll" and issubclass(load_task("two.py:Other"), Task)
    assert load_task("two.py:Other") is load_task(str(folder / "two.py:Other"))  # executed once


def test_an_edited_file_is_loaded_anew(folder):
    assert load_task("bright.py").best is None
    Path("bright.py").write_text(BRIGHT + "    best = 'eval/accuracy'\n")
    assert load_task("bright.py").best == "eval/accuracy"


def test_an_unknown_best_metric_is_one_line(folder, capsys):
    Path("bright.py").write_text(BRIGHT + "    best = 'eval/f1'\n")
    text = refused(capsys, train.main, "--config", "tiny.yaml", "task=bright.py")
    assert text.startswith("task: the best checkpoint is chosen by eval/f1, which is none of eval/accuracy, ")


def test_the_keys_of_a_task_are_checked_like_all_others(folder, capsys):
    """Its own by type; those of the three tasks are valid for every task; others get a suggestion."""
    config, task = configure(("test", {"task": "bright.py", "detection.box_std": 0.5}))
    assert config["bright"] == {"limit": 0.3} and config["detection"]["box_std"] == 0.5 and task.config is config
    assert message(configure, ("test", {"task": "bright.py", "bright.limit": "x"})).startswith("bright.limit: 'x' is")
    assert message(configure, ("test", {"task": "bright.py", "bright.limt": 1})).endswith("did you mean bright.limit?")
    assert message(configure, ("test", {"bright.limit": 1})).startswith("test: unknown key bright.limit")


def test_worker_processes_find_the_class_of_a_loaded_file(folder):
    """A decoder pickled here is read by a Python that has not loaded the file, as after spawn and forkserver."""
    task = configure(("tiny", {"task": "bright.py", "model.image_size": 8, "model.patch_size": 4}))[1]
    dataset = task.open("train")
    Path("decoder.pickle").write_bytes(bytes(ForkingPickler.dumps(_BatchDecoder(dataset, "error"))))
    code = "import pickle; print(pickle.load(open('decoder.pickle', 'rb'))[[0, 3]][2].sum().item())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(out.stdout) == int(dataset[0].sum()) + int(dataset[3].sum())


def test_a_run_works_with_spawned_workers(folder):
    """The same batches as without workers."""
    task = configure(("tiny", {"task": "bright.py", "model.image_size": 8, "model.patch_size": 4}))[1]
    dataset, seen = task.open("train"), []
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        for workers in (0, 1):
            batches = stream_batches(dataset, lambda _: torch.arange(24), 8, range(2), Loading(num_workers=workers))
            seen.append(torch.cat([batch.inputs for batch in batches]))
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert torch.equal(*seen)
