"""What photographs.py keeps of a model's predictions, and what they are worth by a score: as they are and as decided,
for the images themselves and for resamples of them.

n images, T passes, K classes, R resamples, D detections. Predictions are a dict of tensors, all of the mean over T
passes: of classes `probs` [n, K] and `targets` [n]; of two classes of pixels `histogram` [n, 2, BINS], how many pixels
of each truth have which probability of class 1; of boxes all detections of all images, `image`, `label`, `score` [D],
`hit` and `miss` [D, 10] at COCO's thresholds, and `objects` [n, K], how many there are. `unit` [n] numbers what images
belong together.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import deciding
from coco_ap import IOU_THRESHOLDS, RECALLS, matched
from data_types import TensorMiniBatch
from detection_task import SHOWN_SCORE, Curves, best_thresholds, box_policy_adapter, decode, draw_objects
from scores import Score
from segmentation_task import overlay

BINS = 256
SUPPRESSIONS, COLUMNS = (0.5, 0.4, 0.3, 0.2), ("image", "label", "score", "hit", "miss", "nms")
PASSES = 16  # T in predictions, of all columns alike
Found = dict[str, Tensor]
Decoding = tuple[float, Tensor]  # the IoU of suppression, and of each kind the least score [K]

# --- Predictions ------------------------------------------------------------------------------------------------------


def class_predictions(task, dataset, batch: TensorMiniBatch, outputs: Tensor) -> Found:
    """outputs, here and below: [B, T, …]."""
    return {"probs": task.probabilities(outputs).mean(1), "targets": batch.targets}


def pixel_predictions(task, dataset, batch: TensorMiniBatch, outputs: Tensor) -> Found:
    probs = task.probabilities(outputs).mean(1)[..., 1]  # [B, H, W]
    bins = (probs * BINS).long().clamp(max=BINS - 1) + BINS * batch.targets
    place = bins + 2 * BINS * torch.arange(len(bins))[:, None, None]
    counts = torch.bincount(place[batch.counted], minlength=2 * BINS * len(bins))
    return {"histogram": counts.view(-1, 2, BINS).int()}


def box_predictions(task, dataset, batch: TensorMiniBatch, outputs: Tensor) -> Found:
    objects = torch.zeros(len(outputs), len(dataset.classes))
    none, levels = torch.zeros(0, dtype=torch.long), torch.zeros(0, len(IOU_THRESHOLDS), dtype=torch.bool)
    rows = [(none, none, none.double(), levels, levels)]
    places = batch.metadata["indices"].tolist()
    for i, found in enumerate(detections(task, batch.metadata["content"], outputs)):
        truth = {name: getattr(dataset, name)[places[i]] for name in ("boxes", "labels", "crowd")}
        for k, ((scores, hit, miss, count),) in matched([found], [truth]).items():
            objects[i, k] = int(count)
            where = (torch.full((len(scores),), int(number)) for number in (i, k))
            rows.append((*where, *map(torch.from_numpy, (scores, hit.T, miss.T))))
    columns = map(torch.cat, zip(*rows))
    return dict(zip(("image", "label", "score", "hit", "miss"), columns)) | {"objects": objects}


def suppressed_predictions(task, dataset, batch: TensorMiniBatch, outputs: Tensor) -> Found:
    """Of boxes after suppression at each of SUPPRESSIONS, which is one more column, `nms` [D]; see `suppressed`."""
    parts, config = [], task.config
    for iou in SUPPRESSIONS:
        other = SimpleNamespace(config=config | {"detection": config["detection"] | {"nms_iou": iou}})
        found = box_predictions(other, dataset, batch, outputs)
        parts.append(found | {"nms": torch.full_like(found["score"], iou)})
    return {key: torch.cat([part[key] for part in parts]) for key in COLUMNS} | {"objects": parts[0]["objects"]}


def suppressed(found: Found, iou: float) -> Found:
    """The predictions after suppression at one of SUPPRESSIONS."""
    mine = found["nms"] == iou
    return {key: x[mine] if key in COLUMNS else x for key, x in found.items()}


def detections(task, content: Tensor, outputs: Tensor) -> list[dict[str, Tensor]]:
    """Decoded, as `detection_task.BoxEvaluation` has them."""
    policy = box_policy_adapter(outputs)
    return decode(policy.classes.probs.mean(1), policy.boxes.mean.mean(1), task.config, content)


def pool(parts: list[Found]) -> Found:
    """The predictions of several models, or batches, for different images, as those of all the images."""
    found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    if "image" in found:
        sizes = [len(part["objects"]) for part in parts]
        found["image"] = torch.cat([part["image"] + sum(sizes[:i]) for i, part in enumerate(parts)])
    return found


def resample(unit: Tensor, count: int, seed: int = 0) -> Tensor:
    """How often each of n images is in each of `count` resamples: float64 [count, n]. Whole units are drawn. unit: of
    each image its number, [n]; the tiles of a micrograph have the same."""
    units = int(unit.max()) + 1
    drawn = torch.randint(units, (count, units), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(count, units, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(times))[:, unit]


# --- Scores of predictions --------------------------------------------------------------------------------------------


class Judge:
    """A score that is a function of counts which are summed over images."""

    decides = True  # whether a decision can change it
    rollout: list[str] = []  # how the rewards that are such scores are drawn

    def fit(self, found: Found):
        """The decision that is best by the score for these predictions."""
        raise NotImplementedError

    def counts(self, found: Found, decision=None) -> Tensor:
        """[n, …], by argmax where there is no decision."""
        raise NotImplementedError

    def score(self, counts: Tensor) -> Tensor:
        """Sums of counts [R, …] -> [R]."""
        raise NotImplementedError

    def judged(self, found: Found, weights: Tensor, decision=None) -> Tensor:
        """The score of resamples, [R]. weights: [R, n]."""
        counts = self.counts(found, decision).double()
        return self.score((weights @ counts.flatten(1)).view(-1, *counts.shape[1:]))

    def value(self, found: Found, decision=None) -> float:
        return float(self.judged(found, torch.ones(1, self.size(found), dtype=torch.float64), decision))

    def size(self, found: Found) -> int:
        """n."""
        return len(next(iter(found.values())))

    def cross_fitted(self, parts: list[Found]) -> float:
        """The score of the parts together, each as decided by what is fitted on the others."""
        if not self.decides:
            return self.value(pool(parts))
        decisions = [self.fit(pool(parts[:i] + parts[i + 1 :])) for i in range(len(parts))]
        counts = [self.counts(part, decision).double().sum(0) for part, decision in zip(parts, decisions)]
        return float(self.score(torch.stack(counts).sum(0)[None]))


def accuracy(confusion: Tensor) -> Tensor:
    return confusion.diagonal(dim1=-2, dim2=-1).sum(-1) / confusion.sum((-2, -1))


class Classes(Judge):
    """A score of the confusion matrix of classes, decided by gains after calibration (deciding.py)."""

    rollout = ["rollout.action=all"]

    def __init__(self, score: Score):
        self.score = score

    def fit(self, found: Found) -> dict[str, list]:
        return deciding.fit(self.score, found["probs"], found["targets"], None, False)

    def choices(self, found: Found, decision: dict | None = None) -> Tensor:
        """[n]."""
        probs = found["probs"].double()
        if decision is None:
            return probs.argmax(-1)
        scale, bias, gains = (torch.tensor(decision[key], dtype=torch.float64) for key in ("scale", "bias", "gains"))
        log_probs = probs.clamp(min=torch.finfo(torch.float32).tiny).log()
        return deciding.by_gains((scale * log_probs + bias).softmax(-1)[:, None], gains)[:, 0]

    def counts(self, found: Found, decision: dict | None = None) -> Tensor:
        """[n, K, K], one confusion matrix an image."""
        truth, chosen = (
            F.one_hot(x, found["probs"].shape[1]) for x in (found["targets"], self.choices(found, decision))
        )
        return truth[:, :, None] * chosen[:, None]


class Pixels(Judge):
    """A score of the confusion matrix of two classes of pixels. A decision is the least bin in which pixels are class
    1: of two classes gains are a threshold, whatever the calibration."""

    rollout = ["rollout.actions_per_sample=1"]  # the credit does not depend on what is drawn

    def __init__(self, score: Score):
        self.score = score

    def fit(self, found: Found) -> int:
        """By trying all; of equals the nearest to one half."""
        total = found["histogram"].sum(0)[None]
        values = torch.cat([self.score(confusions(total, least).double()) for least in range(BINS + 1)])
        best = (values == values[~values.isnan()].max()).nonzero()[:, 0]
        return int(best[(best - BINS // 2).abs().argmin()])

    def counts(self, found: Found, decision: int | None = None) -> Tensor:
        return confusions(found["histogram"], BINS // 2 if decision is None else decision)


def confusions(histogram: Tensor, least: int) -> Tensor:
    """[n, 2, BINS] -> [n, 2, 2], truth and prediction, if class 1 begins at bin `least`."""
    return torch.stack([histogram[..., :least].sum(-1), histogram[..., least:].sum(-1)], -1)


def curves(found: Found) -> Curves:
    """As `detection_task.f1_curves`; classes by their number."""
    result = {}
    for k in range(found["objects"].shape[1]):
        mine = found["label"] == k
        scores, hit, miss = (found[key][mine].numpy() for key in ("score", "hit", "miss"))
        objects = float(found["objects"][:, k].sum())
        if len(scores) or objects:
            order = np.argsort(-scores, kind="stable")
            hits, misses = hit[order, 0].cumsum(), miss[order, 0].cumsum()
            result[str(k)] = scores[order], np.append(0, 2 * hits / np.maximum(hits + misses + objects, 1))
    return result


class Boxes(Judge):
    def size(self, found: Found) -> int:
        return len(found["objects"])


class BoxF1(Boxes):
    """F1 at IoU 0.5 after all of decoding, mean over the classes; decided by a threshold of the score for each."""

    def fit(self, found: Found) -> dict[str, float]:
        return best_thresholds(curves(found))

    def counts(self, found: Found, decision: dict[str, float] | None = None) -> Tensor:
        """[n, K, 3]: hits, misses, objects."""
        objects = found["objects"].double()
        n, num_classes = objects.shape
        least = [(decision or {}).get(str(k), SHOWN_SCORE) for k in range(num_classes)]
        shown = (found["score"] >= torch.tensor(least, dtype=torch.float64)[found["label"]])[:, None]
        judged = torch.stack([found["hit"][:, 0], found["miss"][:, 0]], -1) & shown
        counts = objects.new_zeros(n * num_classes, 2)
        counts.index_add_(0, found["image"] * num_classes + found["label"], judged.double())
        return torch.cat([counts.view(n, num_classes, 2), objects[..., None]], -1)

    def score(self, counts: Tensor) -> Tensor:
        hits, _, _ = counts.unbind(-1)
        total = counts.sum(-1)
        there = total > 0
        return (2 * hits / total.clamp(min=1)).sum(-1) / there.sum(-1)


class BoxAP(Boxes):
    """COCO's mAP@[.5:.95], for which all detections count and no threshold decides."""

    decides = False

    def judged(self, found: Found, weights: Tensor, decision: None = None) -> Tensor:
        """As if an image stood there as often as its weight says: its detections have equal scores and follow each
        other, so that the best precision from each recall on is that after all of them."""
        found_ap = [self.by_class(found, weights, k) for k in range(found["objects"].shape[1])]
        return torch.stack(found_ap).nanmean(0)

    def by_class(self, found: Found, weights: Tensor, k: int) -> Tensor:
        """The mean over the thresholds, NaN where a resample has no object: [R]."""
        mine = (found["label"] == k).nonzero()[:, 0]
        mine = mine[torch.from_numpy(np.argsort(-found["score"][mine].numpy(), kind="stable"))]
        objects = weights @ found["objects"][:, k].double()
        repeats, recalls = weights[:, found["image"][mine]], torch.from_numpy(RECALLS).expand(len(weights), -1)
        total = 0
        for level in range(len(IOU_THRESHOLDS)):
            hits, misses = ((repeats * found[key][mine, level]).cumsum(1) for key in ("hit", "miss"))
            precision = hits / (hits + misses + np.spacing(1))
            precision = F.pad(precision.flip(1).cummax(1)[0].flip(1), (0, 1))
            place = torch.searchsorted((hits / objects[:, None]).contiguous(), recalls.contiguous())
            total = total + precision.gather(1, place).mean(1)
        return torch.where(objects > 0, total / len(IOU_THRESHOLDS), torch.nan)


def box_counts(found: Found, decision: Decoding) -> Tensor:
    """How many detections of each kind have at least the kind's score: [n, K]. found: see `suppressed_predictions`."""
    iou, least = decision
    mine = suppressed(found, iou)
    shown = mine["score"] >= least[mine["label"]]
    place = mine["image"] * len(least) + mine["label"]
    return torch.bincount(place[shown], minlength=found["objects"].numel()).view(found["objects"].shape)


def count_errors(found: Found, decision: Decoding) -> Tensor:
    """The mean absolute error of the counts of each kind, [K]."""
    return (box_counts(found, decision) - found["objects"].double()).abs().mean(0)


def undecided(found: Found) -> Decoding:
    return SUPPRESSIONS[0], torch.full((found["objects"].shape[1],), SHOWN_SCORE, dtype=torch.float64)


def fit_decoding(found: Found) -> Decoding:
    """With the smallest mean error of the counts; of equal scores the nearest to one half."""
    levels, fitted = torch.arange(5, 100, dtype=torch.float64) / 100, []
    for iou in SUPPRESSIONS:
        same = torch.ones(found["objects"].shape[1], dtype=torch.float64)
        errors = torch.stack([count_errors(found, (iou, level * same)) for level in levels])  # [levels, K]
        best = (errors + 1e-9 * (levels[:, None] - SHOWN_SCORE).abs()).argmin(0)
        fitted.append((float(errors.amin(0).mean()), (iou, levels[best])))
    return min(fitted, key=lambda pair: pair[0])[1]


# --- Pictures ---------------------------------------------------------------------------------------------------------


def draw_class(judge: Classes, task, dataset, batch: TensorMiniBatch, outputs: Tensor, decision: dict | None) -> tuple:
    """Here and below, of a batch of one image, outputs [1, T, …]: two pictures, of the truth and of what is predicted
    (None where words say it), and words for both."""
    found = class_predictions(task, dataset, batch, outputs)
    truth, chosen = (dataset.classes[int(x)] for x in (batch.targets, judge.choices(found, decision)))
    return batch.inputs[0], None, truth, chosen


def draw_pixels(judge: Pixels, task, dataset, batch: TensorMiniBatch, outputs: Tensor, decision: int | None) -> tuple:
    least = BINS // 2 if decision is None else decision
    mask = (task.probabilities(outputs).mean(1)[0, ..., 1] * BINS >= least).long()
    histogram = pixel_predictions(task, dataset, batch, outputs)
    value = judge.value(histogram, decision)
    return overlay(batch.inputs[0], batch.targets[0]), overlay(batch.inputs[0], mask), "", f"{value:.2f}"


def draw_boxes(judge: Boxes, task, dataset, batch: TensorMiniBatch, outputs: Tensor, decision: dict | None) -> tuple:
    place, (found,) = int(batch.metadata["indices"]), detections(task, batch.metadata["content"], outputs)
    least = torch.tensor([(decision or {}).get(str(k), SHOWN_SCORE) for k in range(len(dataset.classes))])
    shown = found["scores"] >= least[found["labels"]]
    pictures, words = [], []
    for boxes, labels in (
        (dataset.boxes[place], dataset.labels[place]),
        (found["boxes"][shown], found["labels"][shown]),
    ):
        pictures.append(draw_objects(batch.inputs[0], boxes, [dataset.classes[k] for k in labels.tolist()]))
        words.append(f"{len(labels)} objects")
    return *pictures, *words
