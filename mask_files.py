"""Folders of masks: which mask belongs to which image, what the classes are, and which class a pixel value stands for.

A mask has pixel values 0 … 255, upright: grey levels, the indices of a palette, or, where classes.txt gives colours,
the places of its colours in that list. 255 does not count, or is the foreground of masks of 0 and 255 alone.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from config import one_line
from data_types import InputError
from folders import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    SPLITS,
    SUFFIXES,
    find_images,
    has_pages,
    is_sideways,
    is_visible,
    not_read_note,
    open_image,
    plain_name,
    refuse,
    same_name,
    upright_sizes,
)
from frame import Crop, Frame

IGNORED, NO_CLASS = 255, 254  # in place of a class id
MOST_COUNTED = 5000  # masks that are decoded before a run
GREYS = np.arange(256, dtype=np.uint8).repeat(3).tobytes()  # a palette that says no more than its indices
IMAGE_ENDING = re.compile(r"[_. -](image|img|sat|leftimg8bit|0000)$", re.IGNORECASE)
MASK_ENDING = r"masks?|gt|labels?|seg|segmentation|annotations?|ground_?truth|l|(gt(fine|coarse)_)?label(train)?ids"
MASK_ENDING += "|jpe?g|png|bmp|webp|tiff?"  # x.jpg.png, as Supervisely has it
MASK_ENDING = re.compile(rf"[_. -]({MASK_ENDING})$", re.IGNORECASE)
OTHER_COLOUR = r"(#|0x)([0-9a-f]{3}|[0-9a-f]{6}|[0-9a-f]{8})|\d{1,3}([\s,;]+\d{1,3}){2}"
OTHER_COLOUR = re.compile(rf"\S[\s,:;(\[]+({OTHER_COLOUR})\W*$", re.IGNORECASE)


def folder_of(root: str, names: tuple[str, ...]) -> str:
    """The folder in `root` of the first of the names, or the only one of the others, in any case. Raises InputError."""
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder; it should hold images/ and masks/ with the same stems")
    entries = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and is_visible(entry.name))
    found = [name for name in entries if name.lower() in names]
    if names[0] not in found and len(found) != 1:
        holds = ", ".join(f"{name}/" for name in found or entries[:10]) or "no folders"
        raise InputError(
            f"{root}: no folder {names[0]}; it should hold images/ and masks/ with the same stems; found {holds}"
        )
    return os.path.join(root, names[0] if names[0] in found else found[0])


def by_stem(paths: list[str], folder: str, ending: re.Pattern) -> list[dict[str, list[str]]]:
    """Path below `folder` without its suffix -> the files of this stem; where all stems have the same ending of the
    usual ones, also without it."""
    stems = [same_name(os.path.splitext(os.path.relpath(path, folder))[0]) for path in paths]
    endings = {match[0] if (match := ending.search(stem)) else "" for stem in stems}
    found = []
    for cut in dict.fromkeys((0, len(endings.pop()) if len(endings) == 1 else 0)):
        found.append({})
        for stem, path in zip(stems, paths):
            found[-1].setdefault(stem[: len(stem) - cut], []).append(path)
    return found


def find_pairs(root: str) -> tuple[list[str], list[str], list[str]]:
    """The image files of the folder, sorted, the mask of each, and what is to be said. Raises InputError with all of
    them that have no partner, or two."""
    folders = [folder_of(root, names) for names in (IMAGE_FOLDERS, MASK_FOLDERS)]
    notes, kinds = [], []
    for folder, ending, what in zip(folders, (IMAGE_ENDING, MASK_ENDING), ("images", "masks")):
        not_read = Counter()
        paths, others = find_images(folder, not_read), not_read_note(not_read)
        if not paths:
            raise InputError("; ".join([f"{folder}: no {what} ({' '.join(SUFFIXES)})", *others]))
        top = {os.path.relpath(path, folder).split(os.sep)[0] for path in paths}
        if what == "images" and len(splits := sorted(filter(SPLITS.fullmatch, top))) > 1:
            others.append(f"{', '.join(splits)} are read as one set; to part them, give each its own {what} and masks")
        notes += [f"{os.path.basename(folder)}/: {note}" for note in others]
        kinds.append(by_stem(paths, folder, ending))
    pairs = [(images, masks) for images in kinds[0] for masks in kinds[1]]
    images, masks = max(pairs, key=lambda pair: len(pair[0].keys() & pair[1].keys()))  # at first: no ending cut
    findings = [
        f"{second}: {first} has the same stem; remove one of them"
        for found in (images, masks)
        for first, *others in found.values()
        for second in others
    ]
    for stem in sorted(images.keys() ^ masks.keys()):
        if stem in images:
            findings.append(f"{images[stem][0]}: it has no mask {os.path.join(folders[1], stem)}.png")
        else:
            findings.append(f"{masks[stem][0]}: a mask without an image in {folders[0]}")
    refuse(findings)
    return [path for (path,) in images.values()], [masks[stem][0] for stem in images], notes


def check_sizes(images: list[str], masks: list[str], skip: bool) -> None:
    """Raises InputError with all masks of another size than their images', and, unless `skip`, all files that cannot be
    read. It takes only their headers."""
    findings = []
    for image, mask, *sizes in zip(images, masks, upright_sizes(images), upright_sizes(masks)):
        unreadable = [str(size) for size in sizes if isinstance(size, InputError)]
        if unreadable:
            findings += [] if skip else unreadable
        elif sizes[0] != sizes[1]:
            (wide, high), other = sizes
            line = f"{mask}: the mask has {other[0]}x{other[1]} pixels, its image {wide}x{high}"
            for path, turn in ((image, "the mask, too, or drop the tag"), (mask, "the image, too, or drop the tag")):
                if other == (high, wide) and is_sideways(path):
                    line += f"; EXIF turns {path} by 90 degrees: turn {turn}"
            findings.append(line)
    refuse(findings)


def read_classes(root: str, classes: list[str] | None = None) -> tuple[list[str], str | None]:
    """The names in root/classes.txt by pixel value, and `colours`, as the config has them; none without such a file.
    A line is `name`, or `name #rrggbb` in all lines; `0 name` if all are numbered. classes: of a checkpoint, whose
    earlier versions took each line as it is. Raises InputError."""
    path = os.path.join(root, "classes.txt")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    except FileNotFoundError:
        return [], None
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{path}: cannot be read ({one_line(error)}); it should name the classes, one a line, in UTF-8"
        raise InputError(reason) from None
    if lines == classes:
        return lines, None
    rows = []  # name and colour, None or rrggbb
    for line in lines:
        name = plain_name(line)
        if match := re.fullmatch(r"(.*[^\s,:;])[\s,:;]*#([0-9a-fA-F]{6})", name):
            rows.append((match[1], match[2].lower()))
        elif re.match("#[0-9a-fA-F]{6}", name):
            raise InputError(f"{path}: {name}: a colour comes after its class's name: name #rrggbb")
        elif name and not name.startswith("# ") and name != "__ignore__":  # a comment; LabelMe's word for 255
            rows.append((name, None))
    ignored = [row for row in rows if row[1] and re.fullmatch(r"(255\W+)?(ignored?|__ignore__)", row[0], re.IGNORECASE)]
    rows = [row for row in rows if row not in ignored]
    rows = in_number_order(path, rows)
    names, colours = [name for name, _ in rows], [colour for _, colour in rows + ignored]
    if not 2 <= len(names) <= NO_CLASS or len(set(names)) < len(names):
        found = len(names) if len(set(names)) == len(names) else f"{max(names, key=names.count)} twice"
        raise InputError(f"{path}: it should name 2 to {NO_CLASS} different classes, one a line; found {found}")
    if not any(colours) and all(map(OTHER_COLOUR.search, names[1:])):  # a palette's index would count in its place
        raise InputError(f"{path}: {names[1]}: a colour is written name #rrggbb, with six digits of base sixteen")
    if not any(colours):
        return names, None
    if None in colours or len(set(colours)) < len(colours):
        raise InputError(f"{path}: each class should have a colour of its own, name #rrggbb, or none a colour")
    return names, " ".join(colours)


def in_number_order(path: str, rows: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """The rows (name and colour) of the file `path` in the order of the numbers before their names, without these and
    without 255's; rows that are not numbered as they are. Raises InputError for numbers that are no pixel values."""
    matches = [re.fullmatch(r"([0-9]{1,3})\s*[\s:,;=]\s*(.+)", name) for name, _ in rows]
    by_number = [(int(match[1]), match[2], row[1]) for match, row in zip(matches, rows) if match]
    by_number = sorted((row for row in by_number if row[0] != IGNORED), key=lambda row: row[0])
    numbers = [number for number, *_ in by_number]
    if all(matches) and numbers == list(range(len(numbers))):
        return [(name, colour) for _, name, colour in by_number]
    if all(matches) and numbers == list(range(1, len(numbers) + 1)):
        hint = "number them from 0, as the pixel values, or not at all"
        raise InputError(f"{path}: the classes are numbered from 1; {hint}")
    if 0 not in numbers or len(numbers) < 2 or any(colour for _, colour in rows):  # 2 wheeler; colours need no number
        return rows
    if None in matches:
        other = rows[matches.index(None)][0]
        raise InputError(f"{path}: {other}: no number; number every class, and put # and a blank before a heading")
    i = next(i for i in range(IGNORED) if numbers.count(i) != 1)
    hint = f"each pixel value from 0 to {numbers[-1]} needs one line, also where no mask holds it"
    raise InputError(f"{path}: {numbers.count(i) or 'no'} classes are numbered {i}; {hint}")


class UnreadableMask(InputError):
    """A file that is damaged, as images may be: `data.on_bad_image` says what happens then."""


def open_mask(path: str) -> tuple[Image.Image, str]:
    """The mask file upright, and what about its format may have changed its values. Raises UnreadableMask."""
    try:
        with open_image(path) as opened:
            kind, raw = opened.format, opened.tile[0].args if opened.tile else ""
            lossy = kind in ("JPEG", "MPO", "JPEG2000", "AVIF") or opened.info.get("compression") == "jpeg"
            if kind == "WEBP":
                with open(path, "rb") as file:
                    lossy = b"VP8L" not in file.read(4096)  # the chunk of lossless pictures
            wrong = f"compressed with losses ({kind}), which changes classes; export the masks as PNG" if lossy else ""
            if "16" in str(raw if isinstance(raw, str) else raw[:1]) and not opened.mode.startswith("I"):
                wrong = "16 bits for each of several channels; export the masks with 8"  # Pillow would halve them
            if has_pages(opened):
                wrong = "a TIFF with several pages; export one mask for each image"
            mask = ImageOps.exif_transpose(opened)
            if kind == "GIF":  # its writers renumber palettes
                mask = mask.convert("RGBA" if "transparency" in mask.info else "RGB")
            return mask, wrong
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UnreadableMask(f"{path}: not a readable mask ({one_line(error)}); repair or remove it") from error


def read_values(path: str, colours: str | None) -> tuple[np.ndarray, bytes]:
    """The mask file as uint8 [h, w] of pixel values; with colours the values are their places in that list. Beside it
    the palette, r g b r g b …, if the values are its indices, else nothing. Raises InputError."""
    mask, wrong = open_mask(path)
    mask.info.pop("transparency", None)  # of a palette: the index or the colour counts
    pixels = np.asarray(mask)
    if not wrong and mask.mode in ("LA", "PA", "RGBA") and pixels[..., -1].min() < 255:
        wrong = "it is transparent in places; export the masks without transparency"
    if not wrong and mask.mode.startswith("I") and (pixels.min() < 0 or pixels.max() > IGNORED):
        value = pixels.max() if pixels.max() > IGNORED else pixels.min()
        wrong = f"pixel value {value}; class ids should be 0 to {NO_CLASS - 1}, and {IGNORED} what is ignored"
    if not wrong and not mask.mode.startswith("I") and mask.mode not in ("1", "L", "P", "LA", "PA", "RGB", "RGBA"):
        wrong = f"a mask should be grey, of a palette, or in RGB, not {mask.mode}"
    if wrong:
        raise InputError(f"{path}: {wrong}")
    if colours:
        mask = Image.fromarray(pixels.astype(np.uint8)) if mask.mode.startswith("I") else mask
        return places_of(path, mask, colours), b""
    values = pixels if pixels.ndim == 2 else pixels[..., 0]
    if mask.mode.startswith("RGB") and (coloured := (values != pixels[..., 1]) | (values != pixels[..., 2])).any():
        colour = "#" + pixels[coloured][0, :3].tobytes().hex()
        raise InputError(f"{path}: it is in colours ({colour}); give each class its own in classes.txt: name #rrggbb")
    palette = bytes(mask.getpalette() or ())
    return values.astype(np.uint8), palette if palette != GREYS else b""


def places_of(path: str, mask: Image.Image, colours: str) -> np.ndarray:
    """uint8 [h, w]: the place of each pixel's colour in `colours`. Raises InputError for one that is not there."""
    listed = np.frombuffer(bytes.fromhex("".join(f"{colour}ff" for colour in colours.split())), "<u4")
    order = listed.argsort().astype(np.uint8)
    pixels = np.asarray(mask.convert("RGB").convert("RGBA")).view("<u4")  # [h, w, 1]
    flat = pixels.ravel()
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))  # of runs of one colour, few beside the pixels
    places = order[np.searchsorted(listed[order], flat[starts]).clip(max=len(listed) - 1)]
    if (unknown := listed[places] != flat[starts]).any():
        colour = "#" + flat[starts][unknown][:1].tobytes()[:3].hex()
        hint = f"add it to classes.txt, name {colour} or ignored {colour} (masks of class ids need one without colours)"
        raise InputError(f"{path}: colour {colour} is no class's; {hint}")
    return np.repeat(places, np.diff(starts, append=len(flat))).reshape(pixels.shape[:2])


def count_values(masks: list[str], colours: str | None, skip: bool) -> np.ndarray:
    """Pixels of each value in each mask, [m, 256]. Raises InputError with all masks that are refused; with `skip` those
    that cannot be read have no pixels."""

    def count(path: str) -> tuple[list[int], bytes] | InputError:
        try:
            values, palette = read_values(path, colours)
            return Image.fromarray(values).histogram(), palette
        except InputError as error:
            return error

    with ThreadPoolExecutor(8) as threads:  # Pillow decodes without Python's lock
        found = list(threads.map(count, masks))
    refuse([str(f) for f in found if isinstance(f, InputError) and not (skip and isinstance(f, UnreadableMask))])
    counts, palettes = zip(*(([0] * 256, b"") if isinstance(f, InputError) else f for f in found))
    counts = np.array(counts)
    check_palettes(masks, counts, palettes)
    return counts


def check_palettes(masks: list[str], counts: np.ndarray, palettes: Sequence[bytes]) -> None:
    """Raises InputError where a used index has two colours: some tools number each file's colours anew. counts:
    [m, 256]; palettes: see `read_values`."""
    first: dict[int, tuple[bytes, str]] = {}  # index -> its colour and the first mask that uses it
    for path, count, palette in zip(masks, counts, palettes):
        for i in np.flatnonzero(count[: len(palette) // 3]).tolist():
            colour = palette[3 * i : 3 * i + 3]
            other, where = first.setdefault(i, (colour, path))
            if colour != other:
                line = f"{path}: palette index {i} is #{colour.hex()}, but #{other.hex()} in {where}"
                hint = "give each class its colour in classes.txt, name #rrggbb, or export the masks in grey"
                raise InputError(f"{line}; {hint}")


def class_ids(names: list[str], classes: list[str], value_255: str = "ignored") -> np.ndarray:
    """Pixel value -> class id, 255 for what is ignored, NO_CLASS: uint8 [256]. names: by pixel value, all of them among
    the classes, which are by id."""
    ids = np.full(256, NO_CLASS, dtype=np.uint8)
    places = {plain_name(name): i for i, name in enumerate(classes)}
    ids[: len(names)] = [places[plain_name(name)] for name in names]
    ids[IGNORED] = ids[1] if value_255 == "foreground" else IGNORED
    return ids


def unknown_values(path: str, values: np.ndarray, ids: np.ndarray) -> str:
    """The line for a mask with these values, in ascending order, of no class."""
    last = np.flatnonzero(ids[:NO_CLASS] != NO_CLASS)[-1]
    others = f" and {len(values) - 1} others" if len(values) > 1 else ""
    what = "ignored" if ids[IGNORED] == IGNORED else "foreground"
    line = f"{path}: pixel value {values[0]}{others}, but the classes are 0 to {last} ({IGNORED} is {what})"
    return f"{line}; soft edges are no class, and a class that is missing belongs into classes.txt"


def decode_mask(
    path: str, image_size: int | Frame, ids: np.ndarray, colours: str | None = None, crop: Crop | None = None
) -> Tensor:
    """The mask file as uint8 [H, W] of class ids and 255, put where `images.decode_image` puts the image, by nearest
    neighbour; beside it nothing counts. ids: see `class_ids`; colours: of the pixel values, if masks have colours.
    Raises InputError with one line that names the file."""
    values = read_values(path, colours)[0]
    mask = ids[values]
    if (unknown := mask == NO_CLASS).any():
        raise InputError(unknown_values(path, np.unique(values[unknown]), ids))
    image, frame = Image.fromarray(mask), Frame.of(image_size)
    filled = frame.place(image.size, crop).fill(image, frame, Image.Resampling.NEAREST, IGNORED)
    return torch.from_numpy(np.array(filled))


class MaskClasses:
    """What the pixel values of a folder's masks stand for, decided over the masks themselves before a run.

    classes: of the training folder, by id; None: this is it. num_classes, value_255, colours: the config's. skip: files
    that cannot be read are no error. Has classes, ids (see `class_ids`), value_255 and colours as decided, notes, and
    the sums over the masks of the classes' shares of them, [K]. Raises InputError.
    """

    def __init__(
        self,
        root: str,
        masks: list[str],
        classes: list[str] | None,
        num_classes: int | None = None,
        value_255: str = "auto",
        colours: str | None = None,
        skip: bool = False,
    ):
        names, own_colours = read_classes(root, classes)
        self.colours, self.notes = own_colours or colours, []
        n, most = len(masks), min(len(masks), MOST_COUNTED)
        looked_at = [masks[i * n // most] for i in range(most)]
        self.notes += [f"{most} of its {n} masks are looked at before the run, an even sample"] * (most < n)
        counts = count_values(looked_at, self.colours, skip)
        if not counts.any():
            raise InputError(f"{root}: none of its masks can be read; repair them")
        seen = set(np.flatnonzero(counts.sum(0)).tolist())
        names = names or classes or [str(i) for i in range(num_classes or 0)] or self.name_two(root, seen)
        self.classes = list(classes or names)
        if len(self.classes) > NO_CLASS:
            raise InputError(f"model.num_classes: {len(self.classes)}, but masks can hold at most {NO_CLASS} classes")
        if unknown := sorted(set(map(plain_name, names)) - set(map(plain_name, self.classes))):
            raise InputError(f"{root}/classes.txt: classes unknown in the training folder: {', '.join(unknown)}")
        if classes and colours and not own_colours:
            names = classes  # the colours are in their order
        if value_255 == "auto":
            foreground = classes is None and not self.colours and len(names) == 2 and seen == {0, IGNORED}
            value_255 = "foreground" if foreground else "ignored"
        if value_255 == "foreground" and len(names) != 2:
            raise InputError(f"segmentation.value_255: foreground is for two classes, but {root} has {len(names)}")
        self.value_255, self.ids = value_255, class_ids(names, self.classes, value_255)
        if self.colours:
            self.ids[len(names) :] = IGNORED  # the colours after those of the classes
        refuse([
            unknown_values(path, np.flatnonzero(row), self.ids)
            for path, row in zip(looked_at, counts * (self.ids == NO_CLASS))
            if row.any()
        ])  # fmt: skip
        shares = (counts / counts.sum(1, keepdims=True).clip(min=1)).sum(0)
        self.shares = np.bincount(self.ids, shares, minlength=256)[: len(self.classes)]
        self.say_what_counts(root, np.bincount(self.ids, counts.sum(0), minlength=256), seen)

    def name_two(self, root: str, seen: set[int]) -> list[str]:
        """Names where nothing gives any: masks of 0 and 1, or 0 and 255, have two classes for everybody."""
        if self.colours or not seen & {1, IGNORED} or not seen <= {0, 1, IGNORED}:
            values = ", ".join(map(str, sorted(seen)[:20])) + ", …" * (len(seen) > 20)
            hint = f"name the masks' classes in it, one a line, or set model.num_classes (the masks hold {values})"
            raise InputError(f"{root}/classes.txt: no such file; {hint}")
        self.notes.append("no classes.txt; the two values of the masks are called background and foreground")
        return ["background", "foreground"]

    def say_what_counts(self, root: str, pixels: np.ndarray, seen: set[int]) -> None:
        """Notes about classes that no mask has, and what is ignored. pixels: by class id, [256]; seen: pixel values.
        Raises InputError where nothing is left to learn or to measure."""
        named = [f"{i} {name}" for i, name in enumerate(self.classes)]
        absent = [name for name, count in zip(named, pixels) if not count]
        share = pixels[IGNORED] / pixels.sum()
        if share == 1:
            raise InputError(f"{root}: every pixel of its masks is ignored; they should hold class ids from 0 on")
        if seen == {0, IGNORED} and share and not self.colours:
            hint = f"segmentation.value_255=foreground reads it as {named[1]}" if len(named) == 2 else "write class ids"
            raise InputError(f"{root}: its masks hold only 0 and {IGNORED}, and {IGNORED} is ignored; {hint}")
        if IGNORED in seen and self.value_255 == "foreground":
            also = ", and so is 1" if 1 in seen else ""
            name = named[self.ids[1]]
            self.notes.append(f"pixel value {IGNORED} is read as {name}{also} (segmentation.value_255: foreground)")
        if share:
            nearly = "nearly nothing counts: " if share > 0.99 else ""
            self.notes.append(f"{nearly}{share:.1%} of the masks' pixels are ignored")
        if len(absent) == len(named) - 1:
            only = next(name for name in named if name not in absent)
            self.notes.append(f"every pixel that counts is {only}: there is no other class to tell it from")
        elif absent:
            self.notes.append(f"no mask holds {', '.join(absent[:10])}" + ", …" * (len(absent) > 10))
