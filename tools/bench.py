"""What a training step costs, side by side with what it should cost, as a markdown table.

    uv run tools/bench.py                          # config.yaml and config_digits.yaml, under five minutes on 2 cores
    uv run tools/bench.py --config my.yaml
    uv run tools/bench.py --tasks                  # the step of config_segmentation.yaml and config_detection.yaml
    uv run tools/bench.py --frozen --images DIR    # a ViT-S/14 at 98x98 whose frozen blocks' tokens are kept
    uv run tools/bench.py --plan --config config_24GB.yaml    # GPU memory of a config by calculation, in no time
    uv run tools/bench.py --scan 1000000                      # finding so many image files
    uv run tools/bench.py --scan-boxes 100000                 # opening so many images with seven boxes each

On the CPU in float32, best with nothing else running. The ratios are of wall-clock times of A, B, A, B, ... in one
process, pair by pair. Figures that no config changes the meaning of are measured on the first config.
"""

import argparse
import copy
import ctypes
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.ops import aten
from torch.utils import flop_counter

import build
from augment import augmentation
from config import read_yaml
from data_types import InputError, TensorMiniBatch
from detection_task import DetectionDataset
from folders import find_images, upright_sizes
from grpo import keyed_rng, mean_counted, rollout, size_of, update_policy
from images import Loading, Prepared, epoch_order, item_shape, keep_decoded, micro_batches, prepare, stream_batches
from report import Clock
from token_cache import Cached, TokenCache, kept_blocks
from vision_task import Task, VisionClassificationDataset
from vit_model import VisionTransformer

# What the ratios are about, whatever else the config asks for.
GRPO = {"training.objective": "grpo", "training.kl_coef": 0, "training.entropy_coef": 0, "training.update_epochs": 1}
GRPO |= {"rollout.action": "sample", "rollout.num_mc_samples": 4, "rollout.actions_per_sample": 16}
ALL_BLOCKS = GRPO | {"model.dropout_blocks": None}
DEEP = {"image_size": 224, "patch_size": 32, "embed_dim": 192, "num_heads": 3, "depth": 8, "dropout_blocks": 2}
LIVE_EVERY = 5  # 20 % live groups
VIT_S = {"patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0, "image_size": 98}
VIT_S = {f"model.{name}": value for name, value in VIT_S.items()}
VIT_S |= {"rollout.num_mc_samples": 2, "training.batch_size": 64, "training.micro_batch_size": None}


@dataclass
class Row:
    """A line of the table. values: one per repetition. at_most, at_least: the bound, if there is one."""

    figure: str
    values: list[float]
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        quartiles = statistics.quantiles(self.values, n=4, method="inclusive") if self.values[1:] else self.values * 3
        low, median, high = (f"{x:.0f}" if quartiles[1] >= 10 else f"{x:.3f}" for x in quartiles)
        measured, bound, beyond = f"{median} ({low}–{high})", "–", False
        if self.at_most is not None:
            bound, beyond = f"≤ {self.at_most:.2f}", quartiles[1] > self.at_most
        if self.at_least is not None:
            bound, beyond = f"≥ {self.at_least:.2f}", quartiles[1] < self.at_least
        return f"| {self.figure} | {f'**{measured}, beyond**' if beyond else measured} | {bound} |"


@dataclass
class Setup:
    """What `train.py` has before the first step."""

    task: Task
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    rewards: dict
    reference: torch.nn.Module | None
    batch: TensorMiniBatch | None = None

    @cached_property
    def is_softmax(self) -> bool:
        """Whether a plain supervised step of this task is a cross-entropy."""
        with torch.no_grad():
            return isinstance(self.task.policy(self.task.network(self.model)(self.batch.inputs[:1, :3])), Categorical)


def configure(path: str, overrides: dict) -> Task:
    here = {"training.device": "cpu", "training.dtype": "float32"}
    return build.configure((path, read_yaml(path)), ("bench.py", overrides | here))[1]


def some_live(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """A reward that makes the groups of every fifth image live, the others dead: [B, T, A]."""
    alternating = torch.arange(actions[0].numel()).view(actions.shape[1:]) % 2
    return alternating * (metadata["indices"] % LIVE_EVERY == 0)[:, None, None].float()


def load_images(task: Task, count: int) -> TensorMiniBatch:
    """The first `count` training images, uint8; decoded into their place, so that memory sees the batch once."""
    dataset = task.open(task.config["data"]["train_dir"])
    build.hand_over_counts(task, dataset)
    indices = torch.arange(count) % len(dataset)
    images = torch.empty(count, *item_shape(dataset), dtype=torch.uint8)
    for image, i in zip(images, indices.tolist()):
        image.copy_(dataset[i])
    return dataset.batch(indices, images)


def build_setup(path: str, overrides: dict, images: int | None = None) -> Setup:
    """images: how many are loaded, None for the config's batch. A learning rate of 0 changes no arithmetic, and the
    model stays untrained, so that live groups stay live."""
    task = configure(path, overrides)
    data, _, training = build.sections(task.config)
    model = build.build_model(task, len(task.open(data.train_dir).classes), torch.device("cpu"))
    reference = copy.deepcopy(model).requires_grad_(False) if training.kl_coef else None
    if task.config["model"]["compile"]:
        model.compile(fullgraph=True, dynamic=False)
        torch._dynamo.config.recompile_limit = 64  # of all models and shapes of this process
    optimizer = build.build_optimizer(model, training)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    count = training.batch_size if images is None else images
    batch = load_images(task, count) if count else None
    return Setup(task, model, optimizer, build.load_rewards(task), reference, batch)


def grpo_step(
    s: Setup, step: int = 0, keep_graph: bool = True, network: torch.nn.Module | None = None
) -> dict[str, Tensor]:
    """What `train.py` does between having a batch and having its metrics. network: None for the task's."""
    training = build.sections(s.task.config)[2]
    network, roll = network or s.task.network(s.model), build.rollout_settings(s.task.config)
    policy = partial(s.task.policy, progress=step / training.steps)
    settings, key = build.update_settings(s.task, len(s.batch)), (training.seed, step)
    reference = s.task.network(s.reference) if s.reference else None
    episodes = (
        rollout(network, part, s.rewards, policy, roll, key=(*key, place), keep_graph=keep_graph)
        for place, part in micro_batches(s.batch, settings.micro_batch_size, key, augmentation(s.task))
    )
    return update_policy(
        network, s.optimizer, episodes, policy, settings, batch_size=size_of(s.batch), reference=reference
    )


def plain_step(s: Setup, inputs: Tensor, masks: dict[str, Tensor] | None) -> None:
    """Forward, cross-entropy (without a plain softmax the task's supervised loss), backward, AdamW; on the
    deterministic network without masks."""
    outputs = s.model(inputs, masks)  # [B, T, …], or [B, …] without masks
    outputs = s.task.arrange(outputs if masks else outputs.unsqueeze(1))
    targets = s.batch.targets[:, None, None].expand(-1, outputs.shape[1], *[-1] * s.batch.targets.ndim)
    if s.is_softmax:
        if s.batch.counted is not None:
            targets = targets.where(s.batch.counted[:, None, None], -100)  # what cross_entropy ignores
        loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    else:
        loss = mean_counted(s.task.supervised_loss(s.task.policy(outputs, 0.0), targets), s.batch.counted)
    s.optimizer.zero_grad()
    loss.backward()
    s.optimizer.step()


def prepared(s: Setup, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs and masks as `grpo_step` meets them at `step`, in one micro-batch."""
    data, roll, training = build.sections(s.task.config)
    _, part = next(micro_batches(s.batch, len(s.batch), (training.seed, step), augmentation(s.task)))
    with keyed_rng(training.seed, step, "masks", 0):
        return prepare(part.inputs, data.mean, data.std), s.model.sample_masks(len(part), roll.num_mc_samples)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed. Two kinds of steps in turn make it give memory back to the system and fetch it
    again page by page, time that neither takes when it runs alone (there are no page faults then)."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-1, 2**31 - 1), (-4, 0)):  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: no mapping by itself
            libc.mallopt(option, value)


def pairs(a: Callable, b: Callable, budget: float) -> list[tuple[float, float]]:
    """Seconds of a and b in turn, at least three times each, until `budget` seconds are over."""
    for warm_up in (a, b, a, b):
        warm_up()
    end, times = time.perf_counter() + budget, []
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        a()
        between = time.perf_counter()
        b()
        times.append((between - begin, time.perf_counter() - between))
    return times


def ratio(figure: str, a: Callable, b: Callable, budget: float, at_most: float | None) -> Row:
    return Row(figure, [x / y for x, y in pairs(a, b, budget)], at_most)


def step_over_plain(path: str, overrides: dict, what: str, at_most: float | None, budget: float) -> Row:
    """The whole step ÷ a plain step under the same masks, where every group is live, or nearly so."""
    s = build_setup(path, overrides | {"training.micro_batch_size": None})
    shares = [float(grpo_step(s, step)["groups/live"]) for step in range(3)]
    step = shares.index(max(shares))  # draws are a function of the step, so it is as live each time
    inputs, masks = prepared(s, step)
    figure = f"GRPO step ÷ plain step under the same masks, {path}, {what}, {shares[step]:.0%} of groups live"
    return ratio(figure, lambda: grpo_step(s, step), lambda: plain_step(s, inputs, masks), budget, at_most)


def trunk_once(path: str, budget: float) -> Row:
    """T = 8 with the last 2 of 8 blocks stochastic ÷ one deterministic supervised pass over the same images."""
    passes, depth, last = 8, DEEP["depth"], DEEP["dropout_blocks"]
    overrides = GRPO | {f"model.{name}": value for name, value in DEEP.items()}
    overrides |= {"rollout.num_mc_samples": passes, "training.micro_batch_size": None, "training.batch_size": 32}
    s = build_setup(path, overrides)
    inputs, _ = prepared(s, 0)
    predicted = (depth - last + last * passes) / depth
    figure = f"T = 8, dropout in 2 of 8 blocks ÷ one supervised pass (blocks: {predicted:.2f})"
    return ratio(figure, lambda: grpo_step(s), lambda: plain_step(s, inputs, None), budget, 1.1 * predicted)


def mostly_dead(path: str, budget: float) -> Row:
    """Replay of 20 % live groups ÷ one pass with all groups live; all blocks stochastic."""
    size = configure(path, ALL_BLOCKS).config["training"]["batch_size"]
    every = build_setup(path, ALL_BLOCKS, max(size - size % LIVE_EVERY, LIVE_EVERY))
    some = replace(every, rewards={"some_live": (some_live, 1.0)})

    def replay() -> None:
        share = float(grpo_step(some, keep_graph=False)["groups/live"])
        assert abs(share - 1 / LIVE_EVERY) < 1e-6, share

    figure = "step with 20 % live groups ÷ all live in one pass, all blocks stochastic"
    return ratio(figure, replay, lambda: grpo_step(every), budget, 0.60)


class NoTrunk(torch.nn.Module):
    """The network of a batch whose inputs are the tokens that enter block `start`."""

    def __init__(self, network: Prepared, start: int):
        super().__init__()
        self.network, self.start, self.sample_masks = network, start, network.sample_masks

    def forward(self, tokens: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
        return self.network.arrange(self.network.model(tokens, masks, start=self.start))


def frozen_trunk(path: str, images: str | None, budget: float) -> Iterator[Row]:
    """A step on a batch met before, as `train.py` makes it: with the frozen blocks run again ÷ with their tokens kept,
    and that ÷ a step whose batch is the tokens; for one trained block, and for none (the head alone is trained)."""
    for frozen, dropout_blocks, at_least in ((11, 1, 8.0), (12, 0, 25.0)):
        overrides = GRPO | VIT_S | {"training.freeze_blocks": frozen, "model.dropout_blocks": dropout_blocks}
        s = build_setup(path, overrides | ({"data.train_dir": images} if images else {}))
        network, dataset = s.task.network(s.model), s.task.open(s.task.config["data"]["train_dir"])
        start = kept_blocks(s.task.config["model"], frozen)
        tokens = Cached(network, start, None).trunk(s.batch.inputs)
        cached = Cached(network, start, TokenCache(torch.empty(len(dataset), *tokens.shape[1:])))
        bare = replace(s, batch=replace(s.batch, inputs=tokens))
        what = f"ViT-S/14 at 98x98, {frozen} blocks frozen, dropout_blocks {dropout_blocks}"
        times = pairs(lambda s=s: grpo_step(s), lambda s=s, c=cached: grpo_step(s, network=c), budget)
        yield Row(f"images/s, {what}, tokens kept", [len(s.batch) / y for _, y in times])
        yield Row("the same, tokens computed each time", [len(s.batch) / x for x, _ in times])
        yield Row("their ratio", [x / y for x, y in times], at_least=at_least)
        kept = partial(grpo_step, s, network=cached)
        without = partial(grpo_step, bare, network=NoTrunk(network, start))
        yield ratio("tokens kept ÷ a step without a trunk", kept, without, budget / 3, 1.25 if dropout_blocks else None)


def actions_are_free(path: str, budget: float) -> Row:
    """A = 64 ÷ A = 1, T = 4."""
    many = build_setup(path, GRPO | {"rollout.actions_per_sample": 64})
    one = replace(many, task=configure(path, GRPO | {"rollout.actions_per_sample": 1}))
    return ratio("A = 64 ÷ A = 1", lambda: grpo_step(many), lambda: grpo_step(one), budget, 1.10)


def resident(line: str) -> int:
    """VmRSS or its peak VmHWM in bytes. (getrusage's peak may be the parent's: it survives exec.)"""
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) * 1024


def memory_growth(path: str, way: str, size: int) -> int:
    """In a fresh process: bytes that three steps add to the peak, over the idle process with its model."""
    s = build_setup(path, GRPO | {"training.batch_size": size, "training.micro_batch_size": 32}, images=0)
    if way == "replay":
        s.rewards = {"some_live": (some_live, 1.0)}
    idle = resident("VmRSS")
    s.batch = load_images(s.task, size)
    for step in range(3):
        grpo_step(s, step, keep_graph=way != "replay")
    return resident("VmHWM") - idle


def memory(path: str, threads: int, repetitions: int = 2) -> Iterator[Row]:
    """Peak memory of batch 256, one pass and replay, ÷ one pass of batch 32; micro-batch 32. Linux only."""
    if not Path("/proc/self/status").exists():
        return

    def fresh(way: str, size: int) -> int:
        command = [sys.executable, __file__, "--config", path, "--threads", str(threads), "--memory", way, str(size)]
        return int(subprocess.check_output(command))

    runs = [(fresh("one pass", 32), fresh("one pass", 256), fresh("replay", 256)) for _ in range(repetitions)]
    small = statistics.median(run[0] for run in runs) / 1e6
    for i, way in ((1, "one pass"), (2, "replay")):
        figure = f"growth of peak memory, micro-batch 32, batch 256 ({way}) ÷ batch 32 (one pass, {small:.0f} MB)"
        yield Row(figure, [run[i] / run[0] for run in runs], 1.25)


def data_wait(path: str, windows: int = 3, steps: int = 10) -> Row:
    """Share of the time spent waiting for data after the first epoch, in windows of steps, 1 worker."""
    s = build_setup(path, {"data.num_workers": 1}, images=0)
    data, _, training = build.sections(s.task.config)
    dataset = s.task.open(data.train_dir)
    order = partial(epoch_order, seed=training.seed, size=len(dataset))
    cache, _ = keep_decoded(data, dataset)  # train.py adds the evaluation set
    first = -(-len(dataset) // training.batch_size)  # steps of the first epoch: drawn, not trained on
    last = first + windows * steps
    batches = stream_batches(dataset, order, training.batch_size, range(last), Loading(num_workers=1), cache=cache)
    for _ in range(first):
        next(batches)
    clock, values = Clock(), []
    for step in range(first, last):
        s.batch = clock.wait(partial(next, batches))
        grpo_step(s, step)
        if clock.steps == steps:
            values.append(clock.waited / (time.perf_counter() - clock.interval_begin))
            clock.restart()
    kept = "cached" if cache else "decoded each epoch"
    return Row(f"waiting for data ÷ step, {path}, 1 worker, after the first epoch ({kept})", values, 0.05)


def count_flop(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in `function`."""
    attention = {  # torch has these formulas for the CUDA kernels only
        aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop.__wrapped__,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop.__wrapped__,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=attention) as counter:
        function()
    return counter.get_total_flops()


def speed(path: str, budget: float, at_least: float | None, size: int = 2048) -> Iterator[Row]:
    """Images/s and the share of a large matmul's FLOP/s that the step as configured reaches."""
    s = build_setup(path, {"model.compile": False})
    flop = count_flop(lambda: grpo_step(s))
    s = build_setup(path, {})
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    times = pairs(lambda: grpo_step(s), lambda: torch.mm(a, b, out=out), budget)
    peak = statistics.median(2 * size**3 / y for _, y in times)
    values = [(flop / x) / (2 * size**3 / y) for x, y in times]
    yield Row(f"FLOP/s of the step ÷ of a matmul ({peak / 1e9:.0f} GFLOP/s), {path}", values, at_least=at_least)
    yield Row(f"images/s, {path}", [len(s.batch) / x for x, _ in times])


def scan(count: int, classes: int = 1000) -> tuple[float, float]:
    """Seconds, and bytes of memory per file, to find `count` image files in an image folder. Linux only."""
    with tempfile.TemporaryDirectory() as folder:
        for c in range(classes):
            os.mkdir(f"{folder}/class_{c:04d}")
            for i in range(c, count, classes):
                open(f"{folder}/class_{c:04d}/image_{i:08d}.jpg", "w").close()
        before, begin = resident("VmRSS"), time.perf_counter()
        dataset = VisionClassificationDataset(folder, 224)
        return time.perf_counter() - begin, (resident("VmRSS") - before) / len(dataset)


def scan_boxes(count: int, budget: float, per_image: int = 7) -> Row:
    """Opening a detection folder of `count` images, which checks all of it ÷ only finding the files and their sizes."""
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/images")
        Image.new("RGB", (640, 480)).save(picture := io.BytesIO(), "JPEG")
        for i in range(count):
            Path(f"{folder}/images/{i:012d}.jpg").write_bytes(picture.getvalue())
        images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in range(count)]
        corner, size = torch.rand(2, count * per_image, 2, dtype=torch.float64) * 200 + 1
        rows = torch.cat([corner, size], 1).round(decimals=2).tolist()
        rows = [{"bbox": bbox, "image_id": i % count, "category_id": 1 + i % 80} for i, bbox in enumerate(rows)]
        rows = [row | {"id": i, "area": 5.5, "iscrowd": 0, "segmentation": []} for i, row in enumerate(rows)]
        coco = {"images": images, "annotations": rows, "categories": [{"id": 1 + i, "name": f"{i}"} for i in range(80)]}
        Path(folder, "annotations.json").write_text(json.dumps(coco))
        del images, rows, coco

        def headers() -> None:
            assert set(upright_sizes(find_images(folder))) == {(640, 480)}

        def whole() -> None:
            assert sum(map(len, DetectionDataset(folder, 224, 16).boxes)) == count * per_image

        figure = f"opening {count} images with {per_image} boxes each ÷ finding them and their sizes"
        times = pairs(whole, headers, budget)
        print(f"{statistics.median(y for _, y in times):.1f} s to find the images and their sizes", flush=True)
        return Row(figure, [x / y for x, y in times], 1.5)


def memory_plan(task: Task, world: int = 1) -> dict[str, float]:
    """Bytes on each of `world` GPUs: weights, gradients and AdamW's two moments in float32, and what the forward pass
    of a micro-batch keeps for the backward pass. A block keeps, per token and unit of embed_dim, the inputs of norms,
    linear layers and GELU, and q, k, v and the output of attention: 8 + 2 · mlp_ratio numbers, two more with rotary
    positions, of which under bfloat16 autocast only the norms' inputs are float32; with activation checkpointing its
    input alone, and one block whole. What precedes the first mask runs once per image, the rest T times; the last block
    of a classifier keeps little more than norm1's input and output, or with rotary positions what attention keeps."""
    config = task.config
    model, training = SimpleNamespace(**config["model"]), build.sections(config)[2]
    with torch.device("meta"):
        vit = VisionTransformer(**build.shape_of(config), num_classes=1000)
    params, tokens = sum(p.numel() for p in vit.parameters()), 1 + vit.num_patches
    passes, everywhere = config["rollout"]["num_mc_samples"], model.dropout_blocks is None
    stochastic = model.depth if everywhere else model.dropout_blocks
    after = model.depth if everywhere else max(stochastic - 1, 0)  # attentions that a mask precedes
    attentions = model.depth - after + after * passes  # runs, per image
    mlps = model.depth - stochastic + stochastic * passes
    number = 4 if training.dtype == "float32" else 2  # bytes; auto: bfloat16 on a GPU
    rotated = 0 if vit.rotary is None else 2  # q and k, beside those that are not
    attention = 4 + (5 + rotated) * number  # per token and unit of embed_dim, as what follows
    mlp = 4 + (1 + 2 * model.mlp_ratio) * number
    if model.activation_checkpointing:
        kept = 4 * (attentions + passes) + passes * (attention + mlp)
    elif task.dense:
        kept = attentions * attention + mlps * mlp
    else:  # of the last block one token alone asks and goes on
        ends, last = passes if after else 1, attention if rotated else 4 + number
        kept = (attentions - ends) * attention + ends * last
        kept += (mlps - (passes if stochastic else 1)) * mlp
    per_image = tokens * model.embed_dim * kept
    micro = training.micro_batch_size or training.batch_size // world
    return {
        "parameters": params,
        "weights, gradients, AdamW": 16 * params,
        "activations per image": per_image,
        "images at a time": micro,
        "activations": per_image * micro,
        "in all": 16 * params + per_image * micro,
    }


def figures(args: argparse.Namespace) -> Iterator[Row]:
    """All rows of the table, each as soon as it is measured."""
    first, budget = args.config[0], args.seconds
    if args.frozen:
        yield from frozen_trunk(first, args.images, budget)
        return
    if args.tasks:
        for path, at_most in (("config_segmentation.yaml", 1.12), ("config_detection.yaml", 1.15)):
            yield step_over_plain(path, {"rollout.actions_per_sample": 4}, "A = 4", None, budget)
            yield step_over_plain(path, {}, "as shipped", at_most, budget)
            yield from speed(path, budget, None)
        return
    for path in args.config:
        yield step_over_plain(path, ALL_BLOCKS, "all blocks stochastic", 1.10, budget)
    yield trunk_once(first, budget)
    yield mostly_dead(first, budget)
    yield actions_are_free(first, budget)
    yield from memory(first, args.threads)
    yield data_wait(first)
    for path in args.config:
        yield from speed(path, budget, 0.5 if path == first else None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["config.yaml", "config_digits.yaml"], metavar="FILE")
    parser.add_argument("--tasks", action="store_true", help="masks and boxes instead (data/scenes has to be there)")
    parser.add_argument("--frozen", action="store_true", help="kept tokens of frozen blocks instead")
    parser.add_argument("--images", metavar="DIR", help="for --frozen: class folders of images (the config's)")
    parser.add_argument("--plan", action="store_true", help="GPU memory of the configs, by calculation")
    parser.add_argument("--scan", type=int, metavar="N", help="time and memory to find N image files")
    parser.add_argument("--scan-boxes", type=int, metavar="N", help="time to open N images with boxes")
    parser.add_argument("--gpus", type=int, default=1, help="for --plan: over how many the batch is split (1)")
    parser.add_argument("--seconds", type=float, default=15, help="of repetitions for each figure (15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's (all cores)")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # how `memory` starts itself
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    Distribution.set_default_validate_args(False)  # as after train.py's first step
    begin = time.perf_counter()
    try:
        if args.memory:
            print(memory_growth(args.config[0], args.memory[0], int(args.memory[1])))
        elif args.scan:
            taken, size = scan(args.scan)
            print(f"{args.scan} files: {taken:.1f} s, {size:.0f} bytes of memory each")
        elif args.scan_boxes:
            print(scan_boxes(args.scan_boxes, args.seconds))
        elif args.plan:
            for path in args.config:
                print(path)
                for name, value in memory_plan(build.configure((path, read_yaml(path)))[1], args.gpus).items():
                    counted = name in ("parameters", "images at a time")
                    print(f"  {name:26s} {f'{value:,.0f}' if counted else f'{value / 1e9:.3f} GB'}")
        else:
            keep_freed_memory()
            for path in args.config:
                configure(path, {})  # what is wrong with it is known before an hour of measuring
            print("| what | measured: median (quartiles) | must be |\n|---|---|---|", flush=True)
            for row in figures(args):
                print(row, flush=True)
            print(f"\n{args.threads} threads, torch {torch.__version__}, {time.perf_counter() - begin:.0f} s in all")
    except InputError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
