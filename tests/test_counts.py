"""The reward by counts against brute force, and the pure parts of tools/counts.py."""

import json

import pytest
import torch
from conftest import load_script

from data_types import Credit

count = load_script("examples/count_credit.py")


def brute_force(classes: list[int], overlap: torch.Tensor, known: list[float]) -> float:
    """The score of one set by loops."""
    scores = []
    for k, m in enumerate(known):
        mine = [p for p, c in enumerate(classes) if c == k]
        n = sum(1 / sum(q == p or bool(overlap[p, q]) for q in mine) for p in mine)
        scores.append((min(n, m) + 1) / (max(n, m) + 1))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
def test_values_are_the_scores_with_each_choice(density):
    """Also with elements that do not count, none of a kind and no detection at all."""
    draw = torch.Generator().manual_seed(0)
    sets, patches, num_classes = 4, 7, 3
    overlap = torch.rand(sets, patches, patches, generator=draw) < density
    overlap = overlap | overlap.mT | torch.eye(patches, dtype=torch.bool)
    classes = torch.randint(num_classes + 1, (sets, patches), generator=draw)
    classes[-1] = num_classes
    known = torch.tensor([[0.0, 0, 0], [2, 1, 0], [9, 1, 2], [1, 0, 3]], dtype=torch.float64)
    scores, values = count.count_values(classes, overlap, known)
    assert values.shape == (sets, patches, num_classes + 1)
    for i in range(sets):
        chosen = classes[i].tolist()
        assert float(scores[i]) == pytest.approx(brute_force(chosen, overlap[i], known[i].tolist()))
        for p in range(patches):
            for k in range(num_classes + 1):
                other = [*chosen[:p], k, *chosen[p + 1 :]]
                assert float(values[i, p, k]) == pytest.approx(brute_force(other, overlap[i], known[i].tolist()))


def test_patches_that_all_overlap_are_one_object():
    overlap = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool()
    for classes, right in ([0, 0, 0, 0, 0], [2.0, 0]), ([0, 0, 1, 0, 0], [2.0, 1]), ([2] * 5, [0.0, 0]):
        score, values = count.count_values(torch.tensor(classes), overlap, torch.tensor(right))
        assert float(score) == pytest.approx(1) and float(values.max()) <= 1 + 1e-6


def test_the_reward_finds_the_counts_beside_the_images(tmp_path):
    """And says where they should be."""
    count.read_counts.cache_clear()
    counts = {"a.png": {"x": 1}, "b.png": {"x": 2, "y": 1}}
    (tmp_path / "images").mkdir()
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    paths = [str(tmp_path / "images" / name) for name in counts]
    assert count.known_counts(paths, ["y", "x"]).tolist() == [[0, 1], [1, 2]]
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, 3, 2, 16, 1), generator=draw).float()
    actions = torch.stack([torch.nn.functional.pad(labels, (0, 3)), torch.randn(2, 3, 2, 16, 4, generator=draw)], 3)
    inside = torch.rand(2, 16, generator=draw) < 0.8
    metadata = {"paths": paths, "classes": ["x", "y"], "patch_size": 4, "columns": 4}
    metadata["counted"] = torch.stack([inside, torch.zeros_like(inside)], 1)
    credit = count.count_credit(actions, torch.zeros(2, 3, 16, 7), None, metadata)
    assert isinstance(credit, Credit) and credit.advantages is None
    assert credit.rewards.shape == (2, 3, 2) and credit.values.shape == (2, 3, 2, 16, 3)
    assert not credit.values[:, :, 1].any() and credit.values[:, :, 0].std(-1).max() > 0
    boxes = count.decode_boxes(actions[1, 2, :, 1], 4, 4)
    for a, expected in enumerate(credit.rewards[1, 2].tolist()):
        overlap = count.box_iou(boxes[a, :, None], boxes[a, None]) > 0.5
        classes = torch.where(inside[1], labels[1, 2, a, :, 0], 2).int().tolist()
        assert expected == pytest.approx(brute_force(classes, overlap, [2, 1]), rel=1e-5)
    with pytest.raises(FileNotFoundError, match="counts.json"):
        count.known_counts([str(tmp_path.parent / "c.png")], ["x"])
