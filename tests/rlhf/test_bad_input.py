"""Learners refuse what they cannot work with, at the border, and stop where they find out later."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import losses, rlhf, toy, train


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (rlhf.reinforce, {"beta": -0.1}, "beta must be in .0, inf."),
        (rlhf.reinforce, {"momentum": 1.0}, "momentum must be in .0, 1."),
        (rlhf.rloo, {"beta": np.nan}, "beta must be in .0, inf."),
        (rlhf.rloo, {"clip": 0.0}, "clip must be in .0, inf."),
        (rlhf.grpo, {"beta": -1.0}, "beta must be in .0, inf."),
        (rlhf.grpo, {"clip": -1.0}, "clip must be in .0, inf."),
        (rlhf.grpo, {"clip_high": 0.0}, "clip_high must be in .0, inf."),
        (rlhf.ppo, {"beta": -1.0}, "beta must be in .0, inf."),
        (rlhf.ppo, {"beta": rlhf.AdaptiveKL(initial=-0.1, target=1.0)}, "initial must be in .0, inf."),
        (rlhf.ppo, {"beta": rlhf.AdaptiveKL(initial=0.1, target=0.0)}, "target must be in .0, inf."),
        (rlhf.ppo, {"value_clip": -1.0}, "value_clip must be in .0, inf."),
        (rlhf.ppo, {"value_weight": -1.0}, "value_weight must be in .0, inf."),
        (rlhf.ppo, {"clip": 0.0}, "clip must be in .0, inf."),
    ],
)
def test_bad_hyperparameters_are_refused_when_the_learner_is_made(bandit, as_users_have_it, make, changes, message):
    with pytest.raises(ValueError, match=message):
        bandit.learner(make, 4, **{"beta": 0.1, **changes})


@pytest.mark.parametrize("make", [rlhf.reinforce, rlhf.rloo, rlhf.grpo, rlhf.ppo])
def test_an_actor_critic_is_no_reference(bandit, make):
    wrong = bandit._replace(reference=bandit.start(rlhf.ppo))
    with pytest.raises(TypeError, match="reference_params must be those of a policy, got an ActorCritic"):
        wrong.learner(make, 4, beta=0.1)


def test_ppo_wants_an_actor_critic(bandit, as_users_have_it):
    learner = bandit.learner(rlhf.ppo, 4, beta=0.1)
    with pytest.raises(TypeError, match=r"ppo trains an ActorCritic\(policy, value\), got parameters of type dict"):
        train.fit_online(jax.random.key(0), bandit.reference, learner, optimizer=optax.adam(0.1), num_epochs=1)


@pytest.mark.parametrize("make", [rlhf.rloo, rlhf.grpo, partial(rlhf.grpo, advantages=losses.centred_advantages)])
def test_groups_of_one_have_nothing_to_compare_with(bandit, make):
    learner = bandit.learner(make, 1, beta=0.1)
    with pytest.raises(ValueError, match="the number of responses in a group must be at least 2, got 1"):
        train.fit_online(jax.random.key(0), bandit.reference, learner, optimizer=optax.adam(0.1), num_epochs=1)


def preference_learner(bandit, make, respond, prefer, **hyperparameters):
    ask = toy.ask_everything(bandit.world)
    return make(
        ask=ask,
        respond=respond,
        log_prob=bandit.log_prob,
        prefer=prefer,
        reference_params=bandit.reference,
        beta=0.1,
        **hyperparameters,
    )


@pytest.mark.parametrize(("make", "options", "size"), [(rlhf.online_dpo, {}, 3), (rlhf.xpo, {"alpha": 0.1}, 2)])
def test_comparisons_are_of_as_many_answers_as_they_should(bandit, make, options, size):
    _, respond = bandit.exchange(size)
    prefer = toy.preference_fn(bandit.world.rewards)
    learner = preference_learner(bandit, make, respond, prefer, **options)
    with pytest.raises(ValueError, match="respond must"):
        train.fit_online(jax.random.key(0), bandit.reference, learner, optimizer=optax.adam(0.1), num_epochs=1)


@pytest.mark.parametrize(("make", "options", "size"), [(rlhf.online_dpo, {}, 2), (rlhf.xpo, {"alpha": 0.1}, 1)])
@pytest.mark.parametrize("bad", [np.nan, 1.5, pytest.param(-0.1, marks=pytest.mark.slow)])
def test_preferences_that_are_no_probabilities_stop_training(bandit, make, options, size, bad):
    _, respond = bandit.exchange(size)

    def prefer(prompts, responses, others):
        return jnp.full(prompts.shape, bad) + 0.0 * toy.lookup(bandit.world.rewards, prompts, responses)

    learner = preference_learner(bandit, make, respond, prefer, **options)
    with pytest.raises(train.NonFiniteError, match="step 0"):
        train.fit_online(jax.random.key(0), bandit.reference, learner, optimizer=optax.adam(0.1), num_epochs=1)


def test_a_reward_that_is_nan_stops_training_with_the_last_good_parameters(bandit):
    rewards = bandit.world.rewards.at[0, 0].set(jnp.nan)
    learner = bandit._replace(reward=toy.reward_fn(rewards)).learner(rlhf.rloo, 64, beta=0.1)
    with pytest.raises(train.NonFiniteError) as caught:
        train.fit_online(jax.random.key(0), bandit.reference, learner, optimizer=optax.adam(0.1), num_epochs=1)
    assert jnp.all(jnp.isfinite(caught.value.params["params"]["logits"]))


def test_the_best_of_all_responses_is_not_a_best_of_n(bandit, key):
    _, everything = bandit.exchange()
    with pytest.raises(ValueError, match="respond must sample"):
        rlhf.best_of_n(key, bandit.reference, jnp.arange(2), respond=everything, reward=bandit.reward)


def test_the_best_of_n_is_never_one_whose_reward_is_nan(bandit, key):
    """An error, or, where rewards have no values yet, the best of the others."""
    _, respond = bandit.exchange(4)

    def best(key, reward):
        return rlhf.best_of_n(key, bandit.reference, jnp.arange(2), respond=respond, reward=reward)

    def reward(prompts, responses):
        return jnp.where(jnp.arange(4)[None] == 1, jnp.nan, responses.astype(jnp.float32))

    with pytest.raises(ValueError, match=r"reward\(prompts, responses\) must be a number, .*in row \(0, 1\)"):
        best(key, reward)
    drawn = np.asarray(respond(key, bandit.reference, jnp.arange(2)).responses)
    np.testing.assert_array_equal(jax.jit(lambda key: best(key, reward))(key), np.delete(drawn, 1, axis=1).max(axis=1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"group_size": 0}, ValueError, "group_size must be at least 1"),
        ({"rewards": jnp.zeros(3)}, ValueError, "shapes must be equal"),
    ],
)
def test_moments_of_what_cannot_be_drawn_are_refused(as_users_have_it, changes, error, message):
    arguments = {"logits": jnp.zeros(4), "rewards": jnp.zeros(4), "group_size": 2, **changes}
    with pytest.raises(error, match=message):
        rlhf.estimate_moments(**arguments, advantages=losses.rloo_advantages)
