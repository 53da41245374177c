"""COCO's format as its tools write it: what is read for what it means, left out and counted, or refused by name."""

import copy
import json
import math
import pickle
import unicodedata

import numpy as np
import pytest
import torch
from conftest import message
from PIL import Image
from pycocotools import mask as coco_mask

from build import configure
from coco_annotations import box_of_mask, find_annotations, other_format, read_annotations
from data_types import InputError
from detection_task import DetectionDataset

CLEAN = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 8, "height": 16},
        {"id": 3, "file_name": "b.jpg", "width": 32, "height": 16},
        {"id": 9, "file_name": "c.png", "width": 16, "height": 16},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 4, 4, 8], "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 5, "bbox": [0, 0, 16, 16], "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 90, "bbox": [8, 8.5, 2, 4]},
    ],
    "categories": [{"id": 90, "name": "zebra"}, {"id": 5, "name": "ant"}],
}
BOXES = [[[4, 4, 12, 12]], [[0, 0, 8, 16], [4, 8.5, 5, 12.5]], []]  # of the clean file, in images of 16x16


def make(root, coco=CLEAN, file="annotations.json", images="images") -> str:
    """A folder with the three images, the first two turned by their EXIF, and the file; its path."""
    exif = Image.Exif()
    exif[274] = 6  # stored lying
    (root / images).mkdir(parents=True, exist_ok=True)
    for row in CLEAN["images"]:
        turned = row["file_name"].endswith("jpg")
        size = (row["height"], row["width"]) if turned else (row["width"], row["height"])
        Image.new("RGB", size).save(root / images / row["file_name"], exif=exif if turned else None)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(coco), encoding="utf-8")
    return str(root)


def read(root, *arguments, **options) -> DetectionDataset:
    return DetectionDataset(str(root), 16, 4, *arguments, **options)


def is_clean(dataset) -> bool:
    """Whether all targets are those of the clean file."""
    labels, crowd = [x.tolist() for x in dataset.labels], [x.tolist() for x in dataset.crowd]
    names = [path.replace("\\", "/").rsplit("/", 1)[-1] for path in dataset.paths]
    assert names == ["a.jpg", "b.jpg", "c.png"] and dataset.sizes == [(8, 16), (32, 16), (16, 16)]
    assert labels == [[1], [0, 1], []] and crowd == [[False], [True, False], []]
    return dataset.classes == ["ant", "zebra"] and [x.tolist() for x in dataset.boxes] == BOXES


def rows(section, **changes):
    """A change of all rows: a function of the row for each key, of what it holds where it is called `value`."""

    def change(coco):
        for row in coco[section]:
            row |= {key: function(row) for key, function in changes.items()}

    return change


def row(section, i, **changes):
    return lambda coco: coco[section][i].update(changes)


def more(section, **new):
    return lambda coco: coco[section].append(new)


def changed(*changes) -> dict:
    coco = copy.deepcopy(CLEAN)
    for change in changes:
        change(coco)
    return coco


def drop(section, *keys):
    return lambda coco: [row.pop(key, None) for row in coco[section] for key in keys]


def as_polygon(row) -> list:
    x, y, w, h = row["bbox"]
    return [[x, y, x + w, y, x + w, y + h], [x, y + h, x, y]]


TEXT_IDS = (
    rows("annotations", image_id=lambda r: str(r["image_id"]), category_id=lambda r: float(r["category_id"])),
    rows("categories", id=lambda r: f" {r['id']}"),
)
PREFIX = "..\\..\\label-studio\\data\\media\\upload\\1\\"
SAME = {  # what gives the clean targets, and what is said of it
    "as it is": ([], []),
    "texts and floats for ids": (TEXT_IDS, []),
    "ids that are words": (
        [rows("images", id=lambda r: f"i-{r['id']}"), rows("annotations", image_id=lambda r: f"i-{r['image_id']}")],
        [],
    ),
    "floats and texts for sizes": (
        [rows("images", width=lambda r: r["width"] * 1.0, height=lambda r: str(r["height"]))],
        [],
    ),
    "no sizes": ([drop("images", "width"), row("images", 1, height=None)], []),
    "crowd flags as booleans": ([rows("annotations", iscrowd=lambda r: bool(r.get("iscrowd")))], []),
    "crowd flags as texts": ([rows("annotations", iscrowd=lambda r: str(r.get("iscrowd") or "False"))], []),
    "boxes as texts": ([rows("annotations", bbox=lambda r: [str(x) for x in r["bbox"]])], []),
    "polygons alone": ([rows("annotations", segmentation=as_polygon), drop("annotations", "bbox")], []),
    "a polygon and an empty box": ([row("annotations", 0, bbox=[], segmentation=[[2, 4], [6, 4], [6, 12]])], []),
    "a polygon and a box without area": (
        [row("annotations", 0, bbox=[0, 0, 0, 0], segmentation=[[2, 4, 6, 4, 6, 12]])],
        [],
    ),
    "a mask and texts for a box without area": (
        [row("annotations", 0, bbox=["2", "4", 0, 0], segmentation={"size": [16, 8], "counts": [36, 8, 40, 8, 36]})],
        [],
    ),
    "Label Studio": ([rows("images", file_name=lambda r: f"images/{r['file_name']}")], []),
    "a folder of Windows": ([rows("images", file_name=lambda r: f"images\\{r['file_name']}")], []),
    "Label Studio, of Windows": (
        [rows("images", file_name=lambda r: f"{PREFIX}1a2b3c4d-{r['file_name']}")],
        ["images found by their file name alone, not where it says: 3"],
    ),
    "Label Studio, a local file": (
        [rows("images", file_name=lambda r: f"/data/local-files/?d=some%20where%2F{r['file_name']}")],
        ["images found by their file name alone, not where it says: 3"],
    ),
    "a root category": (
        [more("categories", id=0, name="animals"), rows("categories", supercategory=lambda r: "animals")],
        ["category 0 (animals) left out: the others' parent, and no annotation uses it"],
    ),
    "a name twice": (
        [more("categories", id=1, name="zebra")],
        ["category 1 (zebra) left out: its name is another's, too, and no annotation uses it"],
    ),
    "a category twice": ([more("categories", id=5, name="ant")], []),
    "an annotation of no image": (
        [more("annotations", id=4, image_id=8, category_id=66)],
        ["annotations of images that it does not list, skipped: 1, as image_id 8 (the first listed: 7)"],
    ),
    "an empty box": (
        [more("annotations", id=4, image_id=9, category_id=5, bbox=[1, 2, 0, 4])],
        ["boxes without area, skipped: 1"],
    ),
    "a box over the border": (
        [row("annotations", 1, bbox=[-3, 0, 19, 17.5])],
        ["boxes over the border of their image, clipped: 1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, notes", SAME.values(), ids=SAME)
def test_what_means_the_same_gives_the_same_targets(tmp_path, changes, notes):
    dataset = read(make(tmp_path, changed(*changes)))
    assert is_clean(dataset) and list(dataset.notes) == notes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_names_that_look_alike_and_byte_order_marks(tmp_path, encoding):
    """macOS decomposes the accents of file names; the checkpoint's class names may be composed."""
    name, parts = "caf\u00e9.jpg", unicodedata.normalize("NFD", "caf\u00e9.jpg")
    coco = changed(row("images", 0, file_name=name), row("categories", 1, name="caf\u00e9"))
    make(tmp_path)
    (tmp_path / "images" / "a.jpg").rename(tmp_path / "images" / parts)
    (tmp_path / "annotations.json").write_bytes(json.dumps(coco, ensure_ascii=False).encode(encoding))
    dataset = read(tmp_path, [unicodedata.normalize("NFD", "caf\u00e9"), "zebra"])
    assert dataset.paths[0] == str(tmp_path / "images" / parts) and dataset.labels[1].tolist() == [0, 1]


def test_a_class_may_be_called_none_and_one_pixel_be_a_box(tmp_path):
    """Only where every box is the first pixel are they fractions."""
    first = more("annotations", id=4, image_id=9, category_id=5, bbox=[0, 0, 1, 1])
    dataset = read(make(tmp_path, changed(more("categories", id=6, name="None"), first)))
    assert dataset.classes == ["ant", "None", "zebra"] and dataset.boxes[2].tolist() == [[0, 0, 1, 1]]
    make(tmp_path, changed(rows("annotations", bbox=lambda r: [0, 0, 1, 1])))
    assert "3 of 3 boxes are fractions of their image, as [0.0, 0.0, 1.0, 1.0]" in message(read, tmp_path)


BROKEN = {  # changes, and how the one line ends that says what is wrong
    "annotations.json: not whole or not JSON (": None,
    "annotations.json: it should hold a list of images, as COCO's format has it": lambda c: c.update(images=5),
    "annotations.json: it names no image": lambda c: c.update(images=[], annotations=[]),
    "annotations.json: it names no category": lambda c: c.update(categories=[], annotations=[]),
    "annotations.json: annotations should hold mappings of keys": lambda c: c.update(annotations=["box"]),
    "images[1] has no file_name": lambda c: c["images"][1].pop("file_name"),
    "images[1]: file_name 5 should be a text": row("images", 1, file_name=5),
    "images[1] has no id": row("images", 1, id=None),
    "annotations[0] has no image_id": lambda c: c["annotations"][0].pop("image_id"),
    "annotations[0]: image_id True should be a whole number or a text": row("annotations", 0, image_id=True),
    "annotations[0]: category_id 90.5 should be a whole number or a text": row("annotations", 0, category_id=90.5),
    "annotations[0]: category_id [90] should be a whole": row("annotations", 0, category_id=[90]),
    "categories[1] has no name": lambda c: c["categories"][1].pop("name"),
    "categories[1]: name ['ant'] should be a text": row("categories", 1, name=["ant"]),
    "category 90 (zebra) is there twice, as 5 too; rename one of them": row("categories", 1, name="zebra"),
    "category 5 (bee) is there twice, as ant too; give it": more("categories", id=5, name="bee"),
    "annotation 1: there is no category 6; add it": row("annotations", 0, category_id=6),
    "image 9 (missing.png): there is no file ": row("images", 2, file_name="missing.png"),
    "image 3 (c.png) is there twice; give it another id": more("images", id=3, file_name="c.png"),
    "image 1 (./images/c.png): its file is that of image 9, too": more("images", id=1, file_name="./images/c.png"),
    "image 7 (a.jpg): width and height should be whole numbers > 0, not 0, 16": row("images", 0, width=0),
    "should be whole numbers > 0, not 8.5, 16": row("images", 0, width=8.5),
    "should be whole numbers > 0, not True, 16": row("images", 0, width=True),
    "a.jpg: the image has 8x16 pixels, annotations.json says 9x16; take the one": row("images", 0, width=9),
    "says 16x8; the sides are swapped: remove its EXIF": row("images", 0, width=16, height=8),
    "annotation 1: iscrowd 'maybe' should be 0 or 1": row("annotations", 0, iscrowd="Maybe"),
    "annotation 1: iscrowd 2 should be 0 or 1": row("annotations", 0, iscrowd=2),
    "annotation 1: iscrowd [] should be 0 or 1": row("annotations", 0, iscrowd=[]),
    "annotation 1: bbox [2, 4, nan, 8] should be four": row("annotations", 0, bbox=[2, 4, math.nan, 8]),
    "annotation 1: bbox [2, 4, -1, 8] should be four": row("annotations", 0, bbox=[2, 4, -1, 8]),
    "annotation 1: bbox [2, 4, 8] should be four": row("annotations", 0, bbox=[2, 4, 8]),
    "annotation 1: bbox [2, 4, True, 8] should be four": row("annotations", 0, bbox=[2, 4, True, 8]),
    "annotation 1: bbox [2, 4, 'wide', 8] should be four": row("annotations", 0, bbox=[2, 4, "wide", 8]),
    "annotation 1: bbox '2468' should be four": row("annotations", 0, bbox="2468"),
    "annotation 1: bbox None should be four numbers, or segmentation a polygon": row("annotations", 0, bbox=None),
    "annotation 1: bbox [10000000000": row("annotations", 0, bbox=[10**400, 4, 2, 8]),
    "annotation 1: bbox [9.0, 4.0, 2.0, 2.0] is outside its image of 8x16 pixels": row(
        "annotations", 0, bbox=[9, 4, 2, 2]
    ),
    "3 of 3 boxes are fractions of their image, as [0.25, 0.5, 0.5, 0.5]; write pixels": rows(
        "annotations", bbox=lambda r: [0.25, 0.5, 0.5, 0.5]
    ),
}


@pytest.mark.parametrize("expected", BROKEN)
def test_what_cannot_be_right_is_one_line(tmp_path, expected):
    make(tmp_path, changed(BROKEN[expected]) if BROKEN[expected] else CLEAN)
    if not BROKEN[expected]:
        (tmp_path / "annotations.json").write_text(json.dumps(CLEAN)[:-30])
    assert expected in message(read, tmp_path)


def test_all_findings_come_at_once_in_ten_lines_at_most(tmp_path):
    """Of the file and of the images' headers; that which was found is found again."""
    coco = changed(row("images", 0, width=9), row("images", 1, file_name="x.png"), row("annotations", 0, iscrowd=3))
    make(tmp_path, coco)
    (tmp_path / "images" / "c.png").write_text("no image")
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    for line, what in zip(
        str(caught.value).split("\n"), ("x.png", "a.jpg: the image has", "c.png: not a"), strict=True
    ):
        assert what in line
    make(tmp_path, changed(*(more("images", id=20 + i, file_name=f"{i}.png") for i in range(50))))
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 10 and lines[-1] == "… and 41 more like these"


def test_corners_for_sizes_are_noticed(tmp_path):
    corners = [{"image_id": 3, "category_id": 5, "bbox": [10 + i % 4, 6, 28, 14]} for i in range(20)]
    make(tmp_path, changed(lambda c: c.update(annotations=corners)))
    assert "20 boxes reach over the border: x0 y0 x1 y1? COCO's bbox is x, y, width, height" in message(read, tmp_path)
    make(tmp_path, changed(lambda c: c.update(annotations=corners[:2])))  # too few to be sure
    [note] = read(tmp_path).notes[:1]
    assert note.endswith("clipped: 2; x0 y0 x1 y1? COCO's bbox is x, y, width, height")
    for size, problem in ((5, True), (4, False)):  # inside the image by their areas alone
        inside = [{"image_id": 3, "category_id": 5, "bbox": [1, 2, 4 + i, 5], "area": 3 * (3 + i)} for i in range(size)]
        make(tmp_path, changed(lambda c, rows=inside: c.update(annotations=rows)))
        if problem:
            found = "5 boxes have the area of x0 y0 x1 y1; COCO's bbox is x, y, width, height"
            assert message(read, tmp_path).endswith(found)
        else:
            assert len(read(tmp_path).boxes[1]) == 4
    for area in (20.0, 19, None, "big", math.nan, 10**400):  # of the sides, of an outline within, none
        rows = [{"image_id": 3, "category_id": 5, "bbox": [1, 2, 4, 5], "area": area}] * 6
        make(tmp_path, changed(lambda c, rows=rows: c.update(annotations=rows)))
        assert len(read(tmp_path).boxes[1]) == 6
    for bbox, area in (([0, 0, 4, 5], 20), ([5, 5, 3, 3], 0)):  # the same either way; as who knows no area writes it
        rows = [{"image_id": 3, "category_id": 5, "bbox": bbox, "area": area}] * 6
        make(tmp_path, changed(lambda c, rows=rows: c.update(annotations=rows)))
        assert len(read(tmp_path).boxes[1]) == 6


def test_an_unreadable_image_is_met_when_it_is_decoded_if_it_may_be_skipped(tmp_path):
    make(tmp_path, changed(drop("images", "width")))
    (tmp_path / "images" / "b.jpg").write_bytes(b"no image")
    assert f"{tmp_path}/images/b.jpg: not a readable image" in message(read, tmp_path)
    dataset = read(tmp_path, skip_bad=True)
    assert len(dataset) == 3 and [len(x) for x in dataset.boxes] == [1, 0, 0]
    assert "b.jpg: not a readable image" in message(lambda: dataset[1])
    config = {"task": "detection", "model.image_size": 16, "model.patch_size": 4, "data.on_bad_image": "skip"}
    assert len(configure(("test", config))[1].open(str(tmp_path))) == 3


PLACES = {  # where the annotations are, and where the images
    "images beside the file, Roboflow": ("_annotations.coco.json", "."),
    "one file of any name, Label Studio": ("result.json", "images"),
    "COCO's own, a split": ("annotations/instances_train2017.json", "train2017"),
    "CVAT": ("annotations/instances_default.json", "images"),
    "FiftyOne": ("labels.json", "data"),
    "some other file": ("annotations/boxes.json", "images/train"),
}


@pytest.mark.parametrize("file, images", PLACES.values(), ids=PLACES)
def test_where_tools_put_the_file_and_the_images(tmp_path, file, images):
    """The file itself may stand for the folder, too."""
    dataset = read(make(tmp_path, file=file, images=images))
    assert is_clean(dataset) and is_clean(read(tmp_path / file)) and read(tmp_path / file).root == str(tmp_path)
    assert is_clean(read(tmp_path, annotations=file)) and dataset.root == str(tmp_path)


def test_of_several_files_the_user_names_one(tmp_path):
    """Images of the same name are told apart by the split's folder."""
    for split in ("train", "val"):
        make(tmp_path, file=f"annotations/instances_{split}.json", images=split)
    listed = "annotations/instances_train.json, annotations/instances_val.json"
    what = "name one with detection.annotations, or instead of the folder"
    assert message(read, tmp_path) == f"{tmp_path}: 2 annotation files; {what}: {listed}"
    assert message(read, tmp_path, annotations="x.json") == f"{tmp_path}: no file x.json; {what}: {listed}"
    dataset = read(tmp_path, annotations="instances_val.json")
    assert is_clean(dataset) and dataset.paths[0] == f"{tmp_path}/val/a.jpg"
    assert dataset.notes == ()
    Image.new("L", (2, 2)).save(tmp_path / "val" / "d.png")
    dataset = read(tmp_path, annotations="annotations/instances_val.json")
    assert dataset.notes == ("image files beside those that instances_val.json names, not read: 1",)
    config = {"task": "detection", "model.image_size": 16, "model.patch_size": 4}
    task = configure(("test", config | {"detection.annotations": "annotations/instances_train.json"}))[1]
    assert task.open(str(tmp_path)).paths == [f"{tmp_path}/train/{name}" for name in ("a.jpg", "b.jpg", "c.png")]
    (tmp_path / "annotations.json").write_text(json.dumps(CLEAN))  # comes first; now a name is of two files
    with pytest.raises(InputError, match=f"it may be {tmp_path}/train/a.jpg or {tmp_path}/val/a.jpg; write its path"):
        read(tmp_path)


def test_the_folder_above_those_of_splits_names_them(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_annotations.coco.json").touch()
    expected = f"; there is one in {tmp_path}/train, {tmp_path}/valid: name that folder"
    assert message(find_annotations, str(tmp_path)).endswith(expected)


@pytest.mark.parametrize("file, whose", [("annotations/a.xml", "PASCAL VOC"), ("labels/train/a.txt", "YOLO")])
def test_a_folder_in_another_format_is_refused_with_the_command(tmp_path, file, whose):
    root = tmp_path / "my photos"
    (root / file).parent.mkdir(parents=True)
    (root / file).touch()
    (root / "notes.json").write_text("{}")  # Label Studio's, beside YOLO's files
    command = f"uv run tools/to_coco.py '{root}'"
    expected = f"{root}: its boxes are in {whose}'s format; make COCO's of it with: {command}"
    assert message(find_annotations, str(root)) == expected


FOREIGN = {  # what other tools write, and what is said of it
    "it is in labelme's format; its labelme2coco.py makes COCO's of it": {"version": "5.0", "shapes": []},
    "it is in VIA's format; export as COCO there": {"a.jpg12": {"filename": "a.jpg", "regions": []}},
    "it is in Label Studio's format; export as COCO there": [{"id": 1, "annotations": [], "data": {}}],
    "it is in CreateML's format; export as COCO where it was made": [{"image": "a.jpg", "annotations": []}],
    "not COCO's format, which is a mapping with lists of images, annotations and categories": [5],
}


@pytest.mark.parametrize("expected", FOREIGN)
def test_other_tools_json_is_called_by_their_names(tmp_path, expected):
    """Also where there is a file for each image."""
    make(tmp_path, FOREIGN[expected])
    assert message(read, tmp_path) == f"{tmp_path}/annotations.json: {expected}"
    (tmp_path / "annotations.json").rename(tmp_path / "a.json")
    (tmp_path / "b.json").touch()
    assert "2 annotation files" in message(read, tmp_path)
    (tmp_path / "a.jpg").touch()
    assert message(read, tmp_path) == f"{tmp_path}/a.json: {expected}"


def test_cvats_xml_and_vias_project_are_called_by_their_names(tmp_path):
    (tmp_path / "project.json").write_text(json.dumps({"_via_settings": {}, "_via_img_metadata": {}}))
    assert message(read, tmp_path).endswith("project.json: it is in VIA's format; export as COCO there")
    (tmp_path / "project.json").unlink()
    xml = tmp_path / "annotations.xml"
    xml.write_text('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<image id="0" name="a.jpg"/></annotations>')
    for function in (find_annotations, other_format):
        assert message(function, str(tmp_path)) == f"{xml}: it is in CVAT's format; export as COCO 1.0 there"


def test_an_evaluation_may_have_more_categories_that_no_box_uses(tmp_path):
    make(tmp_path, changed(more("categories", id=1, name="unicorn")))
    assert is_clean(read(tmp_path, ["ant", "zebra"]))
    assert read(tmp_path).notes == ("no object of 1 of 3 classes: unicorn",)
    make(tmp_path, changed(more("categories", id=1, name="bee"), row("annotations", 0, category_id=1)))
    assert message(read, tmp_path, ["ant", "zebra"]).endswith(": categories unknown in training: bee")


def test_blanks_around_a_category_s_name_are_no_part_of_it(tmp_path):
    make(tmp_path, changed(row("categories", 0, name=" zebra\n"), row("categories", 1, name="ant ")))
    assert is_clean(read(tmp_path)) and is_clean(read(tmp_path, ["ant", "zebra"]))
    assert [x.tolist() for x in read(tmp_path, ["ant ", "zebra"]).labels] == [[1], [0, 1], []]  # an older checkpoint's


def test_no_object_at_all_is_said(tmp_path):
    dataset = read(make(tmp_path, changed(lambda c: c.update(annotations=[]))))
    assert dataset.notes == ("no object at all: there is nothing to find",) and dataset.classes == ["ant", "zebra"]
    batch = dataset.batch(torch.arange(3), torch.zeros(3, 3, 16, 16, dtype=torch.uint8))
    assert batch.metadata["boxes"].shape == (3, 0, 4) and not batch.counted[:, 1].any()


def test_annotations_of_which_none_is_left_are_refused(tmp_path):
    """Nothing would be trained; one that is left is enough."""
    ids, flat = rows("annotations", image_id=lambda r: f"00{r['image_id']}"), row("annotations", 0, bbox=[0, 0, 0, 0])
    strange = "annotations of images that it does not list, skipped: {}, as image_id {} (the first listed: 7)"
    for changes, why in (
        ([ids], strange.format(3, "'007'")),
        ([rows("annotations", bbox=lambda r: [0, 0, 0, 0])], "boxes without area, skipped: 3"),
        (
            [flat, *(row("annotations", i, image_id=1) for i in (1, 2))],
            f"{strange.format(2, 1)}; boxes without area, skipped: 1",
        ),
    ):
        make(tmp_path, changed(*changes))
        expected = f"{tmp_path}/annotations.json: no annotation is left ({why}); correct them, or write an empty list"
        assert message(read, tmp_path) == expected
    make(tmp_path, changed(flat, row("annotations", 1, image_id=1)))
    assert [len(x) for x in read(tmp_path).boxes] == [0, 1, 0]


@pytest.mark.parametrize("seed", range(4))
def test_the_box_of_a_mask_is_pycocotools(seed):
    """Of run lengths, as they are and compressed; random blobs, a full and an empty mask, one that begins at once."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        mask = (rng.random(rng.integers(1, 9, 2)) < rng.choice([0, 0.1, 0.3, 0.9, 1])).astype(np.uint8)
        rle = coco_mask.encode(np.asfortranarray(mask))
        flat, size = mask.T.flatten().tolist(), list(mask.shape)
        counts, value = [0], 0
        for pixel in flat:
            if pixel != value:
                counts.append(0)
                value = pixel
            counts[-1] += 1
        expected = coco_mask.toBbox(rle).tolist()
        assert box_of_mask({"size": size, "counts": rle["counts"].decode()}) == expected
        assert box_of_mask({"size": size, "counts": counts}) == expected
    for wrong in (
        {"size": [2, 2], "counts": "o" * 10**6},
        {"size": [2, 2], "counts": [5]},
        {"size": [2], "counts": "1"},
        {"counts": [4]},
        [[1, 2, 3]],
        [],
        None,
    ):
        assert box_of_mask(wrong) is None


def test_large_runs_of_a_compressed_mask(tmp_path):
    """Counts of several characters, and negative differences."""
    mask = np.zeros((300, 500), dtype=np.uint8)
    mask[40:290, 100:140] = mask[50:60, 400:405] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    text = {"size": [300, 500], "counts": rle["counts"].decode()}
    assert box_of_mask(text) == coco_mask.toBbox(rle).tolist() == [100, 40, 305, 250]


def test_a_worker_gets_each_box_once(tmp_path):
    """Where workers are not forked the data set is pickled; its objects are views of one tensor."""
    many = [row | {"id": i, "file_name": f"{i}.png", "width": 4, "height": 4} for i, row in enumerate([{}] * 60)]
    boxes = [{"image_id": i % 60, "category_id": 5, "bbox": [0, 0, 1 + i % 3, 2]} for i in range(600)]
    for image in many:
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / "images" / image["file_name"])
    (tmp_path / "annotations.json").write_text(json.dumps(CLEAN | {"images": many, "annotations": boxes}))
    dataset = read(tmp_path)
    data = pickle.dumps(dataset)
    again = pickle.loads(data)
    assert len(data) < 60 * 150 + 600 * 30 + 5000
    for name in ("boxes", "labels", "crowd"):
        assert all(map(torch.equal, getattr(dataset, name), getattr(again, name)))
    assert again.paths == dataset.paths and again.boxes[3].shape == (10, 4)


def test_plain_and_odd_files_are_read_alike(tmp_path):
    """A file as COCO's own is read at once, another row by row: one text among the numbers changes nothing else."""
    root = make(tmp_path)
    plain = read_annotations(root)
    (tmp_path / "annotations.json").write_text(json.dumps(changed(row("annotations", 2, bbox=["8", 8.5, 2, 4]))))
    odd = read_annotations(root)
    for name in ("image", "category", "boxes", "crowd"):
        assert np.array_equal(getattr(plain, name), getattr(odd, name)) and len(getattr(odd, name)) == 3
