"""Makes annotations in COCO's format of PASCAL VOC's XML or of YOLO's text files; the images stay where they are.

    uv run tools/to_coco.py photos                    # writes photos/annotations.json; then data.train_dir=photos
    uv run tools/to_coco.py photos --out coco         # writes into another folder

A folder with splits (VOC's ImageSets/Main/train.txt, YOLO's train.txt, images/train or train/images) gets a file for
each, annotations/instances_train.json and so on, which data.train_dir and data.eval_dir name instead of a folder.

VOC: Annotations/*.xml (or annotations/, annotations/xmls/) with JPEGImages/ or images/, or both together. Coordinates
count from 1, as VOC's own do, so 1 is subtracted from xmin and ymin, as detectron2 does; unless one in the folder is 0.
`difficult` objects, which VOC's evaluation ignores, become crowds, which COCO's ignores. YOLO: labels/*.txt beside
images/, or the texts beside their images, with the names in data.yaml or classes.txt; polygons become their boxes, and
an image without a text file has no objects, as for Ultralytics.
"""

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from os.path import expanduser
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from coco_annotations import FLAGS, XML, as_id, other_format
from config import one_line
from data_types import InputError
from folders import SUFFIXES, find_images, folder_error, refuse, same_name, upright_size

SPLITS = re.compile(r"(train|val|valid|test|dev|minival)\w*", re.I)
Objects = list[tuple[int | str, float, float, float, float, bool]]  # class, x0 y0 x1 y1, difficult
Record = tuple[str, tuple[int, int], Objects]  # image file, width and height, objects


class Findings(list):
    """What cannot be right, a line each; and counts of what was left out or changed."""

    def __init__(self):
        self.counts: Counter[str] = Counter()


def read_text(path: Path) -> str:
    """Raises InputError for what is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None


def number(text: str | None) -> float:
    """A finite number. Raises ValueError."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text or 'an empty text'} should be a finite number")
    return value


def read_xml(path: Path) -> ElementTree.Element:
    """The root of a VOC file. Raises InputError; entities, by which a small file can become huge, are refused."""
    try:
        data = path.read_bytes()  # the parser knows which encoding it declares
    except OSError as error:
        raise folder_error(error) from None
    if re.search(b"<!(ENTITY|DOCTYPE)", data.replace(b"\0", b"")):  # UTF-16 has zeros
        raise InputError(f"{path}: it declares entities or a document type, which VOC's format has not; remove them")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise InputError(f"{path}: not valid XML ({one_line(error)})") from None


def voc_objects(root: ElementTree.Element, findings: Findings) -> Objects:
    """The objects as the file has them, with flipped corners put right. Raises ValueError."""
    objects = []
    for item in root.findall("object"):
        name, box = (item.findtext("name") or "").strip(), item.find("bndbox")
        if not name or box is None:
            raise ValueError("an object has no name" if not name else f"an object {name} has no bndbox")
        x0, y0, x1, y1 = (number(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
        findings.counts["boxes with flipped corners, put right"] += x0 > x1 or y0 > y1
        difficult = (item.findtext("difficult") or "0").strip().lower()
        if difficult not in FLAGS:
            raise ValueError(f"difficult {difficult} should be 0 or 1")
        objects.append((name, min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1), FLAGS[difficult]))
    return objects


def read_voc(folder: Path, findings: Findings) -> tuple[list[str], dict[str, Record]]:
    """The classes, sorted, and stem -> record, of a folder in VOC's format."""
    files = ("Annotations", "annotations", "annotations/xmls", ".")
    where = next(part for name in files if next((part := folder / name).glob(XML), None))
    pictures = part if (part := folder / "JPEGImages").is_dir() else folder
    by_stem, by_name = {}, {}
    for path in find_images(str(pictures)):
        by_stem.setdefault(same_name(Path(path).stem), []).append(path)
        by_name.setdefault(same_name(Path(path).name), []).append(path)
    records: dict[str, Record] = {}
    for path in sorted(where.glob(XML)):
        try:
            root = read_xml(path)
            named = Path((root.findtext("filename") or "").strip().replace("\\", "/")).name
            images = by_stem.get(same_name(path.stem)) or by_name.get(same_name(named)) or []
            if len(images) > 1:
                raise ValueError(f"its image may be {images[0]} or {images[1]}; give them different names")
            if not images:
                findings.counts["XML files without an image, skipped"] += 1
                continue
            size = tuple(int(number(root.findtext(f"size/{side}") or "0")) for side in ("width", "height"))
            size = size if min(size) > 0 else upright_size(images[0])
            records[path.stem] = images[0], size, voc_objects(root, findings)
        except InputError as error:
            findings.append(str(error))
        except ValueError as error:
            findings.append(f"{path}: {one_line(error)}")
    findings.counts["images without an XML file, not listed"] = sum(map(len, by_stem.values())) - len(records)
    every = [x for _, _, objects in records.values() for x in objects]
    if zero := any(0 in x[1:3] for x in every):
        print(f"{folder}: coordinates count from 0: some are 0")
    low = 0 if zero else 1
    moved = {
        stem: (image, size, [(name, x0 - low, y0 - low, x1, y1, hard) for name, x0, y0, x1, y1, hard in objects])
        for stem, (image, size, objects) in records.items()
    }
    return sorted({x[0] for x in every}), moved


def is_list(path: Path) -> bool:
    """Whether a text is a list of a split's images, not the label file of one."""
    there = SPLITS.search(path.stem) and path.is_file()
    return bool(there) and read_text(path).strip().lower().endswith(SUFFIXES)


def yolo_names(folder: Path) -> list[str]:
    """The classes in order, from data.yaml or classes.txt in the folder or the one above. Raises InputError."""
    for place in (folder, folder / "labels", folder.parent):
        files = sorted([*place.glob("*.yaml"), *place.glob("*.yml")], key=lambda path: path.stem != "data")
        for path in files if place != folder.parent else filter(Path.is_file, [place / "data.yaml"]):
            try:
                names = yaml.safe_load(read_text(path))
            except (yaml.YAMLError, RecursionError, ValueError) as error:
                raise InputError(f"{path}: not valid YAML ({one_line(error)})") from None
            names = names if isinstance(names, dict) else {}
            if "kpt_shape" in names:
                raise InputError(f"{path}: keypoints (kpt_shape); leave the class and the box alone in each label line")
            for key, value in names.items():
                if (
                    key in ("train", "val", "test")
                    and str(value).endswith(".txt")
                    and not is_list(folder / Path(value).name)
                ):
                    print(f"{path}: {key} is {value}, not used: lists are read as train.txt, val.txt … in {folder}")
            count, names = names.get("nc"), names.get("names")
            if names is not None and not isinstance(names, (list, dict)):
                raise InputError(f"{path}: names should be a list, one name a line, not {one_line(names)[:40]}")
            if names is not None and count is not None and as_id(count) != len(names):
                raise InputError(f"{path}: nc is {count}, but names has {len(names)}; name every class, in order")
            if isinstance(names, dict):
                by_id = {as_id(key): name for key, name in names.items()}  # 0 and "0" are one, as for Ultralytics
                if set(by_id) != set(range(len(names))):
                    raise InputError(f"{path}: names should be of the classes 0 to {len(names) - 1}, without a gap")
                names = [by_id[i] for i in range(len(names))]
            if isinstance(names, list):
                return [str(name) for name in names]
        for name in ("classes.txt", "obj.names"):
            if (place / name).is_file():
                lines = [line.strip() for line in read_text(place / name).rstrip().splitlines()]
                if "" in lines:
                    which = f"{place / name}: line {lines.index('') + 1} is empty"
                    raise InputError(f"{which}; name its class, or remove the line if the ids do not count it")
                return lines
    raise InputError(
        f"{folder}: no names in a data.yaml and no classes.txt; name the classes in classes.txt in order, one a line"
    )


def yolo_objects(text: str, size: tuple[int, int], num_classes: int) -> Objects:
    """A label file's objects: a line is the class, then centre and size as fractions of the image, or a polygon's
    corners. Raises ValueError."""
    objects = []
    for line in dict.fromkeys(line.strip() for line in text.splitlines()):  # a line that is there twice counts once
        if not line:
            continue
        if "," in line:
            raise ValueError(f"{line[:40]!r}: a comma; put blanks between the numbers, and points into them")
        label, *values = map(number, line.split())
        if label not in range(num_classes):
            raise ValueError(f"{line[:40]!r}: class {label:g}, but the classes are 0 to {num_classes - 1}")
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError(f"{line[:40]!r} should be a class and four numbers, or a class and a polygon")
        if min(values) < 0 or max(values) > 1.01:
            raise ValueError(f"{line[:40]!r} should be fractions of the image, from 0 to 1")
        if len(values) == 4:
            x, y, w, h = values
            x0, y0, x1, y1 = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        else:
            x0, y0, x1, y1 = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
        width, height = size
        objects.append((int(label), x0 * width, y0 * height, x1 * width, y1 * height, False))
    return objects


def label_file(image: str) -> Path:
    """Where Ultralytics looks for the objects of an image: the last folder `images` of its path becomes `labels`. If
    nothing is there, beside the image, where darknet looks."""
    before, found, after = image.rpartition(f"{os.sep}images{os.sep}")
    path, beside = (Path(x).with_suffix(".txt") for x in (f"{before}{os.sep}labels{os.sep}{after}", image))
    return path if found and (path.is_file() or not beside.is_file()) else beside


def read_yolo(folder: Path, findings: Findings) -> tuple[list[str], dict[str, Record]]:
    """The classes, and path below the folder -> record, of a folder in YOLO's format."""
    names, records, used = yolo_names(folder), {}, set()
    every = find_images(os.path.abspath(folder))
    images = [image for image in every if "images" in Path(os.path.relpath(image, folder)).parts[:-1]] or every
    findings.counts["images in no folder images/, not listed"] = len(every) - len(images)
    for image in images:
        path = label_file(image)
        used.add(path)
        try:
            text, size = read_text(path) if path.is_file() else "", upright_size(image)
            records[os.path.relpath(image, folder)] = image, size, yolo_objects(text, size, len(names))
            findings.counts["images without a label file: without objects"] += not path.is_file()
        except InputError as error:
            findings.append(str(error))
        except ValueError as error:
            findings.append(f"{path}: {one_line(error)}")
    texts = {path for path in Path(os.path.abspath(folder)).rglob("*.txt") if path.parent.parts[-3:].count("labels")}
    alone = [path for path in texts - used if path.name != "classes.txt"]
    findings.counts["label files without an image, skipped"] = len(alone)
    if alone and not any(map(Path.is_file, used)):
        hint = "images belong into images/, beside labels/, under the same names"
        findings.append(f"{folder}: no image has a label file, and {min(alone)} is of no image; {hint}")
    return names, records


def find_record(line: str, paths: dict[str, list[tuple[tuple[str, ...], str]]]) -> str | None:
    """The key of the image that a line of a list means: its path may begin elsewhere, or further down. None if that is
    no image, or one of several. paths: file name -> the parts of each image's path, from the last on, and its key."""
    parts, ends = Path(same_name(line).replace("\\", "/")).parts[::-1], {}
    for path, key in paths.get(parts[0], ()):
        if (same := len(os.path.commonprefix((parts, path)))) == min(len(parts), len(path)):
            ends.setdefault(same, []).append(key)
    found = ends[max(ends)] if ends else []
    return found[0] if len(found) == 1 else None


def splits(folder: Path, records: dict[str, Record]) -> dict[str, list[Record]]:
    """Name -> records: VOC's image sets, YOLO's lists of images, or the folders train, val … of its images; of none of
    these one without a name. Raises InputError for lists of which no line names an image."""
    parts: dict[str, list[Record]] = {}
    listed: set[str] = set()
    sets = [p for p in sorted((folder / "ImageSets" / "Main").glob("*.txt")) if SPLITS.fullmatch(p.stem)]
    sets = sets or [path for path in sorted(folder.glob("*.txt")) if is_list(path)]
    paths: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for key, (image, *_) in records.items():
        path = Path(same_name(os.path.relpath(image, folder))).parts[::-1]
        paths.setdefault(path[0], []).append((path, key))
    for file in sets:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        stems = {line: line.split()[0] for line in lines}  # VOC's, maybe before a flag
        keys = {line: stem if stem in records else find_record(line, paths) for line, stem in stems.items()}
        if missing := [line for line, key in keys.items() if key is None]:
            print(f"{file}: lines that name no image read here, skipped: {len(missing)}, as {missing[0]}")
        parts[file.stem] = [records[key] for key in dict.fromkeys(keys.values()) if key is not None]
        listed.update(key for key in keys.values() if key is not None)
    if sets and not listed:
        raise InputError(f"{sets[0]}: no line names an image read here; correct or remove the lists beside it")
    if sets and len(listed) < len(records):
        print(f"{folder}: images in no list, left out: {len(records) - len(listed)}")
    for key, record in records.items() if not sets else ():
        above = [part for part in Path(key).parts[:-1] if SPLITS.fullmatch(part)]
        parts.setdefault(above[0] if above else "", []).append(record)
    return {name: part for name, part in parts.items() if part}


def to_coco(classes: list[str], records: Iterable[Record], out: Path) -> dict:
    """Images, annotations and categories; file names are relative to `out`."""
    images, annotations, number = [], [], {name: i + 1 for i, name in enumerate(classes)}
    for i, (path, (width, height), objects) in enumerate(records, 1):
        name = Path(os.path.relpath(path, out)).as_posix()
        images.append({"id": i, "file_name": name, "width": width, "height": height})
        for label, x0, y0, x1, y1, crowd in objects:
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": int(crowd)}
            category = number[label] if isinstance(label, str) else label + 1
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": category} | box)
    categories = [{"id": i, "name": name} for name, i in number.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def convert(folder: Path, out: Path) -> None:
    """Reads `folder`, writes into `out`, and says what it wrote and left out. Raises InputError."""
    if not folder.is_dir() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out if folder.is_dir() else folder}: no folder; name one")
    findings, kind = Findings(), other_format(str(folder))
    if kind is None:
        raise InputError(f"{folder}: neither Annotations/*.xml (PASCAL VOC) nor labels/*.txt (YOLO) is in it")
    classes, records = (read_voc if kind == "PASCAL VOC" else read_yolo)(folder, findings)
    if len(set(classes)) < len(classes):
        findings.append(f"{folder}: a class is named twice ({', '.join(classes[:20])}); rename one")
    refuse(findings)
    if not records:
        raise InputError(f"{folder}: no image with annotations in {kind}'s format")
    parts = splits(folder, records).items()
    for what, count in findings.counts.items():
        if count:
            print(f"{folder}: {what}: {count}")
    names = {name: f"annotations/instances_{name}.json" if name else "annotations.json" for name, _ in parts}
    written = {out / names[name]: part for name, part in parts}
    for file in filter(Path.exists, written):
        raise InputError(f"{file} exists: nothing is overwritten; remove it or name another folder with --out")
    for file, part in written.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        coco = to_coco(classes, part, out)
        file.write_text(json.dumps(coco), encoding="utf-8")
        print(f"{file}: {len(part)} images, {len(coco['annotations'])} objects of {len(classes)} classes")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=expanduser, help="in PASCAL VOC's or YOLO's format")
    where = "where the annotations are written (the folder itself)"
    parser.add_argument("--out", type=expanduser, metavar="DIR", help=where)
    args = parser.parse_args(argv)
    try:
        convert(Path(args.folder), Path(args.out or args.folder))
    except (InputError, OSError) as error:
        print(*(f"to_coco.py: {line}" for line in str(error).split("\n")), sep="\n", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
