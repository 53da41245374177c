"""Writes data/scenes: pictures composed from the bundled digits, with pixel masks and COCO boxes of the same scenes.

    uv run data/make_scenes.py

Scene i is a function of the seed and i alone, however many are made. See data/README.md.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
CLASSES = [str(digit) for digit in range(10)]
MAX_IOU = 0.2  # of the boxes of two digits; each digit draws a bound below it, so that few overlap that much
MIN_VISIBLE = 0.4  # of a digit's mask, under all that lie on top of it
TRIES = 50  # places for a digit; then the scene does without it
NOISE = {"": (8, 24), "noisy_": (46, 50)}  # by prefix of the folders: standard deviations of the pixels, from … to
FINE = 4  # clutter is drawn this much larger and averaged down, so that its edges are as soft as the digits'


def load_digits(folder: Path) -> list[list[Image.Image]]:
    """The grey scans of each class, in the order of their names."""
    digits = []
    for name in CLASSES:
        paths = sorted((folder / name).glob("*.png"))
        if not paths:
            raise FileNotFoundError(f"{folder / name}: no digits (*.png) there; restore data/train and data/eval")
        digits.append([Image.open(path).convert("L") for path in paths])
    return digits


def draw_ink(digits: list[list[Image.Image]], size: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """A random digit at a random size: its class and its ink [h, w] in 0..1 without empty rows and columns."""
    digit = int(rng.integers(len(digits)))
    scan = digits[digit][rng.integers(len(digits[digit]))]
    height = int(rng.integers(round(size * 11 / 32), round(size * 18 / 32) + 1))
    width = round(height * rng.uniform(0.85, 1.25))  # of the scan, whose ink is narrower than high
    ink = np.asarray(scan.resize((width, height), Image.Resampling.BICUBIC))
    ink = ink / ink.max()  # small thin digits have paled in the averaging
    return digit, ink[ink.max(1) > 0][:, ink.max(0) > 0]


def paint(canvas: np.ndarray, ink: np.ndarray, x: int, y: int, level: float) -> None:
    """Covers canvas [size, size] with ink [h, w] of brightness `level`, its corner at (x, y)."""
    part = canvas[y : y + len(ink), x : x + ink.shape[1]]  # a view
    part += ink * (level - part)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x, y, width and height of the tight box around a mask [h, w]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def iou(a: tuple, b: tuple) -> float:
    """Intersection over union of two boxes (x, y, w, h)."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(wide, 0) * max(high, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def draw_background(digits: list, size: int, base: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth gradient with clutter as bright as digits on it: [size, size] in 0..255."""
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 25)
    ramp = np.linspace(-1, 1, size * FINE)
    gradient = base + slope * (np.cos(angle) * ramp + np.sin(angle) * ramp[:, None])
    image = Image.fromarray(gradient.clip(0, 255).astype(np.uint8))
    pen, unit = ImageDraw.Draw(image), size * FINE / 32
    for _ in range(rng.integers(0, 3)):  # thin lines
        x, y, angle, length = *rng.uniform(0, size * FINE, 2), rng.uniform(0, 2 * np.pi), rng.uniform(4, 12) * unit
        ends = [x, y, x + length * np.cos(angle), y + length * np.sin(angle)]
        pen.line(ends, fill=int(base + rng.uniform(20, 100)), width=round(rng.uniform(0.6, 1.2) * unit))
    for _ in range(rng.integers(0, 3)):  # blobs and rectangles
        x, y, wide, high = *rng.uniform(0, size * FINE, 2), *(rng.uniform(1.5, 4, 2) * unit)
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape([x, y, x + wide, y + high], fill=int(base + rng.uniform(20, 100)))
    canvas = np.array(image.reduce(FINE), dtype=np.float64)
    for _ in range(rng.integers(0, 2)):  # fragments of digits, at most half as wide and half as high
        ink = draw_ink(digits, size, rng)[1]
        high, wide = (side // 2 for side in ink.shape)
        top, left = rng.integers(0, len(ink) - high + 1), rng.integers(0, ink.shape[1] - wide + 1)
        x, y = rng.integers(0, size - wide + 1), rng.integers(0, size - high + 1)
        paint(canvas, ink[top : top + high, left : left + wide], x, y, base + rng.uniform(30, 100))
    return canvas


def make_scene(digits: list, size: int, noise: tuple, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list]:
    """One scene: image and mask (0, or 1 + the digit), both [size, size] uint8, and per digit (class, box, area).
    noise: the least and the greatest standard deviation, in grey levels; drawn last, so that the rest is the same."""
    base = rng.uniform(20, 90)
    canvas = draw_background(digits, size, base, rng)
    owner = np.zeros((size, size), dtype=np.int64)  # 0, or the digit on top there, counted from 1
    placed = []
    for _ in range(rng.integers(1, 4)):
        (digit, ink), level = draw_ink(digits, size, rng), base + rng.uniform(40, 120)
        mask = ink > 0.5
        left, top, wide, high = box_of(mask)
        bound = rng.uniform(0, MAX_IOU)
        for _ in range(TRIES):
            x, y = (int(rng.integers(0, size - side + 1)) for side in ink.shape[::-1])
            box, trial = (x + left, y + top, wide, high), owner.copy()
            trial[y : y + len(ink), x : x + ink.shape[1]][mask] = len(placed) + 1
            visible = np.bincount(trial.ravel(), minlength=len(placed) + 2)[1:]
            if all(iou(box, b) <= bound and v >= MIN_VISIBLE * a for (_, b, a), v in zip(placed, visible)):
                paint(canvas, ink, x, y, level)
                owner = trial
                placed.append((digit, box, int(mask.sum())))
                break
    canvas += rng.normal(0, rng.uniform(*noise), canvas.shape)
    values = np.array([0] + [digit + 1 for digit, _, _ in placed], dtype=np.uint8)
    return canvas.round().clip(0, 255).astype(np.uint8), values[owner], placed


def write_split(folder: Path, split: int, count: int, digits: list, noise: tuple, args: argparse.Namespace) -> None:
    """Writes `count` scenes into folder/images, folder/masks, folder/classes.txt and folder/annotations.json."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        image, mask, placed = make_scene(digits, args.size, noise, np.random.default_rng([args.seed, split, i]))
        name = f"{i:06d}.png"
        Image.fromarray(image).save(folder / "images" / name)
        Image.fromarray(mask if args.mask_classes == 11 else mask.clip(max=1)).save(folder / "masks" / name)
        images.append({"id": i, "file_name": name, "width": args.size, "height": args.size})
        for digit, box, area in placed:
            # numbered from 1: pycocotools' evaluation takes a match with annotation 0 for no match
            keys = {"id": len(annotations) + 1, "image_id": i, "category_id": digit + 1}
            annotations.append({**keys, "bbox": [float(v) for v in box], "area": area, "iscrowd": 0})
    names = ["background"] + (CLASSES if args.mask_classes == 11 else ["digit"])
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    info = {"description": f"data/make_scenes.py --size {args.size} --seed {args.seed}"}  # some pycocotools need it
    coco = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(coco))
    print(f"{folder}: {count} scenes, {len(annotations)} digits")


def foreign_file(out: Path, counts: dict[str, int]) -> Path | None:
    """A file under `out` that this run would not write, if there is one: a reader would take it for a scene."""
    ours = {out / split / name for split in counts for name in ("classes.txt", "annotations.json")}
    for split, count in counts.items():
        ours |= {out / split / part / f"{i:06d}.png" for part in ("images", "masks") for i in range(count)}
    return min((path for path in out.rglob("*") if not path.is_dir() and path not in ours), default=None)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, exits with 2 for bad input."""
    parser = argparse.ArgumentParser(prog="make_scenes.py", description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--out", type=Path, default=HERE / "scenes", metavar="DIR", help="(data/scenes)")
    parser.add_argument("--train", type=int, default=8000, metavar="N", help="training scenes (8000)")
    parser.add_argument("--eval", type=int, default=500, metavar="N", help="evaluation scenes (500)")
    parser.add_argument("--size", type=int, default=32, help="pixels on a side, at least 16 (32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mask-classes", type=int, choices=(2, 11), default=2, help="background and digit, or 0 to 9")
    args = parser.parse_args(argv)
    for name, least in (("train", 1), ("eval", 1), ("size", 16), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: must be at least {least}")
    counts = {"train": args.train, "eval": args.eval}
    try:
        digits = [load_digits(HERE / split) for split in counts]
        if file := foreign_file(args.out, {prefix + name: counts[name] for prefix in NOISE for name in counts}):
            parser.error(f"{file}: not one of the files to write; move it away or give another --out")
        for prefix, noise in NOISE.items():
            for split, name in enumerate(counts):
                write_split(args.out / (prefix + name), split, counts[name], digits[split], noise, args)
    except OSError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
