"""Mutated files of every kind that is read: each is used or refused in one line; no traceback, no hang, no code run."""

import io
import json
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from checkpoint import load_checkpoint, load_weights, save_checkpoint
from config import check, read_yaml
from data_types import InputError
from detection_task import DetectionDataset
from segmentation_task import decode_mask
from vision_task import decode_image, upright_size
from vit_model import VisionTransformer

ROOT = Path(__file__).parent.parent
SECONDS = 5  # for one file, far more than any takes
GIGABYTES = 1.5  # that the whole of it may add to the process's peak: Pillow lets pictures of 179 million pixels pass
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.remove", "os.rmdir")
heard: list[str] = []


def listen(event: str, args) -> None:
    if event.startswith(FORBIDDEN):
        heard.append(event)


@pytest.fixture(autouse=True, scope="module")
def no_code_runs_and_memory_is_bounded():
    sys.addaudithook(listen)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    heard.clear()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTES * 1e6  # in kB


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few bits flipped, bytes overwritten, a part cut off, left out, doubled, filled with zeros, or made huge."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        size = len(data)
        place, length = rng.randrange(size), rng.randint(1, max(1, size // 4))
        match rng.randrange(7):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + 4] = rng.randbytes(4)
            case 2:
                data[place:] = b""
            case 3:
                data[place : place + length] = b""
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                data[place : place + length] = bytes(min(length, size - place))
            case 6:
                data[place : place + 4] = b"\xff\xff\xff\x7f"
        data = data or bytearray(b"\0")
    return bytes(data)


def survives(function, *refusals) -> bool:
    """Whether `function` came through; it may raise InputError with one line, and nothing else, in time."""
    begin, before = time.monotonic(), len(heard)
    try:
        function()
        used = True
    except InputError as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 2000
        line.encode("utf-8")
        used = False
    assert time.monotonic() - begin < SECONDS
    assert heard[before:] == []
    return used


def pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (24, 20, 3)).astype(np.uint8))
    files = {}
    for name, image, options in (
        ("png", rgb, {}),
        ("png", rgb.convert("P"), {}),
        ("png", rgb.convert("LA"), {}),
        ("jpg", rgb, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
        ("gif", rgb.convert("P"), {}),
        ("bmp", rgb, {}),
        ("tif", rgb, {"compression": "tiff_lzw"}),
        ("tif", rgb, {}),
        ("webp", rgb, {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(name, name.upper()), **options)
        files[f"{len(files)}.{name}"] = buffer.getvalue()
    return files


@pytest.mark.filterwarnings("ignore")
def test_1200_images(tmp_path):
    rng, used = random.Random(0), 0
    for name, data in pictures().items():
        path = tmp_path / name
        for _ in range(134):
            path.write_bytes(mutate(data, rng))

            def read(path=path):
                image = decode_image(str(path), 16)
                assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
                upright_size(str(path))

            used += survives(read)
    assert 100 < used < 1100  # some are still pictures


@pytest.mark.filterwarnings("ignore")
def test_200_masks_and_200_annotation_files(tmp_path):
    rng, used = random.Random(1), 0
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (12, 10)).astype(np.uint8)).save(buffer, "PNG")
    for _ in range(200):
        (tmp_path / "m.png").write_bytes(mutate(buffer.getvalue(), rng))
        used += survives(lambda: decode_mask(str(tmp_path / "m.png"), (10, 12), 8, 3))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    coco = {
        "images": [{"id": i, "file_name": "a.png", "width": 8, "height": 8} for i in range(3)],
        "annotations": [{"id": i, "image_id": i % 3, "category_id": 1, "bbox": [1, 2, 3.5, 4]} for i in range(5)],
        "categories": [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}],
    }
    text = json.dumps(coco).encode()
    for _ in range(200):
        (tmp_path / "annotations.json").write_bytes(mutate(text, rng))
        used += survives(lambda: DetectionDataset(str(tmp_path), 8, 4))
    assert 10 < used < 390


def test_400_configs(tmp_path):
    rng, used = random.Random(2), 0
    files = [path.read_bytes() for path in sorted(ROOT.glob("config*.yaml"))]
    values = ["null", "-1", "1e400", "[1, 2]", "{a: b}", "!!python/object/apply:os.system ['true']", "~", "'x'", ".nan"]
    path = tmp_path / "c.yaml"
    for i in range(400):
        data = rng.choice(files)
        if i % 2:
            data = mutate(data, rng)
        else:  # another value for a key
            lines = data.decode().splitlines()
            at = rng.choice([n for n, line in enumerate(lines) if ": " in line and not line.startswith("#")])
            lines[at] = lines[at].split(": ")[0] + ": " + rng.choice(values)
            data = "\n".join(lines).encode()
        path.write_bytes(data)

        def read():
            config = check((str(path), read_yaml(str(path))))
            yaml.safe_dump(config)

        used += survives(read)
    assert 20 < used < 380


@pytest.mark.filterwarnings("ignore")
def test_300_checkpoints(tmp_path):
    rng, used = random.Random(3), 0
    options = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 2}
    model = VisionTransformer(**options)
    state = {"step": 3, "model": model.state_dict(), "optimizer": {}, "config": {}, "classes": ["a", "b"]}
    save_checkpoint(state, tmp_path, best=False, keep=3)
    data = (tmp_path / "last.pt").read_bytes()
    path, before = tmp_path / "x.pt", {name: p.clone() for name, p in model.state_dict().items()}
    for _ in range(150):
        path.write_bytes(mutate(data, rng))
        used += survives(lambda: load_checkpoint(path))
        if not survives(lambda: load_weights(model, str(path))):  # refused: the model is as it was
            assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        model.load_state_dict(before)
    assert 5 < used < 145
