"""tools/to_coco.py: the same pictures in three formats give the same targets, and what is wrong is named."""

import json
from pathlib import Path

import pytest
import to_coco
import torch
from conftest import message, refused
from PIL import Image

from detection_task import DetectionDataset

NAMES = ["ant", "bee", "cat"]
SCENES = {  # width, height, and objects: class, x0 y0 x1 y1 in pixels from 0, whether it is difficult
    "one": (40, 20, [("bee", 0, 0, 40, 20, False), ("ant", 3, 4, 13, 19, False)]),
    "two": (16, 32, [("cat", 5, 6, 7, 30, True)]),
    "three": (16, 16, []),
}
OBJECT = """<object><name>{}</name><part><bndbox><xmin>1</xmin></bndbox></part><difficult>{}</difficult>
<bndbox><ymax>{}</ymax><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax></bndbox></object>"""


def pictures(folder: Path, names=SCENES) -> None:
    """The scenes' pictures; the first is stored lying."""
    folder.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = 6
    for name in names:
        width, height, _ = SCENES[name]
        size, options = ((height, width), {"exif": exif}) if name == "one" else ((width, height), {})
        Image.new("RGB", size).save(folder / f"{name}.jpg", **options)


def write_coco(root: Path) -> None:
    pictures(root / "images")
    images, rows = [], []
    for i, (name, (width, height, objects)) in enumerate(sorted(SCENES.items())):
        images.append({"id": i, "file_name": f"{name}.jpg", "width": width, "height": height})
        for label, x0, y0, x1, y1, hard in objects:
            row = {"image_id": i, "category_id": NAMES.index(label), "bbox": [x0, y0, x1 - x0, y1 - y0]}
            rows.append(row | {"iscrowd": int(hard)})
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    (root / "annotations.json").write_text(
        json.dumps({"images": images, "annotations": rows, "categories": categories})
    )


def write_voc(root: Path, low: int = 1, images: str = "JPEGImages", xml: str = "Annotations") -> None:
    """low: what the first pixel is called."""
    pictures(root / images)
    (root / xml).mkdir(parents=True, exist_ok=True)
    for name, (width, height, objects) in SCENES.items():
        rows = [OBJECT.format(label, int(hard), y1, x0 + low, y0 + low, x1) for label, x0, y0, x1, y1, hard in objects]
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}.jpg</filename>{size}{''.join(rows)}</annotation>"
        (root / xml / f"{name}.xml").write_text(text)


def write_yolo(root: Path, images: str = "images", labels: str = "labels", names=SCENES) -> None:
    """The last scene has no label file; difficult objects are as others are."""
    pictures(root / images, names)
    (root / labels).mkdir(parents=True, exist_ok=True)
    for name in names:
        width, height, objects = SCENES[name]
        rows = [
            f"{NAMES.index(label)} {(x0 + x1) / 2 / width:.6f} {(y0 + y1) / 2 / height:.6f} {(x1 - x0) / width:.6f} "
            f"{(y1 - y0) / height:.6f}\n"
            for label, x0, y0, x1, y1, _ in objects
        ]
        if rows:
            (root / labels / f"{name}.txt").write_text("".join(rows))
    (root / "data.yaml").write_text("train: images\nnc: 3\nnames: [ant, bee, cat]\n")


def convert(root: Path, *options: str) -> None:
    assert to_coco.main([str(root), *options]) == 0


def test_the_three_formats_give_the_same_targets(tmp_path, capsys):
    """A folder in another format is refused with the command that converts it. YOLO knows no difficult objects."""
    for name, write in {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}.items():
        write(tmp_path / name)
    Image.new("L", (2, 2)).save(tmp_path / "yolo" / "labels.jpg")  # Ultralytics draws such charts
    for name in ("voc", "yolo"):
        assert f"uv run tools/to_coco.py {tmp_path / name}" in message(DetectionDataset, str(tmp_path / name), 16, 4)
        convert(tmp_path / name)
    said = capsys.readouterr().out
    assert f"{tmp_path}/yolo: images without a label file: without objects: 1\n" in said
    assert f"{tmp_path}/yolo: images in no folder images/, not listed: 1\n" in said
    coco, voc, yolo = (DetectionDataset(str(tmp_path / name), 16, 4) for name in ("coco", "voc", "yolo"))
    every = torch.arange(3)
    expected, *others = (x.batch(every, torch.zeros(3, 3, 16, 16)) for x in (coco, voc, yolo))
    assert [Path(path).stem for path in coco.paths] == ["one", "three", "two"] and expected.counted[:, 1].sum() > 5
    for dataset, batch in zip((voc, yolo), others):
        assert dataset.classes == NAMES and dataset.notes == () and dataset.sizes == coco.sizes
        assert torch.equal(batch.metadata["labels"], expected.metadata["labels"])
        assert torch.allclose(batch.metadata["boxes"], expected.metadata["boxes"], atol=1e-3)
    assert torch.equal(others[0].targets, expected.targets) and torch.equal(others[0].counted, expected.counted)
    assert torch.allclose(others[1].targets[:2], expected.targets[:2], atol=1e-3)
    assert voc.crowd[2].tolist() == coco.crowd[2].tolist() == [True] and yolo.crowd[2].tolist() == [False]


@pytest.mark.parametrize("xml", ["annotations", "annotations/xmls", "."])
def test_where_voc_s_and_yolo_s_texts_lie(tmp_path, xml):
    """Also as Oxford's pets and LabelImg have them; the targets are those of the usual layouts."""
    usual, other = tmp_path / "usual", tmp_path / "other"
    if xml == ".":
        write_yolo(usual)
        write_yolo(other, images=".", labels=".")
    else:
        write_voc(usual)
        write_voc(other, images="images", xml=xml)
    for root in (usual, other):
        assert f"uv run tools/to_coco.py {root}" in message(DetectionDataset, str(root), 16, 4)
        convert(root)
    usual, other = (DetectionDataset(str(root), 16, 4) for root in (usual, other))
    assert other.classes == usual.classes and sum(map(len, usual.boxes)) == 3
    for x, y in zip(usual.boxes + usual.labels + usual.crowd, other.boxes + other.labels + other.crowd):
        assert torch.equal(x, y)


def test_voc_beside_its_images_counting_from_zero(tmp_path, capsys):
    """As Roboflow writes it; flipped corners are put right, an XML file without a picture is skipped, and so is a
    picture without one."""
    root = tmp_path / "voc"
    write_voc(root, low=0, images=".", xml=".")
    text = (root / "two.xml").read_text()
    flipped = text.replace("<xmin>5</xmin>", "<xmin>7</xmin>").replace("<xmax>7</xmax>", "<xmax>5</xmax>")
    assert flipped != text
    (root / "two.xml").write_text(flipped)
    (root / "three.xml").rename(root / "nowhere.xml")
    (root / "nowhere.xml").write_text("<annotation><filename>nowhere.jpg</filename></annotation>")
    convert(root)
    said = capsys.readouterr().out
    for line in (
        "coordinates count from 0: some are 0",
        "boxes with flipped corners, put right: 1",
        "XML files without an image, skipped: 1",
        "images without an XML file, not listed: 1",
    ):
        assert f"{root}: {line}\n" in said
    dataset = DetectionDataset(str(root), 16, 4)
    assert [x.tolist() for x in dataset.boxes] == [
        [[0, 0, 16, 16], pytest.approx([1.2, 3.2, 5.2, 15.2])],
        [[5, 3, 7, 15]],
    ]


@pytest.mark.parametrize("encoding", ["iso-8859-1", "utf-16", "utf-8-sig"])
def test_xml_is_read_in_the_encoding_that_it_declares(tmp_path, capsys, encoding):
    """Under a suffix in upper case, too; a bomb in it is found."""
    write_voc(tmp_path)
    declared = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>'
    for path in sorted((tmp_path / "Annotations").iterdir()):
        path.with_suffix(".XML").write_bytes((declared + path.read_text().replace("bee", "b\u00e4r")).encode(encoding))
        path.unlink()
    convert(tmp_path)
    assert DetectionDataset(str(tmp_path), 16, 4).classes == ["ant", "b\u00e4r", "cat"]
    path.with_suffix(".XML").write_bytes((declared + BOMB).encode(encoding))
    assert "it declares entities" in refused(capsys, to_coco.main, str(tmp_path))


def test_vocs_image_sets_are_splits_and_its_masks_no_pictures(tmp_path):
    """ImageSets/Main has lists of each class, too. A split without an object of a class knows it nevertheless."""
    root = tmp_path / "voc"
    write_voc(root)
    pictures(root / "SegmentationClass")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, text in {"train": "one\nthree\n", "val": "two\nmissing\n", "ant_train": "one 1\nthree -1\n"}.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    convert(root)
    files = sorted((root / "annotations").iterdir())
    assert [file.name for file in files] == ["instances_train.json", "instances_val.json"]
    train, val = (DetectionDataset(str(file), 16, 4) for file in files)
    assert train.paths == [f"{root}/JPEGImages/{name}.jpg" for name in ("one", "three")]
    assert [x.tolist() for x in val.labels] == [[2]] and train.classes == val.classes == NAMES


@pytest.mark.parametrize("images, labels", [("images/{}", "labels/{}"), ("{}/images", "{}/labels")])
def test_yolos_splits(tmp_path, images, labels):
    """Ultralytics' layout and Roboflow's; the annotations may be written elsewhere."""
    root, out = tmp_path / "yolo", tmp_path / "coco"
    write_yolo(root, images.format("train"), labels.format("train"), ["one"])
    write_yolo(root, images.format("val"), labels.format("val"), ["two", "three"])
    convert(root, "--out", str(out))
    train, val = (DetectionDataset(f"{out}/annotations/instances_{name}.json", 16, 4) for name in ("train", "val"))
    assert [x.tolist() for x in (*train.labels, *val.labels)] == [[1, 0], [], [2]]
    refusal = "annotations/instances_train.json exists: nothing is overwritten; remove it or name another folder"
    assert refusal in message(to_coco.convert, root, out)
    if labels == "{}/labels":  # one split by itself; its data.yaml is above it
        convert(root / "train")
        assert DetectionDataset(str(root / "train"), 16, 4).labels[0].tolist() == [1, 0]


@pytest.mark.parametrize("start", ["", "./", "data/", "C:\\yolo\\", "/home/bob/"])
def test_yolos_lists_are_splits(tmp_path, capsys, start):
    """As Darknet and Ultralytics write them, of this machine or another; a label file beside is no list, and one that
    is elsewhere is said."""
    write_yolo(tmp_path, "images/a", "labels/a", ["one"])
    write_yolo(tmp_path, "images/b", "labels/b")
    lists = {"train": "a/one b/one", "autosplit_val": "b/two b/two b/four four", "test": "a/two"}
    for name, stems in lists.items():
        lines = [f"{start}images/{stem}.jpg\n" for stem in stems.split()]
        (tmp_path / f"{name}.txt").write_text("".join(lines).replace("/", "\\" if "\\" in start else "/"))
    (tmp_path / "data.yaml").write_text("train: ./train.txt\nval: lists/fold.txt\nnames: [ant, bee, cat]\n")
    (tmp_path / "train_7.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    convert(tmp_path)
    said = capsys.readouterr().out.splitlines()
    used = f"not used: lists are read as train.txt, val.txt … in {tmp_path}"
    assert said.pop(0) == f"{tmp_path}/data.yaml: val is lists/fold.txt, {used}"
    of_none = "txt: lines that name no image read here, skipped:"
    assert said[0].startswith(f"{tmp_path}/autosplit_val.{of_none} 2, as {start}images")
    assert said[1].startswith(f"{tmp_path}/test.{of_none} 1, as ")
    assert said[2] == f"{tmp_path}: images in no list, left out: 1"
    files = sorted((tmp_path / "annotations").iterdir())
    assert [file.name for file in files] == ["instances_autosplit_val.json", "instances_train.json"]
    val, train = (DetectionDataset(str(file), 16, 4).paths for file in files)
    assert val == [f"{tmp_path}/images/b/two.jpg"]
    assert train == [f"{tmp_path}/images/{stem}.jpg" for stem in ("a/one", "b/one")]


def test_the_longest_end_of_a_path_tells_which_image_is_meant():
    paths = {"a.png": [(("a.png", "x", "images"), 1), (("a.png", "y", "images"), 2), (("a.png",), 3)]}
    lines = {"images/x/a.png": 1, "/z/images/y/a.png": 2, "y/a.png": 2, "z/a.png": 3, "b.png": None}
    assert {line: to_coco.find_record(line, paths) for line in lines} == lines
    assert to_coco.find_record("a.png", {"a.png": paths["a.png"][:2]}) is None


def test_names_alone_in_a_list_and_lists_of_other_images(tmp_path, capsys):
    """A name is enough if only one image has it. VOC's own lists come first."""
    write_voc(tmp_path)
    (tmp_path / "train.txt").write_text("two.jpg\nJPEGImages/one.jpg\n")
    convert(tmp_path, "--out", str(tmp_path / "coco"))
    train = DetectionDataset(f"{tmp_path}/coco/annotations/instances_train.json", 16, 4)
    assert [Path(path).stem for path in train.paths] == ["two", "one"]
    sets = tmp_path / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "val.txt").write_text("four\n")
    expected = f"{sets}/val.txt: no line names an image read here; correct or remove the lists beside it"
    assert refused(capsys, to_coco.main, str(tmp_path)) == expected


@pytest.mark.parametrize("file", ["labels/classes.txt", "classes.txt", "data.yaml", "my.yml"])
def test_where_yolo_names_its_classes(tmp_path, file):
    """A polygon becomes its box, and a line that is there twice counts once."""
    write_yolo(tmp_path / "yolo")
    (tmp_path / "yolo" / "data.yaml").unlink()
    names = "path: x\nnames:\n  '1': bee\n  0: ant\n  2: cat\n" if "ml" in file else "\ufeffant\r\nbee\r\ncat\r\n"
    (tmp_path / "yolo" / file).write_text(names)
    (tmp_path / "yolo" / "labels" / "three.txt").write_text("1 0.25 0.5 0.5 0.5 0.5 0.75\n" * 2)
    convert(tmp_path / "yolo")
    dataset = DetectionDataset(str(tmp_path / "yolo"), 16, 4)
    assert dataset.classes == NAMES and dataset.labels[1].tolist() == [1]
    assert dataset.boxes[1].tolist() == [[4, 8, 8, 12]]


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'
BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>3</ymax></bndbox>"
WRONG = {  # which file of which format, what it holds, and what the line says
    "voc/Annotations/one.xml: it declares entities": BOMB,
    "voc/Annotations/one.xml: not valid XML": "<annotation>",
    "voc/Annotations/two.xml: an object has no name": f"<a><object>{BOX.format(3)}</object></a>",
    "voc/Annotations/two.xml: an object x has no bndbox": "<a><object><name>x</name></object></a>",
    "voc/Annotations/two.xml: an empty text should be": f"<a><object><name>x</name>{BOX.format('')}</object></a>",
    "voc/Annotations/two.xml: nan should be": f"<a><object><name>x</name>{BOX.format('nan')}</object></a>",
    "yolo/labels/one.txt: '3 0.5 0.5 0.5 0.5': class 3, but the classes are 0 to 2": "3 0.5 0.5 0.5 0.5",
    "yolo/labels/one.txt: '1 0.5 0.5 0.5' should be a class and four numbers": "1 0.5 0.5 0.5",
    "yolo/labels/one.txt: '1 20 10 40 20' should be fractions of the image": "1 20 10 40 20",
    "yolo/labels/one.txt: '1 0.5 0.5 -0.5 0.5' should be fractions of the image": "1 0.5 0.5 -0.5 0.5",
    "yolo/labels/one.txt: ant should be a finite number": "ant 0.5 0.5 0.5 0.5",
    "yolo/data.yaml: not valid YAML": "names: [",
    "yolo/data.yaml: names should be of the classes 0 to 1, without a gap": "names: {1: ant, 2: bee}",
    "yolo/data.yaml: keypoints (kpt_shape); leave": "kpt_shape: [17, 3]\nnames: [ant, bee, cat]",
    "yolo/data.yaml: names should be of the classes 0 to 2, without": "names: {0: ant, '0': bee, 1: cat}",
    "yolo: a class is named twice": "names: [ant, bee, bee]",
    "yolo: no names in a data.yaml and no classes.txt; name the classes": "train: images",
    "yolo/data.yaml: names should be a list, one name a line, not ant, bee": "names: ant, bee",
    "yolo/data.yaml: nc is 5, but names has 2; name every class, in order": "nc: 5\nnames: {0: ant, 1: bee}",
    "yolo/labels/classes.txt: line 2 is empty; name its class, or": "ant\n\nbee\n",
    "yolo/labels/one.txt: '1,0.5,0.5,0.2,0.2': a comma; put blanks": "1,0.5,0.5,0.2,0.2",
}


@pytest.mark.parametrize("expected", WRONG)
def test_what_is_wrong_is_one_line(tmp_path, capsys, expected):
    file = expected.split(":")[0]
    kind = file.split("/")[0]
    (write_voc if kind == "voc" else write_yolo)(tmp_path / kind)
    if file.endswith("classes.txt"):
        (tmp_path / kind / "data.yaml").unlink()
    (tmp_path / (file if "/" in file else f"{file}/data.yaml")).write_text(WRONG[expected])
    assert expected in refused(capsys, to_coco.main, str(tmp_path / kind))
    assert not list(tmp_path.rglob("*.json"))


def test_labels_of_which_none_is_of_an_image_are_refused(tmp_path, capsys):
    """All images would be without objects. One label file that fits is enough."""
    write_yolo(tmp_path)
    (tmp_path / "images").rename(tmp_path / "photos")
    expected = f"{tmp_path}: no image has a label file, and {tmp_path}/labels/one.txt is of no image; "
    assert refused(capsys, to_coco.main, str(tmp_path)).startswith(expected)
    (tmp_path / "photos").rename(tmp_path / "images")
    (tmp_path / "labels" / "one.txt").rename(tmp_path / "labels" / "other.txt")
    convert(tmp_path)
    assert "label files without an image, skipped: 1" in capsys.readouterr().out


def test_folders_that_are_none_and_home(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_yolo(tmp_path / "yolo")
    file = tmp_path / "yolo" / "data.yaml"
    for arguments in ([str(file)], [str(file.parent), "--out", str(file)]):
        assert refused(capsys, to_coco.main, *arguments) == f"{file}: no folder; name one"
    assert to_coco.main(["~/yolo", "--out", "~/coco"]) == 0
    assert (tmp_path / "coco" / "annotations.json").is_file()


def test_a_folder_of_no_known_format_is_refused(tmp_path, capsys):
    expected = f"{tmp_path}: neither Annotations/*.xml (PASCAL VOC) nor labels/*.txt (YOLO) is in it"
    assert refused(capsys, to_coco.main, str(tmp_path)) == expected
