"""Mutates small folders of all three tasks, opens them as train.py does, and compares the targets with the clean ones.

    uv run tests/mutate_folders.py                          # 300 folders, half a minute
    uv run tests/mutate_folders.py --count 1000 --seed 7    # others
    uv run tests/mutate_folders.py --seed 7 --only 123      # one of these alone

A folder is renamed, mixed, emptied or re-encoded in one or two ways (`folder_mutations.py`). It has to end in an
InputError of at most ten lines, each of which names something in the folder or a key; or in the targets of the clean
folder, whose images are recognised by a number in their names. Images may be lost only if a note says so. What is
harmless has to be right. Now and then `train.main` runs too: exit status 0, or 2 and one message. Exit status 0 if all
of that holds.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import ROOT, TINY, make_scenes  # noqa: E402
from folder_mutations import FILES, HIGH, NAME, OF_KIND, SIDE, TOKEN, WIDE, Case  # noqa: E402

import build  # noqa: E402
import train  # noqa: E402
from data_types import InputError  # noqa: E402
from folders import plain_name  # noqa: E402
from images import ordered_batches  # noqa: E402

KINDS = tuple(OF_KIND)
CLASSES = {"2": "0", "10": "1", "café": "4"}  # class -> the bundled digit
SEEN = 12  # grey levels by which an input may differ from the clean one in the mean
RUN_EVERY = 30  # folders of which one is also trained on
RESULTS = ("refused", "right", "FAULT")


def make_clean(folder: Path) -> None:
    """folder/<kind>/train and eval, 9 and 6 pictures each, not square; some pixels are ignored, an object is a crowd
    and one touches the border."""
    for part, (split, count) in enumerate({"train": 3, "eval": 2}.items()):
        for i, (name, digit) in enumerate(CLASSES.items()):
            target = folder / "classification" / split / name
            target.mkdir(parents=True)
            for j, path in enumerate(sorted((ROOT / "data" / split / digit).glob("*.png"))[:count]):
                Image.open(path).resize((WIDE, HIGH)).save(target / f"im{10 * i + j:02d}.png")
        digits = make_scenes.load_digits(ROOT / "data" / split)
        for kind, classes in (("segmentation", 11), ("segmentation of two", 2), ("detection", 11)):
            root, args = folder / kind / split, SimpleNamespace(size=HIGH, seed=0, mask_classes=classes)
            with contextlib.redirect_stdout(io.StringIO()):
                make_scenes.write_split(root, part, 3 * count, digits, (8, 24), args)
            for path in sorted(root.glob("*/*.png")):
                picture = Image.open(path).crop((0, 0, WIDE, HIGH))
                if kind == "segmentation" and path.parent.name == "masks":
                    picture.paste(255, (0, 0, WIDE, 4))
                picture.save(path.with_name(f"im{path.stem[-2:]}.png"))
                path.unlink()
            coco = json.loads((root / NAME).read_text())
            for row in coco["images"]:
                row |= {"file_name": f"im{row['id']:02d}.png", "width": WIDE}
            first, second, box = *coco["annotations"][:2], coco["annotations"][0]["bbox"]
            first["bbox"], second["iscrowd"] = [0.0, box[1], box[0] + box[2], box[3]], 1
            (root / NAME).write_text(json.dumps(coco))
            for name in ("masks", "classes.txt") if kind == "detection" else (NAME,):
                shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def keys_of(kind: str, train_dir: Path, eval_dir: Path | None) -> dict:
    keys = {"task": kind.split()[0], "data.train_dir": str(train_dir), "data.eval_dir": eval_dir and str(eval_dir)}
    return keys | {"data.num_workers": 0, "model.image_size": SIDE, "model.patch_size": 4}


def target_of(batch, i: int, classes: list[str]) -> Any:
    """Target i of a batch by the names of its classes."""
    names = np.array([*map(plain_name, classes), "ignored"])
    if "boxes" in batch.metadata:
        rows = zip(*(batch.metadata[key][i].tolist() for key in ("boxes", "labels", "crowd")))
        return sorted((str(names[k]), *(round(x, 2) for x in box), crowd) for box, k, crowd in rows if k >= 0)
    target = batch.targets[i] if batch.counted is None else batch.targets[i].where(batch.counted[i], -1)
    return names[target.numpy()].tolist()


def look(keys: dict) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str], list[str]]:
    """Token -> target, token -> input, of the evaluation folder if there is one; images that are there twice; what the
    run says. Raises InputError."""
    said, twice, targets, inputs = [], [], {}, {}
    datasets = build.open_data(build.configure(("mutated", keys))[1], None, SimpleNamespace(line=said.append))[:2]
    for batch in ordered_batches(dataset := datasets[1] or datasets[0], 4):
        for i, path in enumerate(batch.metadata["paths"]):
            token = TOKEN.search(os.path.basename(path))[0].lower()
            twice += [path] * (token in targets)
            targets[token], inputs[token] = target_of(batch, i, dataset.classes), batch.inputs[i].float()
    return targets, inputs, twice, [line for line in said if line.startswith("note: ")]


def outcome(case: Case, keys: dict, clean: tuple) -> tuple[str, str]:
    """refused, right or FAULT, and why."""
    try:
        targets, inputs, twice, notes = look(keys)
    except InputError as error:
        lines = str(error).splitlines()
        ok = 0 < len(lines) <= 10 and all(line.isprintable() for line in lines)
        where = "".join(c if c.isprintable() else "" for c in str(case.root))
        named = all(where in line or re.match(r"(data|model|segmentation|detection)\.", line) for line in lines[:9])
        return ("refused" if ok and named else "FAULT: the message"), "\n".join(lines)
    except Exception:
        return "FAULT: a traceback", traceback.format_exc()
    if case.want is None:
        return "right", ""
    lost, other = case.want.keys() - targets, [t for t in targets if targets[t] != case.want.get(t)]
    news = [note for note in notes + case.said if note not in clean[3] and re.search("not read|skipped", note)]
    unlike = [t for t in inputs if t in clean[1] and (inputs[t] - clean[1][t]).abs().mean() > SEEN]
    for wrong, what in ((twice, "twice"), (other, "other targets"), (lost if not news else (), "lost in silence")):
        if wrong:
            return f"FAULT: {what}", f"{sorted(wrong)}\n" + "\n".join(notes)
    return ("FAULT: other pictures", str(unlike)) if case.recognisable and unlike else ("right", "")


def run(keys: dict, folder: Path, expected: str) -> str:
    """A step of `train.main`; what is wrong with its end, or nothing."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    keys = keys | {"training.steps": 1, "training.ckpt_dir": folder / "ckpt", "training.log_dir": folder / "logs"}
    words = [f"{key}={'null' if value is None else value}" for key, value in keys.items()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        status = train.main(["--config", str(folder / "tiny.yaml"), *words])
    lines = err.getvalue().splitlines()
    one = len(lines) <= 10 and lines[0].startswith("train.py: ") and "Error" not in lines[0] if lines else False
    fine = (status, lines) == (0, []) if expected == "right" else status == 2 and one
    return "" if fine else f"exit status {status}, stderr {lines}"


def one_case(number: int, seed: int, work: Path, cleans: dict) -> tuple[str, str, str]:
    """The number's folder: its kind, what became of it, and, of a fault, all that is to be known."""
    rng = random.Random(f"{seed} {number}")
    kind, training = KINDS[number % len(KINDS)], rng.random() < 0.5
    split = "train" if training else "eval"
    clean = cleans[kind, split]
    while True:
        tables = OF_KIND[kind], rng.choice((FILES, OF_KIND[kind]))
        chosen = [rng.choice(list(table.items())) for table in tables]
        chosen = rng.sample(chosen, rng.choice((1, 2, 2)))
        shutil.rmtree(work / str(number), ignore_errors=True)
        root = Path(shutil.copytree(work / "clean" / kind / split, work / str(number) / "folder"))
        case = Case(kind, root, training, clean[0], rng)
        try:
            for _, mutation in chosen:
                mutation(case)
            break
        except (AssertionError, OSError, LookupError, ValueError, TypeError, AttributeError):
            continue  # these two do not go together
    folders = (case.root, None) if training else (work / "clean" / kind / "train", case.root)
    keys = keys_of(kind, *folders)
    result, why = outcome(case, keys, clean)
    if result == "refused" and len(chosen) == 1 and chosen[0][0].startswith("= "):
        result = "FAULT: refused, though harmless"
    if number % RUN_EVERY == 0 and result in ("refused", "right") and (wrong := run(keys, work / str(number), result)):
        result, why = "FAULT: train.main", wrong
    label = f"{number}: {kind}, {split}, {' + '.join(name for name, _ in chosen)}"
    if "FAULT" not in result:
        shutil.rmtree(work / str(number))
    return kind, result.split(":")[0], f"{label}: {result}\n{why}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="the cases of these numbers alone")
    parser.add_argument("--verbose", action="store_true", help="also print what was refused, and how")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        make_clean(work / "clean")
        roots = {(kind, split): work / "clean" / kind / split for kind in KINDS for split in ("train", "eval")}
        cleans = {(kind, split): look(keys_of(kind, root, None)) for (kind, split), root in roots.items()}
        for number in args.only or range(args.count):
            kind, result, text = one_case(number, args.seed, work, cleans)
            counts[f"{kind.split()[0]} {result}"] += 1
            counts[result] += 1
            if result == "FAULT" or args.verbose:
                print(text.replace(folder, "…"), flush=True)
    tasks = dict.fromkeys(kind.split()[0] for kind in KINDS)
    of_tasks = ", ".join(f"{task} {counts[f'{task} refused']} and {counts[f'{task} right']}" for task in tasks)
    result = ", ".join(f"{counts[x]} {x}" for x in RESULTS)
    print(f"{sum(counts[x] for x in RESULTS)} folders: {result} (refused and right: {of_tasks})")
    return 1 if counts["FAULT"] else 0


if __name__ == "__main__":
    sys.exit(main())
