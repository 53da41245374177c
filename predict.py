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
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from build import build_model, configure, pick_device
from checkpoint import load_checkpoint
from config import flatten
from data_types import InputError, printable
from evaluation import load_pyplot, metrics_line, to_picture
from folders import SUFFIXES, find_images
from grpo import keyed_rng
from images import BadImages, Loading, decode_image, ordered_batches, to_rgb, worker_death
from vision_task import Task


def open_checkpoint(args: argparse.Namespace) -> tuple[Callable, Task, list[str]]:
    """The checkpoint's network as a function of at most --batch-size uint8 images [B, 3, H, W]: outputs [B, T, …] of T
    passes, or [B, …] of the deterministic network; its task; its classes. The passes are T functions, drawn from the
    run's seed, the same for every image. Raises InputError."""
    path = args.checkpoint
    state = load_checkpoint(Path(path))
    overrides = {"task": args.task} if args.task else {}
    config, task = configure((path, flatten(state["config"], path)), ("predict.py", overrides))
    if args.passes:  # after the check: what makes no sense in training may be asked of a trained model
        config["rollout"]["num_mc_samples"] = args.passes
    device = pick_device("auto")
    model = build_model(task, len(state["classes"]), device)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise InputError(f"{path}: its weights do not fit its config; take another checkpoint of the run") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError(f"{path}: its weights hold NaN or infinity; take another checkpoint of the run")
    network = task.network(model)
    with keyed_rng(config["training"]["seed"], "predict"):
        masks = model.sample_masks(1, config["rollout"]["num_mc_samples"])  # name -> [1, T, 1, width]
    masks = {name: mask.expand(args.batch_size, -1, -1, -1) for name, mask in masks.items()}

    @torch.no_grad()
    def outputs(images: Tensor, passes: bool = True) -> Tensor:
        # always of --batch-size images, the last one repeated: products of matrices of another shape are rounded
        # otherwise, and an image's probabilities would depend on how many come with it
        filled = images[torch.arange(args.batch_size).clamp(max=len(images) - 1)]
        return network(filled.to(device), masks if passes else None)[: len(images)]

    return outputs, task, state["classes"]


def find_files(arguments: list[str]) -> list[tuple[str, str]]:
    """The images that files and folders (at any depth) stand for, in the order given: the path, and the name of what is
    written about it: the path below the folder without suffix, numbered if it is taken. Raises InputError."""
    files = {}  # by name, in lower case
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
            while name.casefold() in files:
                number += 1
                name = f"{stem}-{number}"
            files[name.casefold()] = path, name
    if not files:
        raise InputError("no images: name files or folders, or --evaluate a folder in the task's format")
    return list(files.values())


def complain(*errors: Exception | str) -> None:
    for error in errors:
        text = str(error) if isinstance(error, InputError) else printable(str(error))
        print(f"predict.py: {text}", file=sys.stderr, flush=True)


def open_picture(path: str) -> Image.Image:
    """The image upright in RGB, its longer side brought between 256 and 1024 pixels."""
    with Image.open(path) as image:
        rgb = to_rgb(ImageOps.exif_transpose(image))
    longer = max(rgb.size)
    scale = min(max(longer, 256), 1024) / longer
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return rgb.resize([max(round(side * scale), 1) for side in rgb.size], method)


def about(args: argparse.Namespace, task: Task, classes: list[str]) -> dict:
    """How the JSON begins."""
    passes = task.config["rollout"]["num_mc_samples"]
    return {"checkpoint": args.checkpoint, "task": task.config["task"], "classes": classes, "passes": passes}


def decode_files(files: list[tuple[str, str]], image_size: int) -> Iterator[tuple[str, str, Tensor]]:
    """The files in order, each with its image, uint8 [3, image_size, image_size]; of one that cannot be decoded there
    is a line on stderr instead."""
    told = set()
    for path, name in files:
        try:
            yield path, name, decode_image(path, image_size)
        except InputError as error:
            if path not in told:
                complain(error)
            told.add(path)


def predict(args: argparse.Namespace) -> int:
    """Predicts images; returns the exit status."""
    files = find_files(args.images)
    network, task, classes = open_checkpoint(args)
    records, decoded = [], 0
    width = min(max(len(printable(path)) for path, _ in files), 60)
    if not args.json:
        print(f"{'image':<{width}}  entropy  mutual information  found")
    stream = decode_files(files, task.config["model"]["image_size"])
    while batch := list(islice(stream, args.batch_size)):
        decoded += len(batch)
        for (path, name, _), outputs in zip(batch, network(torch.stack([image for *_, image in batch])).cpu()):
            record, found = task.describe(outputs, path, classes)
            record |= task.uncertainty(outputs)
            if args.out:
                for key, (folder, picture) in task.draw(open_picture(path), record, found).items():
                    file = args.out / folder / f"{name}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    picture.save(file)
                    record[key] = str(file)
            if args.json:
                records.append({"path": path} | record)
            else:
                uncertainties = f"{record['predictive_entropy']:7.4f}  {record['mutual_information']:18.4f}"
                print(f"{printable(path):<{width}}  {uncertainties}  {printable(task.in_words(record))}")
    if not decoded:
        complain(f"none of the {len(files)} images can be decoded")
    if args.json:
        print(json.dumps(about(args, task, classes) | {"images": records}, indent=1))
    return 0 if decoded == len(files) else 2


def evaluate(args: argparse.Namespace) -> int:
    """Metrics of a folder in the task's format; returns the exit status, 2 where images had to be left out."""
    if args.out:
        load_pyplot()  # raises now, not after an hour, where matplotlib is missing
    network, task, classes = open_checkpoint(args)
    data = task.config["data"]
    dataset = task.open(args.evaluate, classes)
    evaluation = task.evaluation(dataset)
    bad_images = BadImages(len(dataset), complain)
    on_bad = "drop" if data["on_bad_image"] == "skip" else "error"
    loading = Loading(data["num_workers"], on_bad=on_bad, report=bad_images)
    for batch in ordered_batches(dataset, args.batch_size, loading):
        if len(batch):
            outputs, outputs_mc = network(batch.inputs, passes=False), network(batch.inputs)
            evaluation.add(batch.to(outputs.device), outputs, outputs_mc)
    if len(bad_images.seen) == len(dataset):
        raise InputError(f"{args.evaluate}: none of its {len(dataset)} images can be decoded")
    metrics = evaluation.metrics()
    if args.out:
        for name, picture in (evaluation.charts() | {"most_uncertain": to_picture(evaluation.draw())}).items():
            picture.save(args.out / f"{name}.png")
    if args.json:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        result = {
            "num_images": len(dataset) - len(bad_images.seen),
            "figures": finite,
        } | evaluation.details()  # earlier versions' names
        print(json.dumps(about(args, task, classes) | result, indent=1))
    else:
        print(f"{args.evaluate}: {bad_images.left(dataset)}, T = {task.config['rollout']['num_mc_samples']}")
        print(metrics_line(metrics), *evaluation.lines(), sep="\n")
    return 2 if bad_images.seen else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input (the images that can be read are predicted)."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=os.path.expanduser, metavar="ckpt/<run>", help="a run (its last.pt), or a file in it"
    )
    parser.add_argument("images", nargs="*", help="image files, and folders that are searched at any depth")
    parser.add_argument(
        "--evaluate",
        type=os.path.expanduser,
        metavar="DIR",
        help="metrics of a folder in the format of the task's data",
    )
    parser.add_argument("--task", metavar="FILE", help="the task's file, where the checkpoint's has moved")
    parser.add_argument("--passes", type=int, metavar="T", help="dropout passes per image (those of the training)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder for pictures, masks, charts")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images at a time (16)")
    args = parser.parse_intermixed_args(argv)
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
    except RuntimeError as error:
        if not (died := worker_death(error)):
            raise
        complain(died)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # predict.py … | head
    sys.exit(main())
