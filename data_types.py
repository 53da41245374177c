"""What flows through a training step: plain dataclasses of tensors over a batch, never one Python object per sample.

Symbols, used in every file: B images, T Monte Carlo Dropout passes per image, A actions drawn per pass, E… the elements
of one action (nothing for a class, [2, P] for classes and boxes of patches, [H, W] for masks). The N = T * A actions of
one image are its group.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributions import Distribution


def printable(text: str) -> str:
    """`text` on one line that any terminal takes: file names may hold line breaks and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InputError(ValueError):
    """Bad input: a line that names the file, key or value and what to do, or several, as arguments. `train.py` prints
    them and exits with 2."""

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


@dataclass
class TensorMiniBatch:
    """Images with what is known about them.

    inputs: [B, C, H, W], uint8 as the loader hands it out, float once `prepare` has normalised it.
    targets: [B, E…], an action that would be right: for classification the int64 class index.
    metadata: `paths`, a list of B strings; `indices`, [B] int64 places in the data set; whatever else a reward needs.
        Tensors and lists have an entry per image; what is about the whole data set is something else, a tuple say.
    counted: [B, E…] bool, the elements that count; None: all. The others (padding, an ignored label) have some target,
        but no reward, advantage or loss.
    """

    inputs: Tensor
    targets: Tensor
    metadata: dict = field(default_factory=dict)
    counted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, part: slice) -> "TensorMiniBatch":
        """The images `part` of the batch (a slice), as views."""
        metadata = {k: v[part] if isinstance(v, (Tensor, list)) else v for k, v in self.metadata.items()}
        counted = None if self.counted is None else self.counted[part]
        return TensorMiniBatch(self.inputs[part], self.targets[part], metadata, counted)

    def map(self, function: Callable[[Tensor], Tensor]) -> "TensorMiniBatch":
        """Apply `function` to each tensor."""
        metadata = {k: function(v) if isinstance(v, Tensor) else v for k, v in self.metadata.items()}
        counted = None if self.counted is None else function(self.counted)
        return TensorMiniBatch(function(self.inputs), function(self.targets), metadata, counted)

    def pin_memory(self) -> "TensorMiniBatch":
        """In page-locked memory, from which a copy to the GPU can overlap with work; DataLoader calls this."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "TensorMiniBatch":
        """All its tensors on `device`; from pinned memory without waiting."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass
class Credit:
    """What a reward returns that has done its own credit assignment, and skips the estimator: advantages that are
    finished, or values of alternatives, or both, which are added.

    advantages: [B, T, A], one per action, or [B, T, A, E…], one per element.
    rewards: the scores behind them, [B, T, A] or [B, T, A, E…], for the log.
    values: [B, T, E…, K], what each of the K choices of an element would be worth, the other elements as drawn; its
        advantage is its value minus the policy's mean value, and the loss is the exact mean over the choices. Only
        differences matter. The loss is a mean over elements, so the values of a score of a whole action are to be
        multiplied by how many of its elements count: then an action of more elements means the same.
    """

    advantages: Tensor | None
    rewards: Tensor
    values: Tensor | None = None


@dataclass
class Episode:
    """One rollout of a micro-batch: what was seen, sampled, done and earned.

    inputs: [B, C, H, W], what the model was given.
    masks: the dropout masks of each stochastic layer, name -> [B, T, 1, width]. An update must reuse them.
    actions: the drawn ones, [B, T, A, E…], and after that the dimensions of one element if it is no plain number (a
        box's four). A is 0 where nothing is learned from draws.
    log_probs: [B, T, N, E…] under the policy of the rollout; with its graph if that kept one. N is A; with `weights` it
        is A + K, the drawn actions and then every choice of each element.
    rewards: [B, T, A], one score per action, or [B, T, A, E…], one per element; of `action: all` [B, T, N, E…].
    advantages: [B, T, A] or [B, T, N, E…]; with `weights` they are multiplied by these.
    metadata: `predicted`, [B, T, E…], the mode of each pass (the predicted class index); `targets`, [B, …];
        `reward_terms`, name -> that reward by itself, before weights; `reward_weights`, `weights` if they are those of
        the rewards too, or None; `entropy`, [B, T, E…], of the policy; `paths`, `indices` and the rest of the batch's.
    policy: the distribution itself, batch shape [B, T, E…]; None once detached.
    counted: [B, E…] bool, the elements that count; None: all.
    weights: [B, T, N, E…] >= 0, what each action counts in a mean over N, its probability times N where it is a choice;
        None: all alike.
    """

    inputs: Tensor
    masks: dict[str, Tensor]
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor
    advantages: Tensor
    metadata: dict = field(default_factory=dict)
    policy: Distribution | None = None
    counted: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def counted_in(self, values: Tensor) -> Tensor | None:
        """`counted` where `values`, [B, T, A] or [B, T, A, E…], has the elements; None, all, where it has not."""
        return self.counted if values.ndim == self.log_probs.ndim else None

    def detach(self) -> "Episode":
        """The same episode without its graph: what a replay needs and no more."""
        metadata = {"targets": self.metadata["targets"]}
        return replace(self, log_probs=self.log_probs.detach(), metadata=metadata, policy=None)

    def __getitem__(self, part: slice | Tensor) -> "Episode":
        """The images `part` (a slice or indices) of a detached episode."""
        if isinstance(part, Tensor):
            part = part.to(self.inputs.device, non_blocking=True)
        return Episode.map(lambda tensors: tensors[0][part], [self])

    @staticmethod
    def cat(episodes: list["Episode"]) -> "Episode":
        """The images of several detached episodes in one."""
        return Episode.map(torch.cat, episodes)

    @staticmethod
    def map(function: Callable[[list[Tensor]], Tensor], episodes: list["Episode"]) -> "Episode":
        """Apply `function` to the list of each tensor of detached episodes."""
        first = episodes[0]
        tensors = ["inputs", "actions", "log_probs", "rewards", "advantages"]
        tensors += [name for name in ("counted", "weights") if getattr(first, name) is not None]
        return Episode(
            **{name: function([getattr(e, name) for e in episodes]) for name in tensors},
            masks={name: function([e.masks[name] for e in episodes]) for name in first.masks},
            metadata={name: function([e.metadata[name] for e in episodes]) for name in first.metadata},
        )
