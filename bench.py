"""What a training step costs, side by side with what it should cost, as a markdown table.

    uv run bench.py                          # config.yaml and config_digits.yaml, under five minutes on 2 cores
    uv run bench.py --config my.yaml
    uv run bench.py --tasks                  # the step of config_segmentation.yaml and config_detection.yaml
    uv run bench.py --plan --config config_24GB.yaml    # GPU memory of a config by calculation, in no time
    uv run bench.py --scan 1000000                      # finding so many image files

On the CPU in float32, best with nothing else running. The ratios are of wall-clock times of A, B, A, B, ... in one
process, pair by pair. Figures that no config changes the meaning of are measured on the first config.
"""

import argparse
import copy
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import flop_counter
from torch.utils.data import Dataset

import train
from config import check, read_yaml
from data_types import InputError, TensorMiniBatch
from grpo import keyed_rng, mean_counted
from vision_task import prepare, stream_batches

CPU = torch.device("cpu")
GRPO = {  # what the ratios are about, whatever else the config asks for
    "training.objective": "grpo",
    "training.kl_coef": 0,
    "training.entropy_coef": 0,
    "training.update_epochs": 1,
    "rollout.action": "sample",
    "rollout.num_mc_samples": 4,
    "rollout.actions_per_sample": 16,
}
ALL_BLOCKS = GRPO | {"model.dropout_blocks": None}
DEEP = {"image_size": 224, "patch_size": 32, "embed_dim": 192, "num_heads": 3, "depth": 8, "dropout_blocks": 2}
LIVE_EVERY = 5  # 20 % live groups


@dataclass
class Row:
    """A line of the table. values: one per repetition. at_most, at_least: the bound, if there is one."""

    figure: str
    values: list[float]
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        low, median, high = quartiles(self.values)
        number = (lambda x: f"{x:.0f}") if median >= 10 else (lambda x: f"{x:.3f}")
        beyond = (self.at_most is not None and median > self.at_most) or (
            self.at_least is not None and median < self.at_least
        )
        bound = f"≤ {self.at_most:.2f}" if self.at_most is not None else ""
        bound = f"≥ {self.at_least:.2f}" if self.at_least is not None else bound
        measured = f"{number(median)} ({number(low)}–{number(high)})"
        return f"| {self.figure} | {f'**{measured}, beyond**' if beyond else measured} | {bound or '–'} |"


HEADER = "| figure | measured: median (quartiles) | must be |\n|---|---|---|"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, median, high


# --- The steps --------------------------------------------------------------------------------------------------------


@dataclass
class Setup:
    config: dict
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    rewards: dict
    reference: torch.nn.Module | None
    batch: TensorMiniBatch | None = None


def configure(path: str, overrides: dict) -> dict:
    here = {"training.device": "cpu", "training.dtype": "float32"}
    return check((path, read_yaml(path)), ("bench.py", overrides | here))


def some_live(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """A reward that makes the groups of every fifth image live, the others dead: [B, T, A]."""
    alternating = torch.arange(actions[0].numel()).view(actions.shape[1:]) % 2
    return alternating * (metadata["indices"] % LIVE_EVERY == 0)[:, None, None].float()


def open_dataset(config: dict) -> Dataset:
    return train.TASKS[config["task"]].open_dataset(config["data"]["train_dir"], config, None)


def load_images(config: dict, count: int) -> TensorMiniBatch:
    """The first `count` training images, uint8; decoded into their place, so that memory sees the batch once."""
    dataset = open_dataset(config)
    indices = torch.arange(count) % len(dataset)
    images = torch.empty(count, dataset.channels, dataset.image_size, dataset.image_size, dtype=torch.uint8)
    for image, i in zip(images, indices.tolist()):
        image.copy_(dataset[i])
    return dataset.batch(indices, images)


def build(config: dict) -> Setup:
    """What `train.py` has before the first step, but a learning rate of 0: that changes no arithmetic, and the model
    stays untrained, so that live groups stay live."""
    classes = open_dataset(config).classes
    training = SimpleNamespace(**config["training"])
    model = train.build_model(config, len(classes), CPU)
    reference = copy.deepcopy(model).requires_grad_(False) if training.kl_coef else None
    if config["model"]["compile"]:
        torch._dynamo.config.recompile_limit = 64  # of all models and shapes of this process
        model.compile(fullgraph=True, dynamic=False)
    optimizer = train.build_optimizer(model, training)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return Setup(config, model, optimizer, train.load_rewards(config), reference)


def build_with_images(path: str, overrides: dict, count: int | None = None) -> Setup:
    config = configure(path, overrides)
    return replace(build(config), batch=load_images(config, count or config["training"]["batch_size"]))


def grpo_step(s: Setup, step: int = 0, keep_graph: bool = True) -> dict[str, Tensor]:
    """What `train.py` does between having a batch and having its metrics."""
    return train.training_step(
        s.model, s.optimizer, s.batch, s.rewards, s.config, step, keep_graph=keep_graph, reference=s.reference
    )


def plain_step(s: Setup, inputs: Tensor, masks: dict[str, Tensor] | None) -> None:
    """Forward, cross-entropy (of boxes the supervised loss), backward, AdamW; on the deterministic network without
    masks."""
    task = train.TASKS[s.config["task"]]
    outputs = s.model(inputs, masks)  # [B, T, …], or [B, …] without masks
    outputs = outputs if masks else outputs.unsqueeze(1)
    targets = s.batch.targets[:, None, None].expand(-1, outputs.shape[1], *[-1] * s.batch.targets.ndim)
    if s.config["task"] == "detection":
        policy = task.policy_adapter(s.config, 0.0)(outputs)
        loss = mean_counted(task.supervised_loss(s.config)(policy, targets), s.batch.counted)
    else:
        if s.config["task"] == "segmentation":
            outputs = task.unpatchify(outputs, s.config["model"]["patch_size"])
            targets = targets.where(s.batch.counted[:, None, None], -100)  # what cross_entropy ignores
        loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    s.optimizer.zero_grad()
    loss.backward()
    s.optimizer.step()


def prepared(s: Setup, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs and masks as `grpo_step` meets them at `step`, in one micro-batch."""
    data, training = s.config["data"], s.config["training"]
    with keyed_rng(training["seed"], step, "flips", 0):
        inputs = prepare(s.batch.inputs, data["mean"], data["std"], data["augment"])
    with keyed_rng(training["seed"], step, "masks", 0):
        return inputs, s.model.sample_masks(len(inputs), s.config["rollout"]["num_mc_samples"])


def keep_freed_memory() -> None:
    """Have glibc keep what is freed. Two kinds of steps in turn make it give memory back to the system and fetch it
    again page by page, time that neither takes when it runs alone (there are no page faults then)."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-1, 2**31 - 1), (-4, 0)):  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: no mapping by itself
            libc.mallopt(option, value)


# --- Figures ----------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def pairs(a: Callable, b: Callable, budget: float) -> list[tuple[float, float]]:
    """Seconds of a and b in turn, at least three times each, until `budget` seconds are over."""
    for warm_up in (a, b, a, b):
        warm_up()
    end, times = time.perf_counter() + budget, []
    while len(times) < 3 or time.perf_counter() < end:
        times.append((seconds(a), seconds(b)))
    return times


def ratios(a: Callable, b: Callable, budget: float) -> list[float]:
    return [x / y for x, y in pairs(a, b, budget)]


def step_over_plain(path: str, budget: float) -> list[Row]:
    """The whole step ÷ a plain step under the same masks, T = 4, A = 16, all blocks stochastic, every group live."""
    s = build_with_images(path, ALL_BLOCKS | {"training.micro_batch_size": None})
    shares = [float(grpo_step(s, step)["groups/live"]) for step in range(3)]
    step = shares.index(max(shares))  # draws are a function of the step, so it is as live each time
    inputs, masks = prepared(s, step)
    values = ratios(lambda: grpo_step(s, step), lambda: plain_step(s, inputs, masks), budget)
    return [
        Row(f"GRPO step ÷ plain step under the same masks, {path}, {shares[step]:.0%} of groups live", values, 1.10)
    ]


def task_step_over_plain(path: str, overrides: dict, what: str, at_most: float | None, budget: float) -> list[Row]:
    """The whole step of a mask or box config ÷ a plain supervised step under the same masks."""
    s = build_with_images(path, overrides)
    inputs, masks = prepared(s, 0)
    values = ratios(lambda: grpo_step(s, 0), lambda: plain_step(s, inputs, masks), budget)
    return [Row(f"GRPO step ÷ plain step under the same masks, {path}, {what}", values, at_most)]


def trunk_once(path: str, budget: float) -> list[Row]:
    """T = 8 with the last 2 of 8 blocks stochastic ÷ one deterministic supervised pass over the same images."""
    passes, depth, last = 8, DEEP["depth"], DEEP["dropout_blocks"]
    overrides = GRPO | {f"model.{name}": value for name, value in DEEP.items()}
    overrides |= {"rollout.num_mc_samples": passes, "training.micro_batch_size": None, "training.batch_size": 32}
    s = build_with_images(path, overrides)
    inputs, _ = prepared(s, 0)
    values = ratios(lambda: grpo_step(s), lambda: plain_step(s, inputs, None), budget)
    predicted = (depth - last + last * passes) / depth
    return [
        Row(f"T = 8, dropout in 2 of 8 blocks ÷ one supervised pass (blocks: {predicted:.2f})", values, 1.1 * predicted)
    ]


def mostly_dead(path: str, budget: float) -> list[Row]:
    """Replay of 20 % live groups ÷ one pass with all groups live; all blocks stochastic."""
    size = configure(path, ALL_BLOCKS)["training"]["batch_size"]
    every = build_with_images(path, ALL_BLOCKS, max(size - size % LIVE_EVERY, LIVE_EVERY))
    some = replace(every, rewards={"some_live": (some_live, 1.0)})

    def replay() -> None:
        share = float(grpo_step(some, keep_graph=False)["groups/live"])
        assert abs(share - 1 / LIVE_EVERY) < 1e-6, share

    values = ratios(replay, lambda: grpo_step(every), budget)
    return [Row("step with 20 % live groups ÷ all live in one pass, all blocks stochastic", values, 0.60)]


def actions_are_free(path: str, budget: float) -> list[Row]:
    """A = 64 ÷ A = 1, T = 4."""
    many = build_with_images(path, GRPO | {"rollout.actions_per_sample": 64})
    one = replace(many, config=configure(path, GRPO | {"rollout.actions_per_sample": 1}))
    return [Row("A = 64 ÷ A = 1", ratios(lambda: grpo_step(many), lambda: grpo_step(one), budget), 1.10)]


def resident(line: str) -> int:
    """VmRSS or its peak VmHWM in bytes. (getrusage's peak may be the parent's: it survives exec.)"""
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) * 1024


def memory_growth(path: str, way: str, size: int) -> int:
    """In a fresh process: bytes that three steps add to the peak, over the idle process with its model."""
    s = build(configure(path, GRPO | {"training.batch_size": size, "training.micro_batch_size": 32}))
    if way == "replay":
        s.rewards = {"some_live": (some_live, 1.0)}
    idle = resident("VmRSS")
    s.batch = load_images(s.config, size)
    for step in range(3):
        grpo_step(s, step, keep_graph=way != "replay")
    return resident("VmHWM") - idle


def memory(path: str, threads: int, repetitions: int = 2) -> list[Row]:
    """Peak memory of batch 256, one pass and replay, ÷ one pass of batch 32; micro-batch 32. Linux only."""
    if not Path("/proc/self/status").exists():
        return []

    def fresh(way: str, size: int) -> int:
        command = [sys.executable, __file__, "--config", path, "--threads", str(threads), "--memory", way, str(size)]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    runs = [(fresh("one pass", 32), fresh("one pass", 256), fresh("replay", 256)) for _ in range(repetitions)]
    small = statistics.median(run[0] for run in runs) / 1e6
    name = f"growth of peak memory, micro-batch 32, batch 256 ({{}}) ÷ batch 32 (one pass, {small:.0f} MB)"
    return [
        Row(name.format("one pass"), [one_pass / base for base, one_pass, _ in runs], 1.25),
        Row(name.format("replay"), [replay / base for base, _, replay in runs], 1.25),
    ]


def data_wait(path: str, windows: int = 3, steps: int = 10) -> list[Row]:
    """Share of the time spent waiting for data after the first epoch, in windows of steps, 1 worker."""
    s = build(configure(path, {"data.num_workers": 1}))
    data, training = SimpleNamespace(**s.config["data"]), SimpleNamespace(**s.config["training"])
    dataset = open_dataset(s.config)

    order = partial(train.epoch_order, seed=training.seed, size=len(dataset))
    cache, _ = train.keep_decoded(data, dataset)  # train.py adds the evaluation set
    first = -(-len(dataset) // training.batch_size)  # steps of the first epoch: drawn, not trained on
    last = first + windows * steps
    batches = stream_batches(dataset, order, training.batch_size, range(last), num_workers=1, cache=cache)
    for _ in range(first):
        next(batches)

    values = []
    for window in range(windows):
        begin, waited = time.perf_counter(), 0.0
        for step in range(steps):
            before = time.perf_counter()
            s.batch = next(batches)
            waited += time.perf_counter() - before
            grpo_step(s, first + window * steps + step)
        values.append(waited / (time.perf_counter() - begin))
    kept = "cached" if cache else "decoded each epoch"
    return [Row(f"waiting for data ÷ step, {path}, 1 worker, after the first epoch ({kept})", values, 0.05)]


def count_flop(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in `function`."""

    def forward(q, k, v, *_, **__) -> int:
        return flop_counter.sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *_, **__) -> int:
        return flop_counter.sdpa_backward_flop_count(grad, q, k, v)

    attention = {  # torch knows the CUDA kernels only
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=attention) as counter:
        function()
    return counter.get_total_flops()


def speed(path: str, budget: float, at_least: float | None, size: int = 2048) -> list[Row]:
    """Images/s and the share of a large matmul's FLOP/s that the step as configured reaches."""
    s = build_with_images(path, {"model.compile": False})
    flop = count_flop(lambda: grpo_step(s))
    s = build_with_images(path, {})
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    times = pairs(lambda: grpo_step(s), lambda: torch.mm(a, b, out=out), budget)
    peak = statistics.median(2 * size**3 / y for _, y in times)
    values = [(flop / x) / (2 * size**3 / y) for x, y in times]
    return [
        Row(f"FLOP/s of the step ÷ of a matmul ({peak / 1e9:.0f} GFLOP/s), {path}", values, at_least=at_least),
        Row(f"images/s, {path}", [len(s.batch) / x for x, _ in times]),
    ]


def task_figures(budget: float) -> list[Callable[[], list[Row]]]:
    """The steps of masks and boxes; two classes and A = 4 have a bound."""
    two = {"rollout.actions_per_sample": 4}
    masks, boxes = "config_segmentation.yaml", "config_detection.yaml"
    return [
        lambda: task_step_over_plain(masks, two, "two classes, A = 4", 1.25, budget),
        lambda: task_step_over_plain(masks, {}, "as shipped", None, budget),
        lambda: task_step_over_plain(boxes, {"rollout.actions_per_sample": 4}, "A = 4", None, budget),
        lambda: task_step_over_plain(boxes, {}, "as shipped", None, budget),
        lambda: speed(masks, budget, None),
        lambda: speed(boxes, budget, None),
    ]


def scan(count: int, classes: int = 1000) -> tuple[float, float]:
    """Seconds, and bytes of memory per file, to find `count` image files in an image folder. Linux only."""
    with tempfile.TemporaryDirectory() as folder:
        for c in range(classes):
            os.mkdir(f"{folder}/class_{c:04d}")
            for i in range(c, count, classes):
                open(f"{folder}/class_{c:04d}/image_{i:08d}.jpg", "w").close()
        before = resident("VmRSS")
        begin = time.perf_counter()
        dataset = train.TASKS["classification"].VisionClassificationDataset(folder, 224)
        return time.perf_counter() - begin, (resident("VmRSS") - before) / len(dataset)


def memory_plan(config: dict, world: int = 1) -> dict[str, float]:
    """Bytes on each of `world` GPUs: weights, gradients and AdamW's two moments in float32, and what the forward pass
    of a micro-batch keeps for the backward pass.

    A block keeps, per token and unit of embed_dim, the inputs of norms, linear layers and GELU, and q, k, v and the
    output of attention: 8 + 2 · mlp_ratio numbers, of which under bfloat16 autocast only the norms' inputs are
    float32; with activation checkpointing its input alone, and one block whole. Blocks before the first stochastic one
    run once per image, the others T times; the last one of a classifier keeps little more than keys and values.
    """
    model, training = SimpleNamespace(**config["model"]), SimpleNamespace(**config["training"])
    shape = {k: v for k, v in config["model"].items() if k not in ("num_classes", "checkpoint_path", "compile")}
    with torch.device("meta"):
        params = sum(p.numel() for p in train.VisionTransformer(**shape, num_classes=1000).parameters())
    tokens = 1 + (model.image_size // model.patch_size) ** 2
    stochastic = model.depth if model.dropout_blocks is None else model.dropout_blocks
    passes = config["rollout"]["num_mc_samples"]
    runs = model.depth - stochastic + stochastic * passes  # of a block, per image
    half = training.dtype != "float32"  # auto: bfloat16 on a GPU
    block = 2 * 4 + (6 + 2 * model.mlp_ratio) * (2 if half else 4)  # bytes per token and unit of embed_dim
    last = 0
    if config["task"] == "classification":  # queries of one token: norm1's input, its output, k, v and little else
        runs -= passes
        last = passes * tokens * model.embed_dim * (4 + 3 * (2 if half else 4))
    per_image = runs * tokens * model.embed_dim * block + last
    if model.activation_checkpointing:
        per_image = tokens * model.embed_dim * (4 * (runs + passes) + passes * block)
    micro = training.micro_batch_size or training.batch_size // world
    return {
        "parameters": params,
        "weights, gradients, AdamW": 16 * params,
        "activations per image": per_image,
        "images at a time": micro,
        "activations": per_image * micro,
        "in all": 16 * params + per_image * micro,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", nargs="+", default=["config.yaml", "config_digits.yaml"], metavar="FILE")
    parser.add_argument("--tasks", action="store_true", help="masks and boxes instead (data/scenes has to be there)")
    parser.add_argument("--plan", action="store_true", help="GPU memory of the configs, by calculation")
    parser.add_argument("--scan", type=int, metavar="N", help="time and memory to find N image files")
    parser.add_argument("--gpus", type=int, default=1, help="for --plan: over how many the batch is split (1)")
    parser.add_argument("--seconds", type=float, default=15, help="of repetitions for each figure (15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's (all cores)")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # how `memory` starts itself
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    Distribution.set_default_validate_args(False)  # as after train.py's first step
    first = args.config[0]
    try:
        if args.memory:
            print(memory_growth(first, args.memory[0], int(args.memory[1])))
            return 0
        if args.scan:
            taken, size = scan(args.scan)
            print(f"{args.scan} files: {taken:.1f} s, {size:.0f} bytes of memory each")
            return 0
        if args.plan:
            for path in args.config:
                print(path)
                for name, value in memory_plan(check((path, read_yaml(path))), args.gpus).items():
                    counted = name in ("parameters", "images at a time")
                    print(f"  {name:26s} {f'{value:,.0f}' if counted else f'{value / 1e9:.3f} GB'}")
            return 0
        keep_freed_memory()
        for path in args.config:
            configure(path, {})
        begin = time.perf_counter()
        print(HEADER, flush=True)
        figures = (
            task_figures(args.seconds)
            if args.tasks
            else (
                *(lambda path=path: step_over_plain(path, args.seconds) for path in args.config),
                lambda: trunk_once(first, args.seconds),
                lambda: mostly_dead(first, args.seconds),
                lambda: actions_are_free(first, args.seconds),
                lambda: memory(first, args.threads),
                lambda: data_wait(first),
                *(lambda path=path: speed(path, args.seconds, 0.5 if path == first else None) for path in args.config),
            )
        )
        for figure in figures:
            for row in figure():
                print(row, flush=True)
    except InputError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    print(f"\n{args.threads} threads, torch {torch.__version__}, {time.perf_counter() - begin:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
