"""token_cache.py: tokens that leave frozen blocks are computed once per image, and nothing else changes."""

import errno
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TINY, make_folders, message, same
from PIL import Image

import token_cache
import train
import vit_model
from checkpoint import load_checkpoint
from data_types import InputError
from images import Prepared
from token_cache import CHUNK, Cached, TokenCache, TokenFiles, allocate, digest_of, keep_tokens, kept_blocks
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


# --- For later runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[torch.Tensor]:
    """The batches that the trunk is asked for: a black image and noise before the first step, then images."""
    seen, trunk = [], VisionTransformer.trunk

    def counted(model, images, end):
        seen.append(images)
        return trunk(model, images, end)

    monkeypatch.setattr(VisionTransformer, "trunk", counted)
    return seen


def kept_files(folder: str = "ckpt") -> list[Path]:
    """All that lies there but the runs' folders."""
    return sorted(path for path in Path(folder).iterdir() if not path.is_dir())


def counts(capsys) -> tuple[int, int]:
    """Images whose tokens were found, and computed, as the console has it."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data.token_cache: tokens of")]
    found, computed = re.fullmatch(r"data.token_cache: tokens of (\d+) images found, of (\d+) computed", line).groups()
    return int(found), int(computed)


KEEP = "data.token_cache=keep"


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["data.cache_limit_gb=0", "data.token_cache_dir=kept"],
        ["data.token_dtype=bfloat16", "training.kl_coef=0.1"],
        ["model.dropout_blocks=0", "training.freeze_blocks=2", "data.augment=false"],
    ],
)
def test_a_second_run_computes_no_tokens(folder, capsys, calls, keys):
    """Of training and evaluation; both end in the bits of a run without a file."""
    first = run("first", KEEP, *keys)
    found, computed = counts(capsys)
    assert found == 0 and computed >= 36 and len(calls) > 2
    (file,) = kept_files("kept" if len(keys) == 2 and "cache_limit" in keys[0] else "ckpt")
    calls.clear()
    second = run("second", KEEP, *keys)
    assert [len(images) for images in calls] == [1, CHUNK]
    out = capsys.readouterr().out
    pattern = file.with_name(file.name[:-13] + "_*.bin")
    assert f"data.token_cache: keep: {pattern} have the tokens of {computed} images (0 MB, mapped)" in out.splitlines()
    assert f"data.token_cache: tokens of {computed} images found, of 0 computed" in out.splitlines()
    assert kept_files(file.parent) == [file]
    without = run("without", *keys, f"data.token_cache={'auto' if 'data.token_dtype=bfloat16' in keys else 'never'}")
    for part in ("model", "optimizer", "best_metric"):
        assert same(first[part], without[part]) and same(second[part], without[part]), part


def test_mirrored_images_are_added(folder, capsys, calls):
    """The plain ones are found, the mirrored ones computed; no image twice."""
    run("plain", KEEP, "data.augment=false")
    assert counts(capsys) == (0, 36)
    calls.clear()
    mirrored = run("mirrored", KEEP)
    found, computed = counts(capsys)
    assert 12 < found <= 36 and 0 < computed <= 24
    images = torch.cat(calls[2:]).flatten(1)
    assert len(images.unique(dim=0)) == computed and len(kept_files()) == 2
    assert same(mirrored["model"], run("without", "data.token_cache=never")["model"])
    capsys.readouterr()
    run("again", KEEP)
    assert counts(capsys) == (found + computed, 0) and len(kept_files()) == 2


def test_a_resumed_run_finds_them(folder, capsys, calls):
    whole = run("whole", KEEP, "training.steps=12", "training.eval_interval=3")
    Path("ckpt/again").mkdir()
    shutil.copy("ckpt/whole/step_000006.pt", "ckpt/again/last.pt")
    calls.clear()
    assert train.main(["--resume", "ckpt/again"]) == 0
    assert [len(images) for images in calls] == [1, CHUNK]
    assert same(load_checkpoint(Path("ckpt/again"))["model"], whole["model"])


@pytest.mark.parametrize(
    "keys, same_file",
    [
        (["training.learning_rate=0.1", "training.batch_size=5", "model.dropout=0.5"], True),
        (["training.seed=8"], False),  # other weights
        (["model.num_heads=4"], False),  # the same weights
        (["model.norm_eps=1e-3"], False),
        (["data.mean=[0.485,0.456,0.407]"], False),
        (["data.token_dtype=bfloat16"], False),
    ],
)
def test_another_trunk_has_another_file(folder, capsys, keys, same_file):
    run("a", KEEP)
    capsys.readouterr()
    run("b", KEEP, *keys)
    found, computed = counts(capsys)
    names = {path.name[:-13] for path in kept_files()}
    assert (found > 0, len(names)) == ((True, 1) if same_file else (False, 2))


def trunk_of(change=lambda model: None, blocks: int = 1, size: tuple[int, int] = (8, 16)) -> Cached:
    torch.manual_seed(0)
    model = VisionTransformer(size, 4, embed_dim=8, depth=3, num_heads=2, num_classes=2)
    with torch.no_grad():
        change(model)
    return Cached(Prepared(model, [0.5] * 3, [0.5] * 3), blocks, None)


def test_the_digest_is_of_the_trunk():
    """A last bit of any of its weights; a code that was changed; an image turned, that has the same bytes; but not of
    what comes after it."""

    def digest(*arguments, dtype=torch.float32, size=(8, 16)) -> bytes:
        return digest_of(trunk_of(*arguments, size=size), (3, *size), dtype)

    def last_bit(weight: torch.Tensor) -> None:
        weight.view(-1)[-1] = torch.nextafter(weight.view(-1)[-1], torch.tensor(9.0))

    plain, others = digest(), []
    names = list(trunk_of().network.model.state_dict())
    for name in names:
        changed = digest(lambda model, name=name: last_bit(model.state_dict()[name]))
        later = name.startswith(("blocks.1.", "blocks.2.", "norm.", "head."))
        assert (changed == plain) == later, name
        others += [] if later else [changed]
    others += [digest(lambda m: None, 2), digest(dtype=torch.bfloat16), digest(size=(16, 8))]
    assert len({plain, *others}) == len(others) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_model.F, "gelu", torch.relu)
        assert digest() != plain
    assert digest() == plain


def damage_by_cutting(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def damage_by_another_format(file: Path) -> None:
    file.write_bytes(b"another format" * 1000)


def damage_by_another_name(file: Path) -> None:
    """Of a trunk whose tokens have the same size."""
    run("other", KEEP, "training.seed=8")
    (other,) = set(kept_files()) - {file}
    other.rename(file)


@pytest.mark.parametrize(
    "damage, why",
    [
        (damage_by_cutting, "cut off"),
        (lambda file: os.truncate(file, 70), "cut off"),
        (lambda file: os.truncate(file, 0), "of another format"),
        (damage_by_another_format, "of another format"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"tokens 1", b"tokens 0", 1)), "of another format"),
        (damage_by_another_name, "of another format"),
        (lambda file: (file.unlink(), file.mkdir()), "Is a directory"),
    ],
)
def test_a_damaged_file_is_not_used(folder, capsys, damage, why):
    """One line, and the tokens are computed anew; a later run finds those."""
    first = run("first", KEEP)
    (file,) = kept_files()
    damage(file)
    capsys.readouterr()
    second = run("second", KEEP)
    out = capsys.readouterr().out.splitlines()
    line = f"warning: {file}: not used ({why}); its tokens are computed anew: delete it"
    assert [text for text in out if text.startswith("warning")] == [line]
    assert same(first["model"], second["model"])
    run("third", KEEP)
    found, computed = counts(capsys)
    assert found >= 36 and computed == 0


def token_files(folder: Path, lines: list[str], digest: bytes = b"trunk" * 3 + b"!") -> TokenFiles:
    return TokenFiles(folder, digest, (2, 3), torch.float32, None, SimpleNamespace(line=lines.append))


def test_two_runs_at_a_time(tmp_path):
    """Neither finds the other's when it begins. What both have computed is written once, and nothing is lost."""
    batch, lines, networks = images(37), [], []
    for part in (batch[:20], batch[10:]):
        cache = TokenCache(torch.empty(37, 2, 3), files=token_files(tmp_path, lines))
        assert cache.tokens(part, Compute()).equal(expected(part))
        networks.append(Cached(Prepared(SimpleNamespace(sample_masks=None), [], []), 1, cache))
    for network in networks:
        keep_tokens(network)
    sizes = sorted(path.stat().st_size for path in kept_files(tmp_path))
    assert sizes == [64 + 17 * (16 + 24), 64 + 20 * (16 + 24)]
    again = TokenCache(torch.empty(0, 2, 3), files=token_files(tmp_path, lines))
    assert again.tokens(batch.flip(0), None).equal(expected(batch.flip(0)))
    assert len(again.found) == 37 and not token_files(tmp_path, lines, b"another trunk   ").kept
    written = [f"{path}: tokens of {n} images, for later runs" for path in kept_files(tmp_path) for n in (17, 20)]
    assert len(set(lines) & set(written)) == 2
    for network in networks:
        keep_tokens(network)
    assert len(kept_files(tmp_path)) == 2


def test_what_a_kill_left_is_removed(tmp_path):
    """A temporary file that nobody has written to for an hour."""
    old, young = tmp_path / ".tokens_1.bin.tmp", tmp_path / ".tokens_2.bin.tmp"
    for path, age in ((old, 4000), (young, 3000)):
        path.touch()
        os.utime(path, (0, time.time() - age))
    path = token_files(tmp_path, []).write({b"k" * 16: (torch.zeros(1, 2, 3), 0)})
    assert kept_files(tmp_path) == [young, path]


@pytest.mark.parametrize("named", [False, True])
def test_no_room_at_the_end(folder, capsys, monkeypatch, named):
    """One line, and the run's result is there. A disk is not filled unasked."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_cache, "most_for_a_file", lambda folder: 5000.0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    run("a", KEEP, *["data.token_cache_dir=ckpt"] * named)
    why = "No space left on device" if named else "0.0 GB are more than half of what is free; name a "
    why += "" if named else "data.token_cache_dir"
    out = capsys.readouterr().out.splitlines()
    assert f"warning: ckpt: tokens are not kept for later runs ({why})" in out
    assert out[-1] == "done: ckpt/a/step_000006.pt" and kept_files() == []


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("limit, where", [(4, "memory"), (0, "a file in kept, as data.cache_limit_gb is 0")])
def test_files_of_other_images(folder, capsys, monkeypatch, calls, room, limit, where):
    """They leave no place for the run's own, so that there are more of them when they are needed; where there is no
    room for them tokens are computed again."""
    keys = [KEEP, "data.token_cache_dir=kept", f"data.cache_limit_gb={limit}", "data.augment=false"]
    others = ["data.train_dir=others", "data.eval_dir=null"]
    shutil.copytree("train", "others")
    for i, path in enumerate(sorted(Path("others").rglob("*.png"))):
        Image.new("RGB", (8, 8), (i, 100, 50)).save(path)
    run("others", *keys, *others)
    (file,) = kept_files("kept")
    capsys.readouterr()
    calls.clear()

    def allocated(shape, dtype, folder):
        if not room and shape[0] == 24:
            raise InputError("no room")
        return allocate(shape, dtype, folder)

    monkeypatch.setattr(token_cache, "allocate", allocated)
    end = run("a", *keys)
    out = capsys.readouterr().out
    if room:
        assert f"frozen blocks: up to 0 MB more in {where}: the files are of other images" in out.splitlines()
        assert "tokens of 0 images found, of 36 computed" in out
        assert len({tuple(image) for image in torch.cat(calls[2:]).flatten(1).tolist()}) == 36
        assert len(kept_files("kept")) == 2
    else:
        assert "warning: no room; these images' frozen blocks run again each epoch" in out.splitlines()
        assert "tokens of 0 images found, of 12 computed" in out
    assert same(end["model"], run("b", "data.augment=false", "data.token_cache=never")["model"])


def test_a_run_that_is_stopped_keeps_them_and_one_that_fails_does_not(folder, capsys, monkeypatch):
    update, evaluate = train.update_policy, train.evaluate

    def stopped(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return update(*arguments, **options)

    def failing(*arguments):
        raise InputError("a failure")

    monkeypatch.setattr(train, "evaluate", failing)
    assert train.main(["--config", "tiny.yaml", KEEP]) == 2 and kept_files() == []
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "update_policy", stopped)
    assert train.main(["--config", "tiny.yaml", KEEP, "training.run_name=b"]) == 128 + signal.SIGTERM
    assert len(kept_files()) == 1 and counts(capsys) == (0, 16)
