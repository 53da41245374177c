"""report.py: lines on the console, events in TensorBoard, times, and the metrics that end a run."""

import os
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import message
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import report
from report import Clock, Console, Log, count_dead_steps, log_interval, quiet_writer, read_rows


@pytest.fixture
def watch(monkeypatch) -> SimpleNamespace:
    """Time stands still at `watch.now`."""
    watch = SimpleNamespace(now=100.0)
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: watch.now, perf_counter=lambda: watch.now))
    return watch


def test_console_on_a_terminal(monkeypatch, capfd):
    """The progress line rewrites itself and fits the 50 columns; a line takes its place and stays."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((50, 24)))
    console = Console()
    console.progress("step 1 " + 60 * ".")
    console.progress("step 2")
    console.line("stays")
    assert capfd.readouterr().out == "\r\033[Kstep 1 " + 42 * "." + "\r\033[Kstep 2\r\033[Kstays\n"


def test_console_without_an_encoding_for_a_name(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        monkeypatch.setattr("sys.stdout", file)
        Console().line("café")
    assert (tmp_path / "out").read_text() == "caf\\xe9\n"


@pytest.mark.parametrize("rank, expected", [("0", "first\nstays\nten seconds later\n"), ("1", "")])
def test_console_elsewhere(monkeypatch, capsys, watch, rank, expected):
    """Progress is a plain line every ten seconds, all other lines are there; of several processes rank 0 speaks."""
    monkeypatch.setenv("RANK", rank)
    console = Console()
    console.progress("first")
    watch.now += 9.9
    console.progress("too soon")
    console.line("stays")
    watch.now += 0.1
    console.progress("ten seconds later")
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("rank, first_step", [("0", 1), ("0", 5), ("1", 1)])
def test_log(tmp_path, monkeypatch, rank, first_step):
    """There is no file before the first thing written; a new run's begins with the config; rank 0 alone writes, and
    alone makes what takes work."""
    monkeypatch.setenv("RANK", rank)
    config, made, folder = {"training": {"steps": 9}}, [], tmp_path / "logs"
    log = Log(folder, first_step, config)
    log.flush()
    assert not folder.exists()
    log.add("scalar", "a", lambda: made.append(1) or 1.5, 5)
    log.close()
    assert folder.exists() == bool(made) == (rank == "0")
    if rank == "0":
        events = EventAccumulator(str(folder)).Reload()
        assert [(event.step, event.value) for event in events.Scalars("a")] == [(5, 1.5)]
        assert ("config/text_summary" in events.Tags()["tensors"]) == (first_step == 1)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capfd):
    """Not the traceback of TensorBoard's thread; those of other threads stay."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    log = Log(tmp_path, 1, {})
    log.add("scalar", "a", 1.0, 1)
    full = OSError(28, "No space left on device")
    log.writer.file_writer.event_writer._async_writer._writer.write = Mock(side_effect=full)

    def fill() -> None:
        for step in range(100):
            log.add("scalar", "a", 1.0, step)
            log.flush()

    assert message(fill).startswith(f"{tmp_path}: TensorBoard's events cannot be written (No space left on device); ")
    assert capfd.readouterr().err == ""
    heard = []
    quiet = quiet_writer(heard.append)
    quiet(SimpleNamespace(exc_type=OSError, thread=threading.Thread()))
    quiet(SimpleNamespace(exc_type=ValueError, thread=log.writer.file_writer.event_writer._async_writer._worker))
    assert len(heard) == 2


def test_times_of_an_interval(watch, capsys):
    """Images/s and the share of waiting are of the interval, which `restart` begins; what is left is by the pace of
    all steps. The means of the interval are logged with them."""

    def decode():
        watch.now += 1
        return "batch"

    clock, logged = Clock(), []
    config = {"training": {"batch_size": 16, "steps": 12}}
    log = SimpleNamespace(config=config, scalars=lambda scalars, step: logged.append((step, scalars)))
    assert [clock.wait(decode), clock.wait(decode)] == ["batch"] * 2
    watch.now += 2
    values = {"reward/mean": [0.25, 0.5], "groups/live": [0.5, 0.0]}
    assert log_interval(log, Console(), clock, values, {"extra": 3.0, "step": 7}) == 0.25
    means = {"reward/mean": 0.375, "groups/live": 0.25, "extra": 3.0}
    assert logged.pop() == (7, means | {"speed/images_per_second": 8.0, "speed/data_wait": 0.5})
    watch.now += 9  # an evaluation
    clock.restart()
    clock.wait(decode)
    watch.now += 10  # for the console
    log_interval(log, Console(), clock, values, {"step": 8})
    assert logged[0][1]["speed/images_per_second"] == pytest.approx(16 / 11)
    lines = "step {}/12  reward 0.375  live groups 25%  {} images/s  {} left\n"
    assert capsys.readouterr().out == lines.format(7, 8, "0:00:10") + lines.format(8, 1, "0:00:32")


# --- Metrics that end a run -------------------------------------------------------------------------------------------

GOOD = {"loss": 0.1, "grad_norm": 1.0, "reward/mean": 0.5, "reward/std": 0.5, "reward/min": 0.0, "reward/a.py:f": 0.5}


def read(*changes: dict, objective: str = "grpo", advantage: str = "maxrl") -> dict[str, list[float]]:
    """Of steps 7, 8, … that differ from `GOOD` by these changes."""
    rows = [{name: torch.tensor(value) for name, value in (GOOD | change).items()} for change in changes]
    rows = [row | {"group_rewards": torch.rand(4)} for row in rows]
    return read_rows(rows, 7, {"training": {"objective": objective}, "rollout": {"advantage": advantage}})


def test_rows_are_read_by_name():
    """All that is in each step, but for the groups' rewards. Negative rewards are fine but with maxrl."""
    values = read({}, {"loss": 0.25, "policy/kl": 1.0})
    assert values.keys() == GOOD.keys() and values["loss"] == pytest.approx([0.1, 0.25])
    for options in ({"advantage": "rloo"}, {"objective": "supervised"}):
        assert read({"reward/min": -1.5}, **options)["reward/min"] == [-1.5]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"reward/mean": torch.nan, "reward/a.py:f": torch.nan}, "rollout.reward: a.py:f returned nan at step 8; "),
        (
            {"reward/std": torch.inf},
            "rollout.reward: the sum of rewards returned inf at step 8; expected finite numbers",
        ),
        (
            {"reward/min": -1.5},
            "rollout.reward: returned -1.5 at step 8; rollout.advantage: maxrl expects rewards >= 0: ",
        ),
        ({}, "the loss is nan, the gradient norm 1 at step 8; the weights were not touched: "),
    ],
)
def test_rows_that_end_a_run(change, expected):
    """The first bad step counts, and first the culprit, not the loss that followed from it."""
    assert message(read, {}, change | {"loss": torch.nan}, {"loss": torch.inf}).startswith(expected)
    assert message(read, {"grad_norm": torch.inf}).startswith("the loss is 0.1, the gradient norm inf at step 7; ")


def test_a_dead_run_is_said_once(capsys):
    """After 50 steps in a row without a live group, in however many parts; a live group begins anew."""
    count, said = 0, []
    for live in ([0.0] * 33, [0.0] * 16, [0.0], [0.0] * 60, [0.0, 0.1, 0.0], [0.0] * 49):
        count = count_dead_steps(count, live, Console())
        said.append((count, capsys.readouterr().out.count("warning: no live group in 50 steps: the rewards of every")))
    assert said == [(33, 0), (49, 0), (50, 1), (110, 0), (1, 0), (50, 1)]
