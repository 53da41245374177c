"""images.py: which files are found, what a file decodes to, which batches a step gets, and how pixels are prepared."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from io import BytesIO
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, message
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

import images
import processes
from build import say_notes
from data_types import InputError
from folders import upright_size
from images import ImageDataset, Loading, decode_image, look_at, ordered_batches, prepare, stream_batches
from vit_model import VisionTransformer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on one core
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def noise(height: int = 8, width: int = 8) -> np.ndarray:
    """Random uint8 pixels [height, width, 3]."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Image.Image:
    """A random RGB image without fine detail, which lossy formats hardly change."""
    return Image.fromarray(noise(6, 6)).resize((width, height), Image.Resampling.BICUBIC)


def decoded(path, size: int = 8) -> np.ndarray:
    """`decode_image` as an integer array [size, size, 3]."""
    tensor = decode_image(str(path), size)
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, size, size) and tensor.is_contiguous()
    return tensor.permute(1, 2, 0).numpy().astype(int)


RGB, GREY = noise(2, 2), noise(2, 2)[:, :, :1]
SIXTEEN = np.array([[0, 256], [32768, 65535]])  # 256 would be white if it were clipped
SCALED = SIXTEEN[:, :, None] / 257
IDS, COLOURS = np.array([[0, 1], [1, 2]], np.uint8), np.array([[10, 20, 30], [255, 0, 128], [0, 7, 250]], np.uint8)
PALETTE = Image.fromarray(IDS).copy()
PALETTE.putpalette(COLOURS.tobytes())
SECOND_IS_WHITE = np.array([COLOURS[0], [255] * 3, COLOURS[2]])[IDS]
ALPHA = np.array([[[0], [51]], [[128], [255]]], np.uint8)
RGBA, LA = np.dstack([RGB, ALPHA]), np.dstack([GREY, ALPHA])
ON_WHITE = 255 - ALPHA / 255 * (255.0 - RGB)
FIRST_IS_WHITE = np.where(np.array([[[1], [0]], [[0], [0]]]), 255, RGB)
ORANGE = Image.new("RGB", (2, 2), (250, 120, 10))


@pytest.mark.parametrize(
    "name, pixels, options, mode, expected, tolerance",
    [
        *((name, RGB, {}, "RGB", RGB, 0) for name in ("x.png", "x.BMP", "x.TIFF")),
        ("x.webp", RGB, {"lossless": True}, "RGB", RGB, 0),
        ("x.png", GREY[:, :, 0], {}, "L", GREY, 0),
        ("x.gif", GREY[:, :, 0], {}, "P", GREY, 0),
        ("x.gif", GREY[:, :, 0], {"save_all": True, "append_images": [PALETTE]}, "P", GREY, 0),
        ("x.png", IDS > 0, {}, "1", 255 * (IDS > 0)[:, :, None], 0),
        ("x.png", PALETTE, {}, "P", COLOURS[IDS], 0),
        *((f"x.{s}", PALETTE, {"transparency": 1}, "P", SECOND_IS_WHITE, 0) for s in ("png", "gif")),
        *((f"x.{s}", SIXTEEN.astype("<u2"), {}, "I;16", SCALED, 0.999) for s in ("png", "tif")),
        ("x.tif", SIXTEEN.astype(">u2"), {}, "I;16B", SCALED, 0.999),
        ("x.tif", SIXTEEN.astype("<i4"), {}, "I", SCALED, 0.999),
        *((f"x.{s}", RGBA, {}, "RGBA", ON_WHITE, 1) for s in ("png", "tif")),
        ("x.webp", RGBA, {"lossless": True, "exact": True}, "RGBA", ON_WHITE, 1),
        ("x.png", LA, {}, "LA", ON_WHITE[:, :, :1], 1),
        ("x.png", RGB, {"transparency": tuple(RGB[0, 0].tolist())}, "RGB", FIRST_IS_WHITE, 0),
        ("x.png", GREY[:, :, 0], {"transparency": int(GREY[0, 0, 0])}, "L", FIRST_IS_WHITE[:, :, :1], 0),
        *((name, ORANGE, {"quality": 95}, "RGB", np.array(ORANGE), 4) for name in ("x.jpg", "x.webp")),
        ("x.jpg", Image.new("CMYK", (2, 2), (255, 0, 55, 0)), {"quality": 95}, "CMYK", np.array([[[0, 255, 200]]]), 4),
    ],
)
def test_every_mode_decodes_to_its_rgb(tmp_path, name, pixels, options, mode, expected, tolerance):
    """16-bit grey is scaled, transparency lies on white, an animation gives its first frame."""
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as image:
        assert image.mode == mode
    assert np.abs(decoded(tmp_path / name, 2) - expected.astype(float)).max() <= tolerance


@pytest.mark.parametrize("highest, said", [([4095, 500, 16383], 16383), ([4095, 16384], 0), ([], 0)])
def test_16_bits_that_are_nearly_black_are_said(tmp_path, highest, said):
    """8-bit images and files that cannot be read say nothing."""
    paths = [str(tmp_path / f"{i}.png") for i in range(10)]  # of which 0, 1, 2, 3, 5, 6, 7, 8 are looked at
    for i, path in enumerate(paths[1:]):
        Image.new("I;16", (2, 1), highest[i]).save(path) if i < len(highest) else Image.new("L", (2, 1)).save(path)
    say_notes(SimpleNamespace(root="x", notes=("y",), paths=paths), SimpleNamespace(line=(lines := []).append))
    line = f"note: x: of the 16-bit images, 3 looked at, no pixel is above {said} of 65535: they are nearly black; "
    assert lines == ["note: x: y"] + [line + "scale them to the whole range, or to 8 bits"] * (said > 0)


def test_tiffs_with_several_pages_are_said(tmp_path):
    """An overview, smaller than its image, is no page of its own."""
    for i, size in enumerate((4, 2)):
        options = {"save_all": True, "append_images": [Image.new("L", (size, 4))]}
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.tif", **options)
    said = "of 2 images looked at, 1 are TIFFs with several pages: only the first is read"
    assert look_at([str(tmp_path / f"{i}.tif") for i in range(2)]) == [said]


T = Image.Transpose
STORED = {  # what a camera does to the upright picture under each of EXIF's orientations
    **{1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM},
    **{5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270},
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path, orientation, suffix):
    """A picture stored turned or mirrored decodes as the upright one, and has its size; JPEG, at 1/4, does closely."""
    image, size, tolerance = (smooth(160, 128), 32, 3) if suffix == "jpg" else (Image.fromarray(noise(12, 20)), 8, 0)
    stored = image if orientation == 1 else image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}
    stored.save(tmp_path / f"x.{suffix}", exif=exif, **options.get(suffix, {}))
    image.save(tmp_path / "upright.png")
    upright, as_stored = decoded(tmp_path / "upright.png", size), np.asarray(stored.resize((size, size))).astype(int)
    assert upright_size(str(tmp_path / f"x.{suffix}")) == image.size
    assert np.abs(decoded(tmp_path / f"x.{suffix}", size) - upright).mean() <= tolerance
    assert orientation == 1 or np.abs(as_stored - upright).mean() > 10


def test_resized_not_cropped_and_antialiased(tmp_path):
    """A 2:1 picture's quarters are the square's, up to its corners; a fine checkerboard shrinks to mid grey; an
    enlarged step has values in between."""
    colours = np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [250, 250, 10]]], dtype=np.uint8)
    board = (np.indices((120, 120)).sum(0) % 2 * 255).astype(np.uint8)
    pictures = colours.repeat(40, 0).repeat(80, 1), board, np.array([[0, 200]], dtype=np.uint8)
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    quarters, shrunk, step = (decoded(tmp_path / f"{i}.png", 16) for i in range(3))
    np.testing.assert_array_equal(quarters[[0, 0, -1, -1], [0, -1, 0, -1]].reshape(2, 2, 3), colours)
    np.testing.assert_array_equal(quarters[[2, 2, 13, 13], [5, 10, 5, 10]].reshape(2, 2, 3), colours)
    assert np.abs(shrunk - 127.5).max() < 8
    assert ((step > 50) & (step < 150)).any()


@pytest.mark.parametrize("width, height, part", [(768, 512, 8), (768, 300, 4), (127, 300, 1)])
def test_large_jpeg_is_decoded_at_reduced_size(tmp_path, monkeypatch, width, height, part):
    """A JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8 that still covers the square, and looks as the whole."""
    smooth(height, width).save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        full = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    sizes, to_rgb = [], images.to_rgb
    monkeypatch.setattr(images, "to_rgb", lambda x: sizes.append(x.size) or to_rgb(x))
    difference = np.abs(decoded(tmp_path / "x.jpg", 64) - full)
    assert sizes == [(-(-width // part), -(-height // part))]
    assert difference.mean() < 2 and difference.max() < 20


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    image.save(buffer := BytesIO(), kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, reason",
    [
        (encoded(smooth(64, 64), "JPEG")[:1000], r"image file is truncated \(\d+ bytes not processed\)"),
        (b"this is no image\n", r"cannot identify image file 'PATH'"),
        (None, r"\[Errno 2\] No such file or directory: 'PATH'"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point pixels have no fixed range; save it with 8 or .+"),
        (encoded(Image.new("I", (4, 4), -7), "TIFF"), "pixels from -7 to -7; shift and scale them into 0 to 65535"),
        (encoded(Image.new("I", (4, 4), 65536), "TIFF"), "pixels from 65536 to 65536; .+"),
        (encoded(Image.new("1", (400, 300)), "PNG"), r"Image size \(120000 pixels\) exceeds limit of \d+ pixels, .+"),
        (OSError("two\n  lines"), "two lines"),
        (MemoryError(), "MemoryError"),
    ],
    ids=["truncated", "text", "missing", "float", "negative", "17 bits", "bomb", "line break", "no message"],
)
def test_unreadable_file_is_one_line_naming_it(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    if isinstance(content, bytes):
        (tmp_path / "x").write_bytes(content)
    elif content:  # raised by Pillow
        monkeypatch.setattr(Image, "open", mock.Mock(side_effect=content))
    pattern = r"PATH: not a readable image \(" + reason + r"\); repair or remove it"
    assert re.fullmatch(pattern.replace("PATH", re.escape(f"{tmp_path}/x")), message(decode_image, f"{tmp_path}/x", 8))


# --- Batches ----------------------------------------------------------------------------------------------------------


class Numbered(ImageDataset):
    """n images without files: image i is the single pixel (i, i, i), its class i % 3; those in `bad` are unreadable."""

    root, image_size, classes = "memory", 1, ["a", "b", "c"]

    def __init__(self, n: int, bad: tuple[int, ...] = ()):
        self.paths, self.targets, self.bad = [f"memory/{i}" for i in range(n)], torch.arange(n) % 3, bad
        self.opened = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.opened += 1
        if get_worker_info():  # as by Ctrl-C, which reaches the whole process group
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        if index in self.bad:
            raise InputError(f"memory/{index}: no good")
        return torch.full((3, 1, 1), index, dtype=torch.uint8)


def shuffled(n: int):
    """A permutation for each epoch."""
    return lambda epoch: torch.randperm(n, generator=torch.Generator().manual_seed(epoch))


def expected_indices(n: int, batch_size: int, steps: range) -> list[list[int]]:
    """Slow reference: the epochs of `shuffled(n)` laid end to end and cut."""
    epochs = itertools.chain.from_iterable(shuffled(n)(epoch).tolist() for epoch in itertools.count())
    flat = list(itertools.islice(epochs, steps.stop * batch_size))
    return [flat[s * batch_size : (s + 1) * batch_size] for s in steps]


def seen_indices(batches) -> list[list[int]]:
    """The indices of the batches of `Numbered`, once all else is seen to agree with them."""
    seen = []
    for batch in batches:
        indices = batch.metadata["indices"]
        assert batch.inputs.dtype == torch.uint8 and batch.inputs.shape == (len(indices), 3, 1, 1)
        assert bool((batch.inputs == indices.view(-1, 1, 1, 1)).all())
        assert torch.equal(batch.targets, indices % 3) and batch.targets.dtype == torch.int64
        assert batch.metadata["paths"] == [f"memory/{i}" for i in indices.tolist()]
        assert batch.metadata["classes"] == ("a", "b", "c")
        seen.append(indices.tolist())
    return seen


@EXAMPLES
@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 12), st.integers(0, 9), st.booleans())
def test_batches_are_a_function_of_the_step(n, batch_size, start, more, cache):
    """Any start, batch size (beyond n too) and cache give the batches of the epochs laid end to end."""
    steps = range(start, start + more)
    batches = stream_batches(Numbered(n), shuffled(n), batch_size, steps, cache=cache)
    assert seen_indices(batches) == expected_indices(n, batch_size, steps)


@pytest.mark.parametrize("cache", [False, True])
def test_workers_hand_out_the_same_batches(cache):
    """Two worker processes change nothing, in order or content, and leave signals to the main process."""
    batches = stream_batches(Numbered(10), shuffled(10), 4, range(4, 12), Loading(num_workers=2), cache=cache)
    assert seen_indices(batches) == expected_indices(10, 4, range(4, 12))


def test_where_shared_memory_is_full_batches_go_through_pipes(monkeypatch):
    """The same ones; before the run a line says what is missing, and what to do."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", mock.Mock(side_effect=RuntimeError("No space left on device")))
    batches = stream_batches(Numbered(10), shuffled(10), 4, range(12), Loading(num_workers=2))
    assert seen_indices(batches) == expected_indices(10, 4, range(12))
    monkeypatch.setattr(images.shutil, "disk_usage", lambda folder: SimpleNamespace(free=64e6))
    [note] = images.shared_memory_note(2, 9_000_000, "/")
    assert "(/) has room for 64 MB, the workers can fill 72: " in note and "data.num_workers=0" in note
    assert "--shm-size=1g" in note
    assert not images.shared_memory_note(2, 8_000_000, "/") and not images.shared_memory_note(0, 10**9, "/")
    assert not images.shared_memory_note(2, 10**9, "/no such folder")


def test_the_slices_of_two_processes_are_the_batch():
    halves = slice(0, 2), slice(2, 4)
    parts = [seen_indices(stream_batches(Numbered(7), shuffled(7), 4, range(5), part=part)) for part in halves]
    assert [a + b for a, b in zip(*parts)] == expected_indices(7, 4, range(5))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_gloo_is_given_time_before_a_worker_is_forked(monkeypatch, num_workers):
    """Else a worker forked right after a collective may hang."""
    slept, settled = [], []
    monkeypatch.setattr(images, "settle", lambda: settled.append(len(multiprocessing.active_children())))
    assert list(images.explained(DataLoader([0, 1], batch_size=None, num_workers=num_workers))) == [0, 1]
    assert settled == [0] * num_workers
    monkeypatch.setattr(time, "sleep", slept.append)
    for several in (False, True):
        monkeypatch.setattr(dist, "is_initialized", lambda several=several: several)
        processes.settle()
    assert slept == [0.05]


@pytest.mark.parametrize("start, batch_size, decodes", [(0, 4, 12), (0, 5, 10), (3, 4, 20), (4, 4, 16), (0, 25, 25)])
def test_cache_opens_no_file_after_a_whole_epoch(start, batch_size, decodes):
    """Files are decoded up to the batch that completes the first epoch entered at its start, and never after."""
    dataset = Numbered(10)
    batches = stream_batches(dataset, shuffled(10), batch_size, range(start, 40), cache=True)
    assert len(list(batches)) == 40 - start and dataset.opened == decodes


def test_what_is_kept_in_memory(monkeypatch):
    """10 images of 3 bytes; a process of several keeps none, because it sees all only after many epochs."""
    for cache, limit, kept in (("auto", 31e-9, True), ("auto", 29e-9, False), ("always", 0, True), ("never", 1, False)):
        for world in (1, 2):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            data = SimpleNamespace(cache=cache, cache_limit_gb=limit)
            assert images.keep_decoded(data, Numbered(8), None, Numbered(2)) == (kept and world == 1, 30)


def test_the_fingerprint_is_of_the_names_below_the_folder():
    """It says their number; a name may be any bytes."""
    one, moved, renamed = Numbered(2), Numbered(2), Numbered(2)
    moved.root, moved.paths = "other", ["other/0", "other/1"]
    renamed.paths = ["memory/0", "memory/\udcff\n"]
    assert images.fingerprint(one) == images.fingerprint(moved) != images.fingerprint(renamed)
    assert images.fingerprint(renamed).startswith("2 images (")


DIED = "InputError: data.num_workers: a process that decodes images was killed by the system"
UNCLOSED_STREAM = """
import multiprocessing, os, signal, sys, torch
from images import Loading, stream_batches
from vision_task import VisionClassificationDataset
dataset = VisionClassificationDataset("data/eval", 4)
stream = stream_batches(dataset, lambda epoch: torch.arange(len(dataset)), 2, range(10**6), Loading(num_workers=2))
next(stream)
if sys.argv[1] == "killed":  # as when memory runs out
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    print(sum(len(batch) for batch in stream))
sys.exit("stopped in the middle")
"""


@pytest.mark.parametrize("end, complaint", [("exit", "stopped in the middle"), ("killed", DIED)])
def test_process_ends_though_a_stream_is_left_open(end, complaint):
    """Exit in mid-stream, or on the death of one worker, does not wait for workers that ignore SIGTERM."""
    command = [sys.executable, "-W", "ignore", "-c", UNCLOSED_STREAM, end]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=25)
    assert result.returncode == 1 and complaint in result.stderr
    assert result.stderr.count("\n") == 1 or end == "killed"


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 45), st.integers(1, 3))
def test_ordered_batches_cover_each_image_once(n, batch_size, every):
    """Images 0 … n - 1 in order, in full batches but for the last, dealt to so many processes in turn."""
    whole = [list(range(n))[i : i + batch_size] for i in range(0, n, batch_size)]
    for first in range(every):
        seen = seen_indices(ordered_batches(Numbered(n), batch_size, Loading(), first, every))
        assert seen == whole[first::every]


@pytest.mark.parametrize("cache, num_workers", [(False, 0), (True, 0), (True, 1)])
def test_skip_lets_the_next_good_image_take_the_place(cache, num_workers):
    """Images 2, 3 and 6 of 7 are bad: 4 stands in for the two, with its own class, and 0 for the last, in every epoch,
    from the cache too; the report names the files each time they are met."""
    reports = []
    loading = Loading(num_workers, on_bad="skip", report=reports.append)
    dataset = Numbered(7, bad=(2, 3, 6))
    batches = stream_batches(dataset, lambda epoch: torch.arange(7), 7, range(3), loading, cache=cache)
    assert seen_indices(batches) == [[0, 1, 4, 4, 4, 5, 0]] * 3
    assert reports == [{f"memory/{i}": f"memory/{i}: no good" for i in (2, 3, 6)}] * (1 if cache else 3)
    stream = stream_batches(Numbered(4, bad=range(4)), shuffled(4), 2, range(1), loading)
    assert message(next, stream) == "memory: no image that can be decoded"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_file_ends_the_stream_with_its_line(num_workers):
    """The batches before a bad file arrive; then its one line, not the traceback of a worker."""
    batches = ordered_batches(Numbered(8, bad=(5,)), 2, Loading(num_workers))
    assert [next(batches).metadata["indices"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    assert message(next, batches) == "memory/5: no good"


@pytest.mark.parametrize("bad", [[0], [3, 4], [6], [0, 1, 2, 3, 4, 5, 6]])
def test_an_evaluation_drops_what_cannot_be_decoded(bad):
    """No image stands in for another, none is counted twice; batches keep their places."""
    reports = []
    batches = ordered_batches(Numbered(7, bad), 3, Loading(on_bad="drop", report=reports.append))
    assert seen_indices(batches) == [[i for i in part if i not in bad] for part in ([0, 1, 2], [3, 4, 5], [6])]
    assert {path for report in reports for path in report} == {f"memory/{i}" for i in bad}


def test_prepare_is_the_closed_form():
    """(x / 255 - mean) / std by channel, in float32; nothing is drawn."""
    x, mean, std = torch.arange(360).view(5, 3, 4, 6).byte(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    state = torch.get_rng_state()
    got = prepare(x, mean, std)
    assert torch.equal(torch.get_rng_state(), state) and got.dtype == torch.float32
    for c in range(3):
        expected = (x[:, c].double() / 255 - mean[c]) / std[c]
        torch.testing.assert_close(got[:, c].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_prepared_model_takes_uint8_images():
    """Its logits are the model's on prepared images, with and without masks, arranged; it draws the model's masks."""
    model, scale = VisionTransformer(8, 4, 3, 16, 2, 2), ([0.4] * 3, [0.2] * 3)
    x = torch.arange(960).view(5, 3, 8, 8).byte()
    network = images.Prepared(model, *scale, torch.neg)
    masks = network.sample_masks(5, 2)
    assert masks["pos_drop"].shape == (5, 2, 1, 16)
    assert torch.equal(network(x), -model(prepare(x, *scale)))
    assert torch.equal(images.Prepared(model, *scale)(x, masks), model(prepare(x, *scale), masks))


def test_bad_images_of_all_processes_are_said_and_counted(monkeypatch):
    """Each once; up to 1 % or three of them. Several processes hear of each other's, and stop together."""
    said = []
    alone = images.BadImages(400, said.append)
    alone({"a": "a: no good", "b": "b: no good"})
    alone({"b": "b: no good", "c": "c: no good"})
    alone({"d": "d: no good"})
    assert said == [f"warning: {name}: no good" for name in "abcd"]
    few = "data.on_bad_image: skip: {} of {} images cannot be decoded, more than 1 % and more than 3, {} the first; "
    assert message(alone, {"e": "e: no good"}).startswith(few.format(5, 400, "a"))
    small = images.BadImages(8, said.append)
    small(dict.fromkeys("abc", "no good"))
    assert small.left(Numbered(7)) == "7 images"
    small.seen.add("memory/1")
    assert small.left(Numbered(7)) == "6 of 7 images"
    small.seen.remove("memory/1")
    assert message(small, {"d": "no good"}).startswith(few.format(4, 8, "a"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = images.BadImages(8, said.append)
    first(dict.fromkeys("abcd", "no good"))
    monkeypatch.setattr(images, "gather_everywhere", lambda own, group: [own, {"a": "no good", "z": "z: no good"}])
    assert message(first.share, None).startswith(few.format(5, 8, "a")) and said[-1] == "warning: z: no good"
