"""Several processes (torchrun, gloo on the CPU) against one: the same weights, figures and files."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_make_scenes import make_scenes
from test_train import make_folders

from checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
DOUBLE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train, vision_task
torch.set_default_dtype(torch.float64)
vision_task.per_channel = lambda values, device: torch.tensor(values)[:, None, None] * 255
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""
DIGITS = ["--config", "tiny.yaml", "training.steps=20", "training.micro_batch_size=4"]
SCENES = ["--config", str(ROOT / "config_segmentation.yaml"), "training.steps=8", "training.batch_size=8"]
SCENES += ["training.micro_batch_size=2", "model.embed_dim=16", "model.depth=2", "training.run_name=tiny"]
SCENES += ["training.eval_interval=4", "training.device=cpu", "data.num_workers=0"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_folders(tmp_path)
    (tmp_path / "double.py").write_text(DOUBLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def start(ranks: int, *arguments: str, options=(), script="double.py") -> subprocess.Popen:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
    command += [str(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(ranks: int, *arguments: str, expected: int = 0, **options) -> tuple[str, str]:
    """What a run prints, after it ended as expected."""
    process = start(ranks, *arguments, **options)
    out, err = process.communicate(timeout=100)
    assert process.returncode == expected, err
    return out, err


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path("ckpt", name))["model"]


def difference(a: dict, b: dict) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def figures(out: str) -> list[str]:
    return [line for line in out.splitlines() if re.match(r"step \d+: ", line)]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_two_ranks_are_one_in_float64(folder, task):
    """Weights to 1e-9, eval figures and mean rewards to the last digit shown; 12 eval images in batches of 4 or so,
    none of them twice. With masks the pixels that count differ over the ranks."""
    arguments = DIGITS if task == "classification" else SCENES
    if task == "segmentation":
        assert make_scenes.main(["--out", "data/scenes", "--train", "24", "--eval", "11"]) == 0
    one, two = (run(ranks, *arguments, f"training.run_name=r{ranks}")[0] for ranks in (1, 2))
    assert weights("r1")["head.weight"].dtype == torch.float64
    assert difference(weights("r1"), weights("r2")) < 1e-9
    assert figures(one) == figures(two) and len(figures(one)) > 1
    assert two.count("done: ckpt/r2/step_0000") == 1


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(folder, first, then):
    run(first, *DIGITS, "training.run_name=whole")
    Path("ckpt/part").mkdir()
    shutil.copy("ckpt/whole/step_000009.pt", "ckpt/part/last.pt")
    out, _ = run(then, "--resume", "ckpt/part")
    assert "ckpt/part: going on after step 9" in out
    assert difference(weights("part"), weights("whole")) < 1e-9


def test_what_does_not_divide_is_said_once(folder):
    out, err = run(2, "--config", "tiny.yaml", "training.batch_size=9", expected=1)
    lines = [line for line in err.splitlines() if line.startswith("train.py")]
    assert lines == ["train.py: training.batch_size: 9 does not fall into equal parts for 2 processes"]
    _, err = run(2, "--config", "tiny.yaml", "training.batch_size=16", "training.micro_batch_size=3", expected=1)
    assert "16 does not fall into equal parts for 2 processes of whole micro-batches of 3" in err


def test_sigterm_to_torchrun_saves_and_a_killed_rank_is_survived(folder):
    """SIGTERM: all ranks stop after the same step, one saves. SIGKILL of rank 1: torchrun starts anew, the run goes on
    from last.pt and ends as if nothing had been."""
    arguments = [*DIGITS, "training.steps=300", "training.save_interval=20", "training.eval_interval=300"]
    process = start(2, *arguments, "training.run_name=a")
    wait_for(Path("ckpt/a/last.pt"))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    step = load_checkpoint(Path("ckpt/a"))["step"]
    assert f"stopped after step {step}, saved ckpt/a/step_{step:06d}.pt" in out, err
    assert 20 <= step < 300

    options = ["--max-restarts=2"]
    process = start(2, *arguments, "--resume", "auto", "training.run_name=b", options=options)
    wait_for(Path("ckpt/b/last.pt"))
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert load_checkpoint(Path("ckpt/b"))["step"] == 300
    assert re.search(r"ckpt/b: going on after step (\d+)", out), out
    run(1, "--resume", "ckpt/a")
    assert difference(weights("a"), weights("b")) < 1e-6


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers(pid: int) -> list[int]:
    """The processes that torchrun started, rank by rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found = [entry for entry in environment if entry.startswith(b"RANK=")]
        if found:
            ranks[int(found[0][5:])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def test_two_ranks_learn_the_digits_as_one_does_in_float32(folder):
    """150 steps of config_digits.yaml: the draws are the same, the sums are rounded otherwise."""
    keys = ["training.steps=150", "training.eval_interval=150", "training.micro_batch_size=32", "training.device=cpu"]
    keys += [f"data.{part}_dir={ROOT}/data/{part}" for part in ("train", "eval")]
    lines = []
    for ranks in (1, 2):
        arguments = ["--config", str(ROOT / "config_digits.yaml"), *keys, f"training.run_name=r{ranks}"]
        lines += figures(run(ranks, *arguments, script=ROOT / "train.py")[0])
    one, two = (float(re.search(r"accuracy (\S+)", line)[1]) for line in lines)
    assert one > 0.6 and abs(one - two) < 0.02


def test_the_short_form_of_the_kills(folder):
    """tests/kill_runs.py with three kills, one of them in a write, and one of a rank."""
    command = [sys.executable, str(ROOT / "tests" / "kill_runs.py"), "--kills=3", "--rank-kills=1", "--steps=60"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the same bits as the undisturbed run after 60 steps" in ended.stdout
    assert "1 kills of a rank: ended after 60 steps" in ended.stdout
