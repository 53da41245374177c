"""folders.py: which files are found, and what is said of the others."""

import os

import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile, PngInfo

from folders import find_images, upright_size


def touch(path) -> str:
    """An empty file, its folders made where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def test_find_images_at_any_depth_with_any_case_of_suffix(tmp_path):
    """Also in a folder that is named like an image; nothing else is found, and nothing hidden."""
    names = [f"x.{s}" for s in ("png", "jpg", "jpeg", "bmp", "webp", "tif", "tiff", "gif", "jfif", "ppm", "pgm")]
    names += [f"deep/er/{name.upper()}" for name in names] + ["deep/x.JpEg", "folder.png/z.png"]
    expected = sorted(touch(tmp_path / name) for name in names)
    for name in ("notes.txt", "png", "a.png.txt", "b.npy", ".a.png", ".hid/c.png", "deep/.hid/d.png", "deep/.e.JPG"):
        touch(tmp_path / name)
    (tmp_path / "empty.jpg").mkdir()
    assert find_images(str(tmp_path)) == expected and len(expected) == 24


def test_find_images_follows_links_but_not_in_circles(tmp_path):
    """A link in a circle adds nothing; linked files and folders count, a folder of many names once, under the first."""
    own = touch(tmp_path / "class" / "own.png")
    touch(tmp_path / "elsewhere" / "far.png")
    for name, to in (("loop", "../class"), ("b", "../elsewhere"), ("a", "../elsewhere"), ("linked.png", own)):
        (tmp_path / "class" / name).symlink_to(to)
    found = [os.path.relpath(path, tmp_path / "class") for path in find_images(str(tmp_path / "class"))]
    assert found == ["a/far.png", "linked.png", "own.png"]


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
