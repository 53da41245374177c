"""Masks as people and tools write them: what is read, what a pixel value stands for, what is refused, what is said."""

import json
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, message
from PIL import Image

import mask_files
import predict
import train
from build import configure
from checkpoint import load_checkpoint
from data_types import InputError
from mask_files import class_ids, decode_mask, read_classes
from segmentation_task import SegmentationDataset

TASK = {"task": "segmentation", "model.image_size": 2, "model.patch_size": 2}
NAMES = "background\nthing\n"
BINARY = [[0, 255], [255, 0]]


def folder(root, masks, classes=NAMES, suffix=".png", **options):
    """images/ and masks/ in `root`: a mask of each picture, or grey levels, named 0, 1, …"""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i, mask in enumerate(masks):
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(np.array(mask, dtype=np.uint8))
        Image.new("RGB", mask.size).save(root / "images" / f"{i}.jpg")
        mask.save(root / "masks" / f"{i}{suffix}", **options)
    if classes is not None:
        (root / "classes.txt").write_bytes(classes.encode())
    return str(root)


def opened(root, *layers, classes=None):
    """The data set as a run opens it, and the run's task."""
    task = configure(("test", TASK), *layers)[1]
    return task.open(root, classes), task


def targets(dataset):
    """What a run learns from: class ids, 255 where nothing counts, of all masks at image_size."""
    batch = dataset.batch(torch.arange(len(dataset)), torch.stack([dataset[i] for i in range(len(dataset))]))
    return torch.where(batch.counted, batch.targets, 255).tolist()


def lines(function, *arguments) -> list[str]:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value).splitlines()


# --- What 255 is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [NAMES, None])
def test_masks_of_0_and_255_have_a_foreground_and_the_checkpoint_keeps_it(tmp_path, classes):
    """For the evaluation folder, a resumed run and predict.py, even where no mask of theirs would tell."""
    dataset, task = opened(folder(tmp_path / "train", [BINARY, [[0, 0], [0, 255]]], classes))
    assert targets(dataset) == [[[0, 1], [1, 0]], [[0, 0], [0, 1]]]
    assert dataset.classes == ["background", "thing" if classes else "foreground"]
    assert any(
        f"255 is read as 1 {dataset.classes[1]} (segmentation.value_255: foreground)" in n for n in dataset.notes
    )
    assert task.config["segmentation"]["value_255"] == "foreground"
    checkpoint = ("checkpoint", {"segmentation.value_255": task.config["segmentation"]["value_255"]})
    for i, mask in enumerate(([[0, 255], [0, 0]], [[0, 1], [0, 0]], [[255, 1], [0, 0]])):
        evaluated = opened(folder(tmp_path / f"eval{i}", [mask]), checkpoint, classes=["background", "thing"])[0]
        assert targets(evaluated) == [[[int(v > 0) for v in row] for row in mask]]
    assert evaluated.notes[0].startswith("pixel value 255 is read as 1 thing, and so is 1 (")


def test_a_run_and_its_predictions_follow_the_training_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split, mask in (("train", BINARY), ("eval", [[255, 255], [0, 255]])):
        folder(tmp_path / split, [mask] * 2)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(TINY | {"task": "segmentation"}))
    assert train.main(["--config", "x.yaml", "training.steps=2"]) == 0
    note = "pixel value 255 is read as 1 thing (segmentation.value_255: foreground)"
    out = capsys.readouterr().out
    assert f"note: train: {note}" in out and f"note: eval: {note}" in out
    assert load_checkpoint(Path("ckpt/x"))["config"]["segmentation"]["value_255"] == "foreground"
    assert train.main(["--resume", "ckpt/x", "training.steps=3"]) == train.main(["--evaluate", "ckpt/x"]) == 0
    assert capsys.readouterr().out.count(f"note: eval: {note}") == 2
    assert predict.main(["ckpt/x", "--evaluate", "eval", "--json"]) == 0
    assert "eval/iou/thing" in json.loads(capsys.readouterr().out)["figures"]
    assert predict.main(["ckpt/x", "eval/images", "--out", "out"]) == 0
    with Image.open("out/masks/0.png") as found:
        assert set(np.unique(found)) <= {0, 1}


@pytest.mark.parametrize(
    "mask, classes, key, expected",
    [
        ([[0, 1], [255, 0]], None, "auto", [[0, 1], [255, 0]]),
        ([[0, 1], [255, 0]], NAMES, "auto", [[0, 1], [255, 0]]),
        ([[0, 1], [255, 0]], NAMES, "foreground", [[0, 1], [1, 0]]),
        ([[0, 1], [1, 0]], None, "auto", [[0, 1], [1, 0]]),
        ([[2, 1], [255, 0]], "a\nb\nc", "auto", [[2, 1], [255, 0]]),
        ([[1, 1], [255, 1]], NAMES, "auto", [[1, 1], [255, 1]]),
    ],
)
def test_beside_other_values_255_is_ignored(tmp_path, mask, classes, key, expected):
    dataset, task = opened(folder(tmp_path, [mask], classes), ("test", {"segmentation.value_255": key}))
    assert targets(dataset) == [expected]
    assert task.config["segmentation"]["value_255"] == ("ignored" if key == "auto" else key)


def test_earlier_checkpoints_ignore_255(tmp_path):
    root = folder(tmp_path, [[[0, 1], [255, 0]], BINARY])
    assert targets(opened(root, classes=["background", "thing"])[0])[1] == BINARY


@pytest.mark.parametrize(
    "mask, classes, layer, expected",
    [
        (BINARY, "a\nb\nc", {}, "its masks hold only 0 and 255, and 255 is ignored; write class ids"),
        (BINARY, NAMES, {"value_255": "ignored"}, "is ignored; segmentation.value_255=foreground reads it as 1 thing"),
        ([[255, 255]], NAMES, {}, "every pixel of its masks is ignored; they should hold class ids from 0 on"),
        ([[0, 1]], "a\nb\nc", {"value_255": "foreground"}, "value_255: foreground is for two classes, but"),
        ([[0, 2]], None, {}, "classes.txt: no such file; name the masks' classes in it, one a line, or set "),
        ([[0, 0]], None, {}, "or set model.num_classes (the masks hold 0)"),
    ],
)
def test_where_nothing_would_be_learned_the_run_is_refused(tmp_path, mask, classes, layer, expected):
    layer = {f"segmentation.{key}": value for key, value in layer.items()}
    assert expected in message(opened, folder(tmp_path, [mask], classes), ("test", layer))


def test_an_evaluation_folder_of_0_and_255_after_training_on_0_and_1_is_refused(tmp_path):
    """Or read as asked. It would be judged by its background alone."""
    root, classes = folder(tmp_path, [BINARY]), ["background", "thing"]
    ignored = ("checkpoint", {"segmentation.value_255": "ignored"})
    assert message(opened, root, ignored, classes=classes).endswith("value_255=foreground reads it as 1 thing")
    asked = ("command line", {"segmentation.value_255": "foreground"})
    assert targets(opened(root, ignored, asked, classes=classes)[0]) == [[[0, 1], [1, 0]]]


@pytest.mark.parametrize(
    "mask, notes",
    [
        ([[0, 1], [2, 3]], []),
        ([[0, 1], [1, 255]], ["25.0% of the masks' pixels are ignored", "no mask holds 2 c, 3 d"]),
        ([[0, 0]], ["every pixel that counts is 0 a: there is no other class to tell it from"]),
        ([[255] * 199 + [1]], ["nearly nothing counts: 99.5% of the masks' pixels are ignored", None]),
    ],
)
def test_what_the_masks_lack_is_said(tmp_path, mask, notes):
    found = opened(folder(tmp_path, [mask], "a\nb\nc\nd\n"))[0].notes
    assert len(found) == len(notes) and all(note in (None, line) for note, line in zip(notes, found))


def test_of_many_masks_an_even_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_files, "MOST_COUNTED", 3)
    root = folder(tmp_path, [[[0, 255]], [[0, 7]], [[0, 255]], [[0, 255]], [[0, 255]], [[0, 255]]])
    dataset = opened(root)[0]
    assert dataset.notes[0] == "3 of its 6 masks are looked at before the run, an even sample"
    assert "masks/1.png: pixel value 7, but" in message(lambda: dataset[1])


# --- What a mask may be -----------------------------------------------------------------------------------------------

IDS = np.array([[0, 1, 2], [255, 2, 0]], dtype=np.uint8)
GREY = Image.fromarray(IDS)
PALETTE = GREY.copy()
PALETTE.putpalette([9, 0, 0, 0, 9, 0, 0, 0, 9] + [7] * 759)
SAME_MASKS = {  # the same pixel values, as several tools write them
    "palette": (PALETTE, ".png", {}),
    "palette with a transparent index": (PALETTE, ".png", {"transparency": 0}),
    "RGB": (GREY.convert("RGB"), ".png", {}),
    "RGBA": (GREY.convert("RGBA"), ".png", {}),
    "LA": (GREY.convert("LA"), ".png", {}),
    "16 bits": (Image.fromarray(IDS.astype(np.uint16)), ".png", {}),
    "32 bits": (Image.fromarray(IDS.astype(np.int32)), ".tif", {}),
    "tiff": (GREY, ".tif", {"compression": "tiff_lzw"}),
    "lossless WebP": (GREY.convert("RGB"), ".webp", {"lossless": True}),
    "tiff with an overview": (GREY, ".tif", {"save_all": True, "append_images": [Image.new("L", (1, 1))]}),
    "PNM": (GREY, ".pgm", {}),
}


@pytest.mark.parametrize("mask, suffix, options", SAME_MASKS.values(), ids=SAME_MASKS)
def test_the_same_values_in_any_mode(tmp_path, mask, suffix, options):
    mask.save(path := str(tmp_path / f"m{suffix}"), **options)
    with Image.open(path) as saved:
        assert saved.mode == mask.mode or suffix in (".webp", ".tif")
    ids = class_ids(["a", "b", "c"], ["a", "b", "c"])
    assert decode_mask(path, 6, ids)[::3, ::2].tolist() == IDS.tolist()


def test_a_gif_is_read_by_its_greys(tmp_path):
    """Those who write GIFs renumber palettes, Pillow too: an index says nothing."""
    root = folder(tmp_path, [[[0, 2]]], "a\nb\nc", ".gif")
    with Image.open(tmp_path / "masks" / "0.gif") as saved:
        assert np.asarray(saved).tolist() == [[0, 1]]
    assert targets(opened(root)[0]) == [[[0, 2]] * 2]
    PALETTE.crop((0, 0, 2, 1)).save(tmp_path / "masks" / "0.gif")
    assert "masks/0.gif: it is in colours (#090000); give each class its own in" in message(opened, root)


def indexed(values, *colours) -> Image.Image:
    mask = Image.fromarray(np.array(values, dtype=np.uint8))
    mask.putpalette(bytes.fromhex("".join(colours)))
    return mask


def test_palettes_that_number_their_colours_anew_are_refused_unless_classes_txt_has_the_colours(tmp_path):
    masks = [indexed([[0, 1]], "000000", "ff0000"), indexed([[1, 0]], "ff0000", "000000")]
    root = folder(tmp_path, masks)
    line = f"{root}/masks/1.png: palette index 0 is #ff0000, but #000000 in {root}/masks/0.png; "
    hint = "give each class its colour in classes.txt, name #rrggbb, or export the masks in grey"
    assert lines(opened, root) == [line + hint]
    (tmp_path / "classes.txt").write_text("background #000000\nthing #ff0000")
    assert targets(opened(root)[0]) == [[[0, 1]] * 2] * 2


def test_palettes_may_differ_in_what_is_not_used_or_lack_it_and_lie_beside_greys(tmp_path):
    voc, ramp = ("000000", "800000", "008000"), Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    masks = [indexed([[0, 1]], *voc), indexed([[0, 1]], *voc[:2], "123456"), indexed([[0, 1]], voc[0]), ramp, [[0, 1]]]
    assert targets(opened(folder(tmp_path, masks))[0]) == [[[0, 1]] * 2] * 5


@pytest.mark.parametrize("size", [2, 3, 8, 12])
def test_masks_are_resized_by_nearest_neighbour(tmp_path, size):
    """Output pixel i shows the input pixel that holds its centre: no new values, no shift."""
    values = np.arange(36, dtype=np.uint8).reshape(6, 6)
    Image.fromarray(values).save(tmp_path / "m.png")
    got = decode_mask(str(tmp_path / "m.png"), size, np.arange(256, dtype=np.uint8))
    places = [int((i + 0.5) * 6 / size) for i in range(size)]
    assert torch.equal(got, torch.from_numpy(values[places][:, places]))


def test_black_and_white_masks_are_0_and_1(tmp_path):
    mask = Image.fromarray(np.array(BINARY, dtype=np.uint8)).convert("1")
    dataset = opened(folder(tmp_path, [mask], classes=None))[0]
    assert targets(dataset) == [[[0, 1], [1, 0]]] and dataset.classes == ["background", "foreground"]


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_mask_is_turned_by_its_own_orientation(tmp_path, turn):
    """As its image would be: the two decoded with the same orientation show the same."""
    exif = Image.Exif()
    exif[0x0112] = turn
    root = folder(tmp_path, [[[0, 0, 1], [1, 0, 0]]], exif=exif)
    with Image.open(tmp_path / "masks" / "0.png") as mask:
        mask.convert("RGB").point(lambda value: value * 255).save(tmp_path / "images" / "0.png", exif=exif)
    (tmp_path / "images" / "0.jpg").unlink()
    dataset = SegmentationDataset(root, 6)
    assert torch.equal(dataset[0][3], (dataset[0][0] > 127).byte())


def damaged(root):
    """Its header is whole, its pixels are not."""
    head, pixels = (path := root / "masks" / "0.png").read_bytes().split(b"IDAT")
    path.write_bytes(head + b"IDAT" + bytes(4) + pixels[4:])


def deep_colours(root):
    """A PNG with 16 bits for each of three channels, of which Pillow keeps the upper 8: ids would all be 0."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    chunks = chunk(b"IHDR", bytes([0, 0, 0, 2, 0, 0, 0, 1, 16, 2, 0, 0, 0]))
    chunks += chunk(b"IDAT", zlib.compress(b"\0" + b"\0\1" * 6)) + chunk(b"IEND", b"")
    (root / "masks" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def saved(mask, name="0.png", **options):
    """In place of the first mask."""
    return lambda root: ((root / "masks" / "0.png").unlink(), mask.save(root / "masks" / name, **options))


NOISE = Image.effect_noise((2, 1), 99)
REFUSED = {
    "0.png: pixel value 2, but the classes are 0 to 1 (255 is ignored); soft edges": saved(Image.new("L", (2, 1), 2)),
    "0.png: pixel value 300; class ids should be 0 to 253, and 255": saved(Image.new("I;16", (2, 1), 300)),
    "0.png: pixel value -1; class ids": saved(Image.new("I", (2, 1), -1), format="TIFF"),
    "0.png: a mask should be grey, of a palette, or in RGB, not F": saved(Image.new("F", (2, 1)), format="TIFF"),
    "0.png: compressed with losses (JPEG), which changes classes; export the masks as PNG": saved(NOISE, format="JPEG"),
    "0.png: compressed with losses (WEBP)": saved(NOISE, format="WEBP"),
    "0.png: compressed with losses (TIFF)": saved(NOISE.convert("RGB"), format="TIFF", compression="jpeg"),
    "0.tif: a TIFF with several pages; export one mask for each": saved(
        Image.new("L", (2, 1)), "0.tif", save_all=True, append_images=[Image.new("L", (2, 1))]
    ),
    "0.png: it is transparent in places; export the": saved(Image.new("RGBA", (2, 1), (1, 1, 1, 254))),
    "0.gif: it is transparent": saved(Image.new("RGBA", (2, 1)), "0.gif"),
    "0.png: it is in colours (#ff0001); give each class its own in classes.txt: name #rrggbb": saved(
        Image.new("RGB", (2, 1), (255, 0, 1))
    ),
    "0.png: 16 bits for each of several channels; export the masks with 8": deep_colours,
    "0.png: not a readable mask (": damaged,
    "0.png: the mask has 1x2 pixels, its image 2x1": saved(Image.new("L", (1, 2))),
    "0.png: not a readable image (cannot identify": lambda root: (root / "masks" / "0.png").write_text("no picture"),
}


@pytest.mark.parametrize("expected", REFUSED)
def test_what_cannot_be_a_mask_is_refused_before_the_run(tmp_path, expected):
    """Whatever data.on_bad_image says, unless the file is damaged."""
    root = folder(tmp_path, [[[0, 1]], [[0, 1]]])
    REFUSED[expected](tmp_path)
    assert f"masks/{expected}" in message(opened, root)
    skip = ("test", {"data.on_bad_image": "skip"})
    if "not a readable" in expected:
        assert len(opened(root, skip)[0]) == 2
    else:
        assert f"masks/{expected}" in message(opened, root, skip)


def test_soft_edges_of_a_binary_mask_are_refused(tmp_path):
    for name in (mask := [[0, 255, 128, 254]], [[0, 254]]):
        found = message(opened, folder(tmp_path / str(len(name[0])), [name]))
        assert f"pixel value {128 if name is mask else 254}" in found and (" and 1 others" in found) == (name is mask)


def test_all_findings_are_in_one_list_of_ten_lines(tmp_path):
    root = folder(tmp_path, [[[0, 1]]] * 30)
    for i in range(4, 30):
        Image.new("L", (3, 3)).save(tmp_path / "masks" / f"{i}.png")
    found = lines(opened, root)
    assert len(found) == 10 and found[-1] == "… and 17 more like these"
    for i in range(3):
        (tmp_path / "masks" / f"{i}.png").rename(tmp_path / "masks" / f"m{i}.png")
    found = lines(opened, root)
    assert len(found) == 6 and found[0] == f"{root}/images/0.jpg: it has no mask {root}/masks/0.png"
    assert found[3] == f"{root}/masks/m0.png: a mask without an image in {root}/images"


def test_swapped_sizes_of_a_file_that_is_cut_off(tmp_path):
    """The header says all that it takes; the pixels are not looked at."""
    root = folder(tmp_path, [[[0, 1]]])
    Image.new("L", (1, 2)).save(path := tmp_path / "masks" / "0.png")
    path.write_bytes(path.read_bytes()[:45])
    assert message(opened, root) == f"{path}: the mask has 1x2 pixels, its image 2x1"


def test_swapped_sizes_name_the_orientation(tmp_path):
    root, exif = folder(tmp_path, [[[0, 1]]]), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2, 1)).save(tmp_path / "images" / "0.jpg", exif=exif)
    expected = f"has 2x1 pixels, its image 1x2; EXIF turns {root}/images/0.jpg by 90 degrees: turn the mask, too"
    assert expected in message(opened, root)


# --- Colours ----------------------------------------------------------------------------------------------------------

COLOURS = "sky #0000FF\r\nroad #808080\r\nignored #ffffff\r\n"
PAINTED = Image.fromarray(np.array([[[0, 0, 255], [128] * 3], [[255] * 3, [0, 0, 255]]], dtype=np.uint8))
PAINTED_IDS = [[0, 1], [255, 0]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_classes_txt_are_read_and_kept_in_the_checkpoint(tmp_path, mode):
    """Palette masks, too: an index says nothing then. The evaluation folder needs no classes.txt."""
    root = folder(
        tmp_path / "train",
        [PAINTED.convert(mode, palette=Image.Palette.ADAPTIVE), Image.new("L", (2, 2), 128)],
        COLOURS,
    )
    dataset, task = opened(root)
    assert targets(dataset) == [PAINTED_IDS, [[1, 1], [1, 1]]] and dataset.classes == ["sky", "road"]
    assert task.config["segmentation"] == {"value_255": "ignored", "colours": "0000ff 808080 ffffff"}
    kept = ("checkpoint", {"segmentation.colours": "0000ff 808080 ffffff"})
    for i, own in enumerate((None, "road\nsky", "ignored #ffffff\nroad #808080\nsky #0000ff")):
        evaluated = opened(folder(tmp_path / str(i), [PAINTED], own), kept, classes=["sky", "road"])[0]
        assert targets(evaluated) == [PAINTED_IDS]


def test_a_colour_that_is_not_listed_is_named(tmp_path):
    root = folder(tmp_path, [PAINTED], "sky #0000ff\nroad #808080")
    found = message(opened, root)
    assert f"{root}/masks/0.png: colour #ffffff is no class's; add it to classes.txt, name #ffffff or ignored" in found


# --- classes.txt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, names",
    [
        ("a\nb\n", ["a", "b"]),
        ("\ufeffa\r\nb c \r\n\r\n", ["a", "b c"]),
        ("0 a\n1 b\n", ["a", "b"]),
        ("1: b\n0: a\n255: void\n", ["a", "b"]),
        ("# the classes\n__ignore__\n_background_\ncat", ["_background_", "cat"]),
        ("0\n1\n2", ["0", "1", "2"]),
        ("# id name\n0 a\n2 c\n1 b", ["a", "b", "c"]),
        ("2 wheeler\n4 wheeler", ["2 wheeler", "4 wheeler"]),
        (unicodedata.normalize("NFD", "Bär\nÉléphant"), ["Bär", "Éléphant"]),
        ("a #010203\nb,#0a0b0C\n", ["a", "b"]),
        ("0 a #010203\n7 b #0a0b0C\n", ["0 a", "7 b"]),
    ],
)
def test_names_in_classes_txt(tmp_path, text, names):
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_classes(str(tmp_path)) == (names, "010203 0a0b0c" if "#010203" in text else None)


def test_an_earlier_checkpoint_took_the_lines_as_they_are(tmp_path):
    taken = ["\ufeff0 a", "1 b"]
    root = folder(tmp_path / "train", [[[0, 1]]], "\r\n".join(taken))
    assert opened(root, classes=taken)[0].classes == taken
    assert targets(opened(folder(tmp_path / "e", [[[0, 1]]], "b\na"), classes=["\ufeffa", "b"])[0]) == [[[1, 0]] * 2]


def test_an_evaluation_folder_in_another_order_is_mapped_by_name(tmp_path):
    root = folder(tmp_path, [[[0, 1], [2, 255]]], unicodedata.normalize("NFD", "c\né\na"))
    dataset = opened(root, classes=["a", "b", "c", "é"])[0]
    assert targets(dataset) == [[[2, 3], [0, 255]]] and dataset.classes == ["a", "b", "c", "é"]
    assert dataset.notes[-1] == "no mask holds 1 b"


def test_classes_without_a_file_are_numbered(tmp_path):
    root = folder(tmp_path, [[[0, 1], [2, 255]]], None)
    assert opened(root, ("test", {"model.num_classes": 3}))[0].classes == list("012")
    assert message(opened, root, ("test", {"model.num_classes": 255})).startswith(
        "model.num_classes: 255, but masks can"
    )


@pytest.mark.parametrize(
    "text, classes, expected",
    [
        ("one\n", None, "it should name 2 to 254 different classes, one a line; found 1"),
        ("a\nb\na\n", None, "it should name 2 to 254 different classes, one a line; found a twice"),
        ("a #000\nb #f00\n", None, "b #f00: a colour is written name #rrggbb, with six digits of base sixteen"),
        ("a:0,0,0::\nb:255,0,0::\n", None, "b:255,0,0::: a colour is written name #rrggbb"),
        ("a #000000ff\nb #ff0000ff\n", None, "b #ff0000ff: a colour is written name #rrggbb"),
        ("a 0x000000\nb 0xff0000\n", None, "b 0xff0000: a colour is written name #rrggbb"),
        ("a #000000\nb\n", None, "each class should have a colour of its own, name #rrggbb, or none a colour"),
        ("a #000000\nb #000000\n", None, "each class should have a colour of its own"),
        ("#000000 a\n#ffffff b\n", None, "#000000 a: a colour comes after its class's name: name #rrggbb"),
        ("1 a\n2 b\n", None, "the classes are numbered from 1; number them from 0, as the pixel values, or not at"),
        ("0 a\n2 c\n1 b\n5 f\n", None, "no classes are numbered 3; each pixel value from 0 to 5 needs one line, also"),
        ("0 a\n0 b\n1 c\n", None, "2 classes are numbered 0; each pixel value from 0 to 1 needs one line"),
        ("id name\n0 a\n1 b\n", None, "id name: no number; number every class, and put # and a blank before a"),
        ("name,r,g,b\na,0,0,0\nb,255,0,0\n", None, "a,0,0,0: a colour is written name #rrggbb"),
        ("a\nx\n", ["a", "b"], "classes unknown in the training folder: x"),
    ],
)
def test_classes_txt_that_cannot_be_right(tmp_path, text, classes, expected):
    found = message(opened, folder(tmp_path, [[[0, 1]]], text), classes=classes)
    assert found.startswith(f"{tmp_path}/classes.txt: ") and expected in found


# --- Which mask belongs to which image --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image, mask",
    [
        ("images/a/{}.jpg", "masks/a/{}_mask.gif"),  # Carvana
        ("images/{}_leftImg8bit.png", "labels/{}_gtFine_labelTrainIds.png"),  # Cityscapes
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),  # Pascal VOC, LabelMe
        ("imagesTr/{}_0000.png", "labelsTr/{}.png"),  # nnU-Net
        ("img/{}.jpeg", "masks/{}.jpeg.png"),  # Supervisely
        ("image/ISIC_{}.jpg", "mask/ISIC_{}_Segmentation.png"),
        ("images/Mu\u0308ll_{}.jpg", "annotations/M\u00fcll_{}.png"),  # one of them from a Mac
    ],
)
def test_usual_names_of_folders_and_masks(tmp_path, image, mask):
    for i in range(2):
        for name, value in ((image, 0), (mask, i)):
            path = tmp_path / name.format(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("1", (2, 2), value).save(path)
    assert targets(opened(str(tmp_path))[0]) == [[[0, 0]] * 2, [[1, 1]] * 2]


def test_folders_of_other_names_are_refused_with_what_was_found(tmp_path):
    for name in ("leftImg8bit", "gtFine", ".hidden"):
        (tmp_path / name).mkdir()
    expected = "no folder images; it should hold images/ and masks/ with the same stems; found gtFine/, leftImg8bit/"
    assert message(opened, str(tmp_path)) == f"{tmp_path}: {expected}"
    for name in ("images", "labels", "annotations"):
        (tmp_path / name).mkdir()
    assert message(opened, str(tmp_path)).endswith("found annotations/, labels/")
    assert message(opened, f"{tmp_path}/x").startswith(f"{tmp_path}/x: no such folder; ")


def test_an_ending_counts_only_if_all_masks_have_it(tmp_path):
    root = folder(tmp_path, [[[0, 1]]] * 3)
    for i, ending in enumerate(("_mask", "_mask", "_gt")):
        (tmp_path / "masks" / f"{i}.png").rename(tmp_path / "masks" / f"{i}{ending}.png")
    assert len(lines(opened, root)) == 6
    (tmp_path / "masks" / "2_gt.png").rename(tmp_path / "masks" / "2_mask.png")
    (tmp_path / "masks" / "1_mask.png").unlink()
    assert message(opened, root) == f"{root}/images/1.jpg: it has no mask {root}/masks/1.png"


def test_what_is_not_read_is_said(tmp_path):
    root = folder(tmp_path, [[[0, 1]]])
    (tmp_path / "images" / "x.heic").touch()
    assert opened(root)[0].notes[0].startswith("images/: not read: 1 .heic (")
    (tmp_path / "masks" / "0.png").rename(tmp_path / "masks" / "0.npy")
    assert "masks: no masks (" in message(opened, root) and "not read: 1 .npy" in message(opened, root)
    (tmp_path / "masks" / "0.npy").unlink()
    (tmp_path / "images" / "0.png").touch()
    Image.new("L", (2, 1)).save(tmp_path / "masks" / "0.png")
    assert f"{root}/images/0.png: {root}/images/0.jpg has the same stem; remove one" in message(opened, root)


def test_splits_in_the_folders_are_read_as_one_set_and_said(tmp_path):
    """As MMSegmentation has them, whose folders' names are known."""
    for split in ("train", "val"):
        folder(tmp_path / split, [[[0, 1]]])
        for old, new in (("images", "img_dir"), ("masks", "ann_dir")):
            (tmp_path / new).mkdir(exist_ok=True)
            (tmp_path / split / old).rename(tmp_path / new / split)
    (tmp_path / "train" / "classes.txt").rename(tmp_path / "classes.txt")
    dataset = opened(str(tmp_path))[0]
    assert len(dataset) == 2 and targets(dataset)[0] == targets(dataset)[1]
    note = "img_dir/: train, val are read as one set; to part them, give each its own images and masks"
    assert note in dataset.notes
