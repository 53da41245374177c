r"""A price list as a score of the confusion matrix: what taking one of CIFAR-10's classes for another costs.

    uv run train.py --config config_dinov2.yaml data.train_dir=photos/train data.eval_dir=photos/eval \
        rollout.reward=examples/price_list.py:price_list rollout.action=all

A camera beside a road stops the traffic for animals. An animal that is taken for a vehicle may be hit: a large one
(deer, horse) costs 1, a cat or a dog 0.7, a bird or a frog 0.4. A vehicle that is taken for an animal costs 0.3, as the
traffic stops for nothing. The wrong animal or the wrong vehicle costs 0.1, since the traffic does the right thing.
"""

import torch
from torch import Tensor

COSTS = [  # by truth and prediction; the classes are in alphabetical order, as in CIFAR-10
    # airplane automobile bird cat deer dog frog horse ship truck
    [0.0, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.1, 0.1],  # airplane
    [0.1, 0.0, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.1, 0.1],  # automobile
    [0.4, 0.4, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4, 0.4],  # bird
    [0.7, 0.7, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.7, 0.7],  # cat
    [1.0, 1.0, 0.1, 0.1, 0.0, 0.1, 0.1, 0.1, 1.0, 1.0],  # deer
    [0.7, 0.7, 0.1, 0.1, 0.1, 0.0, 0.1, 0.1, 0.7, 0.7],  # dog
    [0.4, 0.4, 0.1, 0.1, 0.1, 0.1, 0.0, 0.1, 0.4, 0.4],  # frog
    [1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0, 1.0, 1.0],  # horse
    [0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.0, 0.1],  # ship
    [0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.1, 0.0],  # truck
]


def price_list(confusion: Tensor) -> Tensor:
    """1 - the mean cost of an image. confusion: [..., 10, 10], truth and prediction."""
    costs = torch.tensor(COSTS).to(confusion)
    return 1 - (costs * confusion).sum((-2, -1)) / confusion.sum((-2, -1))
