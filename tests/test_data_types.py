"""Slicing, indexing and joining batches and episodes changes no number."""

from dataclasses import fields, replace

import torch
from torch.distributions import Categorical

from data_types import Episode, TensorMiniBatch


def make_batch(size: int) -> TensorMiniBatch:
    inputs = torch.arange(size * 3 * 2 * 2, dtype=torch.uint8).view(size, 3, 2, 2)
    metadata = {
        "paths": [f"{i}.png" for i in range(size)],
        "indices": torch.arange(size) + 100,
        "classes": tuple("abcdef"),
        "n": 7,
    }
    return TensorMiniBatch(inputs, torch.arange(size) * 2, metadata)


def make_episode(size: int, elements: tuple[int, ...] = (), seed: int = 0) -> Episode:
    """An episode of T = 2, A = 3 with random numbers and a graph."""
    torch.manual_seed(seed)
    logits = torch.randn(size, 2, *elements, 5, requires_grad=True)
    policy = Categorical(logits=logits)
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
    )


def assert_same(one: Episode, other: Episode) -> None:
    assert (one.policy, other.policy) == (None, None)
    assert one.masks.keys() == other.masks.keys() and one.metadata.keys() == other.metadata.keys()
    for name in ("inputs", "actions", "log_probs", "rewards", "advantages"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, msg=name)
    for mine, others in ((one.masks, other.masks), (one.metadata, other.metadata)):
        for name in mine:
            torch.testing.assert_close(mine[name], others[name], rtol=0, atol=0, msg=name)


def test_a_slice_of_a_batch_takes_the_same_images_of_everything():
    """inputs, targets, tensors and lists of the metadata are cut alike; other metadata is kept whole, a tuple that
    happens to be as long as the batch as well."""
    part = make_batch(6)[2:5]
    assert len(part) == 3
    assert part.inputs[:, 0, 0, 0].tolist() == [24, 36, 48]
    assert part.targets.tolist() == [4, 6, 8]
    assert part.metadata["paths"] == ["2.png", "3.png", "4.png"]
    assert part.metadata["classes"] == tuple("abcdef") and part.metadata["n"] == 7
    assert part.metadata["indices"].tolist() == [102, 103, 104]


def test_a_slice_of_a_batch_is_a_view_and_clamped_like_a_list():
    """No image is copied, a slice beyond the end gives what there is, the source keeps its size."""
    batch = make_batch(6)
    part = batch[4:9]
    assert len(part) == 2 and len(batch) == 6 and len(batch.metadata["paths"]) == 6
    assert part.inputs.data_ptr() == batch.inputs[4:].data_ptr()
    assert part.targets.data_ptr() == batch.targets[4:].data_ptr()
    assert len(batch[6:]) == 0 and batch[6:].metadata["paths"] == []


def test_slices_of_a_batch_joined_again_are_the_batch():
    """Cutting into uneven micro-batches loses, repeats and reorders nothing."""
    batch = make_batch(7)
    parts = [batch[start : start + 3] for start in range(0, 7, 3)]
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.cat([part.inputs for part in parts]).equal(batch.inputs)
    assert torch.cat([part.metadata["indices"] for part in parts]).equal(batch.metadata["indices"])
    assert sum((part.metadata["paths"] for part in parts), []) == batch.metadata["paths"]


def test_moving_a_batch_keeps_numbers_types_and_metadata():
    """`to` changes the device only; the original is left where it was."""
    batch = make_batch(4)
    moved = batch.to("meta")
    assert (moved.inputs.device.type, moved.targets.device.type) == ("meta", "meta")
    assert (moved.inputs.dtype, moved.targets.dtype) == (torch.uint8, torch.int64)
    assert moved.metadata["paths"] == batch.metadata["paths"] and batch.inputs.device.type == "cpu"
    assert batch.to("cpu").inputs.equal(batch.inputs)


def test_a_detached_episode_has_no_graph_and_the_same_numbers():
    """What is left: all tensors, the targets of the metadata, and nothing that holds the forward pass in memory."""
    episode = make_episode(4)
    detached = episode.detach()
    assert episode.log_probs.requires_grad and episode.policy is not None and "paths" in episode.metadata
    assert not detached.log_probs.requires_grad and detached.policy is None
    assert list(detached.metadata) == ["targets"]
    assert_same(detached, replace(episode, policy=None, metadata={"targets": torch.arange(4)}))


def test_an_episode_cut_and_joined_is_the_episode():
    """cat of slices, of uneven sizes, with and without elements, is the whole, field by field."""
    for elements in ((), (3,), (2, 2)):
        whole = make_episode(5, elements).detach()
        parts = [whole[0:2], whole[2:3], whole[3:5]]
        assert [len(part) for part in parts] == [2, 1, 2] and parts[0].actions.shape == (2, 2, 3, *elements)
        assert_same(Episode.cat(parts), whole)
        assert_same(Episode.cat([whole]), whole)


def test_an_episode_indexed_takes_these_images_in_this_order():
    """Repeated and permuted indices select the same images of every tensor; the inverse permutation undoes it."""
    whole = make_episode(5, (2,)).detach()
    indices = torch.tensor([3, 0, 0, 4])
    part = whole[indices]
    assert len(part) == 4 and part.metadata["targets"].tolist() == [3, 0, 0, 4]
    for place, index in enumerate(indices.tolist()):
        assert_same(part[place : place + 1], whole[index : index + 1])
    order = torch.tensor([2, 4, 1, 0, 3])
    assert_same(whole[order][order.argsort()], whole)


def test_joining_different_episodes_keeps_their_order():
    """Images of the second episode follow those of the first, in masks as well."""
    first, second = make_episode(2, seed=1).detach(), make_episode(3, seed=2).detach()
    both = Episode.cat([first, second])
    assert_same(both[:2], first)
    assert_same(both[2:], second)


def test_map_applies_to_every_tensor_of_an_episode():
    """A function that doubles doubles every field but the policy; no tensor of the class is forgotten."""
    episode = make_episode(3).detach()
    doubled = Episode.map(lambda tensors: 2 * tensors[0], [episode])
    assert {field.name for field in fields(Episode)} == vars(doubled).keys()
    for name in ("inputs", "actions", "log_probs", "rewards", "advantages"):
        assert getattr(doubled, name).equal(2 * getattr(episode, name)), name
    assert all(doubled.masks[name].equal(2 * episode.masks[name]) for name in ("a", "b"))
    assert doubled.metadata["targets"].tolist() == [0, 2, 4]
