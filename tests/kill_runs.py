"""Kills training again and again and looks what is left.

    uv run tests/kill_runs.py                        # 30 kills of one process, 10 of one of two ranks; some minutes
    uv run tests/kill_runs.py --kills 3 --rank-kills 1
    uv run tests/kill_runs.py --frozen --kills 100 --rank-kills 0   # the tokens of frozen blocks kept in a file

One process: SIGKILL at random moments of a run on the digits, every third in the middle of a checkpoint's write, and
`--resume auto` after each. After every kill each file under a final name has to be readable, nothing of kept tokens may
be left on the disk, and the run has to end in the same bits as one that nobody disturbed. Two ranks under
`torchrun --max-restarts`: the run has to end, having gone back no further than to the last checkpoint. Exit status 0 if
all of that holds.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import load_checkpoint, read_file  # noqa: E402

FROZEN: list[str] = []  # keys of --frozen


def command(folder: Path, name: str, steps: int, *more: str) -> list[str]:
    keys = [f"training.steps={steps}", f"training.run_name={name}", "training.save_interval=10"]
    keys += [f"training.ckpt_dir={folder}/ckpt", f"training.log_dir={folder}/logs", "training.eval_interval=50"]
    keys += ["training.device=cpu", "data.num_workers=1", "training.keep_checkpoints=2", "training.batch_size=32"]
    return [
        "train.py",
        "--config",
        "config_digits.yaml",
        *more,
        *keys,
        *FROZEN,
        f"data.token_cache_dir={folder}/tokens",
    ]


def start(arguments: list[str], *launcher: str, stdout=subprocess.PIPE) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": stdout, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *arguments], cwd=ROOT, env=environment, **pipes)


def same(a, b) -> bool:
    """Whether two checkpoints hold the same bits (but for where they lie)."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "config")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_files(run: Path) -> int:
    """Every file under a final name can be read; returns the step of last.pt, 0 without one."""
    for path in run.glob("*.pt"):
        read_file(path)
    assert not list(run.parents[1].glob("tokens/*")), "a file of tokens is left"
    return load_checkpoint(run)["step"] if (run / "last.pt").exists() else 0


def kill_one_process(folder: Path, kills: int, steps: int, rng: random.Random) -> None:
    process = start(command(folder, "whole", steps))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    run, in_write, done = folder / "ckpt" / "killed", 0, 0
    while done < kills:
        before = check_files(run)
        process = start(command(folder, "killed", steps, "--resume", "auto"))
        target = before + rng.randint(1, max(2, 2 * steps // kills))  # steps that it may get on, at most
        wait_for_write = done % 3 == 2
        deadline = time.monotonic() + rng.uniform(2, 8)
        while process.poll() is None:
            if wait_for_write and any(run.glob(".*.pt.tmp")):
                in_write += 1
                break
            if not wait_for_write and (time.monotonic() > deadline or check_step(run) >= target):
                break
            time.sleep(0 if wait_for_write else 0.01)
        if process.poll() is not None:  # it came to its end
            assert process.returncode == 0, process.stdout.read()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
        print(f"kill {done}: last.pt is of step {check_files(run)}{' (in a write)' * wait_for_write}", flush=True)
    process = start(command(folder, "killed", steps, "--resume", "auto"))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    ends = [load_checkpoint(folder / "ckpt" / name) for name in ("whole", "killed")]
    assert same(*ends), "the end differs from that of the undisturbed run"
    print(f"{done} kills, {in_write} of them in a write: the same bits as the undisturbed run after {steps} steps")


def check_step(run: Path) -> int:
    """The newest step file's number, from its name."""
    return max((int(path.stem.split("_")[1]) for path in run.glob("step_*.pt")), default=0)


def resumed(output: Path) -> list[int]:
    """The steps that one group of ranks after the other went on after."""
    return [int(step) for step in re.findall(r"going on after step (\d+)", output.read_text())]


def kill_ranks(folder: Path, kills: int, steps: int, rng: random.Random) -> None:
    run, output, log = folder / "ckpt" / "ranks", folder / "ranks.txt", []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launcher += [f"--max-restarts={kills}"]  # a group that dies by itself is one too many
    with open(output, "w") as file:  # not a pipe, which fills up
        process = start(command(folder, "ranks", steps, "--resume", "auto"), *launcher, stdout=file)
    for kill in range(kills):
        # The rank that is left of a killed group may still end its write of a checkpoint, so a new file says nothing.
        # Its successors do not start before it is gone: they say where they go on, and the file after that is theirs.
        while process.poll() is None:
            went_on = resumed(output)
            if len(went_on) == kill and check_step(run) > max(went_on, default=0):
                break
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None or len(victims := workers(process.pid)) < 2:  # at its end
            break
        last = check_step(run)
        os.kill(rng.choice(victims), signal.SIGKILL)
        log.append(last)
        print(f"kill {kill + 1} of a rank: after step {last}", flush=True)
    assert process.wait() == 0, output.read_text()
    assert check_files(run) == steps
    went_on = resumed(output)  # one for each kill, in turn
    assert len(went_on) == len(log) and all(step >= last for step, last in zip(went_on, log)), (log, went_on)
    print(f"{len(log)} kills of a rank: ended after {steps} steps, went on after {went_on}")


def workers(pid: int) -> list[int]:
    """The ranks that torchrun started."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            if b"LOCAL_RANK=" in Path(f"/proc/{child}/environ").read_bytes():
                found.append(int(child))
        except OSError:  # just gone
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--rank-kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--frozen", action="store_true", help="freeze all blocks but the last, keep their tokens on disk"
    )
    args = parser.parse_args()
    FROZEN.extend(["training.freeze_blocks=3", "data.cache_limit_gb=0"] if args.frozen else [])
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            kill_one_process(Path(folder), args.kills, args.steps, rng)
        if args.rank_kills:
            kill_ranks(Path(folder), args.rank_kills, args.steps, rng)
    return 0


if __name__ == "__main__":
    sys.exit(main())
