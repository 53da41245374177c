"""Image folder, decoding, batches, `prepare`, reward, metrics and pictures of vision_task.py."""

import itertools
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin
from sklearn.metrics import accuracy_score, log_loss
from torch.utils.data import get_worker_info

import vision_task
from data_types import InputError
from grpo import keyed_rng
from vision_task import (
    VisionClassificationDataset,
    classification_metrics,
    classification_reward,
    decode_image,
    draw_most_uncertain,
    draw_predictions,
    evaluation_figures,
    expected_calibration_error,
    find_images,
    fingerprint,
    ordered_batches,
    predictive_entropy,
    prepare,
    stream_batches,
    upright_size,
)
from vit_model import VisionTransformer

SUFFIXES = ".png .jpg .jpeg .bmp .webp .tif .tiff .gif"
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on one core
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


# --- Helpers ----------------------------------------------------------------------------------------------------------


def noise(height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    """Random uint8 pixels [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """A random RGB image without fine detail, which lossy formats hardly change."""
    return Image.fromarray(noise(6, 6, seed)).resize((width, height), Image.Resampling.BICUBIC)


def decoded(path, size: int = 8) -> np.ndarray:
    """`decode_image` as an integer array [size, size, 3]."""
    tensor = decode_image(str(path), size)
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, size, size) and tensor.is_contiguous()
    return tensor.permute(1, 2, 0).numpy().astype(int)


def touch(path) -> str:
    """An empty file, its folders made where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def image_folder(root, counts: dict[str, int], size: int = 4) -> VisionClassificationDataset:
    """A data set of PNG files of random pixels, `counts[name]` of each class."""
    for c, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(size, size, seed=100 * c + i)).save(root / name / f"{i}.png")
    return VisionClassificationDataset(str(root), size)


def memory_dataset(n: int) -> VisionClassificationDataset:
    """A data set without files for use under `fake_decode`: image i is the single pixel (i, i, i), its class i % 3."""
    dataset = object.__new__(VisionClassificationDataset)
    dataset.paths, dataset.targets = [f"{i}.png" for i in range(n)], torch.arange(n) % 3
    dataset.image_size, dataset.classes = 1, ["a", "b", "c"]
    return dataset


def fake_decode(path: str, image_size: int) -> torch.Tensor:
    """The pixel of `memory_dataset`."""
    return torch.full((3, image_size, image_size), int(path.removesuffix(".png")), dtype=torch.uint8)


def shuffled(n: int):
    """A permutation for each epoch."""
    return lambda epoch: torch.randperm(n, generator=torch.Generator().manual_seed(epoch))


def error_of(function, *args) -> str:
    """The message of the InputError that the call raises."""
    with pytest.raises(InputError) as caught:
        function(*args)
    return str(caught.value)


# --- Folder -----------------------------------------------------------------------------------------------------------


def test_find_images_at_any_depth_with_any_case_of_suffix(tmp_path):
    """Eight suffixes in either case at any depth are found, sorted; everything else and all that is hidden is not."""
    suffixes = SUFFIXES.split()
    names = [f"{s[1:]}{s}" for s in suffixes] + [f"deep/er/{s[1:]}{s.upper()}" for s in suffixes] + ["deep/x.JpEg"]
    expected = sorted(touch(tmp_path / name) for name in names)
    for name in ("notes.txt", "png", "a.png.txt", "b.npy", ".a.png", ".hid/c.png", "deep/.hid/d.png", "deep/.e.JPG"):
        touch(tmp_path / name)
    assert find_images(str(tmp_path)) == expected and len(expected) == 17


def test_find_images_traverses_a_directory_named_like_an_image(tmp_path):
    """A directory called x.png is a directory: its images are found, it is none itself."""
    inside = touch(tmp_path / "x.png" / "y.png")
    (tmp_path / "empty.jpg").mkdir()
    assert find_images(str(tmp_path)) == [inside]


def test_find_images_follows_links_but_not_in_circles(tmp_path):
    """A link in a circle adds nothing; linked files and folders count, a folder of many names once, under the first."""
    own = touch(tmp_path / "class" / "own.png")
    touch(tmp_path / "elsewhere" / "far.png")
    for name, to in (("loop", "../class"), ("b", "../elsewhere"), ("a", "../elsewhere"), ("c", "../elsewhere")):
        (tmp_path / "class" / name).symlink_to(to)
    (tmp_path / "class" / "linked.png").symlink_to(own)
    found = [os.path.relpath(path, tmp_path / "class") for path in find_images(str(tmp_path / "class"))]
    assert found == ["a/far.png", "linked.png", "own.png"]


def test_class_ids_are_the_sorted_subdirectories(tmp_path):
    """Ids follow the sorted names, whatever the order of creation; hidden folders and loose files are no classes."""
    for name in ("cat/1.png", "ant/z.png", "ant/a/b.png", "bee/x.jpg", ".git/y.png", "loose.png"):
        touch(tmp_path / name)
    dataset = VisionClassificationDataset(str(tmp_path), 8)
    assert dataset.classes == ["ant", "bee", "cat"] and len(dataset) == 4
    assert dataset.targets.tolist() == [0, 0, 1, 2] and dataset.targets.dtype == torch.int64
    assert dataset.paths == [str(tmp_path / p) for p in ("ant/a/b.png", "ant/z.png", "bee/x.jpg", "cat/1.png")]


def test_eval_folder_takes_the_ids_of_the_training_folder(tmp_path):
    """Classes that the evaluation folder lacks, or has without images, leave the ids of the others alone."""
    touch(tmp_path / "cat" / "1.png")
    (tmp_path / "ant").mkdir()
    dataset = VisionClassificationDataset(str(tmp_path), 8, classes=["ant", "bee", "cat"])
    assert dataset.classes == ["ant", "bee", "cat"] and dataset.targets.tolist() == [2]


def test_folder_errors_are_one_line_naming_the_folder(tmp_path):
    """The exact message of each way in which a folder may be unfit."""
    hint = "it should hold one subdirectory of images per class"
    missing, file, empty = tmp_path / "missing", touch(tmp_path / "file.png"), tmp_path / "empty"
    (empty / ".hidden").mkdir(parents=True)
    touch(tmp_path / "train" / "ant" / "1.png")
    touch(tmp_path / "train" / "bee" / "notes.txt")
    (tmp_path / "eval" / "ant").mkdir(parents=True)
    make = VisionClassificationDataset
    assert error_of(make, str(missing), 8) == f"{missing}: no such folder; {hint}"
    assert error_of(make, file, 8) == f"{file}: no such folder; {hint}"
    assert error_of(make, str(empty), 8) == f"{empty}: no subdirectories; {hint}"
    train, evaluation = str(tmp_path / "train"), str(tmp_path / "eval")
    assert error_of(make, train, 8) == f"{train}/bee: no images ({SUFFIXES}); add some or remove it"
    assert error_of(make, train, 8, ["cat"]) == f"{train}: classes unknown in the training folder: ant, bee"
    assert error_of(make, evaluation, 8, ["ant"]) == f"{evaluation}: no images ({SUFFIXES}) in its subdirectories"


# --- Decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options", [("x.png", {}), ("x.BMP", {}), ("x.webp", {"lossless": True}), ("x.TIFF", {})]
)
def test_lossless_formats_decode_exactly(tmp_path, name, options):
    """The pixels come back as they were written, channels in RGB order."""
    Image.fromarray(noise()).save(tmp_path / name, **options)
    np.testing.assert_array_equal(decoded(tmp_path / name), noise())


@pytest.mark.parametrize("name, options", [("x.jpg", {"quality": 95, "subsampling": 0}), ("x.webp", {"quality": 95})])
def test_lossy_formats_decode_closely(tmp_path, name, options):
    """JPEG (stored as YCbCr) and lossy WebP come back as RGB, a few grey levels off."""
    image = smooth(64, 64)
    image.save(tmp_path / name, **options)
    assert np.abs(decoded(tmp_path / name, 64) - np.asarray(image).astype(int)).mean() < 3


def test_gif_of_grey_and_animation(tmp_path):
    """A grey GIF gives its grey three times; of an animation, the first frame."""
    grey = noise()[:, :, 0]
    frames = [Image.fromarray(grey), Image.fromarray(255 - grey)]
    frames[0].save(tmp_path / "x.gif")
    frames[0].save(tmp_path / "y.gif", save_all=True, append_images=frames[1:])
    for name in ("x.gif", "y.gif"):
        np.testing.assert_array_equal(decoded(tmp_path / name), np.repeat(grey[:, :, None], 3, 2))


@pytest.mark.parametrize("suffix, mode", [("png", "I;16"), ("tif", "I;16"), ("tif", "I;16B"), ("tif", "I")])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix, mode):
    """0, 32768, 65535 become 0, 128, 255; and 256, which clipping would make white, 1."""
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    values = np.array([[0, 256], [32768, 65535]]).astype(dtype)
    path = tmp_path / f"x.{suffix}"
    Image.frombytes(mode, (2, 2), values.tobytes()).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    expected = np.array([[0, 1], [128, 255]])
    assert np.abs(decoded(path, 2) - expected[:, :, None]).max() <= 1
    assert decoded(path, 2)[1, 1].tolist() == [255, 255, 255]


def test_eight_bit_grey_one_bit_and_palette(tmp_path):
    """L, 1 and P images become the RGB values that they stand for."""
    values = np.array([[0, 1], [1, 2]], dtype=np.uint8)
    Image.fromarray(values * 100).save(tmp_path / "L.png")
    Image.fromarray((values > 0).astype(np.uint8) * 255).convert("1").save(tmp_path / "1.png")
    colours = np.array([[10, 20, 30], [255, 0, 128], [0, 7, 250]], dtype=np.uint8)
    palette = Image.fromarray(values, mode="L").copy()
    palette.putpalette(colours.tobytes())
    palette.save(tmp_path / "P.png")
    for name in ("L", "1", "P"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.mode == name
    np.testing.assert_array_equal(decoded(tmp_path / "L.png", 2), (values.astype(int) * 100)[:, :, None].repeat(3, 2))
    np.testing.assert_array_equal(decoded(tmp_path / "1.png", 2), (values > 0)[:, :, None].repeat(3, 2) * 255)
    np.testing.assert_array_equal(decoded(tmp_path / "P.png", 2), colours[values])


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entry_lies_on_white(tmp_path, suffix):
    """The transparent entry of a palette becomes white whatever its colour, the others stay."""
    values = np.array([[0, 1], [1, 2]], dtype=np.uint8)
    colours = np.array([[10, 20, 30], [255, 0, 128], [0, 7, 250]], dtype=np.uint8)
    palette = Image.fromarray(values, mode="L").copy()
    palette.putpalette(colours.tobytes())
    palette.save(tmp_path / f"x.{suffix}", transparency=1)
    colours[1] = 255
    np.testing.assert_array_equal(decoded(tmp_path / f"x.{suffix}", 2), colours[values])


def test_transparency_lies_on_white(tmp_path):
    """RGBA, LA, and grey or RGB with one transparent colour: alpha * colour + (1 - alpha) * 255."""
    alpha = np.array([[0, 51], [128, 255]], dtype=np.uint8)
    rgb = noise(2, 2)
    white = 255 - alpha[:, :, None] / 255 * (255.0 - rgb)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.webp", lossless=True, exact=True)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.tif")
    Image.fromarray(np.dstack([rgb[:, :, 0], alpha])).save(tmp_path / "la.png")
    for name in ("rgba.png", "rgba.webp", "rgba.tif"):
        assert np.abs(decoded(tmp_path / name, 2) - white).max() <= 1
    assert np.abs(decoded(tmp_path / "la.png", 2) - white[:, :, :1]).max() <= 1
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=tuple(rgb[0, 1].tolist()))
    Image.fromarray(rgb[:, :, 0]).save(tmp_path / "l.png", transparency=int(rgb[0, 1, 0]))
    keyed = rgb.copy()
    keyed[0, 1] = 255
    np.testing.assert_array_equal(decoded(tmp_path / "rgb.png", 2), keyed)
    np.testing.assert_array_equal(decoded(tmp_path / "l.png", 2), keyed[:, :, :1].repeat(3, 2))


def test_cmyk_and_ycbcr_jpeg(tmp_path):
    """CMYK inks and YCbCr colours come out as RGB: ink 0 is bright, and red is not blue."""
    for i, (inks, rgb) in enumerate({(0, 255, 255, 0): (255, 0, 0), (255, 0, 55, 0): (0, 255, 200)}.items()):
        Image.new("CMYK", (16, 16), inks).save(tmp_path / f"cmyk{i}.jpg", quality=95)
        Image.new("RGB", (16, 16), rgb).save(tmp_path / f"ycc{i}.jpg", quality=95)
        for name, mode in ((f"cmyk{i}.jpg", "CMYK"), (f"ycc{i}.jpg", "RGB")):
            with Image.open(tmp_path / name) as image:
                assert image.mode == mode
            assert np.abs(decoded(tmp_path / name) - rgb).max() <= 4


# What a camera stores, given the upright picture [h, w, 3], under each of EXIF's orientations.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_upright_size(tmp_path, orientation, suffix):
    """The size of the picture as it is decoded, whoever turns it: Pillow turns TIFFs by itself."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = STORED[orientation](np.zeros((10, 20, 3), dtype=np.uint8))
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"x.{suffix}", exif=exif)
    assert upright_size(str(tmp_path / f"x.{suffix}")) == (20, 10)


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path, orientation):
    """A picture stored turned or mirrored decodes as the upright one; exactly so without loss, JPEG at 1/4 closely."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, image, tolerance in (("x.png", Image.fromarray(noise(12, 20)), 0), ("x.jpg", smooth(160, 128), 3)):
        upright = np.asarray(image)
        stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
        stored.save(tmp_path / name, exif=exif, **({"quality": 95, "subsampling": 0} if tolerance else {}))
        image.save(tmp_path / f"upright_{name}.png")
        size = 32 if tolerance else 8
        difference = np.abs(decoded(tmp_path / name, size) - decoded(tmp_path / f"upright_{name}.png", size))
        assert difference.mean() <= tolerance
        if orientation > 1:
            as_stored = np.asarray(stored.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(as_stored - decoded(tmp_path / f"upright_{name}.png", size)).mean() > 10


def test_resized_not_cropped(tmp_path):
    """The four quarters of a 2:1 picture are the four quarters of the square, up to its corners."""
    colours = np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [250, 250, 10]]], dtype=np.uint8)
    Image.fromarray(colours.repeat(40, 0).repeat(80, 1)).save(tmp_path / "x.png")
    x = decoded(tmp_path / "x.png", 16)
    corners = x[[0, 0, -1, -1], [0, -1, 0, -1]].reshape(2, 2, 3)
    np.testing.assert_array_equal(corners, colours)
    np.testing.assert_array_equal(x[[2, 2, 13, 13], [5, 10, 5, 10]].reshape(2, 2, 3), colours)


def test_resizing_is_antialiased_and_not_nearest(tmp_path):
    """A fine checkerboard shrinks to mid grey; enlarging a step gives values in between."""
    board = (np.indices((120, 120)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    assert np.abs(decoded(tmp_path / "board.png", 16) - 127.5).max() < 8
    Image.fromarray(np.array([[0, 200]], dtype=np.uint8)).save(tmp_path / "step.png")
    assert ((decoded(tmp_path / "step.png", 16) > 50) & (decoded(tmp_path / "step.png", 16) < 150)).any()


@pytest.mark.parametrize("size, image_size, expected", [((768, 512), 64, 8), ((768, 300), 64, 4), ((127, 300), 64, 1)])
def test_large_jpeg_is_decoded_at_reduced_size(tmp_path, monkeypatch, size, image_size, expected):
    """A JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8 that still covers the square, and looks as the whole."""
    image = smooth(size[1], size[0])
    image.save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as file:
        full = np.asarray(file.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)).astype(int)
    sizes, to_rgb = [], vision_task.to_rgb
    monkeypatch.setattr(vision_task, "to_rgb", lambda x: sizes.append(x.size) or to_rgb(x))
    difference = np.abs(decoded(tmp_path / "x.jpg", image_size) - full)
    assert sizes == [(-(-size[0] // expected), -(-size[1] // expected))]
    assert difference.mean() < 2 and difference.max() < 20


def test_draft_is_asked_of_the_jpeg_decoder_only_for_the_size(tmp_path, monkeypatch):
    """`draft` is told the square's size and no mode, so that colours stay."""
    calls, draft = [], JpegImagePlugin.JpegImageFile.draft
    spy = mock.patch.object(
        JpegImagePlugin.JpegImageFile, "draft", lambda self, *args: calls.append(args) or draft(self, *args)
    )
    smooth(64, 64).save(tmp_path / "x.jpg")
    with spy:
        decoded(tmp_path / "x.jpg", 16)
    assert calls == [(None, (16, 16))]


def write_bad_file(path, kind: str) -> str:
    """A file that is no image, or a broken one; returns its path."""
    if kind.startswith("truncated"):
        Image.fromarray(noise(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("this is no image\n")
    elif kind == "float":
        Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path)
    elif kind == "bomb":
        Image.new("1", (400, 300)).save(path)
    elif kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "broken exif":
        entry = struct.pack("<HHI4s", 0x112, 3, 1, b"\x06\0\0\0") + struct.pack("<HHI4s", 0x100, 2, 4, b"abc\0")
        Image.new("RGB", (4, 4)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entry + bytes(4))
    return str(path)


@pytest.mark.parametrize(
    "kind, name, reason",
    [
        ("truncated", "x.jpg", r"image file is truncated \(\d+ bytes not processed\)"),
        ("truncated", "x.png", r".+"),
        ("truncated", "x.bmp", r".+"),
        ("truncated", "x.gif", r".+"),
        ("truncated", "x.webp", r".+"),
        ("truncated", "x.tif", r".+"),
        ("text", "x.jpg", r"cannot identify image file '{path}'"),
        ("empty", "x.png", r"cannot identify image file '{path}'"),
        ("missing", "x.png", r"\[Errno 2\] No such file or directory: '{path}'"),
        ("directory", "x.png", r"\[Errno 21\] Is a directory: '{path}'"),
        ("float", "x.tif", r"floating-point pixels have no fixed range; save it with 8 or 16 bits"),
        ("bomb", "x.png", r"Image size \(120000 pixels\) exceeds limit of \d+ pixels, could be .+ attack\."),
        ("broken exif", "x.jpg", r".+"),
    ],
)
def test_unreadable_file_is_one_line_naming_it(tmp_path, monkeypatch, kind, name, reason):
    """InputError `path: not a readable image (reason); repair or remove it`, without a line break."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    path = write_bad_file(tmp_path / name, kind)
    reason = reason.replace("{path}", re.escape(path))
    pattern = rf"{re.escape(path)}: not a readable image \({reason}\); repair or remove it"
    assert re.fullmatch(pattern, error_of(decode_image, path, 8))  # `.` matches no line break


def test_reason_of_an_error_is_put_in_one_line(tmp_path, monkeypatch):
    """Line breaks in a decoder's message are folded; an error without a message is told by its type."""
    path = str(tmp_path / "x.png")
    for error, reason in ((OSError("two\n  lines"), "two lines"), (MemoryError(), "MemoryError")):
        monkeypatch.setattr(Image, "open", mock.Mock(side_effect=error))
        assert error_of(decode_image, path, 8) == f"{path}: not a readable image ({reason}); repair or remove it"


# --- Batches ----------------------------------------------------------------------------------------------------------


def expected_indices(n: int, batch_size: int, steps: range) -> list[list[int]]:
    """Slow reference: the epochs of `shuffled(n)` laid end to end and cut."""
    epochs = itertools.chain.from_iterable(shuffled(n)(epoch).tolist() for epoch in itertools.count())
    flat = list(itertools.islice(epochs, steps.stop * batch_size))
    return [flat[s * batch_size : (s + 1) * batch_size] for s in steps]


def seen_indices(batches) -> list[list[int]]:
    """The indices of `memory_dataset`'s batches, once pixels, paths and targets are seen to agree with them."""
    seen = []
    for batch in batches:
        indices = batch.metadata["indices"]
        assert batch.inputs.dtype == torch.uint8 and batch.inputs.shape == (len(indices), 3, 1, 1)
        assert torch.equal(batch.inputs, indices.to(torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1))
        assert torch.equal(batch.targets, indices % 3) and batch.targets.dtype == torch.int64
        assert batch.metadata["paths"] == [f"{i}.png" for i in indices.tolist()]
        seen.append(indices.tolist())
    return seen


@EXAMPLES
@given(
    n=st.integers(1, 20),
    batch_size=st.integers(1, 25),
    start=st.integers(0, 12),
    cache=st.booleans(),
    more=st.integers(0, 9),
)
def test_batches_are_a_function_of_the_step(n, batch_size, start, cache, more):
    """Any start, batch size (beyond n too) and cache give the batches of the epochs laid end to end."""
    steps = range(start, start + more)
    with mock.patch.object(vision_task, "decode_image", fake_decode):
        batches = stream_batches(memory_dataset(n), shuffled(n), batch_size, steps, cache=cache)
        assert seen_indices(batches) == expected_indices(n, batch_size, steps)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("start", [0, 4])
def test_workers_hand_out_the_same_batches(monkeypatch, cache, start):
    """Two worker processes change nothing, in order or content."""
    monkeypatch.setattr(vision_task, "decode_image", fake_decode)
    steps = range(start, 12)
    batches = stream_batches(memory_dataset(10), shuffled(10), 4, steps, num_workers=2, cache=cache)
    assert seen_indices(batches) == expected_indices(10, 4, steps)


def test_starting_late_gives_the_rest_of_the_run(tmp_path):
    """Real files: from step s on, pixels, targets and metadata are those of the run from step 0."""
    dataset = image_folder(tmp_path / "train", {"a": 3, "b": 4})
    whole = list(stream_batches(dataset, shuffled(7), 3, range(8)))
    for start in (1, 3, 7):
        rest = list(stream_batches(dataset, shuffled(7), 3, range(start, 8), cache=True))
        assert len(rest) == 8 - start
        for one, other in zip(whole[start:], rest, strict=True):
            assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
            assert one.metadata["paths"] == other.metadata["paths"]


@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 7), (5, 12), (6, 1)])
def test_every_epoch_covers_each_image_once(monkeypatch, n, batch_size):
    """Cut into pieces of n, the stream is one permutation after the other, and no two alike."""
    monkeypatch.setattr(vision_task, "decode_image", fake_decode)
    steps = range(-(-4 * n // batch_size))
    flat = sum(seen_indices(stream_batches(memory_dataset(n), shuffled(n), batch_size, steps)), [])
    epochs = [flat[i * n : (i + 1) * n] for i in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_batch_holds_the_files_pixels_targets_and_names(tmp_path):
    """Each row of a batch is the image, class and path of its index."""
    dataset = image_folder(tmp_path / "train", {"a": 3, "b": 4})
    for batch in stream_batches(dataset, shuffled(7), 3, range(5)):
        for row, index in enumerate(batch.metadata["indices"].tolist()):
            path = batch.metadata["paths"][row]
            assert path == dataset.paths[index]
            assert int(batch.targets[row]) == "ab".index(path.split(os.sep)[-2])
            np.testing.assert_array_equal(batch.inputs[row].permute(1, 2, 0), np.asarray(Image.open(path)))
        assert batch.metadata["indices"].dtype == torch.int64 and batch.inputs.dtype == torch.uint8


@pytest.mark.parametrize(
    "start, batch_size, decodes", [(0, 4, 12), (0, 5, 10), (3, 4, 32 - 12), (4, 4, 32 - 16), (0, 25, 25)]
)
def test_cache_opens_no_file_after_a_whole_epoch(monkeypatch, start, batch_size, decodes):
    """Files are decoded up to the batch that completes the first epoch entered at its start, and never after."""
    opened = []
    monkeypatch.setattr(vision_task, "decode_image", lambda *args: opened.append(args) or fake_decode(*args))
    batches = stream_batches(memory_dataset(10), shuffled(10), batch_size, range(start, 40), cache=True)
    assert seen_indices(batches) == expected_indices(10, batch_size, range(start, 40))
    assert len(opened) == decodes


def test_cached_run_survives_the_loss_of_the_files(tmp_path):
    """With workers and a cache the folder may vanish after the first epoch; without a cache it may not."""
    dataset = image_folder(tmp_path / "train", {"a": 3, "b": 4})
    expected = [batch.inputs for batch in stream_batches(dataset, shuffled(7), 3, range(20))]
    with_cache = stream_batches(dataset, shuffled(7), 3, range(20), cache=True, num_workers=1)
    got = [next(with_cache).inputs for _ in range(3)]
    without = stream_batches(dataset, shuffled(7), 3, range(20))
    next(without)
    shutil.rmtree(tmp_path / "train")
    got += [batch.inputs for batch in with_cache]
    assert len(got) == 20 and all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert "No such file" in error_of(next, without)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_file_ends_the_stream_with_its_line(tmp_path, num_workers):
    """The batches before a bad file arrive; then its one line, not the traceback of a worker."""
    dataset = image_folder(tmp_path / "train", {"a": 3, "b": 5})
    path = dataset.paths[5]
    with open(path, "w") as file:
        file.write("no image")
    batches = ordered_batches(dataset, 2, num_workers=num_workers)
    assert [next(batches).metadata["indices"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    line = f"{path}: not a readable image (cannot identify image file {path!r}); repair or remove it"
    assert error_of(next, batches) == line


def signalled_decode(path: str, image_size: int) -> torch.Tensor:
    """`fake_decode` in a worker that is told to stop."""
    assert get_worker_info() is not None
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return fake_decode(path, image_size)


def test_workers_leave_signals_to_the_main_process(monkeypatch):
    """Ctrl-C and SIGTERM, which reach the whole process group, do not end a worker."""
    monkeypatch.setattr(vision_task, "decode_image", signalled_decode)
    batches = stream_batches(memory_dataset(5), shuffled(5), 2, range(4), num_workers=1)
    assert seen_indices(batches) == expected_indices(5, 2, range(4))


UNCLOSED_STREAM = """
import multiprocessing, os, signal, sys, torch
from vision_task import VisionClassificationDataset, stream_batches
dataset = VisionClassificationDataset(sys.argv[1], 4)
stream = stream_batches(dataset, lambda epoch: torch.arange(len(dataset)), 2, range(10**6), num_workers=2)
next(stream)
if sys.argv[2] == "killed":  # as when memory runs out
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    print(sum(len(batch) for batch in stream))
sys.exit("stopped in the middle")
"""


@pytest.mark.parametrize("end, complaint", [("exit", "stopped in the middle"), ("killed", "Traceback")])
def test_process_ends_though_a_stream_is_left_open(tmp_path, end, complaint):
    """Exit in mid-stream, or on the death of one worker, does not wait for workers that ignore SIGTERM."""
    image_folder(tmp_path / "train", {"a": 3, "b": 4})
    command = [sys.executable, "-W", "ignore", "-c", UNCLOSED_STREAM, str(tmp_path / "train"), end]
    root = os.path.dirname(vision_task.__file__)
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=25)
    assert result.returncode == 1 and complaint in result.stderr
    assert result.stderr.count("\n") == 1 or end == "killed"


@EXAMPLES
@given(n=st.integers(1, 40), batch_size=st.integers(1, 45), cache=st.booleans())
def test_ordered_batches_cover_each_image_once(n, batch_size, cache):
    """Images 0 … n - 1 in order, in full batches but for the last."""
    with mock.patch.object(vision_task, "decode_image", fake_decode):
        seen = seen_indices(ordered_batches(memory_dataset(n), batch_size, cache=cache))
    assert sum(seen, []) == list(range(n))
    assert [len(indices) for indices in seen[:-1]] == [batch_size] * ((n - 1) // batch_size)


def test_ordered_batches_with_workers(monkeypatch):
    """The same from worker processes."""
    monkeypatch.setattr(vision_task, "decode_image", fake_decode)
    seen = seen_indices(ordered_batches(memory_dataset(8), 3, num_workers=2))
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_part_of_a_batch_keeps_all_class_names(monkeypatch):
    """Three classes in a batch of three: the names are no per-image metadata."""
    monkeypatch.setattr(vision_task, "decode_image", fake_decode)
    batch = next(stream_batches(memory_dataset(5), shuffled(5), 3, range(1)))
    assert batch[:2].metadata["classes"] == ("a", "b", "c") and len(batch[:2].metadata["paths"]) == 2


# --- Prepare ----------------------------------------------------------------------------------------------------------


def test_prepare_is_the_closed_form():
    """(x / 255 - mean) / std by channel, in float32; without `augment` it draws nothing."""
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    state = torch.get_rng_state()
    got = prepare(images, mean, std)
    assert torch.equal(torch.get_rng_state(), state)
    column = (1, 3, 1, 1)
    expected = (images.double() / 255 - torch.tensor(mean).double().view(column)) / torch.tensor(std).double().view(
        column
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_augment_mirrors_each_image_with_probability_one_half():
    """Each image is itself or its mirror image, about half of them mirrored (4 standard deviations)."""
    images = torch.randint(0, 256, (2000, 3, 2, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    with keyed_rng(0, "flips"):
        got = prepare(images, [0.0] * 3, [1.0] * 3, augment=True)
    plain, mirrored = images / 255, images.flip(-1) / 255
    same = torch.isclose(got, plain).flatten(1).all(1)
    other = torch.isclose(got, mirrored).flatten(1).all(1)
    assert bool((same ^ other).all()) and abs(int(other.sum()) - 1000) < 4 * (2000 / 4) ** 0.5
    assert torch.equal(images, before)


def test_augment_is_a_function_of_the_key(tmp_path):
    """Equal keys mirror the same images, another key others; a batch's targets and metadata stay."""
    dataset = image_folder(tmp_path / "train", {"a": 20, "b": 20})
    batch = next(ordered_batches(dataset, 40))
    targets = batch.targets.clone()

    def draw(*key) -> torch.Tensor:
        with keyed_rng(*key):
            return prepare(batch.inputs, [0.5] * 3, [0.5] * 3, augment=True)

    first = draw(3, 7, "flip", 0)
    torch.manual_seed(123)
    assert torch.equal(first, draw(3, 7, "flip", 0))
    changed = (first != draw(3, 8, "flip", 0)).flatten(1).any(1)
    assert 5 < int(changed.sum()) < 35
    assert torch.equal(batch.targets, targets) and torch.equal(batch.metadata["indices"], torch.arange(40))


# --- Reward and metrics -----------------------------------------------------------------------------------------------


def test_reward_equals_a_slow_loop():
    """1.0 where the action is the image's class, 0.0 elsewhere, [B, T, A]."""
    generator = torch.Generator().manual_seed(0)
    actions, targets = torch.randint(0, 3, (4, 5, 6), generator=generator), torch.tensor([0, 1, 2, 1])
    got = classification_reward(actions, torch.zeros(4, 5, 3), targets, {})
    assert got.dtype == torch.float32 and got.shape == (4, 5, 6)
    for b, t, a in itertools.product(range(4), range(5), range(6)):
        assert float(got[b, t, a]) == (1.0 if int(actions[b, t, a]) == int(targets[b]) else 0.0)
    assert 20 < float(got.sum()) < 60


def random_probs(seed: int, n: int, num_classes: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [n, num_classes] of very different sharpness, and targets [n] that often agree with them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes, generator=generator, dtype=dtype)
    probs = (logits * 4 * torch.rand(n, 1, generator=generator, dtype=dtype)).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def slow_ece(probs: np.ndarray, targets: np.ndarray, num_bins: int) -> float:
    """sum over bins (i / num_bins, (i + 1) / num_bins] of count / n * |accuracy - mean confidence|."""
    total = 0.0
    for i in range(num_bins):
        rows = [r for r in range(len(probs)) if i / num_bins < max(probs[r]) <= (i + 1) / num_bins]
        if rows:
            accuracy = sum(int(np.argmax(probs[r])) == targets[r] for r in rows) / len(rows)
            total += len(rows) / len(probs) * abs(accuracy - sum(max(probs[r]) for r in rows) / len(rows))
    return total


@EXAMPLES
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), num_classes=st.integers(2, 6), num_bins=st.integers(1, 20))
def test_calibration_error_equals_a_slow_loop(seed, n, num_classes, num_bins):
    """Any size, number of classes and of bins."""
    probs, targets = random_probs(seed, n, num_classes)
    got = float(expected_calibration_error(probs, targets, num_bins))
    assert got == pytest.approx(slow_ece(probs.numpy(), targets.numpy(), num_bins), abs=1e-12)


def test_calibration_error_by_hand():
    """A confidence on an edge belongs to the bin below it; certainty has a bin; 15 bins unless said."""
    probs = torch.tensor([[0.5, 0.5], [0.75, 0.25]])  # right at 0.5 and wrong at 0.75, in two bins
    assert float(expected_calibration_error(probs, torch.tensor([0, 1]), num_bins=2)) == 0.625
    certain = torch.tensor([[1.0, 0.0]] * 4)
    assert float(expected_calibration_error(certain, torch.tensor([0, 0, 0, 1]))) == 0.25
    rounded = torch.tensor([[1.0000001, 0.0]])  # a mean over passes may come out so
    assert float(expected_calibration_error(rounded, torch.tensor([1]))) == pytest.approx(1)
    probs, targets = random_probs(1, 300, 4)
    assert float(expected_calibration_error(probs, targets)) == pytest.approx(
        slow_ece(probs.numpy(), targets.numpy(), 15)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_equal_scikit_learn(dtype):
    """Accuracy and negative log-likelihood as scikit-learn has them, calibration error as the slow loop."""
    probs, targets = random_probs(2, 500, 5, dtype)
    got, exact = classification_metrics(probs, targets), probs.double().numpy()
    assert list(got) == ["accuracy", "nll", "ece"] and all(type(value) is float for value in got.values())
    assert got["accuracy"] == pytest.approx(accuracy_score(targets, probs.argmax(-1)), abs=1e-12)
    assert got["nll"] == pytest.approx(
        log_loss(targets, exact / exact.sum(1, keepdims=True), labels=range(5)), rel=1e-5
    )
    assert got["ece"] == pytest.approx(slow_ece(exact, targets.numpy(), 15), abs=1e-6)
    assert 0.3 < got["accuracy"] < 0.9 and got["ece"] > 0.005


def test_probability_zero_of_the_right_class_is_finite():
    """-log of the smallest normal float32, not infinity; certainty of the right class costs 0."""
    got = classification_metrics(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))
    assert got["nll"] == pytest.approx(-np.log(np.finfo(np.float32).tiny) / 2, rel=1e-6)
    assert got["accuracy"] == 0.5 and got["ece"] == 0.5


def test_evaluation_figures_are_the_metrics_of_both_predictors():
    """eval/… of the deterministic network, eval_mc/… of the mean over passes."""
    (one, targets), (other, _) = random_probs(4, 60, 3), random_probs(5, 60, 3)
    expected = {f"eval/{name}": value for name, value in classification_metrics(one, targets).items()}
    expected |= {f"eval_mc/{name}": value for name, value in classification_metrics(other, targets).items()}
    assert evaluation_figures(one, other, targets) == expected and len(expected) == 6


def test_predictive_entropy_equals_categorical():
    """In nats, as torch.distributions has it; ln K at most, 0 where one class is certain."""
    probs, _ = random_probs(3, 50, 7)
    torch.testing.assert_close(predictive_entropy(probs), torch.distributions.Categorical(probs=probs).entropy())
    got = predictive_entropy(torch.tensor([[0.25] * 4, [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([np.log(4), 0.0], dtype=torch.float64))


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_draw_predictions_puts_each_image_at_its_place():
    """Row by row, each tile inside a white border of 2, enlarged without blur, captions in black below."""
    images = torch.randint(0, 200, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sheet = draw_predictions(images, [["one", "two"], [], ["three"], [], ["five"]], columns=2, size=32)
    height = 32 + 2 * 12 + 4
    assert sheet.dtype == torch.uint8 and sheet.shape == (3, 3 * height, 2 * 32)
    for i in range(6):
        cell = sheet[:, i // 2 * height :, i % 2 * 32 :][:, :height, :32]
        if i == 5:
            assert bool((cell == 255).all())  # an unused place
            continue
        assert torch.equal(cell[:, 2:30, 2:30], images[i].repeat_interleave(7, 1).repeat_interleave(7, 2))
        assert all(bool((border == 255).all()) for border in (cell[:, :2], cell[:, :32, :2], cell[:, :32, 30:]))
        first, second = (bool((cell[:, top : top + 12] < 128).any()) for top in (32, 44))
        assert (first, second) == [(True, True), (False, False), (True, False), (False, False), (True, False)][i]


@pytest.mark.parametrize("name", ["a" * 300, "W" * 20, "犬 chien ß"])
def test_long_class_names_stay_in_their_cell(name):
    """A caption of any length or script leaves the neighbours and all images alone."""
    images = torch.full((3, 3, 8, 8), 77, dtype=torch.uint8)
    long, none = [name, name], ["", ""]
    sheet, blank = (draw_predictions(images, [c, none, c], columns=2, size=64) for c in (long, none))
    height = 64 + 2 * 12 + 4
    assert sheet.shape == (3, 2 * height, 128)
    rows, columns = (sheet != blank).any(0).nonzero().unbind(1)
    assert int(columns.max()) < 64 and int((rows % height).min()) >= 64
    assert int((rows < height).sum()) > 10 and int((rows >= height).sum()) > 10


def test_draw_most_uncertain_shows_the_highest_entropy_first(tmp_path, monkeypatch):
    """The `count` images of highest entropy, the highest first, with class, prediction and entropy in nats."""
    dataset = image_folder(tmp_path / "train", {"ant": 2, "bee": 2})
    probs, drawn = torch.tensor([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]), []
    monkeypatch.setattr(vision_task, "draw_predictions", lambda *args: drawn.append(args))
    draw_most_uncertain(dataset, probs, dataset.targets, torch.tensor([3, 2, 1, 0]), count=3)
    [(images, captions)] = drawn
    assert torch.equal(torch.stack(images), torch.stack([dataset[2], dataset[0], dataset[3]]))
    assert captions == [
        ["true ant", "ant (50%)", "entropy 0.69"],
        ["true bee", "bee (75%)", "entropy 0.56"],
        ["true ant", "ant (90%)", "entropy 0.33"],
    ]


def test_a_prepared_model_takes_uint8_images():
    """Its logits are the model's on prepared images, with and without masks, and it draws the model's masks."""
    model = VisionTransformer(8, 4, 3, 16, 2, 2, num_classes=3)
    network = vision_task.Prepared(model, [0.4] * 3, [0.2] * 3)
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with keyed_rng("masks"):
        masks = network.sample_masks(5, 2)
    assert masks["pos_drop"].shape == (5, 2, 1, 16)
    assert torch.equal(network(images), model(prepare(images, [0.4] * 3, [0.2] * 3)))
    assert torch.equal(network(images, masks), model(prepare(images, [0.4] * 3, [0.2] * 3), masks))


# --- Dirty data -------------------------------------------------------------------------------------------------------


def spoil(path, how: str) -> None:
    """Makes an image file undecodable."""
    if how == "gone":
        path.unlink()
    elif how == "text":
        path.write_text("this is no picture")
    elif how == "truncated":
        Image.fromarray(noise(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:700])
    else:  # a decompression bomb: a small file that claims 30,000 x 30,000 pixels
        Image.new("1", (30_000, 30_000)).save(path, "PNG")


@pytest.mark.parametrize("how", ["gone", "text", "truncated", "bomb"])
@pytest.mark.parametrize("cache, num_workers", [(False, 0), (True, 0), (True, 1)])
def test_skip_lets_the_next_good_image_take_the_place(tmp_path, how, cache, num_workers):
    """Images 2 and 3 of 7 (the last of one class and the first of the next) are bad: 4 stands in for both, with its
    own class, in every epoch, from the cache too; the report names both files each time they are met."""
    dataset, reports = image_folder(tmp_path, {"ant": 3, "bee": 4}), []
    good = [dataset[i] for i in range(7)]
    for i in (2, 3):
        spoil(Path(dataset.paths[i]), how)
    options = {"cache": cache, "num_workers": num_workers, "on_bad": "skip", "report": reports.append}
    batches = stream_batches(dataset, lambda epoch: torch.arange(7), 7, range(3), **options)
    for batch in batches:
        assert batch.metadata["indices"].tolist() == [0, 1, 4, 4, 4, 5, 6]
        assert batch.targets.tolist() == [0, 0, 1, 1, 1, 1, 1]
        assert all(torch.equal(image, good[i]) for image, i in zip(batch.inputs, [0, 1, 4, 4, 4, 5, 6]))
    assert len(reports) == (1 if cache else 3)
    for report in reports:
        assert list(report) == [dataset.paths[2], dataset.paths[3]]
        assert all(message.startswith(f"{path}: not a readable image (") for path, message in report.items())


def test_an_error_is_raised_unless_skipping_is_asked_for(tmp_path):
    dataset = image_folder(tmp_path, {"ant": 3, "bee": 2})
    spoil(Path(dataset.paths[1]), "text")
    with pytest.raises(InputError, match="not a readable image"):
        list(stream_batches(dataset, lambda epoch: torch.arange(5), 5, range(1)))


def test_the_last_images_are_replaced_by_the_first(tmp_path):
    dataset = image_folder(tmp_path, {"ant": 2, "bee": 2})
    spoil(Path(dataset.paths[3]), "gone")
    batch = next(stream_batches(dataset, lambda epoch: torch.arange(4), 4, range(1), on_bad="skip"))
    assert batch.metadata["indices"].tolist() == [0, 1, 2, 0]


def test_no_good_image_at_all(tmp_path):
    dataset = image_folder(tmp_path, {"ant": 2, "bee": 2})
    for path in dataset.paths:
        spoil(Path(path), "gone")
    with pytest.raises(InputError, match="no image that can be decoded"):
        next(stream_batches(dataset, lambda epoch: torch.arange(4), 2, range(1), on_bad="skip"))


@pytest.mark.parametrize("bad", [[0], [3, 4], [6], [0, 1, 2, 3, 4, 5, 6]])
def test_an_evaluation_drops_what_cannot_be_decoded(tmp_path, bad):
    """No image stands in for another, none is counted twice; batches keep their places."""
    dataset, reports = image_folder(tmp_path, {"ant": 3, "bee": 4}), []
    for i in bad:
        spoil(Path(dataset.paths[i]), "text")
    batches = list(ordered_batches(dataset, 3, on_bad="drop", report=reports.append))
    seen = [batch.metadata["indices"].tolist() for batch in batches]
    assert seen == [[i for i in part if i not in bad] for part in ([0, 1, 2], [3, 4, 5], [6])]
    assert {path for report in reports for path in report} == {dataset.paths[i] for i in bad}


def test_every_other_batch(tmp_path):
    """What two processes evaluate: all batches, each by one of them."""
    dataset = image_folder(tmp_path, {"ant": 3, "bee": 4})
    parts = [[b.metadata["indices"].tolist() for b in ordered_batches(dataset, 2, first, 2)] for first in range(2)]
    assert parts == [[[0, 1], [4, 5]], [[2, 3], [6]]]


def test_the_slices_of_two_processes_are_the_batch(monkeypatch):
    monkeypatch.setattr(vision_task, "decode_image", fake_decode)
    whole = list(seen_indices(stream_batches(memory_dataset(7), shuffled(7), 4, range(5))))
    parts = [
        list(seen_indices(stream_batches(memory_dataset(7), shuffled(7), 4, range(5), part=part)))
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert [a + b for a, b in zip(*parts)] == whole


def test_names_that_are_not_utf_8_and_line_breaks(tmp_path):
    """They are read like others, and an error names them on one line that any terminal can print."""
    folder = tmp_path / "train"
    image_folder(folder, {"ant": 2, "bee": 2})
    odd = os.fsencode(folder / "ant") + b"/\xff\xfe\nx.png"
    with open(odd, "wb") as file:
        file.write(b"nothing")
    with open(os.fsencode(folder / "bee") + b"/\xe9.png", "wb") as file:
        Image.fromarray(noise(4, 4)).save(file, "PNG")
    dataset = VisionClassificationDataset(str(folder), 4)
    assert len(dataset) == 6 and dataset[5].shape == (3, 4, 4)
    with pytest.raises(InputError) as error:
        list(ordered_batches(dataset, 6))
    str(error.value).encode("utf-8")
    assert "\n" not in str(error.value) and r"\udcff\udcfe\nx.png: not a readable image" in str(error.value)
    assert fingerprint(dataset).startswith("6 images (")


def test_the_fingerprint_is_of_the_names_below_the_folder(tmp_path):
    one, two = (image_folder(tmp_path / name, {"ant": 2, "bee": 2}) for name in ("a", "b"))
    assert fingerprint(one) == fingerprint(two)
    Path(one.paths[1]).rename(tmp_path / "a" / "ant" / "7.png")
    assert fingerprint(VisionClassificationDataset(str(tmp_path / "a"), 4)) != fingerprint(two)
