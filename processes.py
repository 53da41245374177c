"""Several processes, by `torchrun`: how they meet, agree, and put together what each has of a batch."""

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are, as `torchrun` says; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def connect(device: torch.device) -> dist.ProcessGroup | None:
    """Meet the other processes; returns a gloo group for messages between CPUs, None where one process is alone."""
    if rank_and_world()[1] == 1:
        return None
    store = meet()
    rank, world = rank_and_world()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return dist.new_group(backend="gloo")


def meet() -> dist.Store:
    """A store of the processes that are alive. torchrun keeps one over its restarts, and in it the addresses of the
    dead: rank 0 hands a new prefix to each process that says hello by a name never used before."""
    store, rank, world = next(dist.rendezvous("env://"))
    own = uuid.uuid4().hex
    store.set(f"hello/{rank}", own)
    if rank:
        prefix = store.get(f"prefix/{own}").decode()  # waits for it
        store.set(f"{prefix}/met/{rank}", "")
        return dist.PrefixStore(prefix, store)
    while not all(store.check([f"{own}/met/{other}"]) for other in range(1, world)):
        for other in range(1, world):
            if store.check([f"hello/{other}"]):  # it may be that of a dead one: then its own is still to come
                store.set(f"prefix/{store.get(f'hello/{other}').decode()}", own)
        time.sleep(0.02)
    return dist.PrefixStore(own, store)


def settle() -> None:
    """To be called before a fork. After a collective has returned, gloo's thread frees what it sent, and for a moment
    holds a lock of Python's. A process forked in that moment waits for the lock for ever (CPython 3.11)."""
    if dist.is_initialized():
        time.sleep(0.05)


def agreed(stop: list[int], group: dist.ProcessGroup | None) -> int:
    """The signal that asked any of the processes to stop, 0 if none did."""
    number = torch.tensor(max(stop, default=0))
    if group:
        dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
    return int(number)


def share_metrics(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """`update_policy`'s metrics of this process's images -> of the whole batch: the loss is a sum over the processes,
    as its parts are divided by the whole batch's size; the others are means."""
    if not dist.is_initialized():
        return metrics
    world = dist.get_world_size()
    same = ("grad_norm", "group_rewards", "reward/min")
    names = [name for name in metrics if name not in same]
    values = torch.stack([metrics[name].float() for name in names])
    groups = [torch.empty_like(metrics["group_rewards"]) for _ in range(world)]
    lowest = metrics["reward/min"].clone()
    dist.all_reduce(values)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_gather(groups, metrics["group_rewards"].contiguous())
    shared = {name: value if name == "loss" else value / world for name, value in zip(names, values)}
    return metrics | shared | {"reward/min": lowest, "group_rewards": torch.cat(groups)}


def gathered(rows: Iterator[tuple], count: int, group: dist.ProcessGroup) -> Iterator[tuple]:
    """On rank 0 the `count` rows of all processes in turn, their tensors on the CPU; on the others none."""
    rank, world = rank_and_world()
    for _ in range(-(-count // world)):
        row = next(rows, None)
        row = row and tuple(part.to("cpu") for part in row)
        everybody = None if rank else [None] * world
        dist.gather_object(row, everybody, group=group)
        yield from filter(None, everybody or ())


def sum_over_processes(value: int | Tensor) -> int | Tensor:
    """The sum of a number over all processes; as many times the same where it is an int."""
    if not dist.is_initialized():
        return value
    if isinstance(value, int):
        return value * dist.get_world_size()
    dist.all_reduce(value)
    return value


def from_rank_zero(function: Callable[[], Any], group: dist.ProcessGroup | None) -> Any:
    """What `function` returns on rank 0, the only one that calls it, on all processes."""
    answer = [None if rank_and_world()[0] and group else function()]
    if group:
        dist.broadcast_object_list(answer, group=group)
    return answer[0]


def gather_everywhere(value: Any, group: dist.ProcessGroup | None) -> list:
    """The values of all processes, on each of them."""
    values = [value] * rank_and_world()[1]
    if group:
        dist.all_gather_object(values, value, group=group)
    return values


def same_everywhere(value: Any, group: dist.ProcessGroup | None) -> bool:
    """Whether this process has the value that rank 0 has."""
    return from_rank_zero(lambda: value, group) == value


def catch_signals() -> list[int]:
    """A list that gets the number of a SIGINT or SIGTERM, for the run to finish its step; a second one stops at
    once."""
    stop: list[int] = []

    def on_signal(number: int, _frame) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop
