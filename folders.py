"""What folders hold, known before the first step: image files, their sizes, and whatever is wrong, in one list."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from PIL import ExifTags, Image, features

from config import one_line
from data_types import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
SUFFIXES += (".avif",) if features.check("avif") else ()
NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpe", ".svg", ".eps", ".pdf", ".psd", ".ico", ".tga"}
NOT_READ |= {".dcm", ".nii", ".exr", ".hdr", ".npy", ".npz", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng"}  # cameras'
NOT_READ |= {".pbm", ".pnm", ".pfm", ".pcx", ".dib", ".mpo", ".apng", ".hif", ".xcf", ".sgi"}
NOT_READ -= set(SUFFIXES)
NO_IMAGES = {".txt", ".xml", ".json", ".csv", ".tsv", ".yaml", ".yml", ".md", ".html", ".db", ".ini", ".py", ".zip"}
STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")  # of image files, whatever their names
SYSTEM = {"@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found", "#recycle", "@recycle"}
SYSTEM |= {"recycler", "found.000", "#snapshot", "@recently-snapshot", "@tmp", "__pycache__"}
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "imagestr", "img_dir")  # of segmentation
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "annotation", "gt", "ground_truth", "groundtruth")
MASK_FOLDERS += ("segmentationclass", "segmentationclasspng")  # Pascal VOC's, LabelMe's
MASK_FOLDERS += ("labelstr", "ann_dir")  # nnU-Net's, MMSegmentation's
MOST_LINES = 10  # of one message
MOST_HEADERS = 100_000
OrientationTag, WidthTag, HeightTag = ExifTags.Base.Orientation, ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is the user's: not hidden, not one that systems and archives leave."""
    return not name.startswith(".") and name.lower() not in SYSTEM


def same_name(name: str) -> str:
    """`name` with its accents composed: macOS decomposes them, and the two look alike."""
    return unicodedata.normalize("NFC", name)


def plain_name(name: str) -> str:
    """A class name without what cannot be seen: blanks around it, a byte-order mark before it, accents that are
    composed otherwise."""
    return same_name(name.removeprefix("\ufeff").strip())


def folder_error(error: OSError) -> InputError:
    return InputError(f"{error.filename}: cannot be opened ({error.strerror}); change its permissions or move it")


def leads_back(real: str, home: str) -> bool:
    """Whether a link to the real path `real`, met below the real path `home`, leads in a circle: to it or above it."""
    return home == real or home.startswith(os.path.join(real, ""))


def find_images(root: str, not_read: Counter | None = None) -> list[str]:
    """All image files at any depth below `root`, sorted; links are followed, hidden and system folders are not.
    not_read: counts, by suffix, the files that look like images of other formats, or are images under a suffix that is
    not read. Raises InputError for a folder that cannot be opened."""
    found, visited, home = [], set(), os.path.realpath(root)

    def stop(error: OSError) -> None:
        raise folder_error(error) from None

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=stop):
        real = os.path.realpath(folder)
        if real in visited or (visited and leads_back(real, home)):  # a link in a circle
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(filter(is_visible, subfolders))
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                found.append(os.path.join(folder, name))
            elif not_read is not None:
                suffix = os.path.splitext(name)[1].lower()
                if suffix in NOT_READ or (suffix not in NO_IMAGES and starts_as_image(os.path.join(folder, name))):
                    not_read[suffix or "without a suffix"] += 1
    return sorted(found)


def starts_as_image(path: str) -> bool:
    try:
        with open(path if os.path.isfile(path) else os.devnull, "rb") as file:  # a pipe would be waited for
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(STARTS) or (start[:4], start[8:]) == (b"RIFF", b"WEBP")


def not_read_note(not_read: Counter) -> list[str]:
    """What `find_images` counted, as lines to be said: one or none."""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(not_read.items()))
    return [f"not read: {kinds} (the formats that are: {' '.join(SUFFIXES)})"] if kinds else []


def has_late_text(image: Image.Image) -> bool:
    """Whether a PNG, just opened, has metadata behind its pixels, where Pillow finds it only by decoding them."""
    image.fp.seek(image.tile[0].offset - 8)  # the first chunk of pixels: length and kind, the data, their check sum
    while len(head := image.fp.read(8)) == 8:
        if head[4:] in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            return True
        image.fp.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
    return False


def open_image(path: str) -> Image.Image:
    """Pillow's image, its pixels not yet decoded. Raises what Pillow does, and OSError for a pipe or the like, which
    would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a regular file")
    return Image.open(path)


def has_pages(image: Image.Image) -> bool:
    """Whether a TIFF, just opened, has a second page as large as its first; smaller ones are overviews."""
    if image.format != "TIFF" or not image.is_animated:
        return False
    sizes = []
    for page in (1, 0):
        image.seek(page)
        sizes.append(image.size)
    return sizes[0] == sizes[1]


def read_header(path: str) -> tuple[tuple[int, int], int]:
    """Width and height of the image file as stored, and its EXIF orientation. Raises InputError."""
    try:
        with open_image(path) as image:
            if image.format == "TIFF":  # Pillow turns these by itself, some versions on opening, others on loading
                size = image.tag_v2[WidthTag], image.tag_v2[HeightTag]
                return size, image.tag_v2.get(OrientationTag, 1)
            early = image.format == "PNG" and not has_late_text(image)  # a PNG's own method decodes the pixels
            exif = Image.Image.getexif(image) if early else image.getexif()
            return image.size, exif.get(OrientationTag, 1)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"{path}: not a readable image ({one_line(error)}); repair or remove it") from error


def upright_size(path: str) -> tuple[int, int]:
    """Width and height of the image file as `images.decode_image` turns it, from its header. Raises InputError."""
    size, turn = read_header(path)
    return size[::-1] if turn in SIDEWAYS else size


def is_sideways(path: str) -> bool:
    """Whether the file's EXIF orientation swaps width and height. Raises InputError."""
    return read_header(path)[1] in SIDEWAYS


def upright_sizes(paths: Iterable[str]) -> list[tuple[int, int] | InputError]:
    """`upright_size` of each file, or what is wrong with it."""

    def read(path: str) -> tuple[int, int] | InputError:
        try:
            return upright_size(path)
        except InputError as error:
            return error

    with ThreadPoolExecutor(8) as threads:  # a disk over the network takes its time to answer
        return list(threads.map(read, paths, chunksize=64))


def check_headers(paths: list[str]) -> None:
    """Raises InputError with the image files whose headers cannot be read, if there are at most MOST_HEADERS files: of
    more it would take minutes, and they are met when they are decoded."""
    if len(paths) <= MOST_HEADERS:
        refuse([str(found) for found in upright_sizes(paths) if isinstance(found, InputError)])


def refuse(findings: list[str]) -> None:
    """Raises InputError with all findings, one a line and at most ten lines, if there are any."""
    if len(findings) > MOST_LINES:
        findings = [*findings[: MOST_LINES - 1], f"… and {len(findings) - MOST_LINES + 1} more like these"]
    if findings:
        raise InputError(*findings)


# --- Class folders ----------------------------------------------------------------------------------------------------

SPLITS = r"train|training|val|valid|validation|test|testing|eval|dev"
SPLITS = re.compile(rf"({SPLITS})([_ -]?(set|data|images?)|\d{{4}})?", re.IGNORECASE)  # also test_set, val2017
OTHER_PURPOSES = (  # what folders or files beside each other are made for
    ({"images", "annotations.json"}, "task=detection"),
    ({"images", "labels"}, "task=detection (uv run tools/to_coco.py makes its format), or masks: task=segmentation"),
    ({"images", "annotations"}, "task=detection, or masks: task=segmentation"),
    ({"leftimg8bit", "gtfine"}, "task=segmentation, as images/ and masks/"),
    ({"jpegimages", "annotations"}, "task=detection (uv run tools/to_coco.py makes its format)"),
)
FOLDER_HINT = "it should hold one subdirectory of images per class"


def natural_key(name: str) -> tuple:
    """Sorts names as people and timm do: 2 comes before 10."""
    parts = re.split(r"(\d+)", name.lower())  # text and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def find_classes(root: str, known: Iterable[str] | None = None) -> dict[str, str]:
    """Class name -> its folder in `root`, in natural order. known: the classes that there may be, None: any. Raises
    InputError where there is none or an unknown one, where two look alike, or where `root` is made for something
    else."""
    if not os.path.isdir(root):
        raise InputError(f"{root}: {'a file' if os.path.isfile(root) else 'no such folder'}; {FOLDER_HINT}")
    entries, home = list_folder(root), os.path.realpath(root)
    lost = sorted(e.path for e in entries if is_visible(e.name) and e.is_symlink() and not os.path.exists(e.path))
    refuse([f"{path}: a link to {os.readlink(path)}, where nothing is; correct or remove it" for path in lost])
    names = sorted((e.name for e in entries if e.is_dir() and is_visible(e.name)), key=natural_key)
    real = {name: os.path.realpath(os.path.join(root, name)) for name in names}
    names = [name for name in names if not leads_back(real[name], home)]
    unknown = [name for name in names if known is None or plain_name(name) not in set(map(plain_name, known))]
    if unknown:
        refuse_other_purposes(root, names, entries)
    if known is not None and unknown:
        raise InputError(f"{root}: classes unknown in the training folder: {', '.join(unknown)}")
    if not names:
        raise InputError(f"{root}: no subdirectories; {FOLDER_HINT}")
    folders: dict[str, str] = {}
    owner: dict[str, str] = {}
    for name in names:
        path = os.path.join(root, name)
        if other := folders.get(plain_name(name)):
            raise InputError(f"{path}: its name looks like that of {other}; rename one of them")
        if other := owner.get(real[name]):
            raise InputError(f"{path}: by a link it is the same folder as {other}; remove one of the two classes")
        folders[plain_name(name)] = owner[real[name]] = path
    return folders


def refuse_other_purposes(root: str, names: list[str], entries: list[os.DirEntry]) -> None:
    """Raises InputError where the folders `names` of `root` are no classes, but splits, or parts of another format."""
    if names and all(map(SPLITS.fullmatch, names)):
        first = min(names, key=lambda name: not name.lower().startswith("train"))
        raise InputError(f"{root}: it holds {', '.join(names)}, not classes; name one of them: {root}/{first}")
    present = {entry.name.lower() for entry in entries}
    for marks, purpose in OTHER_PURPOSES:
        if marks <= present:
            raise InputError(f"{root}: it holds {' and '.join(sorted(marks))}, not classes; that is for {purpose}")
    if (images := present.intersection(IMAGE_FOLDERS)) and (masks := present.intersection(MASK_FOLDERS)):
        found = " and ".join(sorted(images | masks))
        raise InputError(f"{root}: it holds {found}, not classes; that is for task=segmentation")


def list_folder(root: str) -> list[os.DirEntry]:
    """What lies in `root`. Raises InputError."""
    try:
        return list(os.scandir(root))
    except OSError as error:
        raise folder_error(error) from None


def subfolders(root: str) -> list[str]:
    """The names of the visible folders in `root`, sorted. Raises InputError."""
    return sorted(e.name for e in list_folder(root) if e.is_dir() and is_visible(e.name))


def inner_hint(root: str) -> str:
    """What to name in place of a folder that holds a single one, if that holds several; else nothing."""
    outer = subfolders(root)
    path = os.path.join(root, *outer)
    inner = subfolders(path) if len(outer) == 1 else []
    splits = bool(inner) and all(map(SPLITS.fullmatch, inner))
    if splits:
        path = os.path.join(path, min(inner, key=lambda name: not name.lower().startswith("train")))
    listed = ", ".join(inner[:3]) + ", …" * (len(inner) > 3)
    kind = "splits" if splits else "the classes"
    return f"; if {listed} are {kind}, name {path}" if len(inner) > 1 else ""


def class_notes(root: str, folders: dict[str, str]) -> list[str]:
    """Lines on images that lie beside the class folders, and on classes, or parts of one, that are called like splits.
    folders: see `find_classes`."""
    loose = sorted(e.name for e in list_folder(root) if e.name.lower().endswith(SUFFIXES) and not e.is_dir())
    loose, splits = list(filter(is_visible, loose)), list(filter(SPLITS.fullmatch, folders))
    notes = [f"not read: {len(loose)} images beside the class folders, {loose[0]} the first"] if loose else []
    notes += [f"{', '.join(splits)} are taken for classes, though they are called like splits"] * bool(splits)
    names = {name.casefold(): name for name in folders}  # of those that differ in case alone the last
    notes += [f"{x}, {y} differ in case alone, and are two classes" for x in folders if (y := names[x.casefold()]) != x]
    first = next(iter(folders.values()))  # the others are like it, and some hold a million files
    parts = list(filter(SPLITS.fullmatch, subfolders(first)))
    return notes + [f"{first}: {', '.join(parts)} in a class folder are one set, and all are read"] * (len(parts) > 1)
