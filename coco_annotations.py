"""Annotation files of boxes in COCO's format, as its many tools write them: found, read, checked against the images.

What a file says is read for what it means (ids as texts, sizes as floats); what no training should meet is left out and
counted in `notes`; what cannot be right is refused, all of it in one list.
"""

import gc
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from config import one_line
from data_types import InputError
from folders import SUFFIXES, find_images, folder_error, is_visible, plain_name, refuse, same_name, upright_sizes

FLAGS = {None: False, 0: False, 1: True, "0": False, "1": True, "false": False, "true": True}
XML = "*.[xX][mM][lL]"
FAR = 1e9  # pixels, beyond any image
TOOLS = (  # keys of JSON that is not COCO's, or of its first row; whose it is; what makes COCO's of it
    ({"shapes"}, "labelme", "its labelme2coco.py makes COCO's of it"),
    ({"_via_img_metadata"}, "VIA", "export as COCO there"),
    ({"regions"}, "VIA", "export as COCO there"),
    ({"data", "annotations"}, "Label Studio", "export as COCO there"),
    ({"image", "annotations"}, "CreateML", "export as COCO where it was made"),
)
Id = int | str


@dataclass
class Annotations:
    """What a file says of n images with m objects.

    file, root: its path, and that of its folder. paths, sizes: of each image the file, and width and height upright.
    categories: id -> name, by ascending id. image, category: the place of each object's in them, int64 [m]. boxes: x0
    y0 x1 y1 in pixels of the image, inside it, float64 [m, 4]. crowd: bool [m]. notes: what was left out or changed.
    """

    file: str
    root: str
    paths: list[str]
    sizes: list[tuple[int, int]]
    categories: dict[Id, str]
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    notes: list[str]


def other_format(root: str) -> str | None:
    """Whose boxes a folder holds that are not in COCO's format: PASCAL VOC's, YOLO's, or nobody's that we know. Raises
    InputError for CVAT's XML, which nothing here reads."""
    formats = {
        "PASCAL VOC": (f"[Aa]nnotations/{XML}", f"[Aa]nnotations/xmls/{XML}", XML),
        "YOLO": ("labels/*.txt", "labels/*/*.txt", "*/labels/*.txt", "images/*.txt", "obj_train_data/*.txt"),
    }
    there = ((name, x) for name, patterns in formats.items() for p in patterns for x in Path(root).glob(p))
    name, path = next(there, (None, None))
    if name == "PASCAL VOC" and is_cvat(path):
        raise InputError(f"{path}: it is in CVAT's format; export as COCO 1.0 there")
    return name or ("YOLO" if any(map(is_beside_image, Path(root).glob("*.txt"))) else None)  # as LabelImg has it


def is_beside_image(path: str | Path) -> bool:
    """Whether an image of the same name lies beside a text."""
    return any(os.path.isfile(os.path.splitext(path)[0] + suffix) for suffix in SUFFIXES)


def is_cvat(path: Path) -> bool:
    """Whether an XML file is CVAT's, of many images; VOC's begins with <annotation>. Raises InputError."""
    try:
        with path.open("rb") as file:
            return re.search(rb"<annotations[\s>]", file.read(4096)) is not None
    except OSError as error:
        raise folder_error(error) from None


def find_annotations(root: str, named: str | None = None) -> tuple[str, str]:
    """The folder and its annotation file: root itself if it is a file; `named` below it or its annotations/; else
    annotations.json, _annotations.coco.json, or the only other that there is. Raises InputError, which lists them."""
    if os.path.isfile(root):
        parent = os.path.dirname(root) or "."
        return (os.path.dirname(parent) or ".") if os.path.basename(parent) == "annotations" else parent, root
    usual = ("annotations.json", "_annotations.coco.json")
    tried = [named, os.path.join("annotations", named)] if named else usual
    for name in tried:
        if os.path.isfile(path := os.path.join(root, name)):
            return root, path
    for patterns in (("*.json", "annotations/instances_*.json"), ("annotations/*.json",)):
        found = sorted(str(path) for pattern in patterns for path in Path(root).glob(pattern))
        found = [path for path in found if is_visible(name := os.path.basename(path)) and name != "notes.json"]
        if found:
            break
    if len(found) > 1 and is_beside_image(found[0]):
        load(found[0])  # a file for each image, as labelme's, is refused by its tool's name
    if named or len(found) > 1:
        what = f"no file {named}" if named else f"{len(found)} annotation files"
        listed = ", ".join(os.path.relpath(path, root) for path in found[:20]) or "no other"
        how = "name one with detection.annotations, or instead of the folder"
        raise InputError(f"{root}: {what}; {how}: {listed}")
    if found:
        return root, found[0]
    if theirs := other_format(root):
        command = f"uv run tools/to_coco.py {shlex.quote(root)}"
        raise InputError(f"{root}: its boxes are in {theirs}'s format; make COCO's of it with: {command}")
    expected = "a detection folder holds images/ and annotations.json in COCO's format"
    if below := sorted(str(path.parent) for name in usual for path in Path(root).glob(f"*/{name}")):  # of splits
        expected += f"; there is one in {', '.join(below[:10])}: name that folder"
    raise InputError(f"{os.path.join(root, usual[0])}: no such file; {expected}")


def foreign(data: Any) -> str | None:
    """What there is to say of JSON that has none of COCO's lists: whose it is, if its keys tell. None if it has one."""
    if isinstance(data, dict) and not data.keys().isdisjoint(("images", "annotations", "categories")):
        return None
    first = next(iter(data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()), None)
    keys = {key for part in (data, first) if isinstance(part, dict) for key in part}
    tools = (f"it is in {tool}'s format; {how}" for marks, tool, how in TOOLS if marks <= keys)
    return next(tools, "not COCO's format, which is a mapping with lists of images, annotations and categories")


def load(path: str) -> dict[str, list[dict]]:
    """The three lists of the file. Raises InputError."""
    try:
        coco = json.loads(Path(path).read_bytes())  # bytes: it knows the byte-order marks
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); change its permissions") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not whole or not JSON ({one_line(error)}); write it anew") from None
    if problem := foreign(coco):
        raise InputError(f"{path}: {problem}")
    lists = {}
    for section in ("images", "annotations", "categories"):
        rows = coco.get(section)
        if not isinstance(rows, list):
            raise InputError(f"{path}: it should hold a list of {section}, as COCO's format has it")
        if wrong := set(map(type, rows)) - {dict}:
            raise InputError(f"{path}: {section} should hold mappings of keys to values, not {wrong.pop().__name__}")
        lists[section] = rows
    return lists


def shown(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= 60 else text[:60] + "…"


def name_of(rows: list[dict], i: int) -> str:
    """How a finding calls annotation i of the file."""
    return f"annotation {shown(rows[i].get('id', i))}"


def as_id(value: Any) -> Id | None:
    """An id, or a whole number, for what it means: 7, 7.0 and "7" are one. None for what is neither."""
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is str:
        text = value.strip()
        return int(text) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) else text or None
    return value if type(value) is int else None


def read_ids(rows: list[dict], key: str, section: str, findings: list[str]) -> list[Id | None]:
    """The ids of all rows, None where there is a finding."""
    values = [row.get(key) for row in rows]
    if set(map(type, values)) <= {int}:
        return values
    ids = list(map(as_id, values))
    for i, value in enumerate(values):
        if ids[i] is None:
            wrong = f" has no {key}" if value is None else f": {key} {shown(value)} should be a whole number or a text"
            findings.append(f"{section}[{i}]{wrong}")
    return ids


def read_categories(rows: list[dict], used: set, findings: list[str], notes: list[str]) -> dict[Id, str]:
    """id -> name, by ascending id. Left out: of the same name twice the one without an annotation, and the others'
    parent without one, which Roboflow writes."""
    ids, names, taken = read_ids(rows, "id", "categories", findings), {}, {}
    for i, (key, row) in enumerate(zip(ids, rows)):
        name = row.get("name")
        if type(name) not in (str, int) or not str(name).strip():
            wrong = " has no name" if name is None else f": name {shown(name)} should be a text"
            findings.append(f"categories[{i}]{wrong}")
        elif key is not None and names.setdefault(key, str(name)) != str(name):
            findings.append(f"category {key} ({name}) is there twice, as {names[key]} too; give it another id")
    parents = {str(row.get("supercategory")) for row in rows if row.get("supercategory") != row.get("name")}
    parents -= {"None", "none"}  # of those without one
    for key in sorted(names, key=lambda key: (key not in used, isinstance(key, str), key or 0)):
        name = plain_name(names[key])
        if key not in used and (name in taken or (name in parents and len(names) > 1)):
            why = "its name is another's, too" if name in taken else "the others' parent"
            notes.append(f"category {key} ({name}) left out: {why}, and no annotation uses it")
        elif name in taken:
            findings.append(f"category {key} ({name}) is there twice, as {taken[name]} too; rename one of them")
        else:
            taken[name] = key
    order = sorted(taken, key=lambda name: (isinstance(taken[name], str), taken[name] or 0))
    return {taken[name]: name for name in order}


class ImageFiles:
    """The image files below `root`, to be found by the names that annotation tools give them. split: what the
    annotation file is of, whose images may have a folder of that name."""

    def __init__(self, root: str, split: str):
        self.root, prefix = root, os.path.join(root, "")
        self.by_path = {same_name(path[len(prefix) :]).replace(os.sep, "/"): path for path in find_images(root)}
        self.folders = ("images", "", split, f"images/{split}")
        self.by_name: dict[str, list[str]] = {}
        self.by_name_alone = 0  # how many were found so

    def find(self, name: str) -> list[str]:
        """The files that `name` may mean: one, if all is well."""
        plain = same_name(name).replace("\\", "/")
        for folder in self.folders:
            if path := self.by_path.get(f"{folder}/{plain}" if folder else plain):
                return [path]
        for folder in self.folders:
            for text in (name, plain):
                if os.path.isfile(path := os.path.join(self.root, folder, text)):
                    return [self.by_path.get(os.path.relpath(path, self.root), os.path.normpath(path))]
        if not self.by_name:
            for path in self.by_path.values():
                self.by_name.setdefault(same_name(os.path.basename(path)), []).append(path)
        # Label Studio: /data/local-files/?d=some%20folder/name, and its uploads get a prefix
        base, decoded = (text.split("?d=")[-1].rsplit("/", 1)[-1] for text in (plain, unquote(plain)))
        for text in (base, decoded, re.sub(r"^[0-9a-f]{8}-", "", decoded)):
            if found := self.by_name.get(text):
                self.by_name_alone += 1
                return found
        return []


def read_images(rows: list[dict], files: ImageFiles, findings: list[str]) -> dict[Id, tuple[str, tuple | None]]:
    """id -> file, and width and height or None where they are not given, of each row without a finding."""
    images, owner = {}, {}
    for i, (key, row) in enumerate(zip(read_ids(rows, "id", "images", findings), rows)):
        file = row.get("file_name")
        if key is None:
            continue
        if type(file) is not str or not file:
            wrong = " has no file_name" if file is None else f": file_name {shown(file)} should be a text"
            findings.append(f"images[{i}]{wrong}")
            continue
        name, size = f"image {key} ({file})", None
        if row.get("width") is not None and row.get("height") is not None:
            size = as_id(row["width"]), as_id(row["height"])
            if not all(type(side) is int and 0 < side < FAR for side in size):
                given = f"{shown(row['width'])}, {shown(row['height'])}"
                findings.append(f"{name}: width and height should be whole numbers > 0, not {given}")
                continue
        paths = files.find(file)
        if key in images:
            findings.append(f"{name} is there twice; give it another id, or remove it")
        elif len(paths) != 1:
            wanted = os.path.join(files.root, "images", file)
            many = f"it may be {' or '.join(paths[:3])}; write its path below {files.root}"
            findings.append(f"{name}: {many if paths else f'there is no file {wanted}; add it or remove the image'}")
        elif paths[0] in owner:
            findings.append(f"{name}: its file is that of image {owner[paths[0]]}, too; make one image of them")
        else:
            images[key], owner[paths[0]] = (paths[0], size), key
    return images


def check_sizes(images: dict[Id, tuple], file: str, skip_bad: bool, findings: list[str]) -> list[tuple | None]:
    """Width and height of each image, upright, by its header; None where there is a finding, or where skip_bad leaves
    a file that cannot be read, and whose size is not given, to whoever decodes it."""
    sizes, name = [], os.path.basename(file)
    for (path, size), found in zip(images.values(), upright_sizes(path for path, _ in images.values())):
        if isinstance(found, InputError):
            if not skip_bad:
                findings.append(str(found))
            sizes.append(size if skip_bad else None)
        elif size in (None, found):
            sizes.append(found)
        else:
            says = f"the image has {found[0]}x{found[1]} pixels, {name} says {size[0]}x{size[1]}"
            turned = "the sides are swapped: remove its EXIF orientation, which turns it, or turn it if it has none"
            other = "take the one that its boxes were drawn on"
            findings.append(f"{path}: {says}; {turned if found == size[::-1] else other}")
            sizes.append(None)
    return sizes


def decode_counts(text: str) -> list[int]:
    """The run lengths of COCO's compressed masks: five bits a character from chr(48) on, the sixth says that more
    follow; from the fourth on as the difference to the one before the last."""
    counts, value, shift = [], 0, 0
    for c in map(ord, text):
        value |= ((c - 48) & 31) << shift
        shift += 5
        if shift > 60:  # no run is as long
            return []
        if not (c - 48) & 32:
            value -= (1 << shift) if (c - 48) & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def box_of_mask(mask: Any) -> list[float] | None:
    """x, y, width and height of what COCO's `segmentation` covers, polygons or run lengths; None if it is neither."""
    if isinstance(mask, dict):
        counts, size = mask.get("counts"), mask.get("size")
        counts = decode_counts(counts) if isinstance(counts, str) else counts
        if not (isinstance(counts, list) and isinstance(size, list) and set(map(type, counts + size)) <= {int}):
            return None
        if len(size) != 2 or min(counts + size, default=-1) < 0 or sum(counts) != size[0] * size[1] < FAR:
            return None
        ends = np.cumsum(counts)  # column by column; background and object in turn, background first
        low, high = ends[:-1:2], ends[1::2] - 1
        low, high = low[: len(high)][high >= low[: len(high)]], high[high >= low[: len(high)]]
        if not len(low):
            return [0, 0, 0, 0]
        (x0, y0), (x1, y1) = np.divmod(low, size[0]), np.divmod(high, size[0])
        top, bottom = np.where(x1 > x0, 0, y0).min(), np.where(x1 > x0, size[0] - 1, y1).max()
        return [int(x0.min()), int(top), int(x1.max() - x0.min() + 1), int(bottom - top + 1)]
    flat = mask if isinstance(mask, list) else []
    flat = list(chain.from_iterable(flat)) if all(isinstance(part, list) for part in flat) else flat
    if len(flat) < 4 or len(flat) % 2 or not all(type(x) in (int, float) and abs(x) < FAR for x in flat):
        return None
    x, y = flat[::2], flat[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def read_box(row: dict) -> list[float]:
    """x, y, width and height of one annotation; of its mask where there is no box, or one without area, as some tools
    write beside polygons. Raises ValueError, which says what is wrong."""
    box = row.get("bbox")
    if box in (None, []):
        box = box_of_mask(row.get("segmentation"))
        if box is None:
            raise ValueError(f"bbox {shown(row.get('bbox'))} should be four numbers, or segmentation a polygon")
    try:
        box = [float(x) if type(x) in (int, float, str) else math.nan for x in box if isinstance(box, list)]
    except (TypeError, ValueError, OverflowError):
        box = []
    if len(box) != 4 or not all(abs(x) < FAR for x in box) or min(box[2:]) < 0:
        given = shown(row.get("bbox"))
        raise ValueError(f"bbox {given} should be four finite numbers: x, y, width >= 0, height >= 0")
    return box if min(box[2:]) > 0 else box_of_mask(row.get("segmentation")) or box


def read_boxes(rows: list[dict]) -> np.ndarray | None:
    """`read_box` of all rows at once, [m, 4], if they are as COCO's own; None if one is not."""
    values = [row.get("bbox") for row in rows]
    if not set(map(type, values)) <= {list} or not set(map(len, values)) <= {4}:
        return None
    if not set(map(type, chain.from_iterable(values))) <= {int, float}:
        return None
    try:
        boxes = np.fromiter(chain.from_iterable(values), np.float64, 4 * len(values)).reshape(-1, 4)
    except OverflowError:
        return None
    return boxes if (np.abs(boxes) < FAR).all() and (boxes[:, 2:] >= 0).all() else None


def read_objects(rows: list[dict], wanted: np.ndarray, findings: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes x, y, width, height, [m, 4], and whether they are crowds, [m], of the rows; NaN where there is a finding.
    wanted [m]: the rows that are looked at."""
    boxes, flags = read_boxes(rows), [row.get("iscrowd") for row in rows]
    if boxes is not None and set(map(type, flags)) <= {int, type(None)} and set(flags) <= {None, 0, 1}:
        for i in np.flatnonzero((boxes[:, 2:] == 0).any(1)).tolist():
            boxes[i] = read_box(rows[i])
        return boxes, np.array([bool(flag) for flag in flags], dtype=bool)
    boxes, crowd = np.full((len(rows), 4), math.nan), np.zeros(len(rows), dtype=bool)
    for i in np.flatnonzero(wanted).tolist():
        flag = flags[i].strip().lower() if isinstance(flags[i], str) else flags[i]
        try:
            if isinstance(flag, (list, dict)) or flag not in FLAGS:
                raise ValueError(f"iscrowd {shown(flag)} should be 0 or 1")
            boxes[i], crowd[i] = read_box(rows[i]), FLAGS[flag]
        except ValueError as error:
            findings.append(f"{name_of(rows, i)}: {error}")
    return boxes, crowd


def check_areas(boxes: np.ndarray, areas: np.ndarray, findings: list[str]) -> None:
    """A finding where the areas [m] that the file tells (NaN: none) are those of corners, not of widths and heights.
    boxes: [m, 4]."""
    told = areas > 0
    of_sides, of_corners = (
        (np.abs(areas - sides.clip(0).prod(1)) <= 0.01 * areas)[told].mean() if told.sum() >= 5 else 0.0
        for sides in (boxes[:, 2:], boxes[:, 2:] - boxes[:, :2])
    )
    if of_corners > 0.95 and of_sides < 0.05:
        findings.append(f"{told.sum()} boxes have the area of x0 y0 x1 y1; COCO's bbox is x, y, width, height")


def fit_boxes(
    boxes: np.ndarray, sizes: np.ndarray, name_of: Callable[[int], str], findings: list[str], notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """x, y, width, height [m, 4] in images of `sizes` [m, 2] -> x0, y0, x1, y1 inside them, and which have an area,
    [m]. name_of(place): how a finding calls it."""
    low, extent = boxes[:, :2], boxes[:, 2:]
    high, real = low + extent, (extent > 0).all(1)
    inside = np.stack([low, high], 1).clip(0, sizes[:, None])  # [m, 2, 2]
    outside = real & ~(inside[:, 1] > inside[:, 0]).all(1)
    over = real & ((low < -1e-3) | (high > sizes + 1e-3)).any(1)
    # a part of the first pixel is no object, but what fractions of the image look like; the whole of it may be one
    fraction = real & (low >= 0).all(1) & (high <= 1).all(1) & (sizes > 1).all(1)
    if fraction.sum() < real.sum():
        fraction &= (boxes != boxes.round()).any(1)
    if fraction.sum() > real.sum() / 100:
        example = boxes[fraction.argmax()].tolist()
        findings.append(
            f"{fraction.sum()} of {real.sum()} boxes are fractions of their image, as {example}; write pixels (x and "
            "width times the image's width, y and height times its height)"
        )
    elif fraction.any():
        notes.append(f"boxes within the first pixel of their image (fractions?): {fraction.sum()}")
    corners = real & (extent > low).all(1) & (extent <= sizes + 1).all(1)
    if real.sum() >= 20 and over.sum() > real.sum() / 2 and corners.sum() == real.sum():
        findings.append(f"{over.sum()} boxes reach over the border: x0 y0 x1 y1? COCO's bbox is x, y, width, height")
    for i in np.flatnonzero(outside & ~fraction).tolist():
        width, height = sizes[i].tolist()
        box = [round(x, 2) for x in boxes[i].tolist()]
        image = f"its image of {width}x{height} pixels"
        findings.append(f"{name_of(i)}: bbox {box} is outside {image}; correct or remove it")
    if over.any():
        hint = "; x0 y0 x1 y1? COCO's bbox is x, y, width, height" if corners.sum() == real.sum() > 1 else ""
        notes.append(f"boxes over the border of their image, clipped: {over.sum()}{hint}")
    if not real.all():
        notes.append(f"boxes without area, skipped: {(~real).sum()}")
    return inside.reshape(-1, 4), real


@contextmanager
def no_collection() -> Iterator[None]:
    """Pauses the search for garbage: it would go through the file's rows, which are none, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_collection()
def read_annotations(root: str, named: str | None = None, skip_bad: bool = False) -> Annotations:
    """The annotations of a folder, or of the file `named` in it (see `find_annotations`). skip_bad: an image file that
    cannot be read is left for whoever decodes it. Raises InputError with all that is wrong, at most ten lines."""
    root, file = find_annotations(root, named)
    lists, findings, notes, wrong_files = load(file), [], [], []
    rows = lists["annotations"]
    if not lists["images"]:
        raise InputError(f"{file}: it names no image")
    image_ids, category_ids = (read_ids(rows, key, "annotations", findings) for key in ("image_id", "category_id"))
    categories = read_categories(lists["categories"], set(category_ids), findings, notes)
    files = ImageFiles(root, Path(file).stem.removeprefix("instances_"))
    images = read_images(lists["images"], files, findings)
    sizes = check_sizes(images, file, skip_bad, wrong_files)
    listed = {as_id(row.get("id")) for row in lists["images"]} if len(images) < len(lists["images"]) else images
    if files.by_name_alone:
        notes.append(f"images found by their file name alone, not where it says: {files.by_name_alone}")
    paths = [path for path, _ in images.values()]
    folders = set(map(os.path.dirname, paths))
    if unlisted := sum(os.path.dirname(path) in folders for path in set(files.by_path.values()).difference(paths)):
        notes.append(f"image files beside those that {os.path.basename(file)} names, not read: {unlisted}")
    if strange := [row["image_id"] for row, key in zip(rows, image_ids) if key is not None and key not in listed]:
        example = f"as image_id {shown(strange[0])} (the first listed: {shown(lists['images'][0].get('id'))})"
        notes.append(f"annotations of images that it does not list, skipped: {len(strange)}, {example}")
    place, number = {key: i for i, key in enumerate(images)}, {key: i for i, key in enumerate(categories)}
    image = np.array([place.get(key, -1) for key in image_ids], dtype=np.int64)
    category = np.array([number.get(key, -1) for key in category_ids], dtype=np.int64)
    known = {None} | {as_id(row.get("id")) for row in lists["categories"]}  # what is wrong with one is said already
    for i in np.flatnonzero((image >= 0) & (category < 0)).tolist():
        if category_ids[i] not in known:
            missing = f"there is no category {category_ids[i]}"
            findings.append(f"{name_of(rows, i)}: {missing}; add it or remove the annotation")
    sure = np.array([size is not None for size in sizes] + [False])  # the last: of an image that is none
    wanted = sure[image] & (category >= 0)
    boxes, crowd = read_objects(rows, wanted, findings)
    kept = np.flatnonzero(wanted & ~np.isnan(boxes).any(1))
    sizes = [size or (1, 1) for size in sizes]
    of_each = np.array(sizes).reshape(-1, 2)[image[kept]]
    areas = [rows[i].get("area") for i in kept.tolist()]
    areas = np.array([area if type(area) in (int, float) and abs(area) < FAR**2 else math.nan for area in areas])
    check_areas(boxes[kept], areas, findings)
    boxes, real = fit_boxes(boxes[kept], of_each, lambda i: name_of(rows, kept[i]), findings, notes)
    refuse([f"{file}: {finding}" for finding in findings] + wrong_files)
    kept, boxes = kept[real], boxes[real]
    if rows and len(strange) + (~real).sum() == len(rows):
        why = "; ".join(note for note in notes if ", skipped: " in note)
        raise InputError(f"{file}: no annotation is left ({why}); correct them, or write an empty list")
    return Annotations(file, root, paths, sizes, categories, image[kept], category[kept], boxes, crowd[kept], notes)
