"""Slicing, indexing and joining batches and episodes changes no number."""

from dataclasses import fields, replace

import pytest
import torch
from conftest import same
from torch.distributions import Categorical

from data_types import Episode, TensorMiniBatch, printable


def make_batch(size: int) -> TensorMiniBatch:
    inputs = torch.arange(size * 3 * 2 * 2, dtype=torch.uint8).view(size, 3, 2, 2)
    metadata = {"paths": [f"{i}.png" for i in range(size)], "indices": torch.arange(size) + 100, "n": tuple("abcdef")}
    return TensorMiniBatch(inputs, torch.arange(size) * 2, metadata, torch.arange(size) % 2 == 0)


def make_episode(size: int, elements: tuple[int, ...] = ()) -> Episode:
    """An episode of T = 2, A = 3 with random numbers and a graph; with elements, some of which count."""
    torch.manual_seed(0)
    policy = Categorical(logits=torch.randn(size, 2, *elements, 5, requires_grad=True))
    actions = policy.sample((3,)).movedim(0, 2)
    return Episode(
        inputs=torch.randn(size, 3, 2, 2),
        masks={"a": torch.rand(size, 2, 1, 4), "b": torch.rand(size, 2, 1, 6)},
        actions=actions,
        log_probs=policy.log_prob(actions.movedim(2, 0)).movedim(0, 2),
        rewards=torch.rand(actions.shape[:3]),
        advantages=torch.randn(actions.shape[:3]),
        metadata={"targets": torch.arange(size), "paths": ["x"] * size, "reward_terms": {"r": torch.rand(size, 2, 3)}},
        policy=policy,
        counted=torch.rand(size, *elements) < 0.5 if elements else None,
        weights=torch.rand(actions.shape) if elements else None,
    )


def equal(one: Episode, other: Episode) -> bool:
    return same(vars(one), vars(other))


def test_a_slice_of_a_batch_takes_the_same_images_of_everything():
    """Tensors, as views, and lists of the metadata are cut alike and clamped like a list; other metadata is kept
    whole, a tuple that happens to be as long as the batch as well."""
    batch = make_batch(6)
    part = batch[2:5]
    assert len(part) == 3 and len(batch) == 6
    assert part.inputs[:, 0, 0, 0].tolist() == [24, 36, 48]
    assert part.targets.tolist() == [4, 6, 8] and part.counted.tolist() == [True, False, True]
    assert part.metadata.pop("indices").tolist() == [102, 103, 104]
    assert part.metadata == {"paths": ["2.png", "3.png", "4.png"], "n": tuple("abcdef")}
    assert part.inputs.data_ptr() == batch.inputs[2:].data_ptr()
    assert batch[4:9].metadata["paths"] == ["4.png", "5.png"] and len(batch[6:]) == 0


def test_moving_a_batch_keeps_numbers_types_and_metadata():
    """`to` changes the device only; the original is left where it was."""
    batch = make_batch(4)
    moved = batch.to("meta")
    tensors = moved.inputs, moved.targets, moved.counted, moved.metadata["indices"]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and batch.inputs.device.type == "cpu"
    assert [tensor.dtype for tensor in tensors] == [torch.uint8, torch.int64, torch.bool, torch.int64]
    assert moved.metadata["paths"] == batch.metadata["paths"] and same(vars(batch.to("cpu")), vars(make_batch(4)))


def test_a_detached_episode_has_no_graph_and_the_same_numbers():
    """What is left: all tensors, the targets of the metadata, and nothing that holds the forward pass in memory."""
    episode = make_episode(4, (2,))
    detached = episode.detach()
    assert episode.log_probs.requires_grad and not detached.log_probs.requires_grad
    assert equal(detached, replace(episode, policy=None, metadata={"targets": torch.arange(4)}))


@pytest.mark.parametrize("elements", [(), (3,), (2, 2)])
def test_an_episode_cut_and_joined_is_the_episode(elements):
    """cat of slices of uneven sizes is the whole, field by field."""
    whole = make_episode(5, elements).detach()
    parts = [whole[0:2], whole[2:3], whole[3:5]]
    assert [len(part) for part in parts] == [2, 1, 2] and parts[0].actions.shape == (2, 2, 3, *elements)
    assert equal(Episode.cat(parts), whole) and not equal(Episode.cat(parts[::-1]), whole)


def test_an_episode_indexed_takes_these_images_in_this_order():
    """Repeated and permuted indices select the same images of every tensor."""
    whole, indices = make_episode(5, (2,)).detach(), [3, 0, 0, 4]
    part = whole[torch.tensor(indices)]
    assert len(part) == 4 and part.metadata["targets"].tolist() == indices
    assert all(equal(part[place : place + 1], whole[i : i + 1]) for place, i in enumerate(indices))


def test_map_applies_to_every_tensor_of_an_episode():
    """No tensor of the class is forgotten: a function that doubles doubles every field but the policy."""
    episode = make_episode(3, (2,)).detach()
    doubled = Episode.map(lambda tensors: 2 * tensors[0], [episode])
    parts = "masks", "metadata", "policy"
    assert episode.weights is not None
    tensors = {field.name: 2 * getattr(episode, field.name) for field in fields(Episode) if field.name not in parts}
    assert doubled.policy is None and same({name: getattr(doubled, name) for name in tensors}, tensors)
    assert same(doubled.masks, {name: 2 * mask for name, mask in episode.masks.items()})
    assert doubled.metadata["targets"].tolist() == [0, 2, 4]


def test_any_text_is_printable_on_one_line():
    for text, line in {"a\nb": r"a\nb", "\x1b[0m": r"\x1b[0m", "\udcff": r"\udcff", "ü—": "ü—"}.items():
        assert printable(text) == line == line.encode().decode()
