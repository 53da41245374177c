"""token_cache.py: tokens that leave frozen blocks are computed once per image, and nothing else changes."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, make_folders, message, same

import token_cache
import train
from checkpoint import load_checkpoint
from token_cache import CHUNK, TokenCache, allocate, kept_blocks
from vit_model import VisionTransformer


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


class Compute:
    """Tokens [B, 2, 3] that tell the image, and the images that were asked for."""

    def __init__(self):
        self.seen = []

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        assert batch.shape == (CHUNK, 3, 4, 5)
        self.seen += batch.flatten(1).tolist()
        return batch.flatten(1)[:, :6].float().view(-1, 2, 3) / 7

    def count(self) -> int:
        """How many different images it has seen; its calls are filled up with the last image."""
        return len({tuple(image) for image in self.seen})


def expected(batch: torch.Tensor) -> torch.Tensor:
    return batch.flatten(1)[:, :6].float().view(-1, 2, 3) / 7


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_image_is_computed_once(tmp_path, on_disk):
    """In calls of one shape, however many are new; twice in a batch or mirrored; a view that is not contiguous."""
    cache, compute = TokenCache(allocate((80, 2, 3), torch.float32, tmp_path if on_disk else None)), Compute()
    batch = images(37)
    for part in (batch[:5], batch[[3, 3, 20, 2, 20]], batch, batch.flip(0), batch.flip(-1)):
        assert cache.tokens(part, compute).equal(expected(part))
    assert compute.count() == len(cache.places) == 74 and len(compute.seen) == CHUNK * (1 + 1 + 2 + 3)
    for part in (batch, batch.flip(-1), torch.cat([batch, batch], 1)[:, :3]):
        assert cache.tokens(part, None).equal(expected(part))
    assert list(tmp_path.iterdir()) == []  # the file has no name, so that nothing is left of it


def test_where_all_places_are_taken_tokens_are_computed_each_time():
    """As for images that somebody's own task changes at random."""
    cache, compute = TokenCache(torch.empty(4, 2, 3)), Compute()
    for _ in range(2):
        assert cache.tokens(images(9), compute).equal(expected(images(9)))
    assert compute.count() == 9 and len(cache.places) == 4 and len(compute.seen) == 2 * CHUNK


def test_bfloat16_rounds_what_is_computed_too():
    """So tokens are a function of the image, not of whether it was met before."""
    cache = TokenCache(torch.empty(4, 2, 3, dtype=torch.bfloat16))
    tokens = cache.tokens(images(6), Compute())
    assert tokens.equal(expected(images(6)).bfloat16().float()) and cache.tokens(images(6), Compute()).equal(tokens)


def test_a_disk_without_room(tmp_path, monkeypatch):
    """One line before the first step; and a folder that cannot be made."""
    hint = "name another folder with data.token_cache_dir, or set data.token_cache: never"
    (tmp_path / "file").touch()
    text = message(allocate, (10**6, 500), torch.float32, tmp_path / "file")
    assert text == f"{tmp_path / 'file'}: no room for 2.0 GB of tokens (File exists); {hint}"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    text = message(allocate, (10**6, 500), torch.bfloat16, tmp_path / "new")
    assert text == f"{tmp_path / 'new'}: no room for 1.0 GB of tokens (No space left on device); {hint}"


@pytest.mark.parametrize(
    "depth, dropout_blocks, frozen, kept",
    [(12, 1, 11, 11), (12, 1, 12, 11), (12, 0, 12, 12), (12, 3, 4, 4), (12, None, 5, 0)],
)
def test_what_is_kept_ends_before_the_first_mask(depth, dropout_blocks, frozen, kept):
    assert kept_blocks({"depth": depth, "dropout_blocks": dropout_blocks}, frozen) == kept


# --- In a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a tiny config: 24 images, batches of 16, the first of two blocks frozen."""
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    sections = {"training": {"freeze_blocks": 1, "steps": 6}, "data": {"augment": True}}
    config = {name: keys | sections.get(name, {}) for name, keys in TINY.items()}
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(name: str, *keys: str) -> dict:
    """The last checkpoint of a run."""
    assert train.main(["--config", "tiny.yaml", f"training.run_name={name}", *keys]) == 0
    return load_checkpoint(Path("ckpt", name))


KEPT = "frozen blocks: the tokens that leave {} of 2 blocks are kept{}: 0 MB in "
ON_DISK = "a file in ckpt, as data.cache_limit_gb is 0"


@pytest.mark.parametrize(
    "keys, line",
    [
        ([], KEPT.format(1, ", mirrored too") + "memory"),
        (["data.cache_limit_gb=0", "training.micro_batch_size=3"], KEPT.format(1, ", mirrored too") + ON_DISK),
        (["model.dropout_blocks=0", "training.freeze_blocks=2", "data.augment=false"], KEPT.format(2, "") + "memory"),
        (
            ["training.kl_coef=0.1", "model.registers=2", "model.positions=rotary"],
            KEPT.format(1, ", mirrored too") + "memory",
        ),
    ],
)
def test_a_run_has_the_same_bits_as_without(folder, capsys, keys, line):
    """Weights, optimizer and the best metric, of mirrored images, on disk, with a reference, with all blocks frozen."""
    with_cache = run("with", *keys)
    assert line in capsys.readouterr().out.splitlines()
    without = run("without", "data.token_cache=never", *keys)
    assert "frozen blocks: run again each epoch (data.token_cache: never)" in capsys.readouterr().out.splitlines()
    for part in ("model", "optimizer", "best_metric"):
        assert same(with_cache[part], without[part]), part
    assert not any(path.name.startswith("tmp") for path in Path("ckpt").iterdir())


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_masks_and_boxes_have_the_same_bits_as_without(folder, task, monkeypatch):
    """Their heads read the patches; the mirrored versions come with mirrored targets."""
    from conftest import make_scenes

    make_scenes.main(["--train", "20", "--eval", "6", "--size", "16", "--out", "scenes"])
    keys = [f"task={task}", "data.train_dir=scenes/train", "data.eval_dir=scenes/eval", "model.image_size=16"]
    assert same(run("with", *keys)["model"], run("without", "data.token_cache=never", *keys)["model"])


def test_the_trunk_runs_once_per_image_and_a_resumed_run_ends_in_the_same_bits(folder, monkeypatch):
    """24 images in two versions and 12 of the evaluation, each once over 12 steps and four evaluations; going on after
    step 6 computes them again, in other company, to the same end."""
    seen, trunk = [], VisionTransformer.trunk

    def counted(model, images, end):
        seen.extend(map(tuple, images.flatten(1).tolist()))
        return trunk(model, images, end)

    monkeypatch.setattr(VisionTransformer, "trunk", counted)
    whole = run("whole", "training.steps=12", "training.eval_interval=3")
    computed = len(seen) // CHUNK
    assert len(set(seen)) <= 24 * 2 + 12 + 1  # and the image that tells the tokens' shape
    assert computed < 12 + 4  # not in every step
    Path("ckpt/again").mkdir()
    shutil.copy("ckpt/whole/step_000006.pt", "ckpt/again/last.pt")
    assert train.main(["--resume", "ckpt/again"]) == 0
    assert same(load_checkpoint(Path("ckpt/again"))["model"], whole["model"])


@pytest.mark.parametrize(
    "keys, why",
    [
        (["model.dropout_blocks=null"], "dropout comes before their end; set model.dropout_blocks lower"),
        (["model.dropout_blocks=2"], "dropout comes before their end; set model.dropout_blocks lower"),
    ],
)
def test_why_nothing_is_kept(folder, capsys, keys, why):
    """The line says it; without frozen blocks there is none."""
    run("a", "training.steps=1", *keys)
    assert f"frozen blocks: run again each epoch ({why})" in capsys.readouterr().out.splitlines()
    run("b", "training.steps=1", "training.freeze_blocks=0")
    assert "frozen blocks" not in capsys.readouterr().out


def test_several_processes_keep_nothing(folder, capsys, monkeypatch):
    """Each would see all images only after many epochs."""
    monkeypatch.setattr(token_cache, "rank_and_world", lambda: (0, 2))
    run("a", "training.steps=1")
    assert "frozen blocks: run again each epoch (of several processes)" in capsys.readouterr().out.splitlines()


def test_a_disk_is_not_filled_unasked(folder, capsys, monkeypatch):
    """More than half of what is free beside the checkpoints: the blocks run again, unless a folder is named."""
    monkeypatch.setattr(token_cache, "most_for_a_file", lambda folder: 5000.0)
    run("a", "training.steps=1", "data.cache_limit_gb=0")
    why = "their tokens take 0.0 GB, more than half of what is free in ckpt, and data.cache_limit_gb is 0"
    expected = f"frozen blocks: run again each epoch ({why}; data.token_cache_dir names another folder)"
    assert expected in capsys.readouterr().out.splitlines()
    run("b", "training.steps=1", "data.cache_limit_gb=0", "data.token_cache_dir=kept")
    line = KEPT.format(1, ", mirrored too") + "a file in kept, as data.cache_limit_gb is 0"
    assert line in capsys.readouterr().out.splitlines()
    assert list(Path("kept").iterdir()) == []


def test_half_of_what_is_free(folder):
    """Of the disk of a folder that need not be there yet."""
    free = shutil.disk_usage(folder).free
    assert token_cache.most_for_a_file(Path("not/there")) == pytest.approx(free / 2, rel=0.2)


def test_a_full_disk_ends_the_run_before_the_first_step(folder, capsys, monkeypatch):
    monkeypatch.setattr(token_cache.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert train.main(["--config", "tiny.yaml", "data.cache_limit_gb=0", "data.token_cache_dir=kept"]) == 2
    assert capsys.readouterr().err.startswith(
        "train.py: kept: no room for 0.0 GB of tokens (full); name another folder"
    )
    assert not Path("ckpt/tiny").exists()
