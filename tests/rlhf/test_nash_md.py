"""Rock, paper, scissors: a preference that no reward explains, and the equilibrium that Nash-MD finds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import losses, rlhf, toy, train

TAU = 0.05
POLICY = toy.TablePolicy(3)
WORLD = toy.World(jnp.eye(1), jnp.zeros((1, 3)))
GAME = jnp.array([[[0.5, 0.1, 0.8], [0.9, 0.5, 0.3], [0.2, 0.7, 0.5]]])  # rock, paper, scissors, at unequal stakes
SKEWED = {"params": {"logits": jnp.log(jnp.array([[0.8, 0.15, 0.05]]))}}
LOG_PROB, TABLE = toy.log_prob_fn(POLICY, WORLD.embeddings), toy.table_fn(POLICY, WORLD.embeddings)


def learned(respond, opponent, *, num, rounds, tau=TAU, reference=SKEWED):
    prefer = toy.general_preference_fn(GAME)
    ask = lambda key: jnp.zeros(num, jnp.int32)  # noqa: E731
    learner = rlhf.nash_md(
        ask=ask,
        respond=respond,
        opponent=opponent,
        log_prob=LOG_PROB,
        prefer=prefer,
        reference_params=reference,
        tau=tau,
    )
    rate = optax.cosine_decay_schedule(0.01, rounds)
    params, _ = train.fit_online(
        jax.random.key(0), reference, learner, optimizer=optax.adam(rate), num_epochs=1, rounds_per_epoch=rounds
    )
    return params


def distance(one, other):
    return 0.5 * np.abs(np.exp(one) - np.exp(other)).sum()


def test_exact_self_play_finds_the_regularised_equilibrium():
    everything = toy.enumerate_fn(POLICY, WORLD.embeddings)
    found = TABLE(jax.jit(partial(learned, everything, everything, num=1, rounds=5000))())
    assert distance(found, toy.regularized_equilibrium(TABLE(SKEWED), GAME, tau=TAU, num_steps=20_000)) < 1e-3
    assert toy.regularized_exploitability(found, TABLE(SKEWED), GAME, tau=TAU)[0] < 1e-5


@pytest.mark.slow
def test_sampled_self_play_finds_it_too():
    respond = toy.respond_fn(POLICY, WORLD.embeddings, group_size=1)
    found = TABLE(jax.jit(partial(learned, respond, respond, num=512, rounds=5000))())
    assert distance(found, toy.regularized_equilibrium(TABLE(SKEWED), GAME, tau=TAU, num_steps=20_000)) < 1e-2


def test_with_a_reference_that_follows_it_finds_the_equilibrium_of_the_game():
    """Each time from the equilibrium that was found before, whose price then vanishes."""
    everything = toy.enumerate_fn(POLICY, WORLD.embeddings)
    once = partial(learned, everything, everything, num=1, rounds=1000, tau=0.2)
    params = jax.jit(lambda: jax.lax.fori_loop(0, 60, lambda _, params: once(reference=params), SKEWED))()
    assert distance(TABLE(params), jnp.log(toy.nash_equilibrium(np.float64(GAME[0])))[None]) < 1e-4
    assert toy.exploitability(TABLE(params), GAME)[0] < 1e-4


def test_no_reward_can_say_what_it_says():
    """Bradley and Terry see three equals in a fair cycle, so RLHF and DPO stay at a reference that loses to paper."""
    fair = jnp.array([[[0.5, 0.1, 0.9], [0.9, 0.5, 0.1], [0.1, 0.9, 0.5]]])
    prompts, chosen, rejected = (jnp.array(column) for column in ([0] * 6, [0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]))
    pairs = toy.preferences(WORLD, prompts, chosen, rejected, 2 * fair[0, chosen, rejected])
    objective = train.reference_free_objective(toy.score_fn(POLICY, WORLD.embeddings), losses.bradley_terry_loss)
    start = {"params": {"logits": jnp.array([[0.5, -1.0, 0.2]])}}
    model, _ = train.fit(
        jax.random.key(0), start, pairs, objective=objective, optimizer=optax.adam(0.1), num_epochs=1000, batch_size=6
    )
    rewards = toy.score_table_fn(POLICY, WORLD.embeddings)(model)
    np.testing.assert_allclose(rewards, jnp.mean(rewards), atol=1e-4)
    best = toy.optimal_policy(TABLE(SKEWED), rewards, beta=0.05)
    assert toy.exploitability(best, fair)[0] > 0.2
    assert (
        toy.exploitability(toy.regularized_equilibrium(TABLE(SKEWED), fair, tau=0.02, num_steps=10_000), fair)[0] < 0.03
    )


@pytest.mark.slow
def test_an_opponent_mixed_with_the_reference_shifts_the_resting_point():
    respond = toy.respond_fn(POLICY, WORLD.embeddings, group_size=1)
    mixed = toy.respond_fn(POLICY, WORLD.embeddings, group_size=1, reference_log_probs=TABLE(SKEWED), mix=0.5)
    found = TABLE(jax.jit(partial(learned, respond, mixed, num=512, rounds=4000, tau=0.2))())

    log_probs = np.float64(TABLE(SKEWED))[0]
    reference = log_probs
    for _ in range(5000):  # log pi = log pi_ref + P(y > mixture) / tau, damped
        mixture = np.exp(0.5 * log_probs + 0.5 * reference)
        answer = reference + np.float64(GAME[0]) @ (mixture / mixture.sum()) / 0.2
        log_probs = 0.98 * log_probs + 0.02 * (answer - np.logaddexp.reduce(answer))
    assert distance(found[0], log_probs) < 2e-2


@pytest.mark.parametrize("tau", [-1.0, np.nan])
def test_a_bad_price_is_refused(tau):
    respond, prefer = toy.respond_fn(POLICY, WORLD.embeddings, group_size=1), toy.general_preference_fn(GAME)
    with pytest.raises(ValueError, match="tau must be in .0, inf."):
        rlhf.nash_md(
            ask=toy.ask_everything(WORLD),
            respond=respond,
            opponent=respond,
            log_prob=LOG_PROB,
            prefer=prefer,
            reference_params=SKEWED,
            tau=tau,
        )
