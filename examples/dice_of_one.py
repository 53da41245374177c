r"""Dice of one class as a score of the confusion matrix: of the membrane, say, whatever the cells' own Dice is.

    uv run train.py --config config_segmentation.yaml data.train_dir=cells/train data.eval_dir=cells/eval \
        rollout.reward=examples/dice_of_one.py:dice_of_one
"""

from torch import Tensor


def dice_of_one(confusion: Tensor) -> Tensor:
    """2 · hits / (true + predicted) of class 1. confusion: [..., K, K], truth and prediction."""
    return 2 * confusion[..., 1, 1] / (confusion[..., 1, :].sum(-1) + confusion[..., :, 1].sum(-1))
