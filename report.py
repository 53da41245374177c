"""What a run tells: lines on the console, curves and pictures in TensorBoard, and why it cannot go on."""

import io
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data_types import InputError
from processes import rank_and_world

WARN_DEAD_STEPS = 50


def allow_all_names() -> None:
    """Names of classes and files may hold what the console's encoding has not: it gets escapes in their place."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Console:
    """Lines that stay, and a progress line that rewrites itself on a terminal; elsewhere a plain line now and then.
    Of several processes rank 0 speaks."""

    def __init__(self):
        allow_all_names()
        self.terminal, self.mute = sys.stdout.isatty(), rank_and_world()[0] > 0
        self.next_time = 0.0

    def line(self, text: str) -> None:
        if not self.mute:
            print(f"\r\033[K{text}" if self.terminal else text, flush=True)

    def progress(self, text: str) -> None:
        if self.mute:
            return
        if self.terminal:
            columns = os.get_terminal_size(sys.stdout.fileno()).columns
            print(f"\r\033[K{text[: columns - 1]}", end="", flush=True)
        elif time.monotonic() >= self.next_time:
            print(text, flush=True)
            self.next_time = time.monotonic() + 10


class Log:
    """TensorBoard's events of a run. Of several processes rank 0 writes, the others are mute. The file is made by the
    first thing written, after the first step, and of a new run it begins with the config. What writes raises InputError
    where the disk does not take it."""

    def __init__(self, directory: Path, first_step: int, config: dict):
        self.directory, self.first_step, self.config, self.writer = directory, first_step, config, None
        self.mute = rank_and_world()[0] > 0

    def add(self, kind: str, name: str, value: object, step: int) -> None:
        """kind: `scalar`, `text`, `histogram` or `image`. A value that takes work is a function, called if needed."""
        if self.mute:
            return
        value = value() if callable(value) else value
        with self.explained():
            if not self.writer:
                threading.excepthook = quiet_writer(threading.excepthook)
                self.writer = SummaryWriter(self.directory, purge_step=self.first_step)
                if self.first_step == 1:
                    self.writer.add_text("config", f"```\n{yaml.safe_dump(self.config, sort_keys=False)}```", 1)
            getattr(self.writer, f"add_{kind}")(name, value, step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.add("scalar", name, value, step)

    def flush(self) -> None:
        if self.writer:
            with self.explained():
                self.writer.flush()

    def close(self) -> None:
        if self.writer:
            with self.explained():
                self.writer.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.directory}: TensorBoard's events cannot be written ({error.strerror or error}); make room, and "
                "--resume goes on from the last checkpoint"
            ) from None


def quiet_writer(hook: Callable) -> Callable:
    """`threading.excepthook` without the traceback of TensorBoard's writing thread: `Log` says it in a line."""

    def quiet(args: threading.ExceptHookArgs) -> None:
        if not (issubclass(args.exc_type, OSError) and "Writer" in type(args.thread).__name__):
            hook(args)

    return quiet


class Clock:
    """Times steps: since the begin, and since the last `restart`, which leaves out evaluations and checkpoints."""

    def __init__(self):
        self.begin, self.total_steps = time.perf_counter(), 0
        self.restart()

    def restart(self) -> None:
        self.interval_begin, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def wait(self, function: Callable[[], Any]) -> Any:
        """function(), timed as waiting for data; a step begins."""
        before = time.perf_counter()
        result = function()
        self.waited += time.perf_counter() - before
        self.steps, self.total_steps = self.steps + 1, self.total_steps + 1
        return result


def log_interval(log: Log, console: Console, clock: Clock, values: dict[str, list[float]], extra: dict) -> float:
    """Writes the means of some steps' metrics, their speed and the extra metrics; returns the share of live groups."""
    training, done, now = log.config["training"], extra.pop("step"), time.perf_counter()
    means = {name: sum(column) / len(column) for name, column in values.items()}
    seconds = now - clock.interval_begin
    speed = clock.steps * training["batch_size"] / seconds
    log.scalars(means | extra | {"speed/images_per_second": speed, "speed/data_wait": clock.waited / seconds}, done)
    left = timedelta(seconds=int((now - clock.begin) / clock.total_steps * (training["steps"] - done)))
    console.progress(
        f"step {done}/{training['steps']}  reward {means['reward/mean']:.3f}  live groups {means['groups/live']:.0%}  "
        f"{speed:.0f} images/s  {left} left"
    )
    return means["groups/live"]


def read_rows(rows: list[dict[str, Tensor]], first_step: int, config: dict) -> dict[str, list[float]]:
    """The metrics of some steps in one copy from the device: name -> its values. Raises InputError where one of them
    shows that the run cannot go on; the weights were not touched from that step on (see `grpo.optimizer_step`)."""
    needs_positive = config["training"]["objective"] == "grpo" and config["rollout"]["advantage"] == "maxrl"
    sums = ("reward/mean", "reward/std", "reward/min")
    names = [name for name in rows[0] if name != "group_rewards" and all(name in row for row in rows)]
    table = torch.stack([torch.stack([row[name].float() for name in names]) for row in rows]).cpu()
    values = dict(zip(names, table.T.tolist()))
    for i in range(len(rows)):
        at = f"at step {first_step + i}"
        for name in sorted(names, key=sums.__contains__):  # first the culprit
            if name.startswith("reward/") and not math.isfinite(values[name][i]):
                who = "the sum of rewards" if name in sums else name.removeprefix("reward/")
                raise InputError(f"rollout.reward: {who} returned {values[name][i]} {at}; expected finite numbers")
        if needs_positive and values["reward/min"][i] < 0 and math.isnan(values["loss"][i]):  # not of a `Credit`
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


def count_dead_steps(dead_steps: int, live: list[float], console: Console) -> int:
    """How many last steps had no live group, after more steps with these shares of live groups; warns at the 50th."""
    for share in live:
        dead_steps = 0 if share > 0 else dead_steps + 1
        if dead_steps == WARN_DEAD_STEPS:
            console.line(
                f"warning: no live group in {WARN_DEAD_STEPS} steps: the rewards of every group are all equal, "
                "so nothing is learned. Try more rollout.actions_per_sample or num_mc_samples, rollout.action: "
                "sample, a reward with partial credit, or supervised weights to start from (model.checkpoint_path)"
            )
    return dead_steps
