"""Blood cells with boxes on 30 photographs and counts on the others: by the boxes alone, by decoding that is fitted to
the counts, by boxes that the counts pick among detections, by a reward that knows nothing but the counts, and by one
that knows the boxes, too, where there are any (examples/count_credit.py).

    uv run tools/counts.py --data DIR --start vits14.pth    # settings, then the runs of the table
    uv run tools/counts.py --tables                         # the table again, without a run

DIR: as for `blood-cells` in photographs.py. Seed s draws which photographs have boxes. Of the others a fifth is held
out: its error of the counts, by decoding that is fitted to the other four fifths, chooses settings. DIR/eval judges,
and chooses no setting. With --minutes 60 nothing is begun that would end later; the same command goes on. Runs and
predictions are in experiments/; docs/counts.json keeps what the table needs.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "examples"), str(HOME / "tools")]

import judging
import torch
from cells import DATA_SETS, START, doubts, of_images
from count_credit import known_counts
from experiments import RESULTS, Figures, write_between
from judging import Found
from photographs import NOT_YET, Run, Runs, Source, about, folds_of, spread
from studies import LABEL, ROOT
from torch import Tensor

from folders import find_images
from frame import to_file

FIGURES, MARKER, KINDS = HOME / "docs" / "counts.json", "counts", ("RBC", "WBC", "platelets")
SEEDS, SEARCHED, WITH_BOXES = 5, 2, 30
CREDIT = "rollout.reward=examples/count_credit.py"
METHODS = {
    "start": LABEL,
    "label": LABEL,
    "boxes": ["rollout.reward=detection_set_credit_50"],
    "picked": LABEL,
    "counts": [f"{CREDIT}:count_credit"],
    "mixed": [f"{CREDIT}:count_or_box_credit"],
}
KNOWN = "counted", "held"  # the parts with counts alone
PARTS = {"counts": "counted", "picked": "picked", "mixed": "mixed"}  # what a method is trained on; the others: labelled
HEAD = [*START, "training.freeze_blocks=12"]  # boxes stay, but for the norm that they share with the classes
TUNED = doubts(3e-4, 1e-3, block=START, head=HEAD)
SETTINGS = {"start": doubts(3e-4, 1e-3, start=START)} | dict.fromkeys(list(METHODS)[1:], TUNED)
WORDS = {
    "start": "label",
    "label": "label, as many steps again",
    "boxes": "label, then reward on boxes",
    "picked": "label, then label on picked boxes",
    "counts": "label, then reward on counts",
    "mixed": "label, then reward on counts and boxes",
}
DECIDED = "", "", "the median count of each kind"


def count_predictions(task, dataset, batch, outputs: Tensor) -> Found:
    """Of boxes by each suppression; how many objects there are is what counts.json says, where there is one."""
    found, counted = judging.suppressed_predictions(task, dataset, batch, outputs), Path(dataset.root) / "counts.json"
    return found | ({"objects": known_counts(batch.metadata["paths"], dataset.classes)} if counted.exists() else {})


STUDY = replace(DATA_SETS["blood-cells"], name="blood-cells-counts", predictions=count_predictions)


@dataclass(frozen=True)
class CountRun(Run):
    """fold: the seed."""

    def overrides(self, source: Source) -> list[str]:
        part = PARTS.get(self.method, "labelled")
        begin = f"{ROOT}/ckpt/{self.start.name}/last.pt" if self.start else source.weights
        keys = [*STUDY.common, *METHODS[self.method], *SETTINGS[self.method][self.setting]]
        keys += [f"data.train_dir={folds_of(STUDY)}/{self.fold}/{part}", f"training.steps={STUDY.steps}"]
        return [*keys, f"training.seed={self.fold}", f"model.checkpoint_path={begin}"]


class CountRuns(Runs):
    def prepare(self, run: Run) -> None:
        folder = folds_of(STUDY) / str(run.fold)
        make_parts(self.base.data / "train", folder, run.fold)
        if run.method == "picked" and not (folder / "picked").exists():
            pick_boxes(folder, *self.outputs(run.start, "counted"))
        if run.method == "mixed" and not (folder / "mixed").exists():
            merge_parts(folder, "mixed")


def make_parts(train_dir: Path, folder: Path, seed: int) -> None:
    """Below `folder` the training photographs in three parts, of links, once: labelled/ with their boxes, counted/ and
    held/ without any, but with counts.json."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    coco = json.loads((train_dir / "annotations.json").read_text(encoding="utf-8"))
    files = {Path(path).name: Path(path).resolve() for path in find_images(str(train_dir))}
    drawn = random.Random(seed).sample(sorted(files), len(files))
    rest = drawn[WITH_BOXES:]
    parts = {"labelled": drawn[:WITH_BOXES], "held": rest[::5], "counted": [x for i, x in enumerate(rest) if i % 5]}
    for part, names in parts.items():
        (images := unfinished / part / "images").mkdir(parents=True)
        for name in names:
            os.symlink(files[name], images / name)
        of_part = of_images(coco, set(names))
        if part != "labelled":
            (unfinished / part / "counts.json").write_text(json.dumps(counts_of(of_part)), encoding="utf-8")
            of_part["annotations"] = []
        (unfinished / part / "annotations.json").write_text(json.dumps(of_part), encoding="utf-8")
    unfinished.replace(folder)


def pick_boxes(folder: Path, task, dataset, stream) -> None:
    """What a loss can make of counts: beside the parts of `make_parts` the folder picked/, labelled/ and counted/ with,
    of each kind, a model's best detections for boxes, as many as are there. dataset, stream: see `Runs.outputs`."""
    parts = [json.loads((folder / part / "annotations.json").read_text()) for part in ("labelled", "counted")]
    ids = {Path(row["file_name"]).name: row["id"] for row in parts[1]["images"]}
    kinds, rows = {row["name"]: row["id"] for row in parts[1]["categories"]}, parts[0]["annotations"]
    for batch, outputs in stream:
        known = known_counts(batch.metadata["paths"], dataset.classes).long().tolist()
        places = batch.metadata["indices"].tolist()
        affine = dataset.affine([dataset.sizes[place] for place in places])
        for i, found in enumerate(judging.detections(task, batch.metadata["content"], outputs)):
            boxes, name = to_file(found["boxes"].double(), affine[i]), Path(dataset.paths[places[i]]).name
            for kind, count in zip(dataset.classes, known[i]):
                mine = boxes[found["labels"] == dataset.classes.index(kind)][:count]  # the best are the first
                for x0, y0, x1, y1 in mine.tolist():
                    box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
                    rows.append(box | {"image_id": ids[name], "category_id": kinds[kind]})
    merge_parts(folder, "picked", rows)


def merge_parts(folder: Path, name: str, rows: list[dict] | None = None) -> None:
    """Beside the parts of `make_parts` one more, labelled/ and counted/ with the counts of both; rows: its boxes, those
    of labelled/ if not given."""
    parts = [json.loads((folder / part / "annotations.json").read_text()) for part in ("labelled", "counted")]
    (images := (unfinished := folder / f"{name}.part") / "images").mkdir(parents=True, exist_ok=True)
    for path in (path for part in ("labelled", "counted") for path in (folder / part / "images").iterdir()):
        (images / path.name).unlink(missing_ok=True)
        os.symlink(path.resolve(), images / path.name)
    merged = {"images": parts[0]["images"] + parts[1]["images"]}
    merged |= {"annotations": [row | {"id": i} for i, row in enumerate(rows or parts[0]["annotations"])]}
    (unfinished / "annotations.json").write_text(json.dumps(parts[0] | merged))
    known = counts_of(parts[0]) | json.loads((folder / "counted" / "counts.json").read_text())
    (unfinished / "counts.json").write_text(json.dumps(known))
    unfinished.replace(folder / name)


def counts_of(coco: dict) -> dict[str, dict[str, int]]:
    """File name -> kind -> number of objects."""
    kinds = {row["id"]: row["name"] for row in coco["categories"]}
    images = {row["id"]: Path(row["file_name"]).name for row in coco["images"]}
    found = Counter((row["image_id"], row["category_id"]) for row in coco["annotations"] if not row.get("iscrowd"))
    return {name: {kind: found[image, k] for k, kind in kinds.items()} for image, name in images.items()}


def held_errors(runner: Runs, run: Run) -> list[float]:
    """Of the held-out counts, mean over the kinds: undecided, and as decided by a fit to the other counts."""
    others, held = runner.predictions(run, "counted"), runner.predictions(run, "held")
    decisions = judging.undecided(held), judging.fit_decoding(others)
    return [round(float(judging.count_errors(held, decision).mean()), 5) for decision in decisions]


def judged(runner: Runs, run: Run) -> list[dict]:
    """On the evaluation images: undecided, as decided by a fit to all known counts, and what their median is worth."""
    known = judging.pool([runner.predictions(run, part) for part in KNOWN])
    found, records = runner.predictions(run, "eval"), []
    for iou, least in (judging.undecided(found), judging.fit_decoding(known)):
        wrong, mine = judging.count_errors(found, (iou, least)), judging.suppressed(found, iou)
        right = float((judging.box_counts(found, (iou, least)) == found["objects"]).double().mean())
        scores = {str(k): x for k, x in enumerate(least.tolist())}
        values = {"f1": judging.BoxF1().value(mine, scores), "map": judging.BoxAP().value(mine)}
        records.append(values | {"errors": wrong.tolist(), "right": right, "nms": iou, "thresholds": scores})
    wrong = (found["objects"] - known["objects"].median(0)[0]).abs().double()
    return [*records, {"errors": wrong.mean(0).tolist(), "right": float((wrong == 0).double().mean())}]


def runs_of(method: str, setting: str | None, start: str | None) -> list[CountRun]:
    """Of all seeds; start: the setting of what the run goes on from, if it is not a start itself."""
    if not setting:
        return []
    begun = [None] * SEEDS if method == "start" else runs_of("start", start, None)
    return [CountRun(STUDY, method, setting, seed, begun[seed]) for seed in range(SEEDS)]


def chosen(figures: Figures, method: str, start: str | None) -> list[CountRun]:
    """The runs with the setting of the smallest error on the hold-out, as decided; none before all are tried."""
    if method != "start" and not start:
        return []
    found = {}
    for setting in SETTINGS[method]:
        records = [figures.get("held", *run.keys[1:]) for run in runs_of(method, setting, start)[:SEARCHED]]
        found[setting] = statistics.mean(run["held"][1] for run in records) if all(records) else math.inf
    return runs_of(method, min(found, key=found.get), start) if max(found.values()) < math.inf else []


def fill(runner: Runs, figures: Figures) -> None:
    """Searches, then runs and judges what was chosen, as far as there is time."""
    start = None
    for method in SETTINGS if runner.jobs else ():
        tried = [run for setting in SETTINGS[method] for run in runs_of(method, setting, start)[:SEARCHED]]
        for what, measure, parts in ("held", held_errors, KNOWN), ("eval", judged, (*KNOWN, "eval")):
            found = runner.run_all(tried if what == "held" else chosen(figures, method, start))
            runs = [run for run, done in found.items() if done and not figures.get(what, *run.keys[1:])]
            for part in parts:
                runner.predict_all(runs, part)
            for run in runs:
                figures.add({what: measure(runner, run)} | about(), what, *run.keys[1:])
        start = start or next((run.setting for run in chosen(figures, method, start)), None)
        if not start:
            return


def table(figures: Figures) -> str:
    heads = ["learned from", "setting", *(f"error, {kind}" for kind in KINDS), "mean error", "counts right"]
    heads += ["F1 at IoU 0.5", "mAP", "mean error − that of label, decided"]
    lines, base, start = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"], None, None
    for method in SETTINGS:
        runs = chosen(figures, method, start)
        start = start or (runs[0].setting if runs else None)
        found = [figures.get("eval", *run.keys[1:]) for run in runs]
        for i, words in enumerate(DECIDED if found and all(found) else ()):
            mine = [record["eval"][i] for record in found]
            means = [statistics.mean(values["errors"]) for values in mine]
            base = means if i == 1 and not base else base
            cells = [words or WORDS[method] + ", decided" * i, runs[0].setting]
            cells += [spread([values["errors"][k] for values in mine]) for k in range(len(KINDS))]
            cells += [spread(means)]
            cells += [spread([v[key] for v in mine]) if key in mine[0] else "" for key in ("right", "f1", "map")]
            cells += [spread([a - b for a, b in zip(means, base)], signed=True) if base and base is not means else ""]
            if not words or method == "start":
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_YET


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder with train/ and eval/")
    parser.add_argument("--start", type=Path, metavar="FILE", help="the weights of a ViT, see docs/pretrained.md")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run that would end after so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (as many as there are cores)")
    parser.add_argument("--tables", action="store_true", help="only write the table")
    args = parser.parse_args()
    if not args.tables and not (args.data and args.start):
        parser.error("name the --data and the weights to --start from; or --tables")
    figures, deadline = Figures(FIGURES), time.monotonic() + 60 * args.minutes
    source = None if args.tables else Source(args.data.resolve(), args.start.resolve())
    os.chdir(HOME)
    torch.set_num_threads(1)
    if source:
        runner = CountRuns(Figures(ROOT / "counts.json"), source, args.jobs, deadline)
        fill(runner, figures)
        if runner.left:
            print(f"about {sum(runner.left.values()) / 60:.1f} hours of runs are left; the same command goes on")
    write_between(RESULTS, MARKER, table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
