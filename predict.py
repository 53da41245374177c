"""Predicts with a trained checkpoint, and says how sure it is.

    uv run predict.py ckpt/config_digits image.jpg folder/
    uv run predict.py ckpt/config_digits --evaluate data/eval --out charts
    uv run predict.py ckpt/tuned photos/ --decide reward
    uv run predict.py ckpt/config_digits --export model.pt2

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
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from os.path import expanduser
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.distributions import Bernoulli

from build import build_model, configure, load_rewards, open_set, pick_device
from checkpoint import load_checkpoint
from config import flatten
from data_types import InputError, TensorMiniBatch, printable
from deciding import Decider, Decision, decide_with, decision_path, digest, load_decision, score_of
from deciding import fit as fit_decision
from detection_task import best_thresholds, mean_f1
from evaluation import load_pyplot, metrics_line, to_picture
from export import export_model
from folders import SUFFIXES, find_images, not_read_note
from frame import Frame
from grpo import keyed_rng
from images import BadImages, ImageDataset, Loading, decode_image, ordered_batches, to_rgb
from report import allow_all_names
from scores import RewardEvaluation
from vision_task import Task


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Task, dict]:
    """The checkpoint's model, its task, its state. Raises InputError."""
    path = args.checkpoint
    state = load_checkpoint(Path(path))
    overrides = {"task": args.task} if args.task else {}
    overrides |= {"rollout.reward": args.reward} if args.reward else {}
    config, task = configure((path, flatten(state["config"], path)), ("predict.py", overrides))
    if args.passes:  # after the check: what makes no sense in training may be asked of a trained model
        config["rollout"]["num_mc_samples"] = args.passes
    model = build_model(task, len(state["classes"]), device)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise InputError(f"{path}: its weights do not fit its config; take another checkpoint of the run") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError(f"{path}: its weights hold NaN or infinity; take another checkpoint of the run")
    return model, task, state


def open_checkpoint(args: argparse.Namespace) -> tuple[Callable, Task, list[str], str]:
    """The checkpoint's network as a function of at most --batch-size uint8 images [B, 3, H, W]: outputs [B, T, …] of T
    passes, or [B, …] of the deterministic network; its task; its classes; its digest. The passes are T functions, drawn
    from the run's seed, the same for every image. Raises InputError."""
    device = pick_device("auto")
    model, task, state = open_model(args, device)
    network, config = task.network(model), task.config
    with keyed_rng(config["training"]["seed"], "predict"):
        masks = model.sample_masks(1, config["rollout"]["num_mc_samples"])  # name -> [1, T, 1, width]
    masks = {name: mask.expand(args.batch_size, -1, -1, -1) for name, mask in masks.items()}

    @torch.no_grad()
    def outputs(images: Tensor, passes: bool = True) -> Tensor:
        # always of --batch-size images, the last one repeated: products of matrices of another shape are rounded
        # otherwise, and an image's probabilities would depend on how many come with it
        filled = images[torch.arange(args.batch_size).clamp(max=len(images) - 1)]
        return network(filled.to(device), masks if passes else None)[: len(images)]

    return outputs, task, state["classes"], digest(state)


def open_decision(args: argparse.Namespace, task: Task, checkpoint: str) -> tuple[dict, Callable | None]:
    """With --decide reward the rewards, and what decides by them, which the task takes over; boxes are decided by the
    task alone. Raises InputError."""
    if args.decide == "argmax":
        return {}, None
    rewards, path = load_rewards(task), decision_path(args.checkpoint)
    boxes = hasattr(task, "thresholds")
    decision = load_decision(path, checkpoint, list(rewards)) if boxes or path.exists() else None
    if boxes:
        task.thresholds = decision.thresholds
        return {}, None
    decider = Decider(task, rewards, decision)
    decide_with(task, decider)
    return rewards, decider


def find_files(arguments: list[str]) -> list[tuple[str, str]]:
    """The images that files and folders (at any depth) stand for, in the order given: the path, and the name of what is
    written about it: the path below the folder without suffix, numbered if it is taken. Raises InputError."""
    files, not_read = {}, Counter()  # by name, in lower case
    for argument in arguments:
        if not os.path.exists(argument):
            raise InputError(f"{argument}: no such file or folder; name images, or folders of them")
        folder = argument if os.path.isdir(argument) else os.path.dirname(argument)
        paths = find_images(argument, not_read) if folder == argument else [argument]
        if not paths:
            complain(*not_read_note(not_read))
            raise InputError(f"{argument}: no images ({' '.join(SUFFIXES)}) in it; name another folder, or files")
        for path in paths:
            name = stem = os.path.splitext(os.path.relpath(path, folder or "."))[0]
            number = 1
            while name.casefold() in files:
                number += 1
                name = f"{stem}-{number}"
            files[name.casefold()] = path, name
    complain(*not_read_note(not_read))
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


def decode_files(files: list[tuple[str, str]], frame: Frame) -> Iterator[tuple[str, str, Tensor]]:
    """The files in order, each with its image, uint8 [3, H, W]; of one that cannot be decoded there is a line on stderr
    instead."""
    told = set()
    for path, name in files:
        try:
            yield path, name, decode_image(path, frame)
        except InputError as error:
            if path not in told:
                complain(error)
            told.add(path)


def predict(args: argparse.Namespace) -> int:
    """Predicts images; returns the exit status."""
    files = find_files(args.images)
    network, task, classes, checkpoint = open_checkpoint(args)
    open_decision(args, task, checkpoint)
    records, decoded = [], 0
    width = min(max(len(printable(path)) for path, _ in files), 60)
    if not args.json:
        print(f"{'image':<{width}}  entropy  mutual information  found")
    stream = decode_files(files, Frame.from_config(task.config))
    while batch := list(islice(stream, args.batch_size)):
        decoded += len(batch)
        for (path, name, _), outputs in zip(batch, network(torch.stack([image for *_, image in batch])).cpu()):
            record, found = task.describe(outputs, path, classes)
            record |= task.uncertainty(outputs) | record
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


def batches_of(
    args: argparse.Namespace, task: Task, dataset: ImageDataset, bad_images: BadImages
) -> Iterator[TensorMiniBatch]:
    """The folder's images that can be decoded, --batch-size at a time. Raises InputError where none can."""
    data = task.config["data"]
    on_bad = "drop" if data["on_bad_image"] == "skip" else "error"
    loading = Loading(data["num_workers"], on_bad=on_bad, report=bad_images)
    yield from filter(len, ordered_batches(dataset, args.batch_size, loading))
    if len(bad_images.seen) == len(dataset):
        raise InputError(f"{dataset.root}: none of its {len(dataset)} images can be decoded")


def fit(args: argparse.Namespace) -> int:
    """Fits what --decide reward needs on a hold-out folder, into a file beside the checkpoint; returns the exit
    status."""
    network, task, classes, checkpoint = open_checkpoint(args)
    dataset, rewards = open_set(task, args.fit, classes), load_rewards(task)
    boxes, score = hasattr(task, "thresholds"), None
    if not boxes:
        score = score_of(rewards)
    evaluation, rows, bad_images = task.evaluation(dataset), [], BadImages(len(dataset), complain)
    for batch in batches_of(args, task, dataset, bad_images):
        outputs_mc = network(batch.inputs)
        if boxes:
            evaluation.add(batch, network(batch.inputs, passes=False), outputs_mc)
        else:
            tags = isinstance(task.policy(outputs_mc), Bernoulli)
            counted = torch.ones_like(batch.targets, dtype=torch.bool) if batch.counted is None else batch.counted
            rows.append((task.probabilities(outputs_mc).mean(1).cpu(), batch.targets, counted))
    if boxes:
        curves = evaluation.curves()
        thresholds = best_thresholds(curves)
        found = {"thresholds": thresholds, "score": (mean_f1(curves, {}), mean_f1(curves, thresholds))}
    else:
        probs, targets, counted = map(torch.cat, zip(*rows))
        found = fit_decision(score, probs, targets, None if tags else counted, tags)
    decision = Decision(checkpoint, args.fit, list(rewards), **found)
    path = decision_path(args.checkpoint)
    decision.save(path)
    name = "F1, mean over the classes" if boxes else ", ".join(rewards)
    told = f": {name} {decision.score[0]:.4f} before, {decision.score[1]:.4f} by the fit" if decision.score else ""
    print(f"{args.fit}: {bad_images.left(dataset)}{told}; --decide reward takes {path}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Metrics of a folder in the task's format; returns the exit status, 2 where images had to be left out."""
    if args.out:
        load_pyplot()  # raises now, not after an hour, where matplotlib is missing
    network, task, classes, checkpoint = open_checkpoint(args)
    rewards, decider = open_decision(args, task, checkpoint)
    dataset = open_set(task, args.evaluate, classes)
    evaluation, judge = task.evaluation(dataset), RewardEvaluation(task, rewards, decider)
    bad_images = BadImages(len(dataset), complain)
    for batch in batches_of(args, task, dataset, bad_images):
        outputs, outputs_mc = network(batch.inputs, passes=False), network(batch.inputs)
        batch = batch.to(outputs.device)
        evaluation.add(batch, outputs, outputs_mc)
        judge.add(batch, outputs, outputs_mc)
    metrics = evaluation.metrics() | judge.metrics()
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


def export(args: argparse.Namespace) -> int:
    """Writes the model as a file that needs nothing of this repo; returns the exit status."""
    model, task, state = open_model(args, torch.device("cpu"))
    about = export_model(model, task, state["classes"], args.export)
    if args.json:
        print(json.dumps(about))
    else:
        outputs = ", ".join(f"{name} {['B', *shape]}".replace("'", "") for name, shape in about["outputs"].items())
        print(f"{args.export}: uint8 images [B, 3, {about['height']}, {about['width']}] -> {outputs}")
    return 0


def new_path(text: str) -> Path:
    """~ is the home: behind --out= the shell leaves it as it is."""
    return Path(expanduser(text))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input (the images that can be read are predicted)."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=expanduser, metavar="ckpt/<run>", help="a run (its last.pt), or a file in it"
    )
    parser.add_argument("images", nargs="*", type=expanduser, help="image files and folders, searched at any depth")
    parser.add_argument(
        "--evaluate", type=expanduser, metavar="DIR", help="metrics of a folder in the format of the task's data"
    )
    parser.add_argument(
        "--decide", choices=("argmax", "reward"), default="argmax", help="reward: the highest expected reward"
    )
    fitted = "fit what --decide reward needs on a hold-out folder"
    parser.add_argument("--fit", type=expanduser, metavar="DIR", help=fitted)
    parser.add_argument("--reward", metavar="NAME", help="decide by another reward than the run's")
    parser.add_argument("--task", metavar="FILE", help="the task's file, where the checkpoint's has moved")
    parser.add_argument("--passes", type=int, metavar="T", help="dropout passes per image (those of the training)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    parser.add_argument("--out", type=new_path, metavar="DIR", help="a new folder for pictures, masks, charts")
    parser.add_argument("--export", type=new_path, metavar="FILE", help="write the model as .pt2 (docs/deploy.md)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images at a time (16)")
    args = parser.parse_intermixed_args(argv)
    allow_all_names()
    try:
        for option, value in (("--passes", args.passes), ("--batch-size", args.batch_size)):
            if value is not None and value < 1:
                raise InputError(f"{option} {value}: must be at least 1")
        if args.reward and not args.fit and args.decide == "argmax":
            raise InputError(f"--reward {args.reward}: it is for --decide reward and for --fit; add one, or drop it")
        for option, folder in (("--evaluate", args.evaluate), ("--fit", args.fit)):
            if folder and (args.images or (args.evaluate and args.fit)):
                other = args.images[0] if args.images else f"--fit {args.fit}"
                raise InputError(f"{other}: {option} takes its images from {folder} alone; drop one")
        if args.out and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise InputError(f"{args.out} exists: nothing is overwritten; name a new folder with --out")
        if args.export and (args.evaluate or args.fit or args.images or args.out):
            raise InputError(
                f"--export {args.export}: it writes the model and predicts nothing; drop the images or folder"
            )
        if args.export and (args.export.suffix != ".pt2" or args.export.exists()):
            raise InputError(f"--export {args.export}: nothing is overwritten; name a new file that ends in .pt2")
        if args.export:
            return export(args)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        return fit(args) if args.fit else evaluate(args) if args.evaluate else predict(args)
    except (InputError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # predict.py … | head
    sys.exit(main())
