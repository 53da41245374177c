"""Trains a Vision Transformer on an image folder from rewards.

    uv run train.py --config config_digits.yaml
    uv run train.py --config config_digits.yaml training.learning_rate=5e-4 rollout.advantage=grpo
    uv run train.py --resume ckpt/config_digits
    uv run train.py --evaluate ckpt/config_digits

The story: config -> task -> data -> model -> (rollout -> reward -> update -> log -> evaluate -> save)*.
"""

import argparse
import math
import os
import signal
import sys
from functools import partial
from os.path import expanduser
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributions import Distribution

import build
import processes
from augment import augmentation
from checkpoint import Progress, restore, save_checkpoint
from config import describe_keys, one_line
from data_types import InputError
from evaluation import draw_batch, evaluate, metrics_line
from grpo import rollout, size_of, update_policy
from images import BadImages, Loading, fingerprint, micro_batches
from report import Clock, Console, Log, count_dead_steps, log_interval, read_rows
from scores import open_scores
from token_cache import keep_tokens, open_networks

REPLAY_BELOW = 0.6  # share of live groups below which a forward pass without a graph + a replay of the live is cheaper


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"keys, with their defaults:\n{describe_keys(build.schema_of())}",
    )
    parser.add_argument(
        "--config", type=expanduser, default="config.yaml", metavar="FILE", help="the run's YAML file (config.yaml)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--resume",
        type=expanduser,
        metavar="DIR|auto",
        help="go on with the run of ckpt/<run> and its config; auto: this config's run, if it exists",
    )
    mode.add_argument(
        "--evaluate",
        type=expanduser,
        metavar="DIR",
        help="print the metrics of ckpt/<run> (last.pt), or of a file in it",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the config")
    return parser.parse_intermixed_args(argv)


def train(args: argparse.Namespace) -> int:
    """Returns the exit status: 0, or 128 + the number of the signal that stopped the run."""
    console = Console()
    task, run_dir, state = build.open_run(args, console)
    data, _, training = build.sections(task.config)
    rewards, roll = build.load_rewards(task), build.rollout_settings(task.config)
    judge = build.open_judge(task, build.load_eval_rewards(task, rewards))
    settings = build.update_settings(task, build.images_per_rank(training))

    # Data and model. Each process checks them for itself; only then do the processes meet.
    train_set, eval_set, cache = build.open_data(task, state, console)
    model, reference = build.open_model(task, train_set.classes, state, console)
    network, reference_network = open_networks(task, model, reference, (train_set, eval_set), console)
    device = next(model.parameters()).device
    control = processes.connect(device)

    # What a run goes on from.
    optimizer = build.build_optimizer(model, training)
    progress = restore(state, optimizer, task.config) if state else Progress()
    trained_on = fingerprint(train_set)
    if not processes.same_everywhere((progress.step, trained_on), control):
        raise InputError(f"step {progress.step}, {trained_on}: rank 0 differs; share training.ckpt_dir and data")
    if state:
        console.line(f"{run_dir}: going on after step {progress.step}")
        if state.get("data", trained_on) != trained_on:
            console.line(
                f"warning: {data.train_dir} holds {trained_on}, it held {state['data']}: the rest of this epoch "
                "meets them in another order"
            )
    if progress.step >= training.steps or progress.stale >= (training.patience or math.inf):
        tried = "" if progress.step >= training.steps else f", training.patience is {training.patience}"
        console.line(f"nothing to do: training.steps is {training.steps}{tried}")
        return 0

    # Batches: the images of each step are a function of the step.
    bad_images = BadImages(len(train_set) + len(eval_set or ()), console.line)
    loading = Loading(data.num_workers, device.type == "cuda", data.on_bad_image, bad_images)
    batches = build.open_batches(task, train_set, range(progress.step, training.steps), loading, cache)
    eval_batches = build.open_eval_batches(eval_set, task, bad_images, keep=cache)
    build.check_evaluation(task, network, eval_batches, eval_set, judge)
    confusions = open_scores(rewards, train_set, progress.confusions)
    augment = augmentation(task)

    # Train: rollout -> reward -> update -> log -> evaluate -> save.
    build.check_writable(training)
    stop, clock = processes.catch_signals(), Clock()
    log = Log(Path(training.log_dir, training.run_name), progress.step + 1, task.config)
    for step in range(progress.step, training.steps):
        batch = clock.wait(partial(next, batches)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * build.learning_rate(step, training)
        policy = partial(task.policy, progress=step / training.steps)
        keep_graph = not settings.may_replay or progress.live_share >= REPLAY_BELOW  # else a second pass of the live
        key, batch_size = (training.seed, step), processes.sum_over_processes(size_of(batch))
        parts = partial(micro_batches, batch, settings.micro_batch_size, key, augment)
        episodes = (
            rollout(network, part, rewards, policy, roll, key=(*key, place), keep_graph=keep_graph)
            for place, part in parts()
        )
        metrics = update_policy(
            network, optimizer, episodes, policy, settings, batch_size=batch_size, reference=reference_network
        )
        for confusion in confusions:
            confusion.update()
        progress.rows.append(processes.share_metrics(metrics))
        progress.step = done = step + 1
        stopping = processes.agreed(stop, control)
        log_due = done % training.log_interval == 0 or done in (1, training.steps)
        eval_due = eval_set is not None and (done % training.eval_interval == 0 or done == training.steps)
        save_due = done % training.save_interval == 0 or done == training.steps or stopping
        Distribution.set_default_validate_args(False)  # the first step was checked
        if not (log_due or eval_due or save_due):
            continue

        bad_images.share(control)
        is_best = ended = False
        values = read_rows(progress.rows, done - len(progress.rows) + 1, task.config)
        if log_due:
            extra = {"learning_rate": build.learning_rate(step, training), "data/bad_images": len(bad_images.seen)}
            progress.live_share = log_interval(log, console, clock, values, extra | {"step": done})
            if training.objective == "grpo":
                progress.dead_steps = count_dead_steps(progress.dead_steps, values["groups/live"], console)
        if done == 1:
            log.add("image", "train/first_batch", partial(draw_batch, task, parts()), done)
        if eval_due:
            evaluation = evaluate(task, network, eval_batches, eval_set, control, judged := judge())
            eval_metrics = processes.from_rank_zero(lambda e=evaluation, j=judged: e.metrics() | j.metrics(), control)
            log.scalars(eval_metrics, done)
            group_rewards = torch.cat([row["group_rewards"] for row in progress.rows])
            log.add("histogram", "groups/success_rate", group_rewards, done)
            log.add("image", "eval/most_uncertain", evaluation.draw, done)
            is_best = progress.is_best(*(metric := task.best_metric(eval_metrics)))
            if math.isnan(metric[1]):
                console.line(f"warning: {metric[0]} is NaN, so it chooses no best.pt; a class without images, perhaps")
            console.line(f"step {done}: {metrics_line(eval_metrics)}")
            if ended := progress.stale == training.patience:
                best = f"{progress.best_name} than {progress.best_metric:.4f}"
                console.line(f"training.patience: {progress.stale} evaluations had no better {best}")
        if log_due:
            progress.rows = []
        if save_due or is_best or ended:
            log.flush()
            about = {"config": task.config, "classes": train_set.classes, "data": trained_on}
            parts = {"model": model, "optimizer": optimizer} | ({"reference": reference} if reference else {})
            saved = vars(progress) | about | {name: part.state_dict() for name, part in parts.items()}
            path = save_checkpoint(saved, run_dir, best=is_best, keep=training.keep_checkpoints)
        clock.restart()
        if stopping or ended:
            break
    log.close()
    keep_tokens(network)
    if stopping and not ended and done < training.steps:
        console.line(f"stopped after step {done}, saved {path}; go on with --resume {run_dir}")
        return 128 + stopping
    console.line(f"done: {path}")
    return 0


def evaluate_run(args: argparse.Namespace) -> int:
    """--evaluate: the metrics of a checkpoint on data.eval_dir; returns the exit status."""
    console = Console()
    task, _, state = build.open_run(args, console)
    if not task.config["data"]["eval_dir"]:
        raise InputError("data.eval_dir: null; --evaluate needs a folder of images")
    eval_set = build.open_eval_set(task, state["classes"], console)
    model, _ = build.open_model(task, eval_set.classes, state, console)
    control = processes.connect(next(model.parameters()).device)
    bad_images = BadImages(len(eval_set), console.line)
    batches = build.open_eval_batches(eval_set, task, bad_images, keep=False)
    try:
        rewards = build.load_eval_rewards(task, build.load_rewards(task))
    except InputError as error:  # their file is gone, say
        console.line(f"warning: {error}; evaluated without the rewards")
        task.config["training"]["decide"], rewards = "argmax", {}
    judge = build.open_judge(task, rewards, state)()
    evaluation = evaluate(task, task.network(model), batches, eval_set, control, judge)
    bad_images.share(control)
    metrics = metrics_line(processes.from_rank_zero(lambda: evaluation.metrics() | judge.metrics(), control))
    console.line(f"step {state['step']}: {metrics}" + f" ({bad_images.left(eval_set)})" * bool(bad_images.seen))
    return 2 if bad_images.seen else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for bad input, 1 where another process is gone, 130 or 143 after
    Ctrl-C or SIGTERM."""
    try:
        args = parse(argv)
        return train(args) if args.evaluate is None else evaluate_run(args)
    except (InputError, OSError) as error:  # OSError: the disk under the TensorBoard events, say
        rank = processes.rank_and_world()[0]
        who = f"train.py, rank {rank}: " if rank else "train.py: "
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if first or dist.is_initialized():  # before they meet all processes of a host find the same
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
