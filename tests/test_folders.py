"""folders.py: which files are found, and what is said of the others."""

import os

from folders import find_images


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
