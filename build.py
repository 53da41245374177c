"""From the words of the config to objects: task, rewards, device, model, optimizer, settings."""

import argparse
import copy
import inspect
import math
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from augment import Settings, draw_crops
from checkpoint import best_metric, load_checkpoint
from config import (
    SCHEMA,
    SIZES,
    Key,
    Schema,
    check,
    convert,
    flatten,
    load_user_file,
    one_line,
    parse_override,
    read_yaml,
)
from data_types import InputError, TensorMiniBatch
from deciding import Decider, decision_path, digest, load_decision
from detection_task import Detection
from evaluation import evaluate
from folders import check_headers
from frame import Frame
from grpo import Reward, RolloutSettings, SupervisedLoss, UpdateSettings, keyed_rng
from images import (
    BadImages,
    Batches,
    ImageDataset,
    Loading,
    epoch_order,
    item_shape,
    keep_decoded,
    look_at,
    ordered_batches,
    shared_memory_note,
    stream_batches,
)
from label_losses import BY_COUNTS
from pretrained import load_weights, read_pretrained
from processes import rank_and_world
from report import Console
from scores import READY, ConfusionScore, RewardEvaluation
from segmentation_task import Segmentation
from vision_task import Classification, Task, VisionClassificationDataset
from vit_model import VisionTransformer

TASKS: dict[str, type[Task]] = {"classification": Classification, "segmentation": Segmentation, "detection": Detection}


def load_task(name: str) -> type[Task]:
    """One of the three tasks by name, or that of path/to/file.py or path/to/file.py:ClassName. Raises InputError."""
    if name in TASKS:
        return TASKS[name]
    path, _, class_name = os.path.expanduser(name).partition(":")
    if not path.endswith(".py"):
        raise InputError(f"task: {name!r} is not allowed; expected {' | '.join(TASKS)} | path/to/file.py[:ClassName]")
    module = load_user_file(path, "task")
    classes = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Task)]
    tasks = {value.__name__: value for value in classes if value.__module__ == module.__name__}  # not what it imports
    if class_name not in tasks and (class_name or len(tasks) != 1):
        wanted = f"a Task {class_name}" if class_name else f"one Task, or be named as {path}:ClassName"
        raise InputError(f"task: {path} should define {wanted}; it defines {', '.join(tasks) or 'none'}")
    task = tasks[class_name] if class_name else next(iter(tasks.values()))
    required = ("open", "rewards", "metrics") if task.evaluation is Task.evaluation else ("open", "rewards")
    if missing := [member for member in required if getattr(task, member) == getattr(Task, member)]:
        raise InputError(f"task: {path}: {task.__name__} lacks {', '.join(missing)}; see vision_task.Task")
    if not isinstance(task.rewards, dict):
        raise InputError(f"task: {path}: {task.__name__}.rewards should map names to functions")
    if wrong := [name for name, key in task.keys.items() if "." not in name or name in SCHEMA or type(key) is not Key]:
        raise InputError(
            f"task: {path}: {task.__name__}.keys: {wrong[0]} should be a new section.key, with a config.Key"
        )
    return task


def schema_of(task: type[Task] = Task) -> Schema:
    """The keys of every run, those of the three tasks, which any config may hold, and those of the task."""
    names = " | ".join([*TASKS, "path/to/file.py[:ClassName]"])
    schema = {"task": Key("classification", str, "what an action is, and all that depends on it", names)} | SCHEMA
    for with_keys in (*TASKS.values(), task):
        schema |= with_keys.keys
    return schema


def configure(*layers: tuple[str, dict]) -> tuple[dict, Task]:
    """`config.check` with the keys of the task that the layers name: the whole config, and the task."""
    name = next((layer["task"] for _, layer in reversed(layers) if "task" in layer), "classification")
    if not isinstance(name, str):
        raise InputError(f"task: {name!r} is not allowed; expected {schema_of()['task'].rule}")
    task = load_task(name)
    config = check(*layers, schema=schema_of(task))
    named = any("data.eval_dir" in layer for _, layer in layers)
    if not named and not os.path.exists(config["data"]["eval_dir"]):  # nobody asked for the default's folder
        config["data"]["eval_dir"] = None
    return config, task(config)


def is_score(name: str, function: Callable) -> bool:
    """Whether a function is a score of the confusion matrix, as one parameter says, or a reward, of four parameters.
    Raises InputError if it is neither."""
    try:
        signature = inspect.signature(function)
        needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        if len(needed) == 1 and needed[0].kind in (needed[0].POSITIONAL_ONLY, needed[0].POSITIONAL_OR_KEYWORD):
            return True
        signature.bind(*range(4))
    except ValueError:  # of a function that is not Python's
        return False
    except TypeError:
        wanted = "four parameters (actions, outputs, targets, metadata), or one: (confusion)"
        raise InputError(f"rollout.reward: {name} takes {signature}; expected {wanted}") from None
    return False


def copied(value: Any) -> Any:
    """A tensor, list or dict that can be written into without harm; anything else as it is."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value


def guarded(name: str, reward: Callable) -> Callable:
    """A user's reward that cannot hurt: it gets copies, and an error inside it is an InputError that names the reward
    and the line."""

    def call(*arguments: Any) -> Any:
        try:
            return reward(*map(copied, arguments))
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]
            code = getattr(reward, "__code__", None)
            own = [frame for frame in frames if code and frame.filename == code.co_filename] or frames
            where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
            raise InputError(f"rollout.reward: {name}: {type(error).__name__}: {one_line(error)}{where}") from error

    return call


def load_reward(task: Task, name: str) -> Reward:
    """One of the task's rewards, a score that is ready in `scores.py`, or path/to/file.py:function of either kind.
    Raises InputError."""
    path, colon, function = name.rpartition(":")
    known = READY | task.rewards
    reward = getattr(load_user_file(path, "rollout.reward"), function, None) if colon else known.get(name)
    if not callable(reward):
        where = f"in {path}" if colon else f"in {', '.join(task.rewards | READY)}; your own is path/to/file.py:function"
        raise InputError(f"rollout.reward: no function {function} {where}")
    one_parameter = is_score(name, reward)
    if colon or type(task) not in TASKS.values():
        reward = guarded(name, reward)
    return ConfusionScore(name, reward, task) if one_parameter else reward


def load_rewards(task: Task) -> dict[str, tuple[Reward, float]]:
    """rollout.reward, name -> weight, as name -> (function, weight); null is the task's first. Raises InputError."""
    weights = task.config["rollout"]["reward"] or {next(iter(task.rewards)): 1.0}
    return {name: (load_reward(task, name), weight) for name, weight in weights.items()}


def load_eval_rewards(task: Task, rewards: dict[str, tuple[Reward, float]]) -> dict[str, tuple[Reward, float]]:
    """The run's rewards, and training.best with weight 0 if that names a score of the confusion matrix. Raises
    InputError."""
    name = task.config["training"]["best"]
    if not name or name.startswith(("eval/", "eval_mc/")) or name in rewards:
        return rewards
    try:
        score = load_reward(task, name)
    except InputError as error:
        raise InputError(f"training.best: {str(error).removeprefix('rollout.reward: ')}") from None
    if not isinstance(score, ConfusionScore):
        raise InputError(f"training.best: {name}: expected a metric, as eval/nll, or a score of the confusion matrix")
    return rewards | {name: (score, 0.0)}


def sections(config: dict) -> tuple[SimpleNamespace, ...]:
    """The keys of data, rollout and training by attribute."""
    return tuple(SimpleNamespace(**config[section]) for section in ("data", "rollout", "training"))


def rollout_settings(config: dict) -> RolloutSettings:
    """RolloutSettings of the config."""
    return RolloutSettings(**{name: config["rollout"][name] for name in RolloutSettings.__dataclass_fields__})


def supervised_loss(task: Task) -> SupervisedLoss:
    """`Task.supervised_loss` by training.supervised_loss, also where a task's own has no parameter `counted`. Raises
    InputError for a name that the task has not."""

    def definer(member: str) -> type:
        return next(parent for parent in type(task).__mro__ if member in vars(parent))

    own = not issubclass(definer("losses"), definer("supervised_loss"))  # a loss that knows nothing of the names
    names = ["cross_entropy", *(() if own else task.losses)]
    if (name := task.config["training"]["supervised_loss"]) not in names:
        raise InputError(f"training.supervised_loss: {name!r} is not allowed; expected {' | '.join(names)}")
    if "counted" in inspect.signature(task.supervised_loss).parameters:
        return task.supervised_loss
    return lambda policy, targets, counted: task.supervised_loss(policy, targets)


def hand_over_counts(task: Task, train_set: ImageDataset) -> None:
    """The class counts of the training set, for the losses that need them. Raises InputError."""
    name = task.config["training"]["supervised_loss"]
    if name in BY_COUNTS and type(task).count_classes is Task.count_classes and not hasattr(train_set, "targets"):
        raise InputError(f"training.supervised_loss: {name}: without `targets` of the data set it needs count_classes")
    task.class_counts = task.count_classes(train_set) if name in BY_COUNTS else None


def update_settings(task: Task, per_rank: int) -> UpdateSettings:
    """UpdateSettings of the config. per_rank: images of a batch that this process has."""
    training = task.config["training"]
    micro_batch_size = training["micro_batch_size"] or per_rank
    pad_to = max(micro_batch_size // 4, 1) if task.config["model"]["compile"] else 1
    own = {"supervised_loss": supervised_loss(task), "micro_batch_size": micro_batch_size, "pad_to": pad_to}
    return UpdateSettings(**{name: (training | own)[name] for name in UpdateSettings.__dataclass_fields__})


def images_per_rank(training: SimpleNamespace) -> int:
    """Images of each batch that are one process's. Raises InputError where the batch does not fall into equal parts."""
    world = rank_and_world()[1]
    per_rank, uneven = divmod(training.batch_size, world)
    if uneven or (world > 1 and per_rank % (training.micro_batch_size or per_rank)):
        parts = f"equal parts for {world} processes"
        parts += f" of whole micro-batches of {training.micro_batch_size}" if training.micro_batch_size else ""
        raise InputError(f"training.batch_size: {training.batch_size} does not fall into {parts}")
    return per_rank


def pick_device(name: str) -> torch.device:
    """training.device as a device that works here, for each process of a host its own GPU; raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # not on meta, where there are no numbers
        device = probe.device
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
    if name.startswith(("patch_embed.", "cls_token", "pos_embed", "reg_token")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def shape_of(config: dict) -> dict:
    """The arguments of the ViT that the config's `model` section names."""
    others = "num_classes", "checkpoint_path", "pos_embed_antialias", "compile"
    return {key: value for key, value in config["model"].items() if key not in others}


def build_model(task: Task, num_classes: int, device: torch.device) -> VisionTransformer:
    """The ViT with seeded weights on `device`; what training.freeze_blocks holds takes no gradient."""
    config = task.config
    dtype = pick_autocast_dtype(config["training"]["dtype"], device)
    width = task.head_size(num_classes)
    shape = shape_of(config) | {"num_classes": width, "dense": task.dense, "autocast_dtype": dtype}
    with keyed_rng(config["training"]["seed"], "init"):
        model = VisionTransformer(**shape).to(device)
    frozen = config["training"]["freeze_blocks"]
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or layer_of(name, len(model.blocks)) > frozen)
    return model


def build_optimizer(model: VisionTransformer, training: SimpleNamespace) -> torch.optim.AdamW:
    """AdamW over what is not frozen; no weight decay on biases, norms, extra tokens and position embedding. `lr_scale`
    of a group is its share of the learning rate: layer_decay per layer below the head, as in BEiT
    (https://arxiv.org/abs/2106.08254)."""
    depth, params = len(model.blocks), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or name in ("cls_token", "pos_embed", "reg_token")
            lr_scale = training.layer_decay ** (depth + 1 - layer_of(name, depth))
            params.setdefault((plain, lr_scale), []).append(p)
    groups = [
        {"params": group, "weight_decay": 0.0 if plain else training.weight_decay, "lr_scale": lr_scale}
        for (plain, lr_scale), group in sorted(params.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=tuple(training.betas), fused=True)


def learning_rate(step: int, training: SimpleNamespace) -> float:
    """Linear warm-up, then half a cosine."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(training.steps - training.warmup_steps, 1)
    low, high = training.min_learning_rate, training.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))


def layers_of(file: tuple[str, dict], overrides: tuple[str, dict]) -> tuple[list[tuple[str, dict]], list[str]]:
    """The layers of a new run's config, and lines about them. The sizes of the model are those of the file of
    model.checkpoint_path: those of the config file yield. Raises InputError for others on the command line."""
    values = [{name: value for name, value in layer.items() if value is not None} for _, layer in (file, overrides)]
    path = (file[1] | overrides[1]).get("model.checkpoint_path")
    if not isinstance(path, str):
        return [file, overrides], []
    found = read_pretrained(os.path.expanduser(path))
    told, assumed = ({f"model.{key}": value for key, value in part.items()} for part in (found.told, found.assumed))
    sizes, given = ({k: convert(k, v, SCHEMA[k]) for k, v in layer.items() if k in SIZES} for layer in values)
    width, yielding, heads = told["model.embed_dim"], [], "model.num_heads"
    own_heads = heads in given or (heads in sizes and sizes.get("model.embed_dim", width) == width)
    guessed = heads not in told and not own_heads
    if guessed and width % 64:
        raise InputError(f"{path}: no tensor tells model.num_heads, and embed_dim {width} is no multiple of 64; set it")
    if guessed:
        told[heads] = width // 64
    for name, value in told.items():
        same = (lambda a, b: int(width * a) == int(width * b)) if name == "model.mlp_ratio" else lambda a, b: a == b
        if name in given and not same(given[name], value) and not (name == heads and found.own):
            raise InputError(f"command line: {name}={given[name]}, but {path} has {value}; leave it out")
        if name in sizes and not same(sizes[name], value):
            yielding.append(f"{name.removeprefix('model.')} {sizes[name]} to {value}")
    used = {name: SCHEMA[name].default for name in SIZES} | assumed | sizes | told | given
    described = [f"{name.removeprefix('model.')} {used[name]}" for name in SIZES]
    described[SIZES.index(heads)] += " (embed_dim / 64: no tensor tells it)" if guessed else ""
    lines = [f"{file[0]} yields to {path}: {', '.join(yielding)}"] if yielding else []
    return [("", assumed), file, (path, told), overrides], [*lines, f"{path}: {', '.join(described)}"]


def open_run(args: argparse.Namespace, console: Console) -> tuple[Task, Path, dict | None]:
    """The task with its config, the run's folder, and the checkpoint's state if the run goes on. The config is the
    file's, or the checkpoint's when a run goes on; the command line wins. Raises InputError."""
    overrides = "command line", dict(map(parse_override, args.overrides))
    name = args.evaluate if args.resume is None else args.resume
    if name == "":
        raise InputError("--resume, --evaluate: the run's name is empty; expected ckpt/<run>")
    run_dir, asked = Path(name or "auto"), {}
    if name in (None, "auto"):  # this config's run
        written = read_yaml(args.config)
        layers, lines = [(args.config, written), overrides], []
        try:
            layers, lines = layers_of(*layers)
        except InputError:
            if name is None:  # else the weights may be gone since the run began
                raise
        config, task = configure(*layers)
        asked = {key: value for key, value in flatten(config, args.config).items() if written.get(key) is not None}
        training = config["training"]
        training["run_name"] = training["run_name"] or Path(args.config).stem
        run_dir, log_dir = (Path(training[parent], training["run_name"]) for parent in ("ckpt_dir", "log_dir"))
        for used in (run_dir, log_dir):
            if name is None and used.is_dir() and any(used.iterdir()):
                hint = "go on with --resume auto, delete it, or name a new run with training.run_name=NAME"
                raise InputError(f"{used} exists: {hint}")
        if args.evaluate is None and not any([*run_dir.glob("last.pt"), *run_dir.glob("step_*.pt")]):
            for line in lines:
                console.line(line)
            return task, run_dir, None
    state = load_checkpoint(run_dir, console.line if name == "auto" else None)
    run_dir = run_dir if run_dir.is_dir() else run_dir.parent  # given a file of the run
    config, task = configure((str(run_dir), flatten(state["config"], str(run_dir))), overrides)
    for key, own in (("ckpt_dir", run_dir.parent), ("run_name", run_dir.name)):
        if f"training.{key}" in overrides[1] and Path(config["training"][key] or own) != Path(own):
            raise InputError(f"training.{key}: a run that goes on keeps its own, {own}; drop the key")
        config["training"][key] = str(own)
    if changed := [key for key, value in flatten(config, "").items() if asked.get(key, value) != value]:
        console.line(
            f"note: {args.config} has another {', '.join(changed)} than the run that goes on, whose own counts; a key "
            "on the command line changes it"
        )
    return task, run_dir, state


def check_writable(training: SimpleNamespace) -> None:
    """Raises InputError where checkpoints or TensorBoard's events, which rank 0 writes, cannot be written. Leaves
    nothing behind."""
    for key in () if rank_and_world()[0] else ("ckpt_dir", "log_dir"):
        folder = Path(getattr(training, key), training.run_name)
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
            for path in new:
                path.rmdir()
        except OSError as error:
            raise InputError(f"training.{key}: {folder} cannot be written ({error.strerror}); name another") from None


def open_set(task: Task, root: str, classes: list[str] | None = None) -> ImageDataset:
    """`Task.open`; a data set of the task's own that knows no more than the input's size gets data.resize. Image files
    whose headers no task has read are looked at now, not in the middle of a run. Raises InputError."""
    dataset, frame = task.open(root, classes), Frame.from_config(task.config)
    if Frame.of(dataset.image_size).resize != frame.resize:
        dataset.image_size = frame
    decodes = all(getattr(type(dataset), name) is getattr(ImageDataset, name) for name in ("__getitem__", "item"))
    if decodes and not task.dense and task.config["data"]["on_bad_image"] == "error":
        check_headers(dataset.paths)
    return dataset


def open_eval_set(task: Task, classes: list[str], console: Console) -> ImageDataset:
    """The evaluation's data set, whose classes are those of the training folder. Raises InputError."""
    eval_set = open_set(task, task.config["data"]["eval_dir"], classes)
    console.line(f"{task.config['data']['eval_dir']}: {len(eval_set)} images")
    say_notes(eval_set, console)
    return eval_set


def check_augment(task: Task, dataset: ImageDataset) -> None:
    """Raises InputError where a task of one's own cannot do what data.augment asks for."""
    settings, own = Settings.of(task.config["data"]["augment"]), type(task)
    if settings.turns > 1 and not settings.mirror and own.mirror is not Task.mirror and own.turn is Task.turn:
        raise InputError(
            "data.augment: the task moves its targets by `mirror` alone, for true; others need `Task.turn`"
        )
    if settings.crop and type(dataset).__getitem__ is not ImageDataset.__getitem__:
        raise InputError("data.augment: crop: the task's data set decodes images itself; it needs `ImageDataset.item`")


def say_notes(dataset: ImageDataset, console: Console) -> None:
    """Whatever else is to be known of a folder before the run begins."""
    for note in (*dataset.notes, *look_at(dataset.paths)):
        console.line(f"note: {dataset.root}: {note}")


def open_batches(
    task: Task, dataset: ImageDataset, steps: range, loading: Loading, cache: bool
) -> Iterator[TensorMiniBatch]:
    """This process's images of the training's batches, which are a function of the step. cache: decoded images are
    kept, unless each step has other crops of them."""
    data, _, training = sections(task.config)
    per_rank, rank = images_per_rank(training), rank_and_world()[0]
    crops, shares = None, Settings.of(data.augment).crop
    if shares:
        crops = lru_cache(maxsize=64)(partial(draw_crops, seed=training.seed, count=training.batch_size, shares=shares))
    return stream_batches(
        dataset,
        partial(epoch_order, seed=training.seed, size=len(dataset)),
        training.batch_size,
        steps,
        loading,
        cache=cache and not shares,
        part=slice(rank * per_rank, (rank + 1) * per_rank),
        crops=crops,
    )


def open_eval_batches(
    dataset: ImageDataset | None, task: Task, bad_images: BadImages, keep: bool = False
) -> Batches | None:
    """This process's batches of the evaluation, decoded once if they are kept; images that cannot be decoded are left
    out with data.on_bad_image: skip."""
    if dataset is None:
        return None
    data, _, training = sections(task.config)
    on_bad = "drop" if data.on_bad_image == "skip" else "error"
    loading = Loading(data.num_workers, pick_device(training.device).type == "cuda", on_bad, bad_images)
    size = training.micro_batch_size or training.batch_size
    return Batches(partial(ordered_batches, dataset, size, loading, *rank_and_world()), keep)


def open_judge(
    task: Task, rewards: dict[str, tuple[Reward, float]], state: dict | None = None
) -> Callable[[], RewardEvaluation]:
    """What makes the `RewardEvaluation` of an evaluation, that decides as training.decide says; by what was fitted for
    the run's checkpoint `state` where there is one. Raises InputError."""
    decider = None
    if task.config["training"]["decide"] == "reward":
        training = task.config["training"]
        if hasattr(task, "thresholds"):
            raise InputError("training.decide: reward: boxes are decided in predict.py alone, see --fit there")
        path = decision_path(Path(training["ckpt_dir"], training["run_name"]))
        weighted = {name: reward for name, reward in rewards.items() if reward[1]}
        fitted = load_decision(path, digest(state), list(weighted)) if state and path.exists() else None
        decider = Decider(task, weighted, fitted)
    return partial(RewardEvaluation, task, rewards, decider)


def check_evaluation(
    task: Task, network: nn.Module, batches: Batches | None, eval_set: ImageDataset | None, judge: Callable
) -> None:
    """Raises InputError now, not at the first evaluation, if one batch cannot be decided as training.decide says, or
    has not the metric that training.best is. (That of a single class may be missing from a batch.)"""
    training = task.config["training"]
    name = training["best"] or ""
    of_all = name.startswith(("eval/", "eval_mc/")) and name.count("/") == 1
    if batches and (of_all or training["decide"] == "reward") and len(batch := next(iter(batches), ())):
        rewards = judge()
        metrics = evaluate(task, network, [batch], eval_set, rewards=rewards).metrics() | rewards.metrics()
        if of_all:
            task.best_metric(metrics)


def open_data(task: Task, state: dict | None, console: Console) -> tuple[ImageDataset, ImageDataset | None, bool]:
    """The data sets of training and evaluation, and whether decoded images are kept. What the training folder's format
    says of the classes holds for the evaluation's, too. Raises InputError."""
    data = sections(task.config)[0]
    train_set = open_set(task, data.train_dir, state["classes"] if state else None)
    wanted, found = task.config["model"]["num_classes"], len(train_set.classes)
    if state and isinstance(train_set, VisionClassificationDataset):  # a new run refuses these by itself
        absent = sorted(set(range(found)).difference(train_set.targets.tolist()))
        if missing := ", ".join(train_set.classes[k] for k in absent):
            raise InputError(f"{data.train_dir}: no image of {missing}; a run that goes on keeps its classes")
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(train_set.classes[:20])) + ", …" * (found > 20)
    console.line(f"{data.train_dir}: {len(train_set)} images of {found} classes (id name): {shown}")
    say_notes(train_set, console)
    eval_set = None
    if data.eval_dir and not Path(data.eval_dir).exists() and state and best_metric(state) is None:
        task.config["data"]["eval_dir"] = data.eval_dir = None  # older versions began such a run without evaluation
    if not data.eval_dir:
        console.line("data.eval_dir: null; training without evaluation")
    elif Path(data.eval_dir).exists():
        eval_set = open_eval_set(task, train_set.classes, console)
        if os.path.samefile(data.train_dir, data.eval_dir):
            console.line("warning: data.eval_dir is data.train_dir: the metrics are of images that are trained on")
    else:
        raise InputError(f"data.eval_dir: {data.eval_dir}: no such folder; null trains without evaluation")
    if wanted not in (None, found):
        raise InputError(f"model.num_classes: {wanted}, but {data.train_dir} holds {found} classes; set it to null")
    check_augment(task, train_set)
    hand_over_counts(task, train_set)
    cropped = bool(Settings.of(data.augment).crop)
    cache, size = keep_decoded(data, None if cropped else train_set, eval_set)
    kept = "kept in memory after the first epoch" if cache else "decoded again each epoch"
    kept += " by each process" if rank_and_world()[1] > 1 else ""
    kept += "; those of training are cropped anew each time (data.augment)" * cropped
    images = "images of the evaluation" if cropped else "images"
    console.line(f"data.cache: {data.cache}: {size / 1e6:.0f} MB of decoded {images}, {kept}")
    batch_bytes = math.prod(item_shape(train_set)) * task.config["training"]["batch_size"]
    for note in shared_memory_note(data.num_workers, batch_bytes // rank_and_world()[1]):
        console.line(note)
    return train_set, eval_set, cache


def open_model(
    task: Task, classes: list[str], state: dict | None, console: Console
) -> tuple[nn.Module, nn.Module | None]:
    """The model with the weights that it starts from, on its device, and the reference of the KL term if there is one:
    a frozen copy of the model that training started from. Raises InputError."""
    config, reference = task.config, None
    model = build_model(task, len(classes), pick_device(config["training"]["device"]))
    if config["model"]["checkpoint_path"] and not state:
        for line in load_weights(model, config["model"]["checkpoint_path"], config, classes).splitlines():
            console.line(line)
    if state:
        try:
            model.load_state_dict(state["model"])
        except RuntimeError:
            run = f"{config['training']['ckpt_dir']}/{config['training']['run_name']}"
            raise InputError(f"{run}: its weights do not fit the model section; drop the model.* keys") from None
    if config["training"]["kl_coef"] and state and "reference" not in state:
        raise InputError("training.kl_coef: this run keeps no reference; start a new one with model.checkpoint_path")
    if config["training"]["kl_coef"]:
        reference = copy.deepcopy(model).requires_grad_(False)
        if state:
            reference.load_state_dict(state["reference"])
    if config["model"]["compile"]:
        torch._dynamo.config.recompile_limit = 32  # each shape is compiled once, there are about ten
        for network in filter(None, (model, reference)):
            network.compile(fullgraph=True, dynamic=False)
    params, device = sum(p.numel() for p in model.parameters()) / 1e6, next(model.parameters()).device
    precision = "bfloat16 autocast" if model.autocast_dtype else "float32"
    console.line(f"{params:.2f} M parameters on {device}, {precision}")
    return model, reference
