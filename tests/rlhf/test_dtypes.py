"""Learners of every precision, and hyperparameters of any other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import rlhf, toy, train


def learner(bandit, name, beta):
    if name in ("reinforce", "rloo", "grpo", "ppo"):
        return bandit.learner(getattr(rlhf, name), 4, beta=beta)
    if name == "adaptive":
        return bandit.learner(rlhf.ppo, 4, beta=rlhf.AdaptiveKL(beta, target=0.1))
    ask, respond = bandit.exchange({"nash_md": 4, "online_dpo": 2, "xpo": 1}[name])
    prefer, shared = toy.preference_fn(bandit.world.rewards), {"reference_params": bandit.reference}
    if name == "nash_md":
        return rlhf.nash_md(
            ask=ask, respond=respond, opponent=respond, log_prob=bandit.log_prob, prefer=prefer, tau=beta, **shared
        )
    if name == "xpo":
        return rlhf.xpo(
            ask=ask, respond=respond, log_prob=bandit.log_prob, prefer=prefer, beta=beta, alpha=beta, **shared
        )
    return rlhf.online_dpo(ask=ask, respond=respond, log_prob=bandit.log_prob, prefer=prefer, beta=beta, **shared)


NARROW = [(name, jnp.bfloat16) for name in ("reinforce", "xpo")]
WIDE = [("adaptive", jnp.float64)]
OTHERS = ("rloo", "grpo", "ppo", "online_dpo", "nash_md", "adaptive")
SLOW = [pytest.param(name, jnp.bfloat16, marks=pytest.mark.slow) for name in OTHERS]
SLOW += [pytest.param("reinforce", jnp.float64, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "dtype"), NARROW + WIDE + SLOW)
def test_betas_of_any_dtype_keep_that_of_the_parameters(make_bandit, key, name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        bandit = make_bandit(dtype)
        start = bandit.start(rlhf.ppo if name == "adaptive" else getattr(rlhf, name))
        start = jax.tree.map(lambda leaf: leaf.astype(dtype), start)

        def run(beta):
            made = learner(bandit, name, beta)
            return train.fit_online(key, start, made, optimizer=optax.adam(0.1), num_epochs=1, rounds_per_epoch=2)

        fixed = jax.eval_shape(lambda: run(np.float32(0.25)))
        traced = jax.eval_shape(jax.vmap(run), jnp.full(2, 0.25, jnp.float32))
        for params, _ in (fixed, traced):
            assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
