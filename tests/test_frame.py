"""frame.py: stretched, letterboxed and cropped images, masks and boxes of any shape, against Pillow's operations."""

import json

import numpy as np
import pytest
import torch
from conftest import message
from PIL import Image

from build import build_model, configure
from detection_task import DetectionDataset, decode, detection_f1_reward, pack, visible
from frame import MODES, Frame, to_file, to_input
from images import decode_image
from mask_files import decode_mask
from pretrained import load_weights
from segmentation_task import SegmentationDataset

BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
PADDING = (10, 20, 30)
# of a file of 60x40 pixels in 24x24 and in 24 (high) x 48, and of 40x60: what of the file, where in the input
PLACES = {
    ("letterbox", (60, 40), (24, 24)): ((0, 0, 60, 40), (0, 4, 24, 20)),
    ("letterbox", (60, 40), (24, 48)): ((0, 0, 60, 40), (6, 0, 42, 24)),
    ("letterbox", (40, 60), (24, 48)): ((0, 0, 40, 60), (16, 0, 32, 24)),
    ("crop", (60, 40), (24, 24)): ((10, 0, 50, 40), (0, 0, 24, 24)),
    ("crop", (60, 40), (24, 48)): ((0, 5, 60, 35), (0, 0, 48, 24)),
    ("crop", (40, 60), (24, 48)): ((0, 20, 40, 40), (0, 0, 48, 24)),
    ("stretch", (60, 40), (24, 24)): ((0, 0, 60, 40), (0, 0, 24, 24)),
    ("stretch", (40, 60), (24, 48)): ((0, 0, 40, 60), (0, 0, 48, 24)),
}


def by_pillow(image: Image.Image, mode: str, size: tuple[int, int], method, padding) -> np.ndarray:
    """Pillow's crop, resize and paste by the table."""
    region, content = PLACES[mode, image.size, size]
    part = image.resize((content[2] - content[0], content[3] - content[1]), method, region)
    whole = Image.new(image.mode, size[::-1], padding)
    whole.paste(part, content[:2])
    return np.asarray(whole)


@pytest.mark.parametrize("mode, size, input_size", PLACES)
def test_image_mask_and_boxes_lie_where_pillow_puts_them(tmp_path, mode, size, input_size):
    """A box drawn into the file is found, pixel for pixel, where `to_input` puts it; `restore` brings a mask back."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, mask = Image.fromarray(pixels), Image.fromarray(pixels[..., 0] % 3)
    image.save(tmp_path / "x.png")
    mask.save(tmp_path / "m.png")
    frame = Frame(*input_size, mode, PADDING)
    found = decode_image(str(tmp_path / "x.png"), frame).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, by_pillow(image, mode, input_size, BICUBIC, PADDING))
    ids = np.arange(256, dtype=np.uint8)
    found = decode_mask(str(tmp_path / "m.png"), frame, ids)
    np.testing.assert_array_equal(found.numpy(), by_pillow(mask, mode, input_size, NEAREST, 255))

    box, placement = (20, 22, 32, 30), frame.place(size)
    drawn = Image.new("L", size)
    drawn.paste(1, box)
    drawn.save(tmp_path / "box.png")
    rows, columns = np.nonzero(decode_mask(str(tmp_path / "box.png"), frame, ids).numpy() == 1)
    affine = torch.tensor(placement.affine(), dtype=torch.float64)
    placed = to_input(torch.tensor(box, dtype=torch.float64), affine)
    # a pixel is the box's if its middle is in it
    expected = torch.cat([(placed[:2] - 0.5).ceil(), (placed[2:] - 0.5).ceil()]).tolist()
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == expected
    torch.testing.assert_close(to_file(placed, affine), torch.tensor(box, dtype=torch.float64))

    back = np.asarray(
        placement.restore(Image.fromarray(np.asarray(by_pillow(mask, mode, input_size, NEAREST, 9))), 255)
    )
    x0, y0, x1, y1 = placement.region
    seen = back[y0:y1, x0:x1]
    assert back.shape == size[::-1] and set(np.unique(seen)) == {0, 1, 2}
    assert (back == 255).sum() == back.size - seen.size


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_wide_jpeg_is_decoded_at_a_part_of_its_size(tmp_path, orientation):
    """Turned by EXIF or not; the same within JPEG's losses as from all of its pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    upright, exif = Image.fromarray(noise).resize((900, 600), BICUBIC), Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "x.jpg", quality=95, exif=exif)
    upright.save(tmp_path / "x.png")
    for mode in MODES:
        jpg, png = (decode_image(str(tmp_path / f"x.{kind}"), Frame(40, 96, mode)).int() for kind in ("jpg", "png"))
        assert (jpg - png).abs().float().mean() < 2


def coco(root, size: tuple[int, int], boxes: list) -> None:
    (root / "images").mkdir(parents=True)
    Image.new("RGB", size, (200, 0, 0)).save(root / "images" / "a.png")
    rows = [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    image = {"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}
    data = {"images": [image], "annotations": rows, "categories": [{"id": 1, "name": "cell"}]}
    (root / "annotations.json").write_text(json.dumps(data))


def test_boxes_of_a_letterboxed_and_of_a_cropped_image(tmp_path):
    """Letterbox: all are there, patches in the padding do not count. Crop: cut, or gone; the metric knows them all.
    Detections are cut at the image, not at the input."""
    coco(tmp_path, (64, 32), [[0, 0, 16, 32], [20, 8, 16, 16], [12, 0, 8, 8]])
    batch = DetectionDataset(str(tmp_path), Frame(32, 32, "letterbox"), 4).batch(
        torch.tensor([0]), torch.zeros(1, 3, 32, 32)
    )
    assert batch.metadata["boxes"][0].tolist() == [[0, 8, 8, 24], [10, 12, 18, 20], [6, 8, 10, 12]]
    assert batch.metadata["content"].tolist() == [[0, 8, 32, 24]]
    rows = batch.counted[0, 0].view(8, 8).all(1).tolist()
    assert rows == [False] * 2 + [True] * 4 + [False] * 2 and not batch.counted[0, 1].view(8, 8)[:2].any()

    dataset = DetectionDataset(str(tmp_path), Frame(32, 32, "crop"), 4)  # x from 16 to 48
    batch = dataset.batch(torch.tensor([0]), torch.zeros(1, 3, 32, 32))
    assert batch.metadata["labels"].tolist() == [[-1, 0, 0]]
    assert batch.metadata["boxes"][0].tolist() == [[0, 0, 0, 0], [4, 8, 20, 24], [0, 0, 4, 8]]
    assert dataset.boxes[0].tolist() == [[-16, 0, 0, 32], [4, 8, 20, 24], [-4, 0, 4, 8]]

    config = configure(("x", {"task": "detection", "model.image_size": 32, "data.resize": "letterbox"}))[0]
    config["model"]["patch_size"] = 16
    probs, raw = torch.tensor([[[0.9, 0.1]]]).expand(1, 4, 2), torch.tensor([0, 0, 9.0, 9.0]).expand(1, 4, 4)
    [found] = decode(probs, raw, config, torch.tensor([[0.0, 8, 32, 24]]))
    assert found["boxes"].tolist() == [[0, 8, 32, 24]]


def test_patches_in_the_padding_find_nothing(tmp_path):
    """Of eight rows of patches that all say `cell` the four in the image count: for detections, F1, the reward."""
    coco(tmp_path, (64, 32), [[0, 0, 8, 8]])  # that of the first patch, at half its size
    config = {"task": "detection", "model.image_size": 32, "model.patch_size": 4, "data.resize": "letterbox"}
    task = configure(("x", config | {"data.augment": True}))[1]
    dataset = task.open(str(tmp_path))
    batch = dataset.batch(torch.tensor([0]), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    outputs = torch.tensor([3.0, 0, 0, 0, 0, 0]).expand(1, 64, 6)  # cell, nothing; a box of the patch itself
    [found] = decode(outputs[..., :2].softmax(-1), outputs[..., 2:], task.config, batch.metadata["content"])
    assert len(found["boxes"]) == 32 and found["boxes"][:, 1].min() == 8 and found["boxes"][:, 3].max() == 24

    evaluation = task.evaluation(dataset)
    evaluation.add(batch, outputs, outputs[:, None])
    assert evaluation.counts.tolist() == [[1, 32, 1]] * 2  # hits, detections, objects
    actions = pack(torch.zeros(1, 64), outputs[..., 2:])[:, None, None]
    reward = detection_f1_reward(actions, outputs[:, None], batch.targets, batch.metadata)
    assert reward.tolist() == [[[pytest.approx(2 / 33)]]]


@pytest.mark.parametrize("size", [(640, 16), (16, 640)])
def test_a_thin_letterboxed_image_still_has_patches(tmp_path, size):
    """One pixel of 32, which is no patch's centre: those that hold its middle count."""
    coco(tmp_path, size, [[0, 0, 16, 16]])
    batch = DetectionDataset(str(tmp_path), Frame(32, 32, "letterbox"), 4).batch(
        torch.tensor([0]), torch.zeros(1, 3, 32, 32)
    )
    rows = batch.counted[0, 0].view(8, 8)
    assert (rows if size[0] > size[1] else rows.T).all(1).tolist() == [False] * 3 + [True] + [False] * 4


@pytest.mark.parametrize("name", ["segmentation", "detection"])
def test_uncertainty_is_that_of_the_image_not_of_the_padding(tmp_path, name):
    """The network is sure of the image, the middle half, and in doubt above and below it."""
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    keys = {"task": name, "model.image_size": 32, "model.patch_size": 8, "data.resize": "letterbox"}
    task = configure(("x", keys))[1]
    shape = (2, 32, 32, 2) if name == "segmentation" else (2, 4, 4, 2 + 4)
    outputs = torch.zeros(shape)
    outputs[:, shape[1] // 4 : 3 * shape[1] // 4, :, 0] = 50
    outputs = outputs if name == "segmentation" else outputs.flatten(1, 2)
    record, _ = task.describe(outputs, str(tmp_path / "a.png"), ["a", "b"])
    assert record["predictive_entropy"] < 1e-6 and task.uncertainty(outputs)["predictive_entropy"] > 0.3


def test_what_is_left_of_a_box():
    """A quarter, with the centre inside, is enough; a crowd is only cut."""
    boxes = torch.tensor([[-4.0, 0, 4, 4], [-4.1, 0, 4, 4], [-3, -3, 5, 5], [-7, 0, 1, 4], [9, 9, 10, 10]])[None]
    labels, crowd = torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[False, False, False, True, False]])
    found = visible(boxes, labels, crowd, torch.tensor([[0.0, 0, 8, 8]]))
    assert found["labels"].tolist() == [[0, -1, 0, 0, -1]]
    assert found["boxes"][0, [0, 2, 3]].tolist() == [[0, 0, 4, 4], [0, 0, 5, 5], [0, 0, 1, 4]]


def test_padding_of_masks_does_not_count(tmp_path):
    for folder, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / folder).mkdir()
        Image.new(mode, (16, 8), 1 if mode == "L" else PADDING).save(tmp_path / folder / "a.png")
    (tmp_path / "classes.txt").write_text("a\nb")
    dataset = SegmentationDataset(str(tmp_path), Frame(8, 8, "letterbox", (1, 2, 3)))
    batch = dataset.batch(torch.tensor([0]), dataset[0][None])
    assert batch.counted[0].all(1).tolist() == [False] * 2 + [True] * 4 + [False] * 2
    assert batch.inputs[0, :, 0, 0].tolist() == [1, 2, 3] and batch.targets[0, 2:6].unique().tolist() == [1]


def test_a_wide_network_and_its_checkpoints(tmp_path):
    """[8, 16] at patch 4: a grid of 2 x 4, whose 9 entries are not taken for a square's. Another grid is resampled; a
    shape that repeats along x is found again; [8, 8] is 8."""
    keys = {
        "model.patch_size": 4,
        "model.embed_dim": 8,
        "model.depth": 1,
        "model.num_heads": 1,
        "model.dropout_blocks": 1,
    }
    tasks = [configure(("x", keys | {"model.image_size": size}))[1] for size in ([8, 16], [16, 8], [8, 8])]
    wide, high, square = (build_model(task, 2, torch.device("cpu")) for task in tasks)
    assert wide.grid == (2, 4) and wide(torch.zeros(1, 3, 8, 16)).shape == (1, 2) and square.grid == (2, 2)
    assert tasks[2].config["model"]["image_size"] == 8
    ramp = torch.arange(2.0).view(2, 1, 1).expand(2, 4, 8)
    with torch.no_grad():
        wide.pos_embed[:, 1:] = ramp.reshape(1, 8, 8)
    state = {"model": wide.state_dict(), "config": tasks[0].config, "classes": ["a", "b"], "step": 1}
    torch.save(state, tmp_path / "x.pt")
    assert "resampled from 2x4 to 4x2" in load_weights(high, str(tmp_path / "x.pt"))
    found = high.pos_embed[0, 1:].view(4, 2, 8)
    assert torch.allclose(found[:, :1], found, atol=1e-6) and (found[1:] > found[:-1]).all()
    del state["config"]["model"]["image_size"]
    torch.save(state, tmp_path / "x.pt")
    assert "not those of a class token and a square grid" in message(load_weights, high, str(tmp_path / "x.pt"))


@pytest.mark.parametrize("size", [[10, 16], [16], [0, 16], [8, 8, 8], "wide", [8.5, 8], True, []])
def test_sizes_that_are_refused(size):
    text = message(configure, ("x", {"model.image_size": size, "model.patch_size": 4 if size != [16] else 5}))
    assert text.startswith("model.image_size: ")
