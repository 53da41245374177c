"""folders.py: which files are found, and what is said of the others."""

import io
import os
import unicodedata
from collections import Counter
from unittest import mock

import pytest
from conftest import message
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile, PngInfo

from data_types import InputError
from folders import SUFFIXES, check_headers, class_notes, find_classes, find_images, not_read_note, refuse, upright_size
from images import decode_image


def touch(path) -> str:
    """An empty file, its folders made where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def encoded(kind: str) -> bytes:
    Image.new("RGB", (2, 2)).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def test_find_images_at_any_depth_with_any_case_of_suffix(tmp_path):
    """Also in a folder that is named like an image; nothing else is found, and nothing hidden."""
    names = [f"x.{s}" for s in ("png", "jpg", "jpeg", "bmp", "webp", "tif", "tiff", "gif", "jfif", "ppm", "pgm")]
    names += [f"deep/er/{name.upper()}" for name in names] + ["deep/x.JpEg", "folder.png/z.png"]
    expected = sorted(touch(tmp_path / name) for name in names)
    for name in ("notes.txt", "png", "a.png.txt", "b.dat", ".a.png", ".hid/c.png", "deep/.hid/d.png", "deep/.e.JPG"):
        touch(tmp_path / name)
    (tmp_path / "empty.jpg").mkdir()
    assert find_images(str(tmp_path)) == expected and len(expected) == 24


def test_system_folders_are_left_alone_and_other_formats_counted(tmp_path):
    """Whatever the case of their names; those that look like images and are not read are said, with their number."""
    for name in ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "#snapshot"):
        touch(tmp_path / name / "a.png")
        touch(tmp_path / "deep" / name.lower() / "a.png")
    expected = [touch(tmp_path / "deep" / "a.png")]
    for name in ("a.heic", "deep/B.HEIC", "c.pbm", ".d.heic", "notes.txt"):
        touch(tmp_path / name)
    not_read = Counter()
    assert find_images(str(tmp_path), not_read) == expected and not_read == {".heic": 2, ".pbm": 1}
    assert not_read_note(not_read) == [f"not read: 2 .heic, 1 .pbm (the formats that are: {' '.join(SUFFIXES)})"]
    assert not_read_note(Counter()) == []


def test_images_under_a_suffix_that_is_not_read_are_counted(tmp_path):
    """Whatever it is, or without any; not texts, whatever begins them, and not what cannot be opened."""
    data = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP")}
    for i, picture in enumerate(data.values()):
        (tmp_path / f"a{i}").write_bytes(picture)
    (tmp_path / "b.jpg_large").write_bytes(data["JPEG"])
    (tmp_path / "c.png.1").write_bytes(data["PNG"])
    (tmp_path / "LICENSE").write_text("MIT")
    (tmp_path / "d.txt").write_bytes(data["PNG"])
    (tmp_path / "e.wav").write_bytes(b"RIFF\x24\0\0\0WAVEfmt ")
    (tmp_path / "nowhere").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    not_read = Counter()
    assert find_images(str(tmp_path), not_read) == []
    assert not_read == {"without a suffix": 5, ".jpg_large": 1, ".1": 1}


def test_a_folder_that_cannot_be_opened_is_an_error(tmp_path):
    """Anywhere; its images would be missing in silence."""
    touch(tmp_path / "a" / "b" / "c.png")
    scandir, shut = os.scandir, tmp_path / "a" / "b"

    def refusing(path):
        if str(path) == str(shut):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with mock.patch("os.scandir", refusing):
        expected = f"{shut}: cannot be opened (Permission denied); change its permissions or move it"
        assert message(find_images, str(tmp_path)) == message(find_classes, str(shut)) == expected


def test_classes_are_in_natural_order(tmp_path):
    """Numbers by their value, as in timm; system folders are none; the same name in other code points is one class."""
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for name in ("10", "9", "1", "x2", "X10", "x1", decomposed, "@eaDir", "__MACOSX", ".git"):
        (tmp_path / name).mkdir()
    touch(tmp_path / "b.png")
    touch(tmp_path / "a.JPG")
    touch(tmp_path / "notes.txt")
    found = find_classes(str(tmp_path))
    assert list(found) == ["1", "9", "10", composed, "x1", "x2", "X10"]
    assert found[composed] == str(tmp_path / decomposed)
    assert class_notes(str(tmp_path), found) == ["not read: 2 images beside the class folders, a.JPG the first"]
    assert list(find_classes(str(tmp_path), list(found))) == list(found)
    (tmp_path / composed).mkdir()
    text = message(find_classes, str(tmp_path))
    assert "its name looks like that of" in text and text.endswith("; rename one of them")


@pytest.mark.parametrize(
    "names, expected",
    [
        (["train", "val"], "it holds train, val, not classes; name one of them: {}/train"),
        (["Train", "TEST"], "it holds TEST, Train, not classes; name one of them: {}/Train"),
        (["test_set", "train_set"], "it holds test_set, train_set, not classes; name one of them: {}/train_set"),
        (["train2017", "val2017"], "it holds train2017, val2017, not classes; name one of them: {}/train2017"),
        (["images", "masks"], "it holds images and masks, not classes; that is for task=segmentation"),
        (["Image", "GT"], "it holds gt and image, not classes; that is for task=segmentation"),
        (["imagesTr", "labelsTr"], "it holds imagestr and labelstr, not classes; that is for task=segmentation"),
        (["gtFine", "leftImg8bit"], "it holds gtfine and leftimg8bit, not classes; that is for task=segmentation, as"),
        (["ann_dir", "img_dir"], "it holds ann_dir and img_dir, not classes; that is for task=segmentation"),
        (
            ["images", "annotations.json"],
            "it holds annotations.json and images, not classes; that is for task=de",
        ),
        (["JPEGImages", "Annotations", "ImageSets"], "it holds annotations and jpegimages, not classes; that is for "),
        (
            ["images", "labels"],
            "it holds images and labels, not classes; that is for task=detection (uv run ",
        ),
    ],
)
def test_folders_made_for_something_else_are_no_classes(tmp_path, names, expected):
    """Splits, and the parts of another task's format; unless they are the classes of the training folder."""
    for name in names:
        touch(tmp_path / name) if "." in name else (tmp_path / name).mkdir()
    assert message(find_classes, str(tmp_path)).startswith(f"{tmp_path}: {expected.format(tmp_path)}")
    known = sorted(name for name in names if "." not in name)
    assert sorted(find_classes(str(tmp_path), known)) == known
    for i in range(2):
        (tmp_path / f"class{i}").mkdir()
    if "train" in names:  # which is also something to recognise
        classes = find_classes(str(tmp_path))
        [note] = class_notes(str(tmp_path), classes)
        assert len(classes) == 4 and note == "train, val are taken for classes, though they are called like splits"


def test_headers_of_too_many_images_are_left_to_who_decodes_them(tmp_path, monkeypatch):
    paths = [touch(tmp_path / "a.png")]
    assert message(check_headers, paths).startswith(f"{paths[0]}: not a readable image (")
    monkeypatch.setattr("folders.MOST_HEADERS", 0)
    check_headers(paths)


def test_splits_in_a_class_folder_are_said(tmp_path):
    for name in ("ant/train", "ant/test", "bee/train", "bee/far"):
        (tmp_path / name).mkdir(parents=True)
    expected = f"{tmp_path}/ant: test, train in a class folder are one set, and all are read"
    assert class_notes(str(tmp_path), find_classes(str(tmp_path))) == [expected]
    assert not class_notes(str(tmp_path), {"bee": f"{tmp_path}/bee"})
    for name in ("Ant", "BEE"):
        (tmp_path / name).mkdir()
    alike = [note for note in class_notes(str(tmp_path), find_classes(str(tmp_path))) if "in case alone" in note]
    assert [set(note.split(" differ")[0].split(", ")) for note in alike] == [{"Ant", "ant"}, {"BEE", "bee"}]


def test_blanks_around_a_class_name_are_no_part_of_it(tmp_path):
    """They cannot be seen. An evaluation folder may differ in them, one folder may not."""
    for name in ("a ", " b"):
        (tmp_path / name).mkdir()
    for known in (None, ["a", "b"], ["b ", "a"]):
        assert find_classes(str(tmp_path), known) == {"a": f"{tmp_path}/a ", "b": f"{tmp_path}/ b"}
    (tmp_path / "a").mkdir()
    assert message(find_classes, str(tmp_path)).endswith("; rename one of them")


def test_all_findings_are_one_message_of_at_most_ten_lines():
    refuse([])
    assert message(refuse, ["a\nb"]) == "a\\nb"
    for count, last in ((10, "9"), (100, "… and 91 more like these")):
        with pytest.raises(InputError) as caught:
            refuse([str(i) for i in range(count)])
        assert str(caught.value).split("\n") == [*"012345678", last]


def test_find_images_follows_links_but_not_in_circles(tmp_path):
    """A link in a circle adds nothing; linked files and folders count, a folder of many names once, under the first."""
    own = touch(tmp_path / "class" / "own.png")
    touch(tmp_path / "elsewhere" / "far.png")
    for name, to in (("loop", "../class"), ("b", "../elsewhere"), ("a", "../elsewhere"), ("linked.png", own)):
        (tmp_path / "class" / name).symlink_to(to)
    found = [os.path.relpath(path, tmp_path / "class") for path in find_images(str(tmp_path / "class"))]
    assert found == ["a/far.png", "linked.png", "own.png"]


def test_links_that_lead_above_a_folder_are_circles(tmp_path):
    """They would put the images of other classes into this one."""
    own, other = touch(tmp_path / "a" / "own.png"), touch(tmp_path / "b" / "other.png")
    for name, to in (("up", ".."), ("upper", "../.."), ("self", ".")):
        (tmp_path / "a" / name).symlink_to(to)
        (tmp_path / name).symlink_to(to)
    assert find_images(str(tmp_path / "a")) == [own] and find_images(str(tmp_path)) == [own, other]
    assert list(find_classes(str(tmp_path))) == ["a", "b"]
    (tmp_path / "c").symlink_to("not mounted")  # a class would be gone
    expected = f"{tmp_path}/c: a link to not mounted, where nothing is; correct or remove it"
    assert message(find_classes, str(tmp_path)) == expected
    (tmp_path / "c").unlink()
    (tmp_path / "c").symlink_to("a")
    expected = f"{tmp_path}/c: by a link it is the same folder as {tmp_path}/a; remove one of the two classes"
    assert message(find_classes, str(tmp_path)) == expected


@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels", "in text"])
def test_the_size_of_a_turned_png_takes_no_decoding(tmp_path, monkeypatch, place):
    """Unless its orientation stands behind the pixels, where some tools write it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    Image.new("L", (3, 2)).save(
        path := tmp_path / "a.png", **({"pnginfo": text} if place == "in text" else {"exif": exif})
    )
    if place == "behind the pixels":
        data = path.read_bytes()
        start, pixels, end = (data.index(kind) - 4 for kind in (b"eXIf", b"IDAT", b"IEND"))
        path.write_bytes(data[:start] + data[pixels:end] + data[start:pixels] + data[end:])
    assert ImageOps.exif_transpose(Image.open(path)).size == (2, 3) == upright_size(str(path))
    monkeypatch.setattr(PngImageFile, "load_prepare", lambda self: pytest.fail("the pixels were decoded"))
    if place != "behind the pixels":
        assert upright_size(str(path)) == (2, 3)


def test_a_pipe_is_no_image_and_not_waited_for(tmp_path):
    """Whatever it is called; neither its size nor its pixels."""
    path = str(tmp_path / "a.png")
    os.mkfifo(path)
    for function, arguments in ((upright_size, ()), (decode_image, (8,))):
        expected = f"{path}: not a readable image (not a regular file); repair or remove it"
        assert message(function, path, *arguments) == expected
