import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import rlhf, toy
from dpo_jax.rlhf.groups import Groups
from dpo_jax.rlhf.preferences import compare_all


def test_all_comparisons_together_weigh_as_much_as_their_number():
    """So that the mean over them is the expected loss of a drawn comparison."""
    ids, logps = jnp.array([[0, 1]]), jnp.log(jnp.array([[0.25, 0.75]]))
    groups = Groups(jnp.zeros((1, 2), int), ids, logps, logps, weights=2 * jnp.exp(logps))
    batch, first_won = compare_all(lambda prompts, first, second: jnp.full(len(first), 0.7), groups, groups)
    assert len(batch.prompts) == 8 and first_won.tolist() == [True] * 4 + [False] * 4
    np.testing.assert_allclose(batch.weights.mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(np.sum(batch.weights[first_won]), 0.7 * 8, rtol=1e-6)


def test_xpo_knows_which_of_the_two_was_the_references(key):
    """The policy's response always wins: rows in which the reference's does have no weight."""
    policy, embeddings = toy.TablePolicy(3), jnp.eye(1)
    params = policy.init(key, embeddings)
    learner = rlhf.xpo(
        ask=lambda key: jnp.zeros(1, jnp.int32),
        respond=toy.enumerate_fn(policy, embeddings),
        log_prob=toy.log_prob_fn(policy, embeddings),
        prefer=lambda prompts, first, second: jnp.ones(len(first)),
        reference_params=params,
        beta=0.1,
        alpha=0.1,
    )
    batch, _ = learner.collect(jax.random.key(1), params, None)
    assert not np.any(batch.columns["reference_won"][batch.weights > 0])
    assert np.sum(batch.weights > 0) == 9 and batch.columns["reference_won"].sum() == 9
