"""augment.py: crops, turns and colours against Pillow's own operations, with masks and boxes; what they depend on."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folders, make_scenes, message, refused, same
from PIL import Image, ImageEnhance
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import detection_task as det
import images
import train
from augment import Settings, augmentation, draw_crops, draw_turns, recoloured, turned
from build import configure, open_set
from checkpoint import load_checkpoint
from frame import MODES, Crop, Frame
from images import Loading, micro_batches, stream_batches

T = Image.Transpose
BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
BY_PILLOW = {  # transposed, left to right, upside down -> Pillow's operation
    **{(0, 0, 0): None, (0, 1, 0): T.FLIP_LEFT_RIGHT, (0, 0, 1): T.FLIP_TOP_BOTTOM, (0, 1, 1): T.ROTATE_180},
    **{(1, 0, 0): T.TRANSPOSE, (1, 0, 1): T.ROTATE_90, (1, 1, 0): T.ROTATE_270, (1, 1, 1): T.TRANSVERSE},
}
SIZES = [(60, 40), (37, 53), (48, 48)]  # of the files
BOXES = [[4, 6, 20, 9], [25, 20, 6, 11], [1, 30, 9, 8], [10, 17, 8, 5]]  # x y w h, in each


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """`boxes` and `masks` of the same noisy images: pixels of box i have the class i + 1."""
    monkeypatch.chdir(tmp_path)
    rng, rows = np.random.default_rng(0), []
    for name in ("boxes/images", "masks/images", "masks/masks"):
        Path(name).mkdir(parents=True)
    for i, (width, height) in enumerate(SIZES):
        image, mask = (
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
            Image.new("L", (width, height)),
        )
        for j, (x, y, w, h) in enumerate(BOXES):
            mask.paste(j + 1, (x, y, x + w, y + h))
            rows.append({"id": len(rows), "image_id": i, "category_id": j, "bbox": [x, y, w, h]})
        for path in ("boxes/images", "masks/images"):
            image.save(f"{path}/{i}.png")
        mask.save(f"masks/masks/{i}.png")
    files = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(SIZES)]
    categories = [{"id": i, "name": f"{i}"} for i in range(4)]
    Path("boxes/annotations.json").write_text(
        json.dumps({"images": files, "annotations": rows, "categories": categories})
    )
    Path("masks/classes.txt").write_text("none\na\nb\nc\nd")
    return tmp_path


def task_of(name: str, **keys):
    model = {"task": name, "model.patch_size": 4, "model.image_size": 24, "data.num_workers": 0}
    return configure(("x", model | {key.replace("__", "."): value for key, value in keys.items()}))[1]


def batch_of(task, crops: list[Crop] | None = None):
    """All images of the task's folder."""
    dataset = open_set(task, {"segmentation": "masks", "detection": "boxes"}[task.config["task"]])
    items = torch.stack([dataset.item(i, *([crops[i]] if crops else [])) for i in range(len(dataset))])
    return dataset, dataset.batch(torch.arange(len(dataset)), items, *([crops] if crops else []))


def extent(mask: torch.Tensor, value: int) -> list[int]:
    """x0 y0 x1 y1 of the pixels with this value."""
    rows, columns = np.nonzero(mask.numpy() == value)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def assert_boxes_are_those_of_the_masks(boxes, masks) -> int:
    """The class's pixels are those whose middle lies in the object's box (or on its edge); returns how many objects
    there were."""
    seen = 0
    for i in range(len(boxes)):
        for box, label in zip(boxes.metadata["boxes"][i], boxes.metadata["labels"][i].tolist()):
            if label >= 0 and (box[2:] - box[:2] > 1).all():
                assert (torch.tensor(extent(masks.targets[i], label + 1)) - box).abs().max() <= 0.5 + 1e-3
                seen += 1
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [24, [24, 36], [36, 24]], ids=str)
def test_turns_are_pillows(folder, mode, size):
    """All eight, or the four that keep a shape: images, masks, boxes, what patches are given, and which count."""
    keys = {"model__image_size": size, "data__resize": mode}
    tasks = task_of("segmentation", **keys), task_of("detection", **keys)
    (_, masks), (dataset, boxes) = (batch_of(task) for task in tasks)
    assert_boxes_are_those_of_the_masks(boxes, masks)
    for turn, operation in BY_PILLOW.items():
        if turn[0] and size != 24:
            continue
        turns = torch.tensor([turn] * 3, dtype=torch.bool)
        found_masks, found = (task.turn(batch, turns) for task, batch in zip(tasks, (masks, boxes)))
        ignored = masks.targets.where(masks.counted, 255).to(torch.uint8)
        for i in range(3):
            by_pillow = [
                Image.fromarray(x.numpy()) for x in (ignored[i], masks.inputs[i].permute(1, 2, 0).contiguous())
            ]
            if operation is not None:
                by_pillow = [picture.transpose(operation) for picture in by_pillow]
            target = found_masks.targets[i].where(found_masks.counted[i], 255)
            np.testing.assert_array_equal(target.numpy(), np.asarray(by_pillow[0]))
            for inputs in (found_masks.inputs, found.inputs):
                np.testing.assert_array_equal(inputs[i].permute(1, 2, 0).numpy(), np.asarray(by_pillow[1]))
        assert assert_boxes_are_those_of_the_masks(found, found_masks) >= 8
        targets, counted = det.right_actions(found.metadata, dataset.image_size)
        torch.testing.assert_close(found.targets, targets, atol=1e-5, rtol=0)
        assert torch.equal(found.counted, counted)
        if not turn[0]:
            assert found.counted.sum() == boxes.counted.sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [24, [24, 36], [36, 24]], ids=str)
def test_crops_are_pillows(folder, mode, size):
    """Images, masks and boxes of the same crop, cut from the file's own pixels."""
    keys = {"model__image_size": size, "data__resize": mode}
    seen = 0
    for step in range(6):
        crops = draw_crops(step, 0, 3, (0.3, 0.9))
        (data, masks), (_, boxes) = (batch_of(task_of(name, **keys), crops) for name in ("segmentation", "detection"))
        for i, crop in enumerate(crops):
            place = data.image_size.place(SIZES[i], crop)
            x0, y0, x1, y1 = place.content
            for path, method, found in (
                (f"masks/images/{i}.png", BICUBIC, masks.inputs[i].permute(1, 2, 0)),
                (f"masks/masks/{i}.png", NEAREST, masks.targets[i]),
            ):
                expected = Image.open(path).resize((x1 - x0, y1 - y0), method, place.region)
                np.testing.assert_array_equal(found[y0:y1, x0:x1].numpy(), np.asarray(expected))
            assert masks.counted[i].sum() == (x1 - x0) * (y1 - y0)
        low, high = boxes.metadata["content"][:, None, :2], boxes.metadata["content"][:, None, 2:]
        real, placed = boxes.metadata["labels"] >= 0, boxes.metadata["boxes"]
        assert ((placed[..., :2] >= low) & (placed[..., 2:] <= high)).all(-1)[real].all()
        seen += assert_boxes_are_those_of_the_masks(boxes, masks)
    assert seen > 20


def test_crops_are_drawn_like_torchvisions():
    """The share of the area, the shape beside the input's, and that all places are reached."""
    crops, frame, size = draw_crops(0, 0, 2000, (0.2, 0.5)), Frame(30, 60), (400, 300)
    regions = torch.tensor([crop.region(size, frame) for crop in crops], dtype=torch.float64)
    wide, high = regions[:, 2] - regions[:, 0], regions[:, 3] - regions[:, 1]
    share, shape = wide * high / (400 * 300), wide / high / 2
    assert 0.195 < share.min() < 0.21 and 0.49 < share.max() < 0.505
    assert 0.74 < shape.min() < 0.76 and shape.max() < 1.35
    assert (regions[:, :2] >= 0).all() and regions[:, 2].max() == 400 and regions[:, 3].max() == 300
    assert Crop(1.0, 0.9, 0.3, 0.9).region((400, 100), frame) == (0, 0, 400, 100)  # the only shape that fits


@pytest.mark.parametrize("augment, count", [({"flip": "h"}, 2), ({"flip": "hv"}, 4), ({"rotate90": True}, 4)])
def test_each_turn_is_as_frequent(augment, count):
    turns = draw_turns(torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)), Settings.of(augment))
    kinds, counts = turns.unique(dim=0, return_counts=True)
    assert len(kinds) == count == Settings.of(augment).turns and (counts / 4000 - 1 / count).abs().max() < 0.03
    assert Settings.of({"flip": "v", "rotate90": True}).turns == 8 and Settings.of(False).turns == 1


def test_colours_are_pillows():
    """Each alone differs by rounding only: Pillow cuts off after each step, and takes a whole number for the mean. All
    three come in Pillow's order: in any other their mean difference would be eight times as large."""
    pixels = torch.randint(0, 256, (5, 3, 9, 7), dtype=torch.uint8)
    all_three = torch.tensor([[1.5, 0.4, 1.8], [0.5, 1.8, 0.3], [1.8, 0.6, 1.5], [0.7, 1.3, 1.6], [1.3, 1.7, 0.4]])

    def differences(factors):
        for found, image, own in zip(recoloured(pixels, factors), pixels, factors.tolist()):
            expected = Image.fromarray(image.permute(1, 2, 0).numpy())
            for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), own):
                expected = enhance(expected).enhance(factor)
            yield np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))

    for i in range(3):
        alone = torch.ones(5, 3)
        alone[:, i] = torch.rand(5) * 2
        assert max(found.max() for found in differences(alone)) <= 2
    assert np.mean(list(differences(all_three))) < 1.5
    assert torch.equal(recoloured(pixels, torch.ones(5, 3)), pixels)


ALL = {"crop": [0.3, 0.8], "flip": "hv", "color": 0.4, "rotate90": True}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_draws_depend_on_the_step_alone(folder, monkeypatch):
    """Neither on the first step, workers, processes nor micro-batches; another step has others."""
    task = task_of("detection", data__augment=ALL)
    dataset, augment = open_set(task, "boxes"), augmentation(task)
    crops = partial(draw_crops, seed=0, count=6, shares=(0.3, 0.8))

    def seen(steps: range, size: int = 6, workers: int = 0, rank: int = 0, world: int = 1) -> list:
        monkeypatch.setattr(images, "rank_and_world", lambda: (rank, world))
        part = slice(rank * 6 // world, (rank + 1) * 6 // world)
        options = {"loading": Loading(num_workers=workers), "part": part, "crops": crops}
        stream = stream_batches(dataset, lambda epoch: torch.arange(3), 6, steps, **options)
        parts = [p for step, batch in zip(steps, stream) for _, p in micro_batches(batch, size, (0, step), augment)]
        return [torch.cat([p.inputs.flatten(1), p.targets.flatten(1), p.counted.flatten(1)], 1) for p in parts]

    whole = seen(range(3))
    assert not any(torch.equal(a, b) for a in whole[0] for b in whole[1])
    assert same(seen(range(1, 3), workers=1), whole[1:])
    assert torch.equal(torch.cat(seen(range(2), size=4)), torch.cat(whole[:2]))
    halves = zip(*(seen(range(2), rank=rank, world=2) for rank in (0, 1)))
    assert same([torch.cat(pair) for pair in halves], whole[:2])


@pytest.mark.parametrize(
    "value, expected",
    [
        (True, True),
        ({"flip": True}, {"flip": "h"}),
        ({"crop": [0.3, 1], "color": "4e-1", "flip": False, "rotate90": False}, {"crop": [0.3, 1.0], "color": 0.4}),
        ({"color": 0}, False),
    ],
)
def test_what_the_key_takes(value, expected):
    assert configure(("x", {"data.augment": value}))[0]["data"]["augment"] == expected


WRONG = [
    {"crop": [0.3]},
    {"crop": [0, 1]},
    {"crop": [0.9, 0.3]},
    {"crop": 0.3},
    {"flip": "x"},
    {"color": 2},
    {"zoom": 1},
]
WRONG += [{"rotate90": 1}, {"rotate90": "yes"}, {"flip": ["h"]}, [], "h", 1, None, {1: 2}]


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_what_it_does_not_take(value):
    assert message(configure, ("x", {"data.augment": value})).startswith("data.augment: ")


def test_a_run(tmp_path, monkeypatch, capsys):
    """With all of it: resumed it ends in the same bits, its first event shows the batch, no cache is used."""
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    make_scenes.main(["--train", "20", "--eval", "4", "--size", "16", "--out", "scenes"])
    for task, train_dir in (("detection", "scenes/train"), ("classification", "train")):
        keys = ["--config", "tiny.yaml", f"task={task}", f"data.train_dir={train_dir}", "data.eval_dir=null"]
        keys += [f"data.augment={ALL}".replace("'", ""), "training.freeze_blocks=1", "data.resize=letterbox"]
        assert train.main([*keys, f"training.run_name={task}", "training.steps=4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "frozen blocks: run again each epoch (data.augment: each step has other crops or colours)" in lines
        assert any(line.endswith("those of training are cropped anew each time (data.augment)") for line in lines)
        own = [f"training.ckpt_dir={task}", f"training.log_dir={task}/logs"]
        own += ["training.min_learning_rate=0.001", "training.warmup_steps=0"]
        assert train.main([*keys, *own, "training.steps=2", "training.run_name=two"]) == 0
        assert train.main(["--resume", f"{task}/two", "training.steps=4", "data.num_workers=1"]) == 0
        assert train.main([*keys, *own, "training.steps=4", "training.run_name=whole"]) == 0
        assert same(*(load_checkpoint(Path(task, name))["model"] for name in ("two", "whole")))
        events = EventAccumulator(f"logs/{task}", size_guidance={"images": 0})
        events.Reload()
        (picture,) = events.Images("train/first_batch")
        assert picture.step == 1 and picture.width >= 4 * 192


OWN = """
import torch
from images import ImageDataset, decode_image
from vision_task import Classification, Task, VisionClassificationDataset
class Own(VisionClassificationDataset):
    def __getitem__(self, index):
        return decode_image(self.paths[index], self.image_size)
class Mine(Classification):
    def open(self, root, classes=None):
        return Own(root, self.config["model"]["image_size"], classes)
    def mirror(self, batch):
        return batch
"""


def test_a_task_that_cannot(tmp_path, monkeypatch, capsys):
    """One line where a data set decodes by itself, or targets move by `mirror` alone; and for rotated rectangles."""
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    keys = ["--config", "tiny.yaml", "task=own.py"]
    text = refused(capsys, train.main, *keys, "data.augment={crop: [0.5, 1]}")
    assert text == "data.augment: crop: the task's data set decodes images itself; it needs `ImageDataset.item`"
    text = refused(capsys, train.main, *keys, "data.augment={flip: v}")
    assert text.startswith("data.augment: the task moves its targets by `mirror` alone")
    text = refused(capsys, train.main, *keys, "data.augment={rotate90: true}", "model.image_size=[8, 16]")
    assert text == "data.augment: rotate90 needs a square input, not model.image_size: [8, 16]"


def test_turned_needs_no_square_for_flips():
    x = torch.arange(12).view(1, 3, 4)
    assert torch.equal(turned(x, torch.tensor([[False, True, True]])), x.flip(-1).flip(-2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [24, [24, 36], [36, 24]], ids=str)
def test_the_right_answer_comes_back_in_the_files_own_pixels(folder, mode, size):
    """Boxes that a crop leaves whole are the annotation's; the metric is one of all objects, those cut off too."""
    task = task_of("detection", model__image_size=size, data__resize=mode, model__patch_size=2)
    dataset, batch = batch_of(task)
    classes = torch.nn.functional.one_hot(batch.targets[:, 0, :, 0].long(), 5) * 20.0
    outputs = torch.cat([classes, batch.targets[:, 1]], -1)
    seen, cut = 0, 0
    for i, file_size in enumerate(SIZES):
        record, width = task.describe(outputs[i][None], f"boxes/images/{i}.png", dataset.classes)
        x0, y0, x1, y1 = dataset.image_size.place(file_size).region
        assert width == file_size[0]
        for found in record["boxes"]:
            x, y, w, h = BOXES[int(found["class"])]
            true = [max(x, x0), max(y, y0), min(x + w, x1), min(y + h, y1)]
            assert found["box"] == pytest.approx(true, abs=1e-3)
            seen, cut = seen + 1, cut + (true != [x, y, x + w, y + h])
    evaluation = task.evaluation(dataset)
    evaluation.add(batch, outputs, outputs[:, None])
    metrics = evaluation.metrics()
    assert 12 >= seen >= 8 and (mode == "crop" or not cut)
    assert (metrics["eval/f1"] == 1) == (seen == 12) and (metrics["eval/map"] > 0.999) == (seen == 12 and not cut)
