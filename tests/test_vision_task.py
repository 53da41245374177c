"""vision_task.py: the image folder, the reward, and what a task has by default and as classification."""

import os
import unicodedata

import pytest
import torch
from conftest import message
from PIL import Image
from torch.distributions import Bernoulli, Categorical

from data_types import TensorMiniBatch
from folders import SUFFIXES
from grpo import keyed_rng
from images import ordered_batches
from vision_task import Classification, Task, VisionClassificationDataset, classification_reward


def make(root, *names: str) -> str:
    """A folder of images of one pixel and of other files, each with the number of its place as its value."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("png"):
            Image.new("L", (1, 1), i).save(root / name)
        else:
            (root / name).touch()
    return str(root)


def test_class_ids_are_the_sorted_subdirectories_of_the_training_folder(tmp_path):
    """Whatever the order of creation; hidden folders and loose files are no classes. A batch has pixels, targets and
    names of its files. Classes that an evaluation folder lacks, or has without images, leave the ids of the others."""
    root = make(tmp_path / "train", "cat/1.png", "ant/z.png", "ant/a/b.png", "bee/x.png", ".git/y.png", "loose.png")
    dataset = Classification({"model": {"image_size": 2}}).open(root)
    assert dataset.classes == ["ant", "bee", "cat"] and len(dataset) == 4 and dataset.targets.dtype == torch.int64
    [batch] = ordered_batches(dataset, 9)
    assert batch.metadata["paths"] == [f"{root}/{p}" for p in ("ant/a/b.png", "ant/z.png", "bee/x.png", "cat/1.png")]
    assert batch.targets.tolist() == [0, 0, 1, 2] and batch.metadata["indices"].tolist() == [0, 1, 2, 3]
    assert torch.equal(batch.inputs, torch.tensor([2, 1, 3, 0], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2))
    evaluation = VisionClassificationDataset(make(tmp_path / "eval", "cat/1.png", "ant/a.txt"), 2, dataset.classes)
    assert evaluation.classes == dataset.classes and evaluation.targets.tolist() == [2]


def test_numbers_are_in_their_order_and_checkpoints_keep_theirs(tmp_path):
    """1, 2, 10; a checkpoint of an earlier version has 1, 10, 2, and its images in that order. A class of other code
    points is the same. What is not read is said."""
    root = make(tmp_path / "train", "10/a.png", "2/b.png", "1/c.png", "1/d.heic", "e.png")
    dataset = VisionClassificationDataset(root, 2)
    assert dataset.classes == ["1", "2", "10"] and dataset.targets.tolist() == [0, 1, 2]
    assert [note[:20] for note in dataset.notes] == ["not read: 1 .heic (t", "not read: 1 images b"]
    older = VisionClassificationDataset(root, 2, ["1", "10", "2"])
    assert older.paths == [f"{root}/{name}" for name in ("1/c.png", "10/a.png", "2/b.png")]
    assert older.classes == ["1", "10", "2"] and older.targets.tolist() == [0, 1, 2]
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    one, other = make(tmp_path / "nfc", f"{composed}/1.png", "x/1.png"), make(tmp_path / "nfd", f"{decomposed}/1.png")
    for classes in (VisionClassificationDataset(one, 2).classes, [decomposed, "x"]):
        assert VisionClassificationDataset(other, 2, classes).targets.tolist() == [0]


def test_folder_errors_are_one_line_naming_the_folder(tmp_path):
    hint = "it should hold one subdirectory of images per class"
    suffixes = " ".join(SUFFIXES)
    train = make(tmp_path / "train", "ant/1.png", "bee/notes.txt")
    evaluation, one = make(tmp_path / "eval", "ant/notes.txt"), make(tmp_path / "one", "ant/1.png")
    wrapped, splits = (
        make(tmp_path / "a", "pets/ant/1.png", "pets/bee/1.png"),
        make(tmp_path / "b", "pets/test/ant/1.png"),
    )
    make(tmp_path / "b", "pets/train/ant/1.png")
    os.symlink(one, f"{one}/itself")
    alone = "only one class, pets; there is nothing to tell it from"
    for root, classes, expected in (
        (f"{tmp_path}/missing", None, f"no such folder; {hint}"),
        (f"{train}/ant/1.png", None, f"a file; {hint}"),
        (make(tmp_path / "empty", ".hidden/1.png"), None, f"no subdirectories; {hint}"),
        (train, ["cat"], "classes unknown in the training folder: ant, bee"),
        (evaluation, ["ant"], f"no images ({suffixes}) in its subdirectories"),
        (one, None, "only one class, ant; there is nothing to tell it from"),
        (wrapped, None, f"{alone}; if ant, bee are the classes, name {wrapped}/pets"),
        (splits, None, f"{alone}; if test, train are splits, name {splits}/pets/train"),
    ):
        assert message(Classification({"model": {"image_size": 8}}).open, root, classes) == f"{root}: {expected}"
    assert (
        message(VisionClassificationDataset, train, 8) == f"{train}/bee: no images ({suffixes}); add some or remove it"
    )


def test_reward_of_each_action():
    """1.0 where it is the image's class, 0.0 elsewhere, [B, T, A]."""
    actions = torch.tensor([[[0, 1, 2], [2, 0, 0]], [[1, 1, 0], [0, 2, 1]]])
    rewards = classification_reward(actions, torch.zeros(2, 2, 3), torch.tensor([0, 1]), {})
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]


class Votes(Task):
    """An action is a yes or no for each of the outputs."""

    def policy(self, outputs, progress=1.0):
        return Bernoulli(logits=outputs)


@pytest.mark.parametrize("task, kind, shape", [(Task, Categorical, (4, 10)), (Votes, Bernoulli, (3, 4, 2))])
def test_uncertainty_is_the_mean_over_the_elements(task, kind, shape):
    """Of H(mean of p), and of H(mean of p) - mean of H(p)."""
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    passes = outputs.sigmoid() if task is Votes else outputs.softmax(-1)
    total = kind(passes.mean(0)).entropy()
    mutual = total - kind(passes).entropy().mean(0)
    expected = {"predictive_entropy": float(total.mean()), "mutual_information": float(mutual.mean())}
    assert task({}).uncertainty(outputs) == pytest.approx(expected) and min(expected.values()) > 0


def test_mirror_turns_each_image_with_probability_one_half():
    """Those that the key says, about half (4 standard deviations), and nothing else."""
    x = torch.randint(0, 256, (2000, 3, 2, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = TensorMiniBatch(x.clone(), torch.arange(2000), {"indices": torch.arange(2000)})

    def turned(key: str) -> torch.Tensor:
        with keyed_rng(key):
            got = Task({}).mirror(batch)
        chosen = (got.inputs != x).flatten(1).any(1)
        assert torch.equal(got.inputs[chosen], x[chosen].flip(-1)) and torch.equal(batch.inputs, x)
        assert got.targets is batch.targets and got.metadata is batch.metadata
        return chosen

    first = turned("a")
    assert abs(int(first.sum()) - 1000) < 4 * (2000 / 4) ** 0.5
    torch.manual_seed(123)
    assert torch.equal(turned("a"), first) and 800 < int((turned("b") != first).sum()) < 1200
