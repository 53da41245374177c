"""Several processes (gloo on the CPU) against one: the same weights, metrics and files; signals and kills under
torchrun."""

import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, make_folders, make_scenes

import images
import train
from checkpoint import load_checkpoint

kill_runs = load_script("tests/kill_runs.py")
RANKS = multiprocessing.get_context("forkserver")  # each rank starts with torch imported
RANKS.set_forkserver_preload(["train"])
DIGITS = ["--config", "tiny.yaml", "training.steps=20", "training.micro_batch_size=4"]
DIGITS += ["rollout.reward={classification_reward: 1, macro_f1: 0.3}", "training.label_coef=0.3"]
SCENES = ["--config", str(ROOT / "config_segmentation.yaml"), "training.steps=8", "training.batch_size=8"]
SCENES += [
    "rollout.reward={mask_iou_credit: 1, mean_iou: 0.1}",
    "training.micro_batch_size=2",
    "training.label_coef=0.3",  # without it the loss is 0 but for rounding
    "model.embed_dim=16",
    "model.depth=2",
    "training.eval_interval=4",
]
SCENES += ["training.device=cpu", "data.num_workers=0", "data.train_dir=scenes/train", "data.eval_dir=scenes/eval"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An own folder to run in."""
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(images, "per_channel", per_channel)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def per_channel(values, _device) -> torch.Tensor:
    return torch.tensor(values)[:, None, None] * 255


def rank_of_two(rank: int, port: int, folder: Path, arguments: list[str]) -> None:
    """What torchrun starts, in float64; what it prints is in out{rank}.txt."""
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    images.per_channel = per_channel
    with open(f"out{rank}.txt", "w") as out, redirect_stdout(out):
        status = train.main(arguments)
    sys.exit(status)


def run(capsys, ranks: int, *arguments: str) -> str:
    """What a run prints that ends well; one rank is this process."""
    if ranks == 1:
        assert train.main(list(arguments)) == 0
        return capsys.readouterr().out
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    group = []
    for rank in (0, 1):
        arguments_of = (rank, port, Path.cwd(), arguments)
        group.append(
            RANKS.Process(target=rank_of_two, args=arguments_of, daemon=True)
        )  # one that hangs ends with pytest
        group[-1].start()
    for process in group:
        process.join(timeout=100)
    assert [process.exitcode for process in group] == [0, 0]
    return Path("out0.txt").read_text() + Path("out1.txt").read_text()


def start(*arguments: str) -> subprocess.Popen:
    """Two ranks, by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *arguments], **pipes)


def difference(*names: str) -> float:
    """Between the weights of two runs, the largest."""
    a, b = (load_checkpoint(Path("ckpt", name))["model"] for name in names)
    assert {tensor.dtype for tensor in a.values()} == {torch.float64}
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def metrics(out: str) -> list[str]:
    """Those of the first step and of the evaluations."""
    return re.findall(r"step 1/.* groups \S+|step \d+: .*", out)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_two_ranks_are_one_in_float64(capsys, float64, task):
    """Weights to 1e-9, metrics to the last digit shown; 12 eval images in batches of 4 or so, none of them twice. With
    masks the pixels that count differ over the ranks. A checkpoint goes on with another number of ranks, too."""
    if task == "segmentation":
        assert make_scenes.main(["--out", "scenes", "--train", "24", "--eval", "11"]) == 0
    arguments = DIGITS if task == "classification" else SCENES
    one, two = (run(capsys, ranks, *arguments, f"training.run_name=r{ranks}") for ranks in (1, 2))
    assert difference("r1", "r2") < 1e-9
    assert metrics(one) == metrics(two) and len(metrics(one)) > 2
    assert two.count("done: ckpt/r2/step_0000") == 1
    pending = [load_checkpoint(next(Path("ckpt", name).glob("step_*[49].pt")))["rows"] for name in ("r1", "r2")]
    losses = [[float(row["loss"]) for row in rows] for rows in pending]  # of the whole batch, on rank 0 too
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)
    for first, then in [(1, 2), (2, 1)] if task == "classification" else []:
        Path(f"ckpt/part{first}").mkdir()
        shutil.copy(f"ckpt/r{first}/step_000009.pt", f"ckpt/part{first}/last.pt")
        assert f"ckpt/part{first}: going on after step 9" in run(capsys, then, "--resume", f"ckpt/part{first}")
        assert difference(f"part{first}", "r1") < 1e-9


def test_bad_input_is_said_once():
    process = start("--config", "tiny.yaml", "training.batch_size=9")
    lines = [line for line in process.communicate(timeout=200)[1].splitlines() if line.startswith("train.py")]
    assert process.returncode == 1  # torchrun's
    assert lines == ["train.py: training.batch_size: 9 does not fall into equal parts for 2 processes"]


def test_sigterm_to_one_of_them_stops_all_after_the_same_step():
    """The first saves, and says how to go on."""
    process = start(*DIGITS, "training.steps=2000", "training.save_interval=20", "training.run_name=a")
    end = time.monotonic() + 100
    while not Path("ckpt/a/last.pt").exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(kill_runs.workers(process.pid)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    step = load_checkpoint(Path("ckpt/a"))["step"]
    assert out.count("stopped after step") == 1 and 0 < step < 2000, err
    assert f"stopped after step {step}, saved ckpt/a/step_{step:06d}.pt; go on with --resume ckpt/a" in out


def test_the_short_form_of_the_kills():
    """tests/kill_runs.py with three kills, one of them in a write, and one of a rank, after which torchrun starts
    anew."""
    command = [sys.executable, str(ROOT / "tests" / "kill_runs.py"), "--kills=3", "--rank-kills=1", "--steps=60"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the same bits as the undisturbed run after 60 steps" in ended.stdout
    assert "1 kills of a rank: ended after 60 steps" in ended.stdout
