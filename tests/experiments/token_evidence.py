"""Evidence made up, in the shapes that `experiments.token_claims.evidence.gather` returns.

Which numbers there are is found by tracing the runs, without running them.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np

from experiments.lab.string_worlds import PIPELINE
from experiments.token_claims import evidence as made
from experiments.token_claims.population import ON_ALL_PAIRS, SMALL_BETAS, gradient_noise, on_all_pairs

FEW = replace(
    PIPELINE, num_demonstrations=16, num_preferences=16, sft_epochs=1, sft_batch_size=8, num_epochs=2, batch_size=8
)


def made_up(num=6, seed=0):
    """Random numbers between 0.3 and 0.5 everywhere, with the worlds last."""
    rng = np.random.default_rng(seed)
    start = jax.eval_shape(FEW.start, jax.random.key(0))

    @cache
    def names_of(run, point):
        names = jax.eval_shape(partial(run, FEW, **dict(point)), start)
        assert all(leaf.shape == () for leaf in names.values())
        return list(names)

    def numbers(run, *shape, **point):
        return {name: rng.uniform(0.3, 0.5, (*shape, num)) for name in names_of(run, tuple(point.items()))}

    def split(run, *shape, **point):
        return {where: numbers(run, *shape, **point) for where in ("reported", "tuning")}

    exact = jax.eval_shape(made.exact, start)
    betas = len(made.BETAS)
    return {
        "dpo": numbers(made.dpo, 3, betas, judge=made.TRUTHFUL, beta=0.5),
        "after length": split(
            made.after_length, len(made.AFTER_LENGTH), len(made.AFTER_BETAS), method="simpo", beta=0.5
        ),
        "keepers": split(
            made.keeper,
            *(len(made.KEPT), 2, len(made.STRENGTHS), len(made.KEPT_BETAS)),
            method="rpo",
            judge=made.TRUTHFUL,
            strength=1.0,
            beta=0.5,
        ),
        "kept by nothing": split(
            made.keeper,
            *(1, 2, 1, len(made.KEPT_BETAS)),
            method="dpo",
            judge=made.TRUTHFUL,
            strength=0.0,
            beta=0.5,
        ),
        "chi-po": numbers(made.against_overoptimisation, 2, len(made.CHI_BETAS), method="chi-po", beta=0.1),
        "alike": numbers(made.alike, len(made.DISTANCES), distance=2),
        "models": split(made.reward_models, 2, len(made.RATES), model="explicit", rate=1e-3),
        "online": {where: numbers(made.offline_and_online, 2, how="online") for where in ("near", "far")},
        "aggregation": numbers(made.by_aggregation, 3, aggregation=next(iter(made.AGGREGATIONS))),
        "learners": split(made.by_learner, 2, len(made.RATES), learner="token PPO", rate=1e-3),
        "noise": numbers(gradient_noise),
        "population": split(on_all_pairs, len(ON_ALL_PAIRS), len(SMALL_BETAS), loss="ln-dpo", beta=1.0),
        "elsewhere": {name: numbers(made.dpo, judge=made.TRUTHFUL, beta=0.5) for name in list(made.elsewhere(FEW))[:2]},
        "exact": jax.tree.map(lambda leaf: rng.uniform(0.3, 0.5, (*leaf.shape, num)), exact),
        "far": jax.tree.map(lambda leaf: rng.uniform(0.3, 0.5, (*leaf.shape, num)), exact),
    }
