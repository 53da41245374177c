"""Trains a Vision Transformer on an image folder from rewards.

    uv run train.py --config config_digits.yaml
    uv run train.py --config config_digits.yaml training.learning_rate=5e-4 rollout.advantage=grpo
    uv run train.py --resume ckpt/config_digits
    uv run train.py --evaluate ckpt/config_digits

The story: config -> data -> model -> (rollout -> reward -> update -> log -> evaluate -> save)*.
"""

import argparse
import copy
import importlib.util
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

import detection_task
import segmentation_task
import vision_task
from checkpoint import load_checkpoint, load_weights, save_checkpoint
from config import check, describe_keys, flatten, one_line, parse_override, read_yaml
from data_types import Episode, InputError, TensorMiniBatch
from grpo import Reward, keyed_rng, rollout, update_policy
from processes import agreed, connect, gathered, rank_and_world, share_metrics
from vision_task import ordered_batches, stream_batches
from vit_model import VisionTransformer

TASKS = {"classification": vision_task, "segmentation": segmentation_task, "detection": detection_task}
REPLAY_BELOW = 0.6  # share of live groups below which a forward pass without a graph + a replay of the live is cheaper
WARN_DEAD_STEPS = 50


# --- What the config's words stand for --------------------------------------------------------------------------------


def load_rewards(config: dict) -> dict[str, tuple[Reward, float]]:
    """rollout.reward, name -> weight, as name -> (function, weight). A name is a function of the task's module, or
    path/to/file.py:function. Raises InputError."""
    rewards, task = {}, TASKS[config["task"]]
    for name, weight in (config["rollout"]["reward"] or task.DEFAULT_REWARD).items():
        file, colon, function = name.rpartition(":")
        module = task
        if colon:
            try:
                if not file.endswith(".py"):
                    raise ImportError("its name should end in .py")
                spec = importlib.util.spec_from_file_location(f"reward file {file}", file)
                module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
                spec.loader.exec_module(module)
            except Exception as error:  # whatever the user's file raises
                raise InputError(f"rollout.reward: {file} cannot be loaded ({one_line(error)})") from error
        reward = getattr(module, function, None)
        if not callable(reward):
            where = file if colon else f"{task.__name__}; one of your own is path/to/file.py:function"
            raise InputError(f"rollout.reward: no function {function} in {where}")
        rewards[name] = reward, weight
    return rewards


def pick_device(name: str) -> torch.device:
    """training.device as a device that works here, for each process of a host its own GPU; raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose random state `keyed_rng` forks
        return device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"training.device: {name} is not available here ({one_line(error)[:80]})") from None


def pick_autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """training.dtype as the dtype of the forward pass, None for plain float32."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and has_bfloat16) else None


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter: 0 for the embedding, 1 to depth for the blocks, depth + 1 for norm and head."""
    if name.startswith(("patch_embed.", "cls_token", "pos_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def build_model(config: dict, num_classes: int, device: torch.device) -> VisionTransformer:
    """The ViT with seeded weights on `device`; what training.freeze_blocks holds takes no gradient."""
    shape = {k: v for k, v in config["model"].items() if k not in ("num_classes", "checkpoint_path", "compile")}
    dtype = pick_autocast_dtype(config["training"]["dtype"], device)
    width = TASKS[config["task"]].head_size(num_classes, config["model"]["patch_size"])
    dense = config["task"] != "classification"
    with keyed_rng(config["training"]["seed"], "init"):
        model = VisionTransformer(**shape, num_classes=width, dense=dense, autocast_dtype=dtype).to(device)
    frozen = config["training"]["freeze_blocks"]
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or layer_of(name, len(model.blocks)) > frozen)
    return model


def build_optimizer(model: VisionTransformer, training: SimpleNamespace) -> torch.optim.AdamW:
    """AdamW over what is not frozen; no weight decay on biases, norms, class token and position embedding.

    `lr_scale` of a group is its share of the learning rate: layer_decay per layer below the head, as in BEiT
    (https://arxiv.org/abs/2106.08254).
    """
    depth, params = len(model.blocks), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or name in ("cls_token", "pos_embed")
            lr_scale = training.layer_decay ** (depth + 1 - layer_of(name, depth))
            params.setdefault((plain, lr_scale), []).append(p)
    groups = [
        {
            "params": params[plain, lr_scale],
            "weight_decay": 0.0 if plain else training.weight_decay,
            "lr_scale": lr_scale,
        }
        for plain, lr_scale in sorted(params)
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=tuple(training.betas), fused=True)


def learning_rate(step: int, training: SimpleNamespace) -> float:
    """Linear warm-up, then half a cosine."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(training.steps - training.warmup_steps, 1)
    low, high = training.min_learning_rate, training.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))


def keep_decoded(data: SimpleNamespace, *datasets: Dataset | None) -> tuple[bool, int]:
    """Whether decoded images are kept in memory (data.cache), and how many bytes they are."""
    size = sum(dataset.channels * dataset.image_size**2 * len(dataset) for dataset in datasets if dataset)
    alone = rank_and_world()[1] == 1  # a process would see all images only after many epochs
    return alone and (data.cache == "always" or (data.cache == "auto" and size <= data.cache_limit_gb * 1e9)), size


def epoch_order(epoch: int, seed: int, size: int) -> Tensor:
    """The epoch's permutation of the training images, [size]."""
    with keyed_rng(seed, "order", epoch):
        return torch.randperm(size)


def training_step(
    model,
    optimizer,
    batch: TensorMiniBatch,
    rewards: dict,
    config: dict,
    step: int,
    *,
    keep_graph: bool,
    reference=None,
) -> dict[str, Tensor]:
    """Rollout, reward, update on a batch (this process's images of it) of uint8 images on the model's device; returns
    `update_policy`'s metrics."""
    data, roll, training = (SimpleNamespace(**config[section]) for section in ("data", "rollout", "training"))
    rank, world = rank_and_world()
    micro_batch_size = training.micro_batch_size or len(batch)
    num_counted = None if batch.counted is None else batch.counted.sum()
    if world > 1 and num_counted is not None:
        dist.all_reduce(num_counted)
    task = TASKS[config["task"]]
    network = task.network(model, config)
    policy_adapter = task.policy_adapter(config, step / training.steps)

    def episodes() -> Iterator[Episode]:
        for index in range(0, len(batch), micro_batch_size):
            part = batch[index : index + micro_batch_size]
            index += rank * len(batch)  # in the batch of all processes
            if data.augment:
                with keyed_rng(training.seed, step, "flips", index):
                    part = task.mirror_batch(part)
            yield rollout(
                network,
                part,
                rewards,
                policy_adapter,
                num_mc_samples=roll.num_mc_samples,
                actions_per_sample=roll.actions_per_sample,
                action=roll.action,
                advantage=roll.advantage,
                key=(training.seed, step, index),
                keep_graph=keep_graph,
            )

    metrics = update_policy(
        network,
        optimizer,
        episodes(),
        batch_size=world * len(batch),
        micro_batch_size=micro_batch_size,
        policy_adapter=policy_adapter,
        num_counted=num_counted,
        objective=training.objective,
        supervised_loss=task.supervised_loss(config),
        clip_low=training.clip_low,
        clip_high=training.clip_high,
        update_epochs=training.update_epochs,
        kl_coef=training.kl_coef,
        entropy_coef=training.entropy_coef,
        reference=task.network(reference, config) if reference else None,
        max_grad_norm=training.max_grad_norm,
        pad_to=max(micro_batch_size // 4, 1) if config["model"]["compile"] else 1,
    )
    return share_metrics(metrics)


# --- Evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model,
    batches: Iterable[TensorMiniBatch],
    dataset: Dataset,
    config: dict,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
):
    """The task's `Evaluation` of the deterministic network and of the mean over T passes, over all batches; where
    several processes have every so many-th batch, that of rank 0 is of them all."""
    task = TASKS[config["task"]]
    network, evaluation = task.network(model, config), task.Evaluation(dataset, config)

    def outputs() -> Iterator[tuple[TensorMiniBatch, Tensor, Tensor]]:
        rank, world = rank_and_world() if group else (0, 1)
        for index, batch in enumerate(batches):
            if len(batch) == 0:  # its images cannot be decoded
                continue
            batch = batch.to(device)
            with keyed_rng(config["training"]["seed"], "evaluation", index * world + rank):
                masks = model.sample_masks(len(batch), config["rollout"]["num_mc_samples"])
            yield batch, network(batch.inputs), network(batch.inputs, masks)

    size = min(config["training"]["micro_batch_size"] or config["training"]["batch_size"], len(dataset))
    for row in gathered(outputs(), -(-len(dataset) // size), group) if group else outputs():
        evaluation.add(*row)
    return evaluation


def eval_line(figures: dict[str, float]) -> str:
    """The figures but those of single classes, on one line."""
    written = {"nll": "NLL", "ece": "ECE", "map": "mAP", "ap50": "AP50", "ap75": "AP75", "f1": "F1"}
    parts = {"eval": [], "eval_mc": []}
    for name, value in figures.items():
        predictor, *name = name.split("/")
        if len(name) == 1:
            parts[predictor].append(f"{written.get(name[0], name[0].replace('_', ' '))} {value:.4f}")
    return f"{' '.join(parts['eval'])} (mean over passes: {' '.join(parts['eval_mc'])})"


# --- Watching ---------------------------------------------------------------------------------------------------------


def read_rows(rows: list[dict[str, Tensor]], first_step: int, advantage: str) -> dict[str, list[float]]:
    """The metrics of some steps in one copy from the device: name -> its values. Raises InputError where one of them
    shows that the run cannot go on; the weights were not touched from that step on (see `grpo.optimizer_step`)."""
    names = [name for name in rows[0] if name != "group_rewards" and all(name in row for row in rows)]
    table = torch.stack([torch.stack([row[name].float() for name in names]) for row in rows]).cpu()
    values = dict(zip(names, table.T.tolist()))
    for i in range(len(rows)):
        at = f"at step {first_step + i}"
        for name in sorted(names, key=("reward/mean", "reward/std", "reward/min").__contains__):  # first the culprit
            if name.startswith("reward/") and not math.isfinite(values[name][i]):
                term = name.removeprefix("reward/")
                who = "the sum of rewards" if term in ("mean", "std", "min") else term
                raise InputError(f"rollout.reward: {who} returned {values[name][i]} {at}; expected finite numbers")
        if advantage == "maxrl" and values["reward/min"][i] < 0:
            raise InputError(
                f"rollout.reward: returned {values['reward/min'][i]:g} {at}; rollout.advantage: maxrl expects "
                "rewards >= 0: add a constant to it, or take rloo"
            )
        if not (math.isfinite(values["loss"][i]) and math.isfinite(values["grad_norm"][i])):
            norms = f"the loss is {values['loss'][i]:g}, the gradient norm {values['grad_norm'][i]:g} {at}"
            raise InputError(
                f"{norms}; the weights were not touched: lower training.learning_rate; --resume goes on from the last "
                "checkpoint, if there is one"
            )
    return values


class Console:
    """Lines that stay, and a progress line that rewrites itself on a terminal; elsewhere a plain line now and then.
    Of several processes rank 0 speaks."""

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.next_time = math.inf if rank_and_world()[0] else 0.0

    def line(self, text: str) -> None:
        if self.next_time < math.inf:
            print(f"\r\033[K{text}" if self.terminal else text, flush=True)

    def progress(self, text: str) -> None:
        if self.next_time == math.inf:
            return
        if self.terminal:
            columns = os.get_terminal_size(sys.stdout.fileno()).columns
            print(f"\r\033[K{text[: columns - 1]}", end="", flush=True)
        elif time.monotonic() >= self.next_time:
            print(text, flush=True)
            self.next_time = time.monotonic() + 10


# --- The story --------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"keys, with their defaults:\n{describe_keys()}",
    )
    parser.add_argument("--config", default="config.yaml", metavar="FILE", help="the run's YAML file (config.yaml)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--resume",
        metavar="DIR|auto",
        help="go on with the run of ckpt/<run> and its config; auto: this config's run, if it exists",
    )
    mode.add_argument(
        "--evaluate", metavar="DIR", help="print the eval figures of ckpt/<run> (last.pt) or of a file in it"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the config")
    return parser.parse_intermixed_args(argv)


def train(args: argparse.Namespace) -> int:
    console = Console()

    # Config: the file's keys, or the checkpoint's when a run goes on; the command line wins.
    overrides = "command line", dict(map(parse_override, args.overrides))
    state, checkpoint = None, args.resume or args.evaluate
    if checkpoint in (None, "auto"):
        config = check((args.config, read_yaml(args.config)), overrides)
        config["training"]["run_name"] = config["training"]["run_name"] or Path(args.config).stem
        run_dir = Path(config["training"]["ckpt_dir"], config["training"]["run_name"])
        checkpoint = run_dir if checkpoint == "auto" and (run_dir / "last.pt").exists() else None
    if checkpoint:
        run_dir = Path(checkpoint)
        state = load_checkpoint(run_dir)
        run_dir = run_dir if run_dir.is_dir() else run_dir.parent  # given a file of the run
        config = check((str(run_dir), flatten(state["config"], str(run_dir))), overrides)
        config["training"] |= {"ckpt_dir": str(run_dir.parent), "run_name": run_dir.name}
    data, roll, training = (SimpleNamespace(**config[section]) for section in ("data", "rollout", "training"))
    log_dir = Path(training.log_dir, training.run_name)
    if not args.resume and not args.evaluate:
        for used in (run_dir, log_dir):
            if used.is_dir() and any(used.iterdir()):
                raise InputError(
                    f"{used} exists: go on with --resume auto, delete it, or name a new run with training.run_name=NAME"
                )
    task, rewards = TASKS[config["task"]], load_rewards(config)
    micro_batch_size = training.micro_batch_size or training.batch_size
    rank, world = rank_and_world()
    per_rank, uneven = divmod(training.batch_size, world)  # images of each batch that are this process's
    if uneven or (world > 1 and per_rank % (training.micro_batch_size or per_rank)):
        raise InputError(
            f"training.batch_size: {training.batch_size} does not fall into equal parts for {world} processes"
            + (f" of whole micro-batches of {training.micro_batch_size}" if training.micro_batch_size else "")
        )

    # Data: what the training folder's format says of the classes holds for the evaluation's, too.
    classes = state["classes"] if state else None
    train_set = eval_set = None
    if not args.evaluate:
        train_set = task.open_dataset(data.train_dir, config, classes)
        classes = train_set.classes
        console.line(f"{data.train_dir}: {len(train_set)} images of {len(classes)} classes")
    if data.eval_dir and (Path(data.eval_dir).exists() or args.evaluate):
        eval_set = task.open_dataset(data.eval_dir, config, classes)
        console.line(f"{data.eval_dir}: {len(eval_set)} images")
    elif args.evaluate:
        raise InputError("data.eval_dir: null; --evaluate needs a folder of images")
    else:
        reason = f"{data.eval_dir}: no such folder" if data.eval_dir else "null"
        console.line(f"data.eval_dir: {reason}; training without evaluation")
    num_classes = config["model"]["num_classes"] or len(classes)
    if num_classes != len(classes):
        raise InputError(
            f"model.num_classes: {num_classes}, but {data.train_dir} holds {len(classes)} classes; set it to null"
        )
    cache, size = keep_decoded(data, train_set, eval_set)
    if not args.evaluate:
        kept = "kept in memory after the first epoch" if cache else "decoded again each epoch"
        kept += " by each process" if world > 1 else ""
        console.line(f"data.cache: {data.cache}: {size / 1e6:.0f} MB of decoded images, {kept}")

    # Model.
    device = pick_device(training.device)
    model = build_model(config, num_classes, device)
    if config["model"]["checkpoint_path"] and not state:
        console.line(load_weights(model, config["model"]["checkpoint_path"]))
    if state:
        try:
            model.load_state_dict(state["model"])
        except RuntimeError:
            raise InputError(f"{run_dir}: its weights do not fit the model section; drop the model.* keys") from None
    reference = None
    if training.kl_coef:
        reference = copy.deepcopy(model).requires_grad_(False)
        if state and "reference" not in state:
            raise InputError(
                "training.kl_coef: this run keeps no reference; start a new one with model.checkpoint_path"
            )
        if state:
            reference.load_state_dict(state["reference"])
    if config["model"]["compile"]:
        torch._dynamo.config.recompile_limit = 32  # each shape is compiled once, there are about ten
        for network in filter(None, (model, reference)):
            network.compile(fullgraph=True, dynamic=False)
    console.line(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}, "
        f"{'bfloat16 autocast' if model.autocast_dtype else 'float32'}"
    )

    control = connect(device)  # after the checks: what is wrong for all is said by one
    bad_images: set[str] = set()

    def report(bad: dict[str, str]) -> None:
        for path in bad.keys() - bad_images:
            console.line(f"warning: {bad[path]}")
        bad_images.update(bad)
        images = len(train_set or ()) + len(eval_set or ())
        if len(bad_images) > images / 100:
            raise InputError(
                f"data.on_bad_image: skip: {len(bad_images)} of {images} images (training and evaluation) cannot be "
                f"decoded, more than 1 %; the last: {next(iter(bad.values()))}"
            )

    loader = {"num_workers": data.num_workers, "pin_memory": device.type == "cuda", "report": report}
    eval_batches = None  # decoded once, if they are kept

    def evaluate_now():
        nonlocal eval_batches
        batches = eval_batches or ordered_batches(
            eval_set, micro_batch_size, rank, world, on_bad="drop" if data.on_bad_image == "skip" else "error", **loader
        )
        if cache:
            batches = eval_batches = list(batches)
        return evaluate(model, batches, eval_set, config, device, control)

    if args.evaluate:
        evaluation = evaluate_now()
        if not rank:
            console.line(f"step {state['step']}: {eval_line(evaluation.figures())}")
        return 0

    trained_on = vision_task.fingerprint(train_set)
    optimizer = build_optimizer(model, training)
    start, best_figure, live_share, dead_steps, rows = 0, -1.0, 1.0, 0, []
    if state:
        hyperparameters = [
            {k: group[k] for k in ("weight_decay", "betas", "lr_scale")} for group in optimizer.param_groups
        ]
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError:
            raise InputError(
                f"{run_dir}: its optimizer does not fit training.freeze_blocks: {training.freeze_blocks} with "
                f"training.layer_decay: {training.layer_decay}; drop these keys, or start a new run from it with "
                "model.checkpoint_path"
            ) from None
        for group, own in zip(optimizer.param_groups, hyperparameters):
            group |= own  # may be overridden
        state = {"best_figure": state.get("best_accuracy", -1.0)} | state  # its name in older checkpoints
        start, best_figure, live_share, dead_steps, rows = (
            state[name] for name in ("step", "best_figure", "live_share", "dead_steps", "rows")
        )
        rows = [{name: value.to(device) for name, value in row.items()} for row in rows]
        console.line(f"{run_dir}: going on after step {start}")
        if state.get("data", trained_on) != trained_on:
            console.line(
                f"warning: {data.train_dir} holds {trained_on}, it held {state['data']}: the rest of this epoch is of "
                "another order"
            )
        if start >= training.steps:
            console.line(f"nothing to do: training.steps is {training.steps}")
            return 0

    def save(best: bool) -> Path:
        progress = {"step": step + 1, "best_figure": best_figure, "live_share": live_share}
        progress |= {"dead_steps": dead_steps, "rows": rows, "config": config, "classes": classes, "data": trained_on}
        weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if reference:
            weights["reference"] = reference.state_dict()
        if writer:
            writer.flush()
        return save_checkpoint(progress | weights, run_dir, best=best, keep=training.keep_checkpoints)

    stop: list[int] = []  # the signal that asked for it

    def on_signal(number: int, _frame) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    # Train: rollout -> reward -> update -> log -> evaluate -> save.
    order = partial(epoch_order, seed=training.seed, size=len(train_set))
    part = slice(rank * per_rank, (rank + 1) * per_rank)
    steps = range(start, training.steps)
    batches = stream_batches(
        train_set, order, training.batch_size, steps, cache=cache, part=part, on_bad=data.on_bad_image, **loader
    )
    may_replay = training.objective == "grpo" and training.kl_coef == training.entropy_coef == 0
    writer = None
    begin = interval_begin = time.perf_counter()
    interval_steps, waited = 0, 0.0
    for step in range(start, training.steps):
        before = time.perf_counter()
        batch = next(batches).to(device)
        waited += time.perf_counter() - before
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(step, training)
        keep_graph = not may_replay or live_share >= REPLAY_BELOW
        rows.append(
            training_step(model, optimizer, batch, rewards, config, step, keep_graph=keep_graph, reference=reference)
        )
        done, interval_steps = step + 1, interval_steps + 1
        stopping = agreed(stop, control)
        log_due = done % training.log_interval == 0 or done in (1, training.steps)
        eval_due = eval_set is not None and (done % training.eval_interval == 0 or done == training.steps)
        save_due = done % training.save_interval == 0 or done == training.steps or stopping
        Distribution.set_default_validate_args(False)  # the first step was checked
        if not (log_due or eval_due or save_due):
            continue

        values = read_rows(rows, done - len(rows) + 1, roll.advantage if training.objective == "grpo" else "")
        if rank:  # rank 0 logs and saves; the others go the same way
            live_share = sum(values["groups/live"]) / len(rows) if log_due else live_share
            rows = [] if log_due else rows
            if eval_due:
                evaluate_now()
            if stopping:
                break
            continue
        writer = writer or SummaryWriter(log_dir, purge_step=start + 1)
        if done == 1:
            writer.add_text("config", f"```\n{yaml.safe_dump(config, sort_keys=False)}```", 1)
        if log_due:
            means = {name: sum(column) / len(column) for name, column in values.items()}
            live_share = means["groups/live"]
            seconds = time.perf_counter() - interval_begin
            speed = interval_steps * training.batch_size / seconds
            for name, value in means.items():
                writer.add_scalar(name, value, done)
            writer.add_scalar("learning_rate", learning_rate(step, training), done)
            writer.add_scalar("speed/images_per_second", speed, done)
            writer.add_scalar("speed/data_wait", waited / seconds, done)
            writer.add_scalar("data/bad_images", len(bad_images), done)
            left = timedelta(seconds=int((time.perf_counter() - begin) / (done - start) * (training.steps - done)))
            console.progress(
                f"step {done}/{training.steps}  reward {means['reward/mean']:.3f}  live groups {live_share:.0%}  "
                f"{speed:.0f} images/s  {left} left"
            )
            for live in values["groups/live"]:
                dead_steps = 0 if live > 0 else dead_steps + 1
                if dead_steps == WARN_DEAD_STEPS and training.objective == "grpo":
                    console.line(
                        f"warning: no live group in {WARN_DEAD_STEPS} steps: the rewards of every group are all equal, "
                        "so nothing is learned. Try more rollout.actions_per_sample or num_mc_samples, rollout.action: "
                        "sample, a reward with partial credit, or supervised weights to start from "
                        "(model.checkpoint_path)"
                    )
        best = False
        if eval_due:
            evaluation = evaluate_now()
            figures = evaluation.figures()
            for name, value in figures.items():
                writer.add_scalar(name, value, done)
            writer.add_histogram("groups/success_rate", torch.cat([row["group_rewards"] for row in rows]).cpu(), done)
            writer.add_image("eval/most_uncertain", evaluation.draw(), done)
            best = figures[task.BEST] > best_figure  # not if it is NaN, for want of objects
            best_figure = figures[task.BEST] if best else best_figure
            console.line(f"step {done}: {eval_line(figures)}")
        if log_due:
            rows = []
        if save_due or best:
            path = save(best)
        interval_begin, interval_steps, waited = time.perf_counter(), 0, 0.0
        if stopping:
            break
    if rank:
        return 128 + stopping if stopping and done < training.steps else 0
    writer.close()
    if stopping and done < training.steps:
        console.line(f"stopped after step {done}, saved {path}; go on with --resume {run_dir}")
        return 128 + stopping
    console.line(f"done: {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input, 130 or 143 after Ctrl-C or SIGTERM."""
    try:
        return train(parse(argv))
    except (InputError, OSError) as error:  # OSError: the disk under the TensorBoard events, say
        rank = rank_and_world()[0]
        who = f"train.py, rank {rank}: " if rank else "train.py: "
        if not rank or dist.is_initialized():  # before they meet all processes find the same
            print(f"\n{who}{error}" if sys.stdout.isatty() else f"{who}{error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"train.py: out of memory ({one_line(error)[:120]}); lower training.micro_batch_size, "
            "rollout.num_mc_samples or model.dropout_blocks, or set model.activation_checkpointing; --resume goes on "
            "from the last checkpoint",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        print(f"train.py: another process is gone, or out of reach ({one_line(error)[:160]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first step or after the last: there is nothing to save
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
