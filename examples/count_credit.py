r"""A reward that knows no boxes, only how many objects of each kind an image shows, for images that nobody has marked.

    uv run train.py --config config_detection.yaml model.checkpoint_path=ckpt/boxes/last.pt training.run_name=counts \
        data.train_dir=counted data.eval_dir=null training.best=null \
        rollout.reward=examples/count_credit.py:count_credit training.label_coef=0 training.entropy_coef=0 \
        training.steps=150 training.warmup_steps=20 training.learning_rate=3e-4 detection.box_std=0.1

The folder has images/, annotations.json with images, categories and an empty list of annotations, and counts.json: file
name without folders -> kind, as annotations.json names it -> number; a kind that is not named has none. An evaluation
folder needs them, too. No label may be in the loss (`training.label_coef`), because to it an image without boxes is
empty. Nor may images be cropped (`data.augment`, `data.resize`), because the counts are those of whole files. Start
from a model that was trained on some boxes: counts teach none. Boxes change only with the layers that they share with
the classes. No box is in the loss, and so `training.kl_coef` holds the classes alone. What holds boxes is images with
boxes among the others, and `count_or_box_credit`; its counts.json names these images, too.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coco_ap import box_iou
from data_types import Credit
from detection_task import decode_boxes, detection_set_credit_50

NMS_IOU = 0.5  # whatever detection.nms_iou is


@lru_cache
def read_counts(path: str) -> dict[str, dict[str, int]]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def known_counts(paths: list[str], classes: list[str]) -> Tensor:
    """[B, K], of the counts.json of each image's own folder or of the nearest above. Raises FileNotFoundError, and
    KeyError for an image that it does not name."""
    rows = []
    for path in map(Path, paths):
        files = (folder / "counts.json" for folder in path.parents)
        file = next((file for file in files if file.is_file()), path.parent / "counts.json")
        counts = read_counts(str(file))[path.name]
        rows.append([float(counts.get(name, 0)) for name in classes])
    return torch.tensor(rows)


def score(found: Tensor, known: Tensor) -> Tensor:
    """Of numbers of objects, 1 where they are equal: (fewer + 1) / (more + 1). An object too many or too few costs less
    the more there are, and far too many (not all were counted, say) have hardly a slope."""
    return (torch.minimum(found, known) + 1) / (torch.maximum(found, known) + 1)


def count_values(classes: Tensor, overlap: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The score of sets of detections, mean over the kinds, [...], and the score with each of the K + 1 choices of each
    patch, the others as they are, [..., P, K + 1].

    What non-maximum suppression leaves is counted smoothly: a patch of kind k is worth one over the number of patches
    of kind k that it overlaps, itself included. So any number of patches that all overlap each other are one object.

    classes: [..., P], K is background, more is no element; overlap: bool [..., P, P]; known: [..., K]."""
    num_classes = known.shape[-1]
    others = overlap.to(known.dtype) * (1 - torch.eye(overlap.shape[-1], device=overlap.device))
    chosen = F.one_hot(classes.clamp(max=num_classes), num_classes + 1)[..., :-1].to(known.dtype)  # [..., P, K]
    near = others @ chosen  # the other patches of kind k that overlap a patch, [..., P, K]
    found = (chosen / (near + 1)).sum(-2, keepdim=True)  # [..., 1, K]
    # a neighbour that has `near` others of its kind, this patch among them if that is of the kind, is worth 1 / n
    n = near + 1
    less = others @ (chosen * (1 / n - 1 / (n - 1).clamp(min=1)))  # what all neighbours lose by a patch that is there
    more = others @ (chosen * (1 / (n + 1) - 1 / n))  # and by one that is not yet
    without = found - chosen * (1 / n + less)
    with_it = found + (1 - chosen) * (1 / n + more)
    known = known.unsqueeze(-2)
    as_it_is, gain = score(without, known), score(with_it, known) - score(without, known)  # [..., P, K] each
    background = as_it_is.mean(-1, keepdim=True)  # only the patch's own kind is another than in the set
    values = torch.cat([background + gain / num_classes, background], -1)
    return score(found, known).mean((-2, -1)), values


def count_credit(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Credit:
    """`count_values` of the drawn sets, mean over the draws, times M + 1, M the objects that are there, so that an
    object weighs about as much in full and in empty images. actions: [B, T, A, 2, P, 4]; values [B, T, 2, P, K + 1], 0
    for boxes; the scores are one per action, [B, T, A]."""
    num_classes, classes = outputs.shape[-1] - 5, actions[..., 0, :, 0].long()
    known = known_counts(metadata["paths"], metadata["classes"]).to(actions)
    if (counted := metadata.get("counted")) is not None:
        classes = torch.where(counted[:, None, None, 0], classes, num_classes)
    boxes = decode_boxes(actions[..., 1, :, :], metadata["patch_size"], metadata.get("columns"))
    overlap = box_iou(boxes[..., None, :], boxes[..., None, :, :]) > NMS_IOU
    scores, values = count_values(classes, overlap, known[:, None, None].expand(*classes.shape[:3], -1))
    values = values.mean(2) * (known.sum(-1) + 1)[:, None, None, None]
    return Credit(None, scores, F.pad(values.unsqueeze(2), (0, 0, 0, 0, 0, 1)))


def count_or_box_credit(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Credit:
    """`detection_set_credit_50` of images with boxes, which holds the boxes too, and `count_credit` of the others."""
    boxes, counts = (f(actions, outputs, targets, metadata) for f in (detection_set_credit_50, count_credit))
    known = (metadata["labels"] >= 0).any(-1)

    def chosen(of_boxes: Tensor, of_counts: Tensor) -> Tensor:
        return torch.where(known.view(-1, *[1] * (of_boxes.dim() - 1)), of_boxes, of_counts)

    advantages = chosen(boxes.advantages, torch.zeros_like(boxes.advantages))
    return Credit(advantages, chosen(boxes.rewards, counts.rewards), chosen(boxes.values, counts.values))
