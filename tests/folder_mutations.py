"""The mutations that `mutate_folders.py` draws from: name -> what it does to a `Case`. A name that begins with = is of
what has to be right, alone at least; the others may also be refused. An exception means that it does not apply."""

import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from conftest import load_script
from PIL import Image, ImageOps

from folders import SUFFIXES, is_visible, plain_name
from mask_files import MASK_FOLDERS

to_coco = load_script("tools/to_coco.py")
WIDE, HIGH, SIDE = 40, 32, 16  # pixels of the pictures and of the input
TOKEN = re.compile("im[0-9]{2}", re.IGNORECASE)  # what all names of a picture have in common
NAME, LIST = "annotations.json", "classes.txt"
SAVED = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
COLOURS = [(37 * i % 256, 91 * i % 256, 53 * i % 256) for i in range(255)] + [(255, 255, 255)]


class Case:
    """A folder to be mutated. root: it; training: or for evaluation; want: token -> target, changed by what truly
    changes labels, None: nobody can know; recognisable: whether the pictures look as they did; said: by our tools."""

    def __init__(self, kind: str, root: Path, training: bool, want: dict[str, Any], rng: random.Random):
        self.kind, self.root, self.training, self.want, self.rng = kind, root, training, copy.deepcopy(want), rng
        self.recognisable, self.said = True, []

    def files(self, masks: bool = False) -> list[Path]:
        found = (p for p in sorted(self.root.rglob("*")) if TOKEN.search(p.name) and p.suffix.lower() in SUFFIXES)
        parts = ((p, set(str(p.relative_to(self.root).parent).lower().split("/"))) for p in found if p.is_file())
        return [p for p, above in parts if bool(above & set(MASK_FOLDERS)) == masks]

    def some(self, things: list) -> list:
        """All, one, or half of them."""
        return self.rng.sample(things, self.rng.choice((len(things), 1, max(len(things) // 2, 1))))

    def rename(self, path: Path, name: str) -> None:
        """Also in the annotations, where it is named as it was."""
        if (self.root / NAME).is_file() and "masks" not in path.parts:
            old, new = (json.dumps(x)[1:-1] for x in (path.name, name))
            edit(NAME, lambda text: text.replace(f'"{old}"', f'"{new}"'))(self)
        assert not path.with_name(name).exists()
        path.rename(path.with_name(name))


Mutation = Callable[[Case], Any]


def edit(name: str, change: Callable[[str], str | bytes]) -> Mutation:
    """The text of a file."""

    def mutation(case: Case) -> None:
        new = change((case.root / name).read_text(encoding="utf-8-sig"))
        (case.root / name).write_bytes(new if isinstance(new, bytes) else new.encode())

    return mutation


def moved(old: str, new: str) -> Mutation:
    def mutation(case: Case) -> None:
        (case.root / new).parent.mkdir(exist_ok=True)
        (case.root / old).rename(case.root / new)

    return mutation


def marked(mutation: Mutation, **attributes: Any) -> Mutation:
    """One after which the case has these attributes."""
    return lambda case: (mutation(case), vars(case).update(attributes))


def unlike(mutation: Mutation) -> Mutation:
    return marked(mutation, recognisable=False)


def relabelled(mutation: Mutation) -> Mutation:
    return marked(mutation, want=None)


# --- Pictures, files and folders of all tasks -------------------------------------------------------------------------


def resave(
    convert: Callable = lambda x: x, suffix: str = ".png", masks: bool = False, every: bool = False, **options
) -> Mutation:
    """Some of the pictures, or of the masks, or all, in another format or mode."""

    def mutation(case: Case) -> None:
        for path in case.files(masks) if every else case.some(case.files(masks)):
            with Image.open(path) as picture:
                # other modes do not hold its values, and losses stay
                assert not (masks and (picture.mode.startswith("I") or picture.format in ("JPEG", "WEBP")))
                grey = masks and picture.format == "GIF"  # its writer renumbers palettes
                new = convert(ImageOps.exif_transpose(picture).convert("L" if grey else picture.mode))
            new.save(path, **{"format": Image.registered_extensions()[suffix], **options})
            if suffix != path.suffix.lower() and "format" not in options:
                case.rename(path, path.stem + suffix)

    return mutation


def mode(name: str, suffix: str = ".png", **options) -> Mutation:
    return resave(lambda x: x.convert("L").convert(name) if name == "LA" else x.convert(name), suffix, **options)


def turned(tag: int, back: Image.Transpose | None, **options) -> Mutation:
    exif = Image.Exif()
    exif[0x0112] = tag
    return resave(lambda x: x if back is None else x.transpose(back), exif=exif, **options)


def renamed(new: Callable[[Path], str], masks: bool | None = None) -> Mutation:
    """Some of the pictures; masks: or all masks; None: pictures, and masks with them."""

    def mutation(case: Case) -> None:
        chosen = case.files(True) if masks else case.some(case.files())
        stems = {path.stem for path in chosen}
        for path in chosen + [path for path in case.files(True) if masks is None and path.stem in stems]:
            case.rename(path, new(path))

    return mutation


def added(*names: str) -> Mutation:
    """A picture under these names in the folder, and under those without a slash in all of its subfolders."""

    def mutation(case: Case) -> None:
        picture = case.files()[0].read_bytes()
        for folder in (case.root, *(p for p in sorted(case.root.rglob("*")) if p.is_dir() and is_visible(p.name))):
            for path in (folder / name for name in names if folder == case.root or "/" not in name):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture)

    return mutation


def one_file(change: Callable[[bytes, random.Random], bytes]) -> Mutation:
    def mutation(case: Case) -> None:
        path = case.rng.choice([*case.files(), *case.files(True), *case.root.glob(NAME)])
        path.write_bytes(change(path.read_bytes(), case.rng))

    return unlike(mutation)  # half a picture may still be one


def deleted(case: Case) -> None:
    path = case.rng.choice([*case.files(), *case.files(True)])
    path.unlink()
    if case.kind == "classification":
        del case.want[TOKEN.search(path.name)[0].lower()]


def linked(case: Case, folders: bool) -> None:
    """Files, or folders, become links to where they are now."""
    (away := case.root.parent / "away").mkdir(exist_ok=True)
    for i, path in enumerate([p for p in case.root.iterdir() if p.is_dir()] if folders else case.files()):
        path.symlink_to(path.rename(away / f"{i}_{path.name}"))


def deeper(case: Case) -> None:
    """Some pictures, with their masks, in a subfolder; annotations know of it."""
    stems = [path.stem for path in case.some(case.files())]
    for path in (path for path in case.files() + case.files(True) if path.stem in stems):
        (path.parent / "more").mkdir(exist_ok=True)
        path.rename(path.parent / "more" / path.name)
        if case.kind == "detection":
            edit(NAME, lambda text, name=path.name: text.replace(f'"{name}"', f'"more/{name}"'))(case)


def at(new: Callable[[Path], Path]) -> Mutation:
    return lambda case: setattr(case, "root", new(case.root))


def another(case: Case) -> None:
    shutil.copy(case.files()[0], case.root / "im97.png")


def packed(case: Case) -> None:
    inner = case.root.rename(case.root.parent / "x")
    case.root.mkdir()
    inner.rename(case.root / "inner")


def beside(kind: str, *names: str) -> Mutation:
    """Parts of another task's clean folder lie there, too."""
    return lambda case: [
        shutil.copytree(part, case.root / part.name) if part.is_dir() else shutil.copy(part, case.root)
        for part in sorted((case.root.parent.parent / "clean" / kind / "train").iterdir())
        if not names or part.name in names
    ]


def grey16(x: Image.Image, factor: int = 257) -> Image.Image:
    return Image.fromarray(np.asarray(x.convert("L")).astype(np.uint16) * factor)


ROTATE, HALF_TURN = Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180
# fmt: off
FILES = {
    **{f"= as {s}": mode("RGB", s) for s in (".jpg", ".bmp", ".tif", ".webp", ".ppm")},
    **{f"as {s}": mode("RGB", s) for s in (".gif", ".jp2", ".ico", ".avif") if s in SAVED},
    **{f"= mode {m}": mode(m) for m in ("L", "RGB", "P", "RGBA", "LA")}, "= mode CMYK": mode("CMYK", ".tif"),
    "mode 1": unlike(mode("1")), "= mode I;16": resave(grey16), "mode F": mode("F", ".tif"),
    "= JPEG called PNG": mode("RGB", format="JPEG"), "larger": resave(lambda x: x.resize((2 * WIDE, 2 * HIGH))),
    "= turned by EXIF": turned(6, ROTATE), "= upside down by EXIF": turned(3, HALF_TURN),
    "wrongly turned by EXIF": unlike(turned(8, None)), "turned": unlike(resave(lambda x: x.transpose(ROTATE))),
    "= PNG": renamed(lambda p: p.stem + ".PNG"), "IM": renamed(lambda p: p.name.replace("im", "IM")),
    "= accents": renamed(lambda p: unicodedata.normalize("NFC" if "masks" in p.parts else "NFD", f"é{p.name}")),
    "= signs": renamed(lambda p: f"a b#c%20;'{p.name}"), "= a line break": renamed(lambda p: f"a\n{p.name}"),
    "no UTF-8": renamed(lambda p: os.fsdecode(b"\xff" + p.name.encode())),
    "= two dots": renamed(lambda p: f"{p.stem}.v1{p.suffix}"), "no suffix": renamed(lambda p: p.stem, False),
    "another suffix": renamed(lambda p: p.stem + ".jpg", False),
    "cut off": one_file(lambda data, rng: data[: rng.randrange(len(data))]), "empty": one_file(lambda *_: b""),
    "text": one_file(lambda *_: b"<html>not found</html>"), "a file deleted": deleted,
    "= linked files": lambda case: linked(case, False), "= linked folders": lambda case: linked(case, True),
    "a link to nowhere": lambda case: (case.files()[0].parent / "im99.png").symlink_to("nowhere"),
    "= a circle of links": lambda case: (case.files()[0].parent / "loop").symlink_to(".."),
    "= itself in it": lambda case: (case.root / "loop").symlink_to("."),
    "= a folder like an image": lambda case: (case.files()[0].parent / "im98.png").mkdir(), "= deeper": deeper,
    "= system files": added(".DS_Store", "Thumbs.db", "desktop.ini", "._im00.png", "@eaDir/im00.png", "readme.md"),
    "= system folders": added("__MACOSX/images/._im00.png", ".git/x", "$RECYCLE.BIN/im00.png", "lost+found/im00.png"),
    "= other formats": added("im90.heic", "im91.dng", "im92.txt"), "another picture": another,
    "= by a link": at(lambda root: root.parent.joinpath("link").symlink_to(root) or root.parent / "link"),
    "= by a long way": at(lambda root: root / ".." / root.name), "the folder above": at(lambda root: root.parent),
    "a part of it": at(lambda root: sorted(root.iterdir())[0]), "none": at(lambda root: root / "none"),
    "packed": packed, "no pictures": lambda case: [path.unlink() for path in case.files()],
    "nothing": lambda case: case.root.mkdir(shutil.rmtree(case.root) or 0o777),
    "with classes": beside("classification"), "with masks": beside("segmentation"),
    "with boxes": beside("detection", NAME),
}
# fmt: on


# --- Folders of classes -----------------------------------------------------------------------------------------------


def relabel(old: str, new: str, share: float = 1.0) -> Mutation:
    """Pictures of one class are in the folder of another name, and so their label is."""

    def mutation(case: Case) -> None:
        files = sorted((case.root / old).glob("*.*"))
        (case.root / new).mkdir(exist_ok=True)
        for path in files[: max(int(len(files) * share), 1)]:
            path.rename(case.root / new / path.name)
            case.want[TOKEN.search(path.name)[0].lower()] = plain_name(new)
        if share == 1:
            (case.root / old).rmdir()

    return mutation


def emptied(*names: str, remove: bool = False) -> Mutation:
    def mutation(case: Case) -> None:
        for path in (path for name in names for path in sorted((case.root / name).iterdir())):
            path.unlink()
            del case.want[TOKEN.search(path.name)[0].lower()]
        for name in names if remove else ():
            (case.root / name).rmdir()

    return mutation


def one_in_another(case: Case) -> None:
    shutil.move(case.root / "2", case.root / "10")
    case.want.update({token: "10" for token, name in case.want.items() if name == "2"})


def hidden(case: Case) -> None:
    moved("2", ".2")(case)
    case.want = {token: name for token, name in case.want.items() if name != "2"}


DECOMPOSED = unicodedata.normalize("NFD", "café")
# fmt: off
FOLDERS = {
    "= NFD": moved("café", DECOMPOSED), "in NFC and NFD": relabel("café", DECOMPOSED, 0.5), "hidden": hidden,
    "a blank": relabel("2", "2 "), "upper case": relabel("café", "CAFÉ"), "both cases": relabel("café", "Café", 0.5),
    "zeros": relabel("2", "002"), "another name": relabel("2", "deux"), "merged": relabel("2", "10"),
    "one image of another class": relabel("2", "10", 0.1), "a class split": relabel("10", "eleven", 0.5),
    "no UTF-8 ": relabel("2", os.fsdecode(b"2\xff")), "a line break": relabel("2", "2\n"),
    "an empty class": lambda case: (case.root / "7").mkdir(), "a class emptied": emptied("2"),
    "a class of text": added("7/a.txt"), "a class of HEIC": added("7/a.heic"), "one in another": one_in_another,
    "one class left": emptied("2", "10", remove=True), "called like a split": relabel("2", "test"),
    "called like splits": lambda case: [relabel(*x)(case) for x in zip(("2", "10", "café"), ("train", "val", "test"))],
    "splits in it": lambda case: [(case.root / name).mkdir() for name in ("train", "val")],
    "loose images": lambda case: [path.rename(case.root / path.name) for path in case.some(case.files())],
    "= a list": lambda case: (case.root / LIST).write_text("café\n2\n10\n"),
    "a class by two names": lambda case: (case.root / "two").symlink_to("2"),
}
# fmt: on


# --- Masks ------------------------------------------------------------------------------------------------------------


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def names_of(case: Case) -> list[str]:
    return lines_of((case.root / LIST).read_text(encoding="utf-8-sig"))


def listed(change: Callable[[list[str]], str | bytes]) -> Mutation:
    return edit(LIST, lambda text: change(lines_of(text)))


def unnumbered(names: list[str]) -> list[str]:
    assert "background" in names
    return names


def numbered(names: list[str], row: str, first: int) -> str:
    return "\n".join(row.format(i, name) for i, name in enumerate(unnumbered(names), first))


def coloured(name: str = "RGB", drop: int = 0) -> Mutation:
    """Masks in colours that classes.txt gives, but for the last `drop` classes."""

    def paint(mask: Image.Image) -> Image.Image:
        assert mask.mode == "L"
        mask.putpalette(bytes(np.array(COLOURS, dtype=np.uint8)))
        return mask if name == "P" else mask.convert(name)

    def mutation(case: Case) -> None:
        lines = [f"{line} #{bytes(colour).hex()}" for line, colour in zip(names_of(case), COLOURS)]
        (case.root / LIST).write_text("\n".join([*lines[: len(lines) - drop], "ignored #ffffff"]))
        assert case.kind == "segmentation" or max(np.asarray(Image.open(p)).max() for p in case.files(True)) == 1
        resave(paint, masks=True, every=True)(case)

    return mutation


def to_255(case: Case) -> None:
    """The foreground of two classes."""
    assert case.kind == "segmentation of two" and {Image.open(path).mode for path in case.files(True)} == {"L"}
    resave(lambda x: x.point(lambda v: v and 255), masks=True, every=True)(case)


def swapped(case: Case) -> None:
    for names in (("masks", "x"), ("images", "masks"), ("x", "images")):
        moved(*names)(case)


def other_names(case: Case, other: dict[str, str]) -> None:
    case.want = {token: [[other.get(x, x) for x in row] for row in mask] for token, mask in case.want.items()}


def reordered(case: Case) -> None:
    names = names_of(case)
    other_names(case, dict(zip(names, names[::-1])))
    (case.root / LIST).write_text("\n".join(names[::-1]))


def without_names(case: Case) -> None:
    assert names_of(case)[0] == "background"  # not in another order
    (case.root / LIST).unlink()
    other_names(case, {"digit": "foreground"} if case.training else {})


def mask(convert: Callable = lambda x: x, suffix: str = ".png", **options) -> Mutation:
    return resave(convert, suffix, masks=True, **options)


# fmt: off
MASKS = {
    **{f"= mask {m}": mode(m, masks=True) for m in ("RGB", "RGBA", "LA")}, "= mask I;16": mask(lambda x: grey16(x, 1)),
    **{f"= mask {s}": mask(suffix=s) for s in (".bmp", ".tif", ".pgm")},
    "= mask .gif": mode("L", ".gif", masks=True),
    "= mask P": mask(lambda x: x.putpalette(bytes(range(256)) * 3) or x), "mask jpg": mask(suffix=".jpg"),
    "= lossless": mode("RGB", ".webp", masks=True, lossless=True), "webp": mode("RGB", ".webp", masks=True),
    "mask JPEG called png": mask(format="JPEG", quality=100), "mask F": mode("F", ".tif", masks=True),
    "mask 1": relabelled(mask(lambda x: x.point(lambda v: v and 255).convert("1"))), "16 bits": mask(grey16),
    "scaled": mask(lambda x: x.point(lambda v: v * 20 % 256)), "inverted": mask(lambda x: x.point(lambda v: 255 - v)),
    "ignored": relabelled(mask(lambda x: x.point(lambda v: 255))), "mask 255": to_255,
    "soft": relabelled(mask(lambda x: x.resize((WIDE + 9, HIGH + 9), 2).resize((WIDE, HIGH), 2))),
    "half": mask(lambda x: x.resize((WIDE // 2, HIGH // 2), 0)), "mask turned": mask(lambda x: x.transpose(ROTATE)),
    "= mask turned by EXIF": turned(6, ROTATE, masks=True), "transparent": mask(lambda x: x.putalpha(0) or x),
    **{f"coloured {m}": coloured(m) for m in ("RGB", "P", "RGBA")}, "a colour short": coloured(drop=1),
    **{f"= all {e}": renamed(lambda p, e=e: p.stem + e + p.suffix, True) for e in ("_mask", "-label", "_gt")},
    "= Cityscapes": lambda case: (renamed(lambda p: f"{p.stem}_gtFine_labelTrainIds{p.suffix}", True)(case), [
        case.rename(p, f"{p.stem}_leftImg8bit{p.suffix}") for p in case.files()]),
    "= nnU-Net": lambda case: ([case.rename(p, f"{p.stem}_0000{p.suffix}") for p in case.files()],
                               moved("images", "imagesTr")(case), moved("masks", "labelsTr")(case)),
    "all _x": renamed(lambda p: f"{p.stem}_x{p.suffix}", True), "= masks PNG": renamed(lambda p: p.stem + ".PNG", True),
    "some _mask": lambda case: [case.rename(p, f"{p.stem}_mask{p.suffix}") for p in case.some(case.files(True))],
    **{f"= {a} called {b}": moved(a, b) for a, b in (("images", "Imgs"), ("masks", "labels"), ("masks", "GT"))},
    "photos": moved("images", "photos"), "swapped": relabelled(swapped), "another order": reordered,
    "no names": without_names,
    "a mask twice": lambda case: shutil.copy(case.files(True)[0], case.files(True)[0].with_suffix(".bmp")),
    "= BOM, CRLF": listed(lambda t: b"\xef\xbb\xbf" + "\r\n".join(t).encode()), "by commas": listed(",".join),
    "= numbered": listed(lambda t: numbered(t, "{}: {}", 0)), "from 1": listed(lambda t: numbered(t, "{} {}", 1)),
    "UTF-16": listed(lambda t: "\n".join(t).encode("utf-16")),
    "a class more": listed(lambda t: "\n".join([*unnumbered(t), "more"])),
    "a class less": listed(lambda t: "\n".join(t[:-1])), "no classes": listed(lambda t: ""),
    "= blank lines": listed(lambda t: "".join(f"{name} \t\n\n" for name in t)),
    "a name twice": listed(lambda t: "\n".join([*t, t[0]])),
}
# fmt: on


# --- Boxes ------------------------------------------------------------------------------------------------------------


def objects_of(data: dict) -> dict[str, list]:
    """What clean annotations say, as the script has it: name, x0, y0, x1, y1 in the input, crowd."""
    names = {row["id"]: str(row["name"]).strip() for row in data["categories"]}
    tokens = {row["id"]: TOKEN.search(row["file_name"])[0].lower() for row in data["images"]}
    want = {token: [] for token in tokens.values()}
    for row in data["annotations"]:
        x, y, w, h = row["bbox"]
        box = (round(v, 2) for v in (x * SIDE / WIDE, y * SIDE / HIGH, (x + w) * SIDE / WIDE, (y + h) * SIDE / HIGH))
        want[tokens[row["image_id"]]].append((names[row["category_id"]], *box, bool(row["iscrowd"])))
    return {token: sorted(rows) for token, rows in want.items()}


def coco(change: Callable[[Case, dict], Any], truth: bool = False) -> Mutation:
    """A change of the annotations; truth: the labels are what they say then."""

    def mutation(case: Case) -> None:
        change(case, data := json.loads((case.root / NAME).read_text()))
        (case.root / NAME).write_text(json.dumps(data))
        case.want = objects_of(data) if truth else case.want

    return mutation


def rows(section: str, truth: bool = False, **values: Callable[[dict], Any]) -> Mutation:
    """Some rows of a section with other values."""

    def change(case: Case, data: dict) -> None:
        for row in case.some(data[section]):
            row.update({key: value(row) for key, value in values.items()})

    return coco(change, truth)


def images(name: Callable[[str], Any]) -> Mutation:
    return rows("images", file_name=lambda row: name(row["file_name"]))


def boxes(box: Callable[..., Any]) -> Mutation:
    return rows("annotations", bbox=lambda row: box(*row["bbox"]))


def ids(new: Callable[[int], Any]) -> Mutation:
    def change(_: Case, data: dict) -> None:
        for row in data["images"] + data["annotations"] + data["categories"]:
            row.update({key: new(row[key]) for key in row.keys() & {"id", "image_id", "category_id"}})

    return coco(change)


def without(section: str, *keys: str) -> Mutation:
    return coco(lambda case, data: [row.pop(key, None) for row in case.some(data[section]) for key in keys])


def more(section: str, **row: Any) -> Mutation:
    """One row more, but for these values as the first is."""
    return coco(lambda case, data: data[section].append(copy.deepcopy(data[section][0]) | row))


def fractions(case: Case, data: dict) -> None:
    for row in data["annotations"]:
        row["bbox"] = [x / side for x, side in zip(row["bbox"], (WIDE, HIGH) * 2)]


def roboflow(case: Case) -> None:
    moved(NAME, "_annotations.coco.json")(case)
    for path in case.files():
        path.rename(case.root / path.name)


def other_format(write: Callable[[Case, dict, dict], None], convert: bool = True, tweak: Any = None) -> Mutation:
    """Another layout of the clean folder; convert: made COCO's by tools/to_coco.py. write(case, image, names) gets each
    image's row with its `objects`. tweak: what is done to the layout before, a `Mutation`."""

    def mutation(case: Case) -> None:
        data = json.loads((case.root / NAME).read_text())
        assert objects_of(data) == case.want and len(data["images"]) == len(case.want)  # nothing is wrong with it yet
        assert {row["file_name"] for row in data["images"]} == {path.name for path in case.files()}
        for folder in ("Annotations", "labels"):
            (case.root / folder).mkdir()
        names = {row["id"]: row["name"] for row in data["categories"]}
        for image in data["images"]:
            objects = [row for row in data["annotations"] if row["image_id"] == image["id"]]
            write(case, image | {"objects": objects}, names)
        (case.root / NAME).unlink()
        if tweak:
            tweak(case)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                status = to_coco.main([str(case.root)]) if convert else 0
            except Exception as error:
                raise RuntimeError("a traceback of tools/to_coco.py") from error
        if status and not said.getvalue().splitlines()[-1].startswith("to_coco.py: "):
            raise RuntimeError(f"tools/to_coco.py: {status} {said.getvalue()}")
        case.said += said.getvalue().splitlines()

    return mutation


def voc(low: int) -> Callable[[Case, dict, dict], None]:
    """PASCAL VOC's, coordinates counted from `low`."""

    def write(case: Case, image: dict, names: dict) -> None:
        xml = f"<filename>{image['file_name']}</filename><size><width>{WIDE}</width><height>{HIGH}</height></size>"
        for row in image["objects"]:
            (x, y, w, h), keys = row["bbox"], ("xmin", "ymin", "xmax", "ymax")
            box = "".join(f"<{k}>{v:g}</{k}>" for k, v in zip(keys, (x + low, y + low, x + w, y + h)))
            xml += f"<object><name>{names[row['category_id']]}</name><difficult>{row['iscrowd']}</difficult>"
            xml += f"<bndbox>{box}</bndbox></object>"
        file = case.root / "Annotations" / f"{Path(image['file_name']).stem}.xml"
        file.write_text(f"<annotation>{xml}</annotation>")
        if (case.root / "images").is_dir():
            moved("images", "JPEGImages")(case)

    return write


def yolo(case: Case, image: dict, names: dict) -> None:
    lines = []
    for row in image["objects"]:
        x, y, w, h = row["bbox"]
        values = (x + w / 2) / WIDE, (y + h / 2) / HIGH, w / WIDE, h / HIGH
        lines.append(" ".join([str(list(names).index(row["category_id"])), *(f"{v:.6f}" for v in values)]))
    (case.root / "labels" / f"{Path(image['file_name']).stem}.txt").write_text("\n".join(lines))
    (case.root / "data.yaml").write_text(yaml.safe_dump({"names": list(names.values())}))
    case.want = {token: sorted((*row[:-1], False) for row in found) for token, found in case.want.items()}  # no crowds


def texts(pattern: str, change: Callable[[str], str]) -> Mutation:
    """All files of a pattern."""
    return lambda case: [edit(p.relative_to(case.root), change)(case) for p in sorted(case.root.glob(pattern))]


def all_moved(**folders: str) -> Mutation:
    """What lies in each folder lies in another one."""

    def mutation(case: Case) -> None:
        for old, new in folders.items():
            (case.root / new).mkdir(parents=True, exist_ok=True)
            for path in [path for path in (case.root / old).iterdir() if path.is_file()]:
                path.rename(case.root / new / path.name)
            if not any((case.root / old).iterdir()):
                (case.root / old).rmdir()

    return mutation


def corners(line: str) -> str:
    """A line of YOLO's as a polygon."""
    label, *box = line.split()
    x, y, w, h = map(float, box)
    edges = (x - w / 2, y - h / 2), (x + w / 2, y - h / 2), (x + w / 2, y + h / 2), (x - w / 2, y + h / 2)
    return " ".join([label, *(f"{v:.6f}" for v in np.clip(edges, 0, 1).ravel())])


def names_in_a_list(case: Case) -> None:
    edit("data.yaml", lambda text: "\n".join(yaml.safe_load(text)["names"]))(case)
    moved("data.yaml", LIST)(case)


def without_texts(case: Case) -> None:
    """The images without objects have no label file."""
    for path in (path for path in (case.root / "labels").iterdir() if not path.read_text()):
        path.unlink()


def flipped(text: str) -> str:
    """VOC's corners in another order."""
    return re.sub(r"<xmin>(.*?)</xmin>(.*?)<xmax>(.*?)</xmax>", r"<xmin>\3</xmin>\2<xmax>\1</xmax>", text)


# fmt: off
LAYOUTS = {  # of YOLO and of VOC
    "CRLF": texts("labels/*.txt", lambda t: t.replace("\n", "\r\n") + "\r\n"), "without texts": without_texts,
    "names by number": texts("data.yaml", lambda t: json.dumps({"names": dict(enumerate(yaml.safe_load(t)["names"]))})),
    "images/train": all_moved(images="images/train", labels="labels/train"), "darknet": all_moved(labels="images"),
    "train/images": all_moved(images="train/images", labels="train/labels"),
    "BOM": texts("labels/*.txt", "\ufeff{}".format),
    "polygons": texts("labels/*.txt", lambda t: "\n".join(map(corners, t.splitlines()))),
    "a line twice": texts("labels/*.txt", lambda t: f"{t}\n{t}"), "names in a list": names_in_a_list,
}, {
    "flipped": texts("Annotations/*.xml", flipped), "BOM": texts("Annotations/*.xml", "\ufeff{}".format),
    "floats": texts("Annotations/*.xml", lambda t: re.sub(r">(\d+)</([xy])", r">\1.0</\2", t)),
    "no sizes": texts("Annotations/*.xml", lambda t: re.sub("<size>.*</size>", "", t)),
    "other paths": texts("Annotations/*.xml", lambda t: t.replace("<filename>", "<filename>C:\\data\\")),
    "no file names": texts("Annotations/*.xml", lambda t: re.sub("<filename>.*</filename>", "", t)),
    "indented": texts("Annotations/*.xml", lambda t: '<?xml version="1.0"?>\n' + t.replace("><", ">\n  <")),
    "in one folder": all_moved(JPEGImages=".", Annotations="."),
}
BOXES = {
    "= ids as texts": ids(str), "= ids as floats": ids(float), "= great ids": ids(lambda x: 10**15 + x),
    "= ids as words": ids(lambda x: f"n{x}"), "negative ids": ids(lambda x: -x), "half ids": ids(lambda x: x + 0.5),
    "= BOM": edit(NAME, lambda t: b"\xef\xbb\xbf" + t.encode()), "UTF-16": edit(NAME, lambda t: t.encode("utf-16")),
    "= indented, CRLF": edit(NAME, lambda t: json.dumps(json.loads(t), indent=2).replace("\n", "\r\n")),
    "half of it": edit(NAME, lambda t: t[: len(t) // 2]), "no text": edit(NAME, lambda t: ""),
    "a list": edit(NAME, lambda t: f"[{t}]"), "NaN": edit(NAME, lambda t: t.replace('"bbox": [', '"bbox": [NaN, ', 1)),
    **{f"no {s}": coco(lambda case, data, s=s: data.pop(s)) for s in ("images", "annotations", "categories", "info")},
    **{f"empty {s}": coco(lambda case, data, s=s: data[s].clear()) for s in ("images", "categories")},
    "no objects": coco(lambda case, data: data["annotations"].clear(), truth=True),
    **{f"= {s} shuffled": coco(lambda case, data, s=s: case.rng.shuffle(data[s]))
       for s in ("images", "annotations", "categories")},
    "= a category more": more("categories", id=99, name="more"), "a category twice": more("categories", id=99),
    "= a root category": more("categories", id=0, name="digits", supercategory="none"),
    "a category's id twice": more("categories", name="x"), "no name": rows("categories", name=lambda row: None),
    "= names as numbers": rows("categories", name=lambda row: int(row["name"])),
    "= names in blanks": rows("categories", name=lambda row: f" {row['name']} "),
    "another name": rows("categories", True, name=lambda row: "x" + row["name"]),
    "a category lost": coco(lambda case, data: data["categories"].pop(case.rng.randrange(10))),
    "other labels": rows("annotations", True, category_id=lambda row: row["category_id"] % 10 + 1),
    "crowds": rows("annotations", True, iscrowd=lambda row: 1),
    "= no area, no id": without("annotations", "area", "id"),
    "an image lost": coco(lambda case, data: data["images"].pop(case.rng.randrange(4))),
    "an image more": more("images", id=99, file_name="im96.png"), "an image twice": more("images", id=99),
    "an image's id twice": more("images", file_name="im05.png"), "= no sizes": without("images", "width", "height"),
    "no width": without("images", "width"), "= width as a text": rows("images", width=lambda row: str(row["width"])),
    "= width as a float": rows("images", width=lambda row: float(row["width"])),
    "swapped": rows("images", width=lambda row: HIGH, height=lambda row: WIDE),
    "0": rows("images", width=lambda row: 0),
    "= crowd as a text": rows("annotations", iscrowd=lambda row: str(row["iscrowd"])),
    "= crowd as a truth": rows("annotations", iscrowd=lambda row: bool(row["iscrowd"])),
    "crowd as a word": rows("annotations", iscrowd=lambda row: "no"), "three numbers": boxes(lambda *box: box[:3]),
    "boxes as texts": boxes(lambda *box: list(map(str, box))), "boxes as one text": boxes(lambda *box: str(box)),
    "= boxes as polygons": rows("annotations", bbox=lambda row: [], segmentation=lambda row: (
        lambda x, y, w, h: [[x, y, x + w, y, x + w, y + h, x, y + h]])(*row["bbox"])),
    "no boxes": without("annotations", "bbox"), "flipped": boxes(lambda x, y, w, h: [x + w, y, -w, h]),
    "outside": boxes(lambda x, y, w, h: [x + 99, y, w, h]), "fractions": coco(fractions),
    "= over the border": boxes(lambda x, y, w, h: [x, y, w, h] if x else [-3, y, w + 3, h]),
    "= a box of nothing": more("annotations", id=999, bbox=[3, 3, 0, 5]),
    "= of no image": more("annotations", id=999, image_id=999), "of none": more("annotations", id=999, category_id=999),
    **{f"= named {text.format('x')}": images(text.format) for text in (
       "images/{}", "./{}", "C:\\data\\images\\{}", "/data/local-files/?d=my%20data/{}", "../{}", "/up/0a1b2c3d-{}")},
    "= named in NFD": images(lambda name: unicodedata.normalize("NFD", name)),
    "named x": images(lambda name: "x" + name),
    "named by a number": images(lambda name: 7), "named with a blank": images(lambda name: f"{name} "),
    **{f"= at {name}": moved(NAME, name) for name in (
       "_annotations.coco.json", "annotations/instances_train.json", "labels.json", "result.json")},
    "far away": moved(NAME, "far/away.json"),
    "a second": lambda case: shutil.copy(case.root / NAME, case.root / "b.json"),
    "two": lambda case: (shutil.copy(case.root / NAME, case.root / "a.json"), moved(NAME, "b.json")(case)),
    "= photos": moved("images", "photos"), "= with masks ": beside("segmentation", "masks", LIST),
    "= Roboflow": roboflow,
    "YOLO": other_format(yolo, False), "= COCO of YOLO": other_format(yolo), "VOC": other_format(voc(1), False),
    **{f"= COCO of VOC from {low}": other_format(voc(low)) for low in (1, 0)},
    **{f"= COCO of YOLO, {name}": other_format(yolo, True, tweak) for name, tweak in LAYOUTS[0].items()},
    **{f"= COCO of VOC, {name}": other_format(voc(1), True, tweak) for name, tweak in LAYOUTS[1].items()},
}
# fmt: on
OF_KIND = {"classification": FOLDERS, "segmentation": MASKS, "segmentation of two": MASKS, "detection": BOXES}
