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
from conftest import ROOT
from PIL import Image

from build import configure
from checkpoint import load_checkpoint
from config import read_yaml
from data_types import InputError
from detection_task import DetectionDataset
from folders import upright_size
from images import decode_image
from mask_files import decode_mask
from pretrained import load_weights
from vit_model import VisionTransformer

SECONDS = 5  # for one file, far more than any takes
GIGABYTES = 1.5  # that the whole of it may add to the process's peak: Pillow lets pictures of 179 million pixels pass
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.remove", "os.rmdir")
heard: list[str] = []
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def no_code_runs_and_memory_is_bounded():
    sys.addaudithook(lambda event, _: heard.append(event) if event.startswith(FORBIDDEN) else None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTES * 1e6  # in kB


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four times a bit flipped, bytes overwritten, a part cut off, left out, doubled or filled with zeros, or a
    number made huge."""
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(data)), rng.randint(1, max(1, len(data) // 4))
        part, rest = data[place : place + length], data[place + length :]
        data = data[:place] + rng.choice([
            bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :],
            rng.randbytes(4) + data[place + 4 :],
            b"",
            rest,
            part + part + rest,
            bytes(len(part)) + rest,
            b"\xff\xff\xff\x7f" + data[place + 4 :],
        ])  # fmt: skip
        data = data or b"\0"
    return data


def survives(function, *arguments) -> bool:
    """Whether the call came through; it may raise InputError with at most ten lines, and nothing else, in time."""
    begin, before = time.monotonic(), len(heard)
    try:
        function(*arguments)
        used = True
    except InputError as error:
        lines = str(error).split("\n")
        assert len(lines) <= 10 and all(line and len(line) < 2000 for line in lines)
        str(error).encode("utf-8")
        used = False
    assert time.monotonic() - begin < SECONDS
    assert heard[before:] == []
    return used


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
RGB, PALETTE = Image.fromarray(NOISE), Image.fromarray(NOISE).convert("P")
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
PALETTES = [encoded(PALETTE, kind) for kind in ("PNG", "GIF", "BMP")]
PICTURES = [encoded(RGB, kind) for kind in ("PNG", "BMP", "TIFF", "WEBP")] + PALETTES[:2]
PICTURES += [encoded(RGB.convert("LA"), "PNG"), encoded(RGB, "TIFF", compression="tiff_lzw")]
PICTURES += [encoded(RGB, "JPEG", exif=TURNED)]
ANNOTATIONS = {
    "info": "x" * 1000,
    "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in range(3)],
    "annotations": [{"id": i, "image_id": i % 3, "category_id": 1, "bbox": [1, 2, 3.5, 4]} for i in range(5)],
    "categories": [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}],
}
CONFIGS = [path.read_bytes() for path in sorted(ROOT.glob("config*.yaml"))]
MODEL = VisionTransformer(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=2)
STATE = {"step": 3, "model": MODEL.state_dict(), "optimizer": {}, "config": {}, "classes": ["a", "b"]}
torch.save(STATE, CHECKPOINT := io.BytesIO())


def read_config(path: Path) -> None:
    config, _ = configure((str(path), read_yaml(str(path))))
    yaml.safe_dump(config)


KINDS = {  # so many files, of what, and how they are read
    "images": (1200, PICTURES, lambda path: (decode_image(str(path), 16), upright_size(str(path)))),
    "masks": (200, PALETTES, lambda path: decode_mask(str(path), 8, np.arange(256, dtype=np.uint8))),
    "annotations": (200, [json.dumps(ANNOTATIONS).encode()], lambda path: DetectionDataset(str(path.parent), 8, 4)),
    "configs": (200, CONFIGS, read_config),
    "checkpoints": (150, [CHECKPOINT.getvalue()], load_checkpoint),
    "weights": (150, [CHECKPOINT.getvalue()], lambda path: load_weights(MODEL, str(path))),
}


@pytest.mark.parametrize("count, originals, read", KINDS.values(), ids=KINDS)
def test_mutated_files(tmp_path, count, originals, read):
    rng, used, path = random.Random(0), 0, tmp_path / "annotations.json"
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{i}.png")
    for i in range(count):
        path.write_bytes(mutate(originals[i % len(originals)], rng))
        used += survives(read, path)
    assert count / 50 < used < count - 5  # some are still good


def test_configs_with_another_value_for_a_key(tmp_path):
    rng, used = random.Random(2), 0
    values = ["null", "-1", "1e400", "[1, 2]", "{a: b}", "!!python/object/apply:os.system ['true']", "~", "'x'", ".nan"]
    for _ in range(200):
        lines = rng.choice(CONFIGS).decode().splitlines()
        at = rng.choice([n for n, line in enumerate(lines) if ": " in line and not line.startswith("#")])
        lines[at] = lines[at].split(": ")[0] + ": " + rng.choice(values)
        (tmp_path / "x.yaml").write_text("\n".join(lines))
        used += survives(read_config, tmp_path / "x.yaml")
    assert 10 < used < 190
