r"""A reward of one's own, by the price of mistakes: on cheques, a digit read too high costs ten times one read too low.

    uv run train.py --config config_digits.yaml model.checkpoint_path=ckpt/config_digits/last.pt \
        rollout.reward=examples/cheque_reward.py:cheque_reward rollout.advantage=rloo training.entropy_coef=0.03 \
        training.steps=500 training.learning_rate=1e-3 training.run_name=cheque
"""

from torch import Tensor


def cheque_cost(predicted: Tensor, targets: Tensor) -> Tensor:
    """What a misread digit of a cheque costs: 10 if read too high (we pay too much), 1 if read too low (they ask)."""
    return 10.0 * (predicted > targets) + 1.0 * (predicted < targets)


def cheque_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """actions: [B, T, A] class ids; targets: [B]; returns [B, T, A] in [0, 1], as `maxrl` wants no negative reward."""
    return 1 - cheque_cost(actions, targets[:, None, None]) / 10
