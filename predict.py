"""Predicts with a trained checkpoint, and says how sure it is.

    uv run predict.py ckpt/config_digits image.jpg folder/
    uv run predict.py ckpt/config_digits --evaluate data/eval --out charts

Every image meets the same T Monte Carlo Dropout passes. Predictive entropy (of their mean) is the whole uncertainty, in
nats; mutual information is the part the passes disagree on: what the model does not know, apart from what the image
does not show. For masks and boxes both are means over pixels and patches.
"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from checkpoint import load_checkpoint
from config import check, flatten
from data_types import InputError, printable
from detection_task import box_policy_adapter, decode
from grpo import classification_policy_adapter, keyed_rng
from segmentation_task import confusion_matrix, mask_policy_adapter, overlay
from train import TASKS, build_model, eval_line, pick_device
from vision_task import (
    SUFFIXES,
    decode_image,
    find_images,
    mutual_information,
    ordered_batches,
    predictive_entropy,
    to_rgb,
    upright_size,
)

REJECTED = (0, 5, 10, 20, 50)  # percent of the images, the most uncertain
SHOWN_SCORE = 0.5  # of boxes in the table and the pictures; --json has all from detection.score_threshold on
PICTURE_SIDE = 256, 1024  # least and most pixels of a picture's longer side

# --- Model and images -------------------------------------------------------------------------------------------------


def open_checkpoint(path: str, num_passes: int | None = None) -> tuple[Callable, Callable, dict, list[str]]:
    """The network of the checkpoint's task as two functions of uint8 images [B, 3, H, W], the outputs [B, …] of the
    deterministic network and those of T passes [B, T, …]; its config; its classes.

    The passes are T functions, drawn from the run's seed, the same for every image. Raises InputError.
    """
    state = load_checkpoint(Path(path))
    config, classes = check((path, flatten(state["config"], path))), state["classes"]
    config["rollout"]["num_mc_samples"] = num_passes or config["rollout"]["num_mc_samples"]
    device = pick_device("auto")
    model = build_model(config, len(classes), device)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise InputError(f"{path}: its weights do not fit its config; take another checkpoint of the run") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError(f"{path}: its weights hold NaN or infinity; take another checkpoint of the run")
    network = TASKS[config["task"]].network(model, config)
    with keyed_rng(config["training"]["seed"], "predict"):
        masks = model.sample_masks(1, config["rollout"]["num_mc_samples"])  # name -> [1, T, 1, width]

    def deterministic(images: Tensor) -> Tensor:
        return network(images.to(device))

    def passes(images: Tensor) -> Tensor:
        return network(images.to(device), {name: m.expand(len(images), -1, -1, -1) for name, m in masks.items()})

    return deterministic, passes, config, classes


@torch.no_grad()
def filled_up(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
    """function(images) of at most batch_size images, computed on exactly as many (the last one repeated): products of
    matrices of another shape are rounded otherwise, and an image's figures would depend on how many come with it."""
    return function(images[torch.arange(batch_size).clamp(max=len(images) - 1)])[: len(images)]


def find_files(arguments: list[str]) -> list[tuple[str, str]]:
    """The images that files and folders (at any depth) stand for, in the order given: the path, and the name of what is
    written about it: the path below the folder without suffix, numbered if it is taken. Raises InputError."""
    files, taken = [], set()
    for argument in arguments:
        if not os.path.exists(argument):
            raise InputError(f"{argument}: no such file or folder; name images, or folders of them")
        folder = argument if os.path.isdir(argument) else os.path.dirname(argument)
        paths = find_images(argument) if folder == argument else [argument]
        if not paths:
            raise InputError(f"{argument}: no images ({' '.join(SUFFIXES)}) in it; name another folder, or files")
        for path in paths:
            name = stem = os.path.splitext(os.path.relpath(path, folder or "."))[0]
            number = 1
            while name.casefold() in taken:
                number += 1
                name = f"{stem}-{number}"
            taken.add(name.casefold())
            files.append((path, name))
    if not files:
        raise InputError("no images: name files or folders, or --evaluate a folder in the task's format")
    return files


def complain(error: Exception | str) -> None:
    print(f"predict.py: {printable(str(error))}", file=sys.stderr, flush=True)


# --- What the passes say of one image ---------------------------------------------------------------------------------


def uncertainty(passes: Tensor) -> dict[str, float]:
    """Predictive entropy and mutual information (nats) of probabilities [T, …, K], each the mean over the dimensions
    between."""
    return {
        "predictive_entropy": float(predictive_entropy(passes.mean(0)).mean()),
        "mutual_information": float(mutual_information(passes).mean()),
    }


def describe_class(outputs: Tensor, path: str, classes: list[str], config: dict) -> tuple[dict, Any]:
    """The class of the mean over the passes. outputs: logits [T, K]. Returns the record for --json, and what
    there is to draw, nothing here."""
    passes = classification_policy_adapter(outputs).probs
    mean = passes.mean(0)
    record = {
        "class": classes[int(mean.argmax())],
        "probability": float(mean.max()),
        "probabilities": dict(zip(classes, mean.tolist())),
    }
    return record | uncertainty(passes), None


def describe_mask(outputs: Tensor, path: str, classes: list[str], config: dict) -> tuple[dict, Image.Image]:
    """The shares of the pixels of the mask, and the mask (mode L) at the image file's size. outputs: logits
    [T, H, W, K]."""
    passes = mask_policy_adapter(outputs).probs
    mask = Image.fromarray(passes.mean(0).argmax(-1).to(torch.uint8).numpy())
    mask = mask.resize(upright_size(path), Image.Resampling.NEAREST)
    counts = mask.histogram()[: len(classes)]
    shares = {name: count / sum(counts) for name, count in zip(classes, counts) if count}
    return {"shares": shares} | uncertainty(passes), mask


def describe_boxes(outputs: Tensor, path: str, classes: list[str], config: dict) -> tuple[dict, list[dict]]:
    """The detections, best first, their boxes x0 y0 x1 y1 in pixels of the image file. outputs: [T, P, K + 1 + 4]."""
    policy = box_policy_adapter(outputs)
    passes = policy.classes.probs
    found = decode(passes.mean(0, keepdim=True), policy.boxes.mean.mean(0, keepdim=True), config)[0]
    side, size = config["model"]["image_size"], upright_size(path)
    boxes = [
        {"class": classes[label], "score": score, "box": [x * length / side for x, length in zip(box, size * 2)]}
        for label, score, box in zip(*(found[name].tolist() for name in ("labels", "scores", "boxes")))
    ]
    return {"boxes": boxes} | uncertainty(passes), boxes


DESCRIBE = {"classification": describe_class, "segmentation": describe_mask, "detection": describe_boxes}


def in_words(record: dict) -> str:
    """What was found in an image, for the table and under its picture."""
    if "class" in record:
        return f"{record['class']} ({record['probability']:.1%})"
    if "shares" in record:
        return ", ".join(f"{name} {share:.1%}" for name, share in record["shares"].items())
    boxes = [box for box in record["boxes"] if box["score"] >= SHOWN_SCORE]
    written = [f"{box['class']} ({box['score']:.0%}) at {' '.join(f'{x:.0f}' for x in box['box'])}" for box in boxes]
    return ", ".join(written) or "nothing"


# --- Pictures ---------------------------------------------------------------------------------------------------------


def open_picture(path: str) -> Image.Image:
    """The image upright in RGB, its longer side brought between 256 and 1024 pixels."""
    with Image.open(path) as image:
        rgb = to_rgb(ImageOps.exif_transpose(image))
    longer = max(rgb.size)
    scale = min(max(longer, PICTURE_SIDE[0]), PICTURE_SIDE[1]) / longer
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return rgb.resize([max(round(side * scale), 1) for side in rgb.size], method)


def pixels(image: Image.Image) -> Tensor:
    """uint8 [h, w] or [h, w, 3]."""
    return torch.from_numpy(np.array(image))


def save(picture: Image.Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return str(path)


def write_pictures(folder: Path, path: str, name: str, record: dict, found: Any) -> dict[str, str]:
    """Writes the image with what was found in it to folder/name.png; where that is a mask, the mask (its pixel values
    are the classes) to folder/masks/name.png and the image under it to folder/overlays/name.png. Returns the files."""
    picture, files = open_picture(path), {}
    if isinstance(found, Image.Image):
        files["mask"] = save(found, folder / "masks" / f"{name}.png")
        folder = folder / "overlays"
        small = pixels(found.resize(picture.size, Image.Resampling.NEAREST))
        picture = Image.fromarray(overlay(pixels(picture).permute(2, 0, 1), small).permute(1, 2, 0).numpy())
    elif found is not None:
        draw, scale = ImageDraw.Draw(picture), picture.width / upright_size(path)[0]
        for box in found:
            if box["score"] >= SHOWN_SCORE:
                x0, y0, x1, y1 = (x * scale for x in box["box"])
                draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline="lime", width=2)
                draw.text((x0 + 3, y0 + 2), box["class"], fill="yellow")
    else:
        lines = [
            in_words(record),
            *(f"{key.replace('_', ' ')} {record[key]:.3f}" for key in ("predictive_entropy", "mutual_information")),
        ]
        sheet = Image.new("RGB", (max(picture.width, 200), picture.height + 14 * len(lines) + 4), "white")
        sheet.paste(picture)
        ImageDraw.Draw(sheet).multiline_text((3, picture.height + 1), "\n".join(lines), fill="black", spacing=3)
        picture = sheet
    return files | {"picture": save(picture, folder / f"{name}.png")}


def draw_confusion(confusion: Tensor, classes: list[str]) -> Image.Image:
    """Counts by [truth, prediction], [K, K]: the truth downwards, the prediction to the right, a cell as blue as its
    share of the truth. Names and numbers are written where they fit."""
    cell = min(max(800 // len(classes), 2), 44)
    written = list(enumerate(classes)) if cell >= 12 else []
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    margin = round(min(max([70, *(pen.textlength(name) + 8 for _, name in written)]), 160))
    names = Image.new("RGB", (margin, cell * len(classes)), "white")
    for i, name in written:
        ImageDraw.Draw(names).text((4, i * cell + cell // 2 - 6), name, fill="black")
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    colours = (255 + shares[..., None] * (torch.tensor([30, 80, 160]) - 255)).round().to(torch.uint8)
    cells = Image.fromarray(colours.numpy()).resize((names.height,) * 2, Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (margin + names.height,) * 2, "white")
    for part, corner in ((names, (0, margin)), (names.transpose(Image.Transpose.ROTATE_90), (margin, 0))):
        sheet.paste(part, corner)
    sheet.paste(cells, (margin, margin))
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), "down: truth\nright:\nprediction", fill="black")
    for row, column in confusion.nonzero().tolist() if written else ():
        share = float(shares[row, column])
        texts = [text for text in (str(int(confusion[row, column])), f"{share:.0%}") if pen.textlength(text) < cell - 2]
        for text in texts[:1]:
            x, y = margin + (column + 0.5) * cell - pen.textlength(text) / 2, margin + row * cell + cell // 2 - 6
            draw.text((x, y), text, fill="white" if share > 0.5 else "black")
    return sheet


def draw_curve(accuracy: Tensor) -> Image.Image:
    """The accuracy-rejection curve. accuracy: of the k least uncertain of n images, k = 1 … n, [n]."""
    width, height, left, top = 480, 300, 60, 24
    sheet = Image.new("RGB", (left + width + 30, top + height + 50), "white")
    draw = ImageDraw.Draw(sheet)
    low = min(math.floor(float(accuracy.min()) * 20) / 20, 0.95)

    def place(rejected: float, value: float) -> tuple[float, float]:
        return left + rejected * width, top + (1 - value) / (1 - low) * height

    for i in range(6):
        share, value = i / 5, low + (1 - low) * i / 5
        draw.line((place(share, low), place(share, 1)), fill="lightgrey")
        draw.line((place(0, value), place(1, value)), fill="lightgrey")
        draw.text((place(share, low)[0] - 10, top + height + 6), f"{share:.0%}", fill="black")
        draw.text((left - 40, place(0, value)[1] - 6), f"{value:.3f}", fill="black")
    draw.text((left, 4), "accuracy on the images kept", fill="black")
    draw.text((left, top + height + 24), "share rejected, the highest predictive entropy first", fill="black")
    points = [place(1 - (k + 1) / len(accuracy), value) for k, value in enumerate(accuracy.tolist())]
    draw.line(points if len(points) > 1 else points * 2, fill="blue", width=2)
    return sheet


# --- The two commands -------------------------------------------------------------------------------------------------


def about(args: argparse.Namespace, config: dict, classes: list[str]) -> dict:
    """How the JSON begins."""
    passes = config["rollout"]["num_mc_samples"]
    return {"checkpoint": args.checkpoint, "task": config["task"], "classes": classes, "passes": passes}


def decode_batches(
    files: list[tuple[str, str]], image_size: int, batch_size: int, refused: list[str]
) -> Iterator[tuple[list[tuple[str, str]], Tensor]]:
    """The files in order with their images, uint8 [batch_size or fewer, 3, image_size, image_size]. What cannot be
    decoded gets its line on stderr and is added to `refused`."""
    batch, images = [], []
    for file in files:
        try:
            images.append(decode_image(file[0], image_size))
            batch.append(file)
        except InputError as error:
            complain(error)
            refused.append(file[0])
        if len(batch) == batch_size:
            yield batch, torch.stack(images)
            batch, images = [], []
    if batch:
        yield batch, torch.stack(images)


def predict(args: argparse.Namespace) -> int:
    """Predicts images; returns the exit status."""
    files = find_files(args.images)
    _, passes, config, classes = open_checkpoint(args.checkpoint, args.passes)
    records, refused = [], []
    width = min(max(len(printable(path)) for path, _ in files), 60)
    if not args.json:
        print(f"{'image':<{width}}  entropy  mutual information  found")
    for batch, images in decode_batches(files, config["model"]["image_size"], args.batch_size, refused):
        for (path, name), outputs in zip(batch, filled_up(passes, images, args.batch_size)):
            record, found = DESCRIBE[config["task"]](outputs.cpu(), path, classes, config)
            if args.out:
                record |= write_pictures(args.out, path, name, record, found)
            if args.json:
                records.append({"path": path} | record)
            else:
                figures = f"{record['predictive_entropy']:7.4f}  {record['mutual_information']:18.4f}"
                print(f"{printable(path):<{width}}  {figures}  {printable(in_words(record))}")
    if args.json:
        print(json.dumps(about(args, config, classes) | {"images": records}, indent=1))
    return 2 if refused else 0


def accuracy_of_kept(uncertainty: Tensor, right: Tensor) -> Tensor:
    """Accuracy of the k least uncertain of n images, k = 1 … n: [n]. uncertainty: [n]; right: bool [n]. Of equally
    uncertain ones the first is kept."""
    order = uncertainty.argsort(stable=True)
    return right[order].double().cumsum(0) / torch.arange(1, len(right) + 1)


def name_bad(bad: dict[str, str]) -> None:
    for message in bad.values():
        complain(message)


@torch.no_grad()
def evaluate(args: argparse.Namespace) -> int:
    """Figures of a folder in the task's format; returns the exit status."""
    deterministic, passes, config, classes = open_checkpoint(args.checkpoint, args.passes)
    task = TASKS[config["task"]]
    dataset = task.open_dataset(args.evaluate, config, classes)
    evaluation = task.Evaluation(dataset, config)
    on_bad = "drop" if config["data"]["on_bad_image"] == "skip" else "error"
    options = {"num_workers": config["data"]["num_workers"], "on_bad": on_bad, "report": name_bad}
    for batch in ordered_batches(dataset, args.batch_size, **options):
        if len(batch) == 0:
            continue
        outputs, outputs_mc = (filled_up(f, batch.inputs, args.batch_size) for f in (deterministic, passes))
        evaluation.add(batch.to(outputs.device), outputs, outputs_mc)
    figures = evaluation.figures()
    result = about(args, config, classes) | {
        "num_images": len(dataset),
        "figures": {name: value if math.isfinite(value) else None for name, value in figures.items()},
    }
    kept, confusion, pictures = [], None, {}
    if config["task"] == "classification":
        _, probs, targets, _ = evaluation.columns()
        predicted = probs.argmax(-1)
        accuracy = accuracy_of_kept(predictive_entropy(probs), predicted == targets)
        kept = [(percent, float(accuracy[-1 - len(dataset) * percent // 100])) for percent in REJECTED]
        result["accuracy_when_rejected"] = {str(percent): value for percent, value in kept}
        pictures["accuracy_rejection"] = draw_curve(accuracy)
        confusion = confusion_matrix(predicted, targets, torch.ones_like(targets, dtype=torch.bool), len(classes))
    elif config["task"] == "segmentation":
        confusion = evaluation.confusions[1]
    if confusion is not None:
        pictures["confusion"] = draw_confusion(confusion, classes)
    if args.out:
        pictures["most_uncertain"] = Image.fromarray(evaluation.draw().permute(1, 2, 0).numpy())
        for name, picture in pictures.items():
            save(picture, args.out / f"{name}.png")
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{args.evaluate}: {len(dataset)} images, T = {config['rollout']['num_mc_samples']}")
    print(eval_line(figures))
    for percent, value in kept:
        print(f"accuracy {value:.4f} without the most uncertain {percent:2d} %")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="ckpt/<run>", help="a run (its last.pt), or a file in it")
    parser.add_argument("images", nargs="*", help="image files, and folders that are searched at any depth")
    parser.add_argument("--evaluate", metavar="DIR", help="figures of a folder in the format of the task's data")
    parser.add_argument("--passes", type=int, metavar="T", help="dropout passes per image (those of the training)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder for pictures, masks, charts")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images at a time (16)")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input (the images that can be read are predicted)."""
    args = parse(argv)
    try:
        for option, value in (("--passes", args.passes), ("--batch-size", args.batch_size)):
            if value is not None and value < 1:
                raise InputError(f"{option} {value}: must be at least 1")
        if args.evaluate and args.images:
            raise InputError(f"{args.images[0]}: --evaluate takes its images from {args.evaluate} alone; drop one")
        if args.out and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise InputError(f"{args.out} exists: nothing is overwritten; name a new folder with --out")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        return evaluate(args) if args.evaluate else predict(args)
    except (InputError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # predict.py … | head
    sys.exit(main())
