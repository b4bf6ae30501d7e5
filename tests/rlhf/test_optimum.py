"""What the learners converge to: the optimum of the RLHF objective, and if not there, where theory says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from dpo_jax import losses, rlhf, toy, train

BETA = 0.3
grpo_of_rlhf = partial(rlhf.grpo, advantages=losses.rloo_advantages, kl=losses.k2_estimate)
LEARNERS = {"reinforce": rlhf.reinforce, "rloo": rlhf.rloo, "grpo": grpo_of_rlhf, "ppo": rlhf.ppo}
every_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)


def trained(bandit, make, *exchange, rounds, rate, **hyperparameters):
    hyperparameters = {"beta": BETA, **hyperparameters}
    learner = bandit.learner(make, *exchange, **hyperparameters)
    passes = 4 if make is rlhf.ppo else 1

    @jax.jit
    def run(key):
        return train.fit_online(
            key,
            bandit.start(make),
            learner,
            optimizer=optax.adam(optax.cosine_decay_schedule(rate, rounds * passes)),
            num_epochs=1,
            rounds_per_epoch=rounds,
            passes_per_round=passes,
        )

    return run(jax.random.key(1))[0]


def optimum(bandit, beta=BETA):
    return toy.optimal_policy(bandit.table, bandit.world.rewards, beta=beta)


def test_there_is_some_way_to_go(bandit):
    assert bandit.distance(bandit.reference, optimum(bandit)) > 0.1


@pytest.mark.parametrize(
    "make",
    [pytest.param(f, marks=pytest.mark.slow if name == "reinforce" else [], id=name) for name, f in LEARNERS.items()],
)
def test_exact_expectations_lead_to_the_optimum(bandit, make):
    params = trained(bandit, make, rounds=1500, rate=0.05)
    assert bandit.distance(params, optimum(bandit)) < 1e-4


@pytest.mark.slow
@every_learner
def test_samples_lead_to_the_optimum(bandit, make):
    params = trained(bandit, make, 4, 128, rounds=3000, rate=0.01)
    assert bandit.distance(params, optimum(bandit)) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("make", [rlhf.rloo, partial(rlhf.ppo, advantages=lambda advantages, _: advantages)])
def test_with_the_kl_in_the_reward_samples_lead_there_exactly(bandit, make):
    """At the optimum all responses to a prompt earn the same, so there is no noise left, however few they are."""
    assert distance_at_a_constant_rate(bandit, make) < 1e-5


@pytest.mark.slow
def test_whitening_keeps_the_noise_alive(bandit):
    assert distance_at_a_constant_rate(bandit, rlhf.ppo) > 1e-3


def distance_at_a_constant_rate(bandit, make):
    is_ppo = make is not rlhf.rloo
    hyperparameters = {"value": bandit.value, "value_weight": 1.0} if is_ppo else {}
    ask, respond = bandit.exchange(4)
    learner = make(
        ask=ask,
        respond=respond,
        log_prob=bandit.log_prob,
        reward=bandit.reward,
        reference_params=bandit.reference,
        beta=BETA,
        **hyperparameters,
    )
    start = bandit.start(rlhf.ppo if is_ppo else rlhf.rloo)
    run = jax.jit(
        lambda key: train.fit_online(
            key, start, learner, optimizer=optax.adam(0.02), num_epochs=1, rounds_per_epoch=3000
        )[0]
    )
    return bandit.distance(run(jax.random.key(1)), optimum(bandit))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_baseline_that_counts_the_response_itself_converges_as_for_a_larger_beta(bandit, size):
    """Dr. GRPO: the gradient of the reward is shorter by one part in the size of the group, that of the KL is not."""
    params = trained(
        bandit,
        partial(rlhf.grpo, advantages=losses.centred_advantages, kl=losses.k2_estimate),
        size,
        512 // size,
        rounds=3000,
        rate=0.01,
    )
    assert bandit.distance(params, optimum(bandit, BETA * size / (size - 1))) < 1e-2
    assert bandit.distance(params, optimum(bandit)) > 3e-2


@pytest.mark.slow
def test_grpo_as_published_converges_elsewhere(bandit):
    """At pi_ref / (1 - A / beta), which is not the optimum at that beta."""
    beta = 3.0
    params = trained(bandit, rlhf.grpo, rounds=2000, rate=0.05, beta=beta)
    probs = np.exp(np.float64(bandit.log_probs(params)))
    rewards = np.float64(bandit.world.rewards)
    centred = rewards - (probs * rewards).sum(-1, keepdims=True)
    advantages = centred / np.sqrt((probs * centred**2).sum(-1, keepdims=True))
    np.testing.assert_allclose(probs, np.exp(bandit.table) / (1 - advantages / beta), atol=1e-3)
    assert bandit.distance(params, optimum(bandit, beta)) > 0.05


@pytest.mark.slow
def test_the_kl_term_of_grpo_alone_holds_to_the_other_divergence(bandit):
    """Without standard deviations it comes to the maximum of reward minus beta times KL(reference || policy)."""
    params = trained(bandit, rlhf.grpo, rounds=2000, rate=0.05, advantages=losses.centred_advantages)

    def objective(logits, reference, rewards):
        log_probs = logits - np.logaddexp.reduce(logits)
        return -(np.exp(log_probs) @ rewards - BETA * np.exp(reference) @ (reference - log_probs))

    for learned, reference, rewards in zip(
        bandit.log_probs(params), np.float64(bandit.table), np.float64(bandit.world.rewards), strict=True
    ):
        best = optimize.minimize(objective, reference, args=(reference, rewards), tol=1e-12).x
        np.testing.assert_allclose(np.exp(learned), np.exp(best) / np.exp(best).sum(), atol=2e-4)


@pytest.mark.slow
def test_a_held_kl_stays_on_target(bandit):
    target = 0.05
    control = rlhf.AdaptiveKL(initial=1.0, target=target)
    params = trained(bandit, rlhf.ppo, rounds=3000, rate=0.01, beta=control)
    kl = toy.kl_to_reference(bandit.log_probs(params.policy), bandit.table).mean()
    np.testing.assert_allclose(kl, target, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
def test_a_learned_reward_leads_to_its_own_optimum(bandit, make):
    learned = jnp.flip(bandit.world.rewards, axis=-1)
    params = trained(bandit._replace(reward=toy.reward_fn(learned)), make, rounds=1500, rate=0.05)
    assert bandit.distance(params, toy.optimal_policy(bandit.table, learned, beta=BETA)) < 1e-4


ONLINE = {"online_dpo": (rlhf.online_dpo, 2, {}), "xpo": (rlhf.xpo, 1, {"alpha": 0.0})}


@pytest.mark.parametrize("name", ["online_dpo", pytest.param("xpo", marks=pytest.mark.slow)])
def test_all_comparisons_lead_to_the_optimum_without_optimism(bandit, name):
    make, _, options = ONLINE[name]
    params = trained_on_preferences(bandit, make, rounds=1500, rate=0.05, **options)
    assert bandit.distance(params, optimum(bandit)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ONLINE)
def test_sampled_comparisons_lead_to_the_optimum_without_optimism(bandit, name):
    make, group_size, options = ONLINE[name]
    params = trained_on_preferences(bandit, make, group_size, 512, **options)
    assert bandit.distance(params, optimum(bandit)) < 2e-2


@pytest.mark.slow
def test_optimism_pulls_away_from_what_the_reference_answers(bandit):
    params = trained_on_preferences(bandit, rlhf.xpo, 1, 512, alpha=0.05)

    def expected_log_prob(table):
        return jnp.sum(jnp.exp(bandit.table) * table, axis=-1).mean()

    assert expected_log_prob(bandit.log_probs(params)) < expected_log_prob(optimum(bandit)) - 0.05


def trained_on_preferences(bandit, make, *exchange, rounds=4000, rate=0.02, **hyperparameters):
    ask, respond = bandit.exchange(*exchange)
    prefer = toy.preference_fn(bandit.world.rewards)
    learner = make(
        ask=ask,
        respond=respond,
        log_prob=bandit.log_prob,
        prefer=prefer,
        reference_params=bandit.reference,
        beta=BETA,
        **hyperparameters,
    )

    @jax.jit
    def run(key):
        descent = optax.adam(optax.cosine_decay_schedule(rate, rounds))
        return train.fit_online(
            key, bandit.reference, learner, optimizer=descent, num_epochs=1, rounds_per_epoch=rounds
        )

    return run(jax.random.key(2))[0]


@pytest.mark.slow
def test_best_of_n_chooses_as_its_closed_form_says(bandit, key):
    num, size = 20_000, 3
    prompts = jnp.arange(num) % 2
    _, respond = bandit.exchange(size)
    chosen = rlhf.best_of_n(key, bandit.reference, prompts, respond=respond, reward=bandit.reward)
    exact = np.exp(toy.best_of_n_policy(bandit.table, bandit.world.rewards, num=size))
    for prompt in (0, 1):
        counts = np.bincount(np.asarray(chosen)[np.asarray(prompts) == prompt], minlength=4)
        expected = exact[prompt] * num / 2
        assert np.sum((counts - expected) ** 2 / expected) < 25  # chi-square with 3 degrees of freedom
