"""Evidence made up, in the shapes that `experiments.claims.evidence.gather` returns."""

import numpy as np

from experiments.claims.evidence import (
    CLIPS,
    EXPLORERS,
    FASTER,
    HACKED_BETAS,
    MANY_BETAS,
    POWERS,
    RATED,
    REGULARISED,
    SMOOTHED,
    SMOOTHINGS,
)
from experiments.dpo_vs_rlhf import LEARNING_RATES
from experiments.lab.feedback import SETTINGS

OF_DPO = (
    "expected_reward",
    "kl_to_reference",
    "gain",
    "overestimate",
    "training_accuracy",
    "new_accuracy",
    "chosen_change",
    "margin_change",
    "share_of_chosen_that_fell",
    "share_of_widened_pairs",
    "ranking_accuracy",
    "rlhf_reward",
    "distance_to_rlhf",
)
OF_EXPLORERS = ("expected_reward", "regret", "reference_reward", "optimal_reward", "log_coverage")
VARIANTS = ("dpo", "ipo", "kto", "kto on labels", "simpo", "orpo", "orpo from scratch")


def made_up(num=6, seed=0):
    """Random numbers between 0.3 and 0.5 everywhere, with the worlds last."""
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return rng.uniform(0.3, 0.5, (*shape, num))

    return {
        "dpo": {name: numbers(len(MANY_BETAS)) for name in OF_DPO},
        "dpo on policy": {name: numbers() for name in OF_DPO},
        "dpo to the end": {name: numbers(len(HACKED_BETAS)) for name in OF_DPO},
        "ppo": {"expected_reward": numbers(len(HACKED_BETAS))},
        "by_rate": {name: {"expected_reward": numbers(len(LEARNING_RATES))} for name in RATED},
        "by_clip": {where: numbers(len(FASTER), len(CLIPS)) for where in ("tuning", "reported")},
        "exploration": {how: {name: numbers(len(POWERS)) for name in OF_EXPLORERS} for how in EXPLORERS},
        "regularisation": {
            loss: {name: numbers(len(LEARNING_RATES)) for name in ("margin", "merit")} for loss in REGULARISED
        },
        "exact": {
            "sft_reward": numbers(),
            "ranking_accuracy": numbers(),
            "maximised": {name: numbers(len(MANY_BETAS)) for name in ("gain", "overestimate")},
            "optimal_reward": numbers(len(MANY_BETAS)),
        },
        "cost": {name: numbers() for name in ("dpo", "rlhf")},
        "variants": {name: {setting: {"expected_reward": numbers()} for setting in SETTINGS} for name in VARIANTS},
        "variants_sft_reward": numbers(),
        "smoothing": {"expected_reward": numbers(len(SMOOTHED), 2, len(SMOOTHINGS))},
    }
