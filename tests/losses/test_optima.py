"""What each loss comes to with infinite data: the optimum of the RLHF objective, and if not that, what else?

First for scores that need not be normalised, then for a policy on a table.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from dpo_jax import losses, toy
from dpo_jax.types import Labels, Pair, Preferences
from tests.losses.menu import BATCH, BY_NAME, CASES, RANKED, REFERENCE_FREE, UNPAIRED

BETA = 0.3
NO_SLOPE, CLEAR_SLOPE = 1e-12, 1e-4
logit = special.logit
array = partial(jnp.asarray, dtype=jnp.float64)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


# Infinite data, where all pairs of distinct responses are compared equally often


@cache
def make_world():
    make = partial(toy.make_world, num_prompts=2, num_responses=4, embedding_dim=3)
    return jax.jit(make)(jax.random.key(3))


@cache
def make_reference():
    return jax.nn.log_softmax(jax.random.normal(jax.random.key(4), (2, 4)))


def mean_loss(loss, data, reference, *, normalise=jax.nn.log_softmax, **hyperparameters):
    """The population loss as a function of a table of logits."""
    arguments = [toy.lookup(reference, data.prompts, data.responses)]
    arguments += [data.desirable] if isinstance(data, Labels) else []
    weights = 1.0 if data.weights is None else data.weights

    def mean(logits):
        policy = toy.lookup(normalise(logits), data.prompts, data.responses)
        return jnp.mean(weights * loss(policy, *arguments, **hyperparameters))

    return mean


def steepest(function, table):
    return float(np.max(np.abs(jax.grad(function)(table))))  # op by op: losses share most of them


# Scores that need not be normalised


def win_probabilities(world):
    """How often each response wins against a uniform other one."""
    versus = special.expit(np.asarray(world.rewards[:, :, None] - world.rewards[:, None, :]))
    return (versus.sum(-1) - 0.5) / (world.num_responses - 1)


FREE = {
    "nca_loss": ({}, lambda p: np.log(2 * p) / BETA),
    "bco_pair_loss": ({"shift": 0.4}, lambda p: (logit(p) + 0.4) / BETA),
    "sppo_loss": ({}, lambda p: (2 * p - 1) / (2 * BETA)),
}


@pytest.mark.parametrize("name", FREE)
def test_free_scores_come_to_rest_where_theory_says(name):
    world = make_world()
    hyperparameters, scores = FREE[name]
    reference = make_reference()
    loss = mean_loss(
        getattr(losses, name), toy.all_preferences(world), reference, normalise=jnp.array, beta=BETA, **hyperparameters
    )
    assert_bottom(loss, reference + scores(win_probabilities(world)))


def test_free_scores_of_bco_come_to_rest_at_the_log_odds_of_the_labels():
    world = make_world()
    loss = mean_loss(
        losses.bco_loss, toy.all_labels(world), make_reference(), normalise=jnp.array, beta=BETA, shift=0.4
    )
    log_odds = world.rewards - world.rewards.mean(-1, keepdims=True)
    assert_bottom(loss, make_reference() + (log_odds + 0.4) / BETA)


def assert_bottom(loss, table):
    """No slope, and curved upwards in all directions."""
    assert steepest(loss, table) < NO_SLOPE
    hessian = jax.jit(jax.hessian(loss))(table).reshape(table.size, table.size)
    assert np.linalg.eigvalsh(hessian).min() > 1e-5


RATIOS = np.linspace(-9, 9, 181)


@pytest.mark.parametrize("win", [0.2, 0.45, 0.55, 0.8])
@pytest.mark.parametrize(
    "name", [name for name, case in BY_NAME.items() if case.kind == UNPAIRED and name != "bco_loss"]
)
def test_bounded_losses_of_labels_rise_or_fall_for_ever(name, win):
    """No score is enough: a response called good more often than not goes up without end, and the others down."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 1.5} if name == "kto_loss" else {}
    hyperparameters = {**BY_NAME[name].hyperparameters, **weights}

    def mean(u):
        good, bad = (
            getattr(losses, name)(u, u * 0, jnp.full(u.shape, label), **hyperparameters) for label in (True, False)
        )
        return jnp.sum(win * good + (1 - win) * bad)

    assert_monotone(jax.grad(mean)(array(RATIOS)), win, f"if {name} has a minimum, leave it out here as bco_loss")


@pytest.mark.parametrize("win", [0.2, 0.45, 0.55, 0.8])
def test_apo_zero_rises_or_falls_for_ever(win):
    def mean(u):
        other, zeros = Pair(u * 0 + 0.7, u * 0), Pair(u * 0, u * 0)
        won, lost = (losses.apo_zero_loss(pair, zeros, beta=BETA) for pair in (Pair(u, other[0]), Pair(other[0], u)))
        return jnp.sum(win * won + (1 - win) * lost)

    assert_monotone(jax.grad(mean)(array(RATIOS)), win)


def assert_monotone(slope, win, hint=""):
    assert np.all(np.sign(slope) == np.sign(0.5 - win)), hint


def test_the_weights_of_kto_move_the_point_where_up_turns_into_down():
    """Indifferent at P lambda_D = (1 - P) lambda_U."""
    u = array(RATIOS)

    def mean(u):
        loss = partial(losses.kto_loss, u, u * 0, beta=BETA, reference_point=0.6)
        weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
        return jnp.sum(0.25 * loss(u == u, **weights) + 0.75 * loss(u != u, **weights))

    np.testing.assert_allclose(jax.grad(mean)(u), 0, atol=1e-15)


def test_apo_down_pushes_both_down_for_ever():
    """Less of both responses is always better, whoever wins."""
    chosen, rejected = map(array, np.meshgrid(np.linspace(-9, 9, 37), np.linspace(-9, 9, 37)))

    def total(lift):
        zeros = Pair(chosen * 0, chosen * 0)
        return jnp.sum(losses.apo_down_loss(Pair(chosen + lift, rejected + lift), zeros, beta=BETA))

    assert jnp.all(jax.grad(total)(chosen * 0) > 0)


# The RLHF optimum

LENGTHS = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
FLIP = 0.2


def with_lengths(loss, data, table=LENGTHS):
    return partial(loss, lengths=jax.tree.map(lambda ids: jnp.asarray(table)[data.prompts, ids], data.responses))


def without_reference(loss):
    return lambda policy, reference, **hyperparameters: loss(policy, **hyperparameters)


all_preferences = jax.jit(toy.all_preferences)


def population(case, world, **noise):
    """The menu's loss, and infinite data of the sort that it takes."""
    if case.kind == RANKED:
        return case.loss, jax.jit(partial(toy.all_rankings, num_ranked=3))(world)
    if case.kind == UNPAIRED:
        return case.loss, toy.all_labels(world)
    if case.kind == BATCH:
        return case.loss, counted_preferences(world)
    data = all_preferences(world, **noise)
    if case.kind == REFERENCE_FREE:
        return without_reference(case.loss), data
    return with_lengths(case.loss, data) if "lengths" in case.hyperparameters else case.loss, data


def countable_world():
    """Probabilities of winning are fractions: a response of reward log i beats one of log j in i of i + j cases."""
    return make_world()._replace(rewards=jnp.log(jnp.array([[1.0, 2, 3, 4], [4.0, 1, 2, 3]])))


def counted_preferences(world):
    """Each comparison as often as it occurs among 420, without weights: for losses that see batches as a whole."""
    everything = toy.all_preferences(world)
    counts = 210 * np.asarray(everything.weights)
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
    rows = np.repeat(np.arange(len(counts)), counts.round().astype(int))
    return Preferences(everything.prompts[rows], jax.tree.map(lambda ids: ids[rows], everything.responses))


def menu_hyperparameters(case):
    return {name: value for name, value in case.hyperparameters.items() if name != "lengths"}


def slope_at_the_optimum(case, **noise):
    world = countable_world() if case.kind == BATCH else make_world()
    loss, data = population(case, world, **noise)
    reference = make_reference()
    optimum = toy.optimal_policy(reference, world.rewards, beta=BETA)
    return steepest(mean_loss(loss, data, reference, **menu_hyperparameters(case)), optimum)


def test_every_loss_has_the_beta_of_the_optimum():
    betas = {case.hyperparameters.get("beta", BETA) for case in CASES}
    assert betas == {BETA}, f"beta must be {BETA} in all Cases of menu.py"


@pytest.mark.parametrize("name", sorted(name for name, case in BY_NAME.items() if case.reaches_optimum))
def test_it_has_no_slope_at_the_rlhf_optimum(name):
    noise = {"flip_probability": FLIP} if name == "robust_dpo_loss" else {}
    assert slope_at_the_optimum(BY_NAME[name], **noise) < NO_SLOPE


@pytest.mark.parametrize("name", sorted(name for name, case in BY_NAME.items() if not case.reaches_optimum))
def test_it_has_a_slope_at_the_rlhf_optimum(name):
    slope = slope_at_the_optimum(BY_NAME[name])
    assert slope > CLEAR_SLOPE, f"if {name} has its minimum there, its Case in menu.py must say reaches_optimum=True"


def test_flipped_labels_lead_dpo_astray_and_clean_ones_robust_dpo():
    assert BY_NAME["robust_dpo_loss"].hyperparameters["label_smoothing"] == FLIP
    assert slope_at_the_optimum(BY_NAME["dpo_loss"], flip_probability=FLIP) > CLEAR_SLOPE
    assert slope_at_the_optimum(BY_NAME["robust_dpo_loss"]) > CLEAR_SLOPE
    assert slope_at_the_optimum(BY_NAME["robust_dpo_loss"], flip_probability=FLIP / 2) > CLEAR_SLOPE


@pytest.mark.parametrize("name", ["aot_loss", "aot_unpaired_loss"])
def test_sorting_alone_leads_astray(name):
    """Without the sort, and without smoothing, these would be DPO."""
    assert slope_at_the_optimum(replace(BY_NAME[name], hyperparameters={"beta": BETA})) > CLEAR_SLOPE


REACHES = {
    "dpo_loss": losses.dpo_loss,
    "savage_loss": losses.savage_loss,
    "with_sft, weight 0": losses.with_sft(losses.dpo_loss, weight=0.0),
    "offset 0": partial(losses.offset_dpo_loss, offset=0.0),
    "dpo_positive, penalty 0": partial(losses.dpo_positive_loss, penalty=0.0),
    "plackett_luce of pairs": losses.plackett_luce_loss,
    "unclipped reverse KL": losses.with_divergence(losses.dpo_loss, losses.reverse_kl),
    "alpha divergence 1": losses.with_divergence(losses.dpo_loss, losses.alpha_divergence(1.0)),
    "weighted sum of the consistent": losses.weighted_sum((0.3, losses.dpo_loss), (0.7, losses.savage_loss)),
}


@pytest.mark.parametrize("name", REACHES)
def test_training_on_infinite_data_reaches_the_rlhf_optimum(name):
    world = make_world()
    reference = make_reference()
    optimum = toy.optimal_policy(reference, world.rewards, beta=BETA)
    assert_reaches(mean_loss(REACHES[name], toy.all_preferences(world), reference, beta=BETA), reference, optimum)


def assert_reaches(loss, start, target):
    """It has no slope there, and descending from the start leads there."""
    loss_and_slope = jax.jit(jax.value_and_grad(loss))
    np.testing.assert_allclose(loss_and_slope(target)[1], 0, atol=NO_SLOPE)
    assert total_variation(descend(loss_and_slope, start), target) < 1e-6
    assert total_variation(start, target) > 0.01


def descend(loss_and_slope, start):
    def flat(logits):
        loss, slope = loss_and_slope(logits.reshape(start.shape))
        return float(loss), np.ravel(slope)

    found = optimize.minimize(flat, np.ravel(start), jac=True, method="BFGS", options={"gtol": 1e-10})
    return found.x.reshape(start.shape)


def total_variation(logits, other):
    p, q = (special.softmax(np.asarray(table), axis=-1) for table in (logits, other))
    return np.abs(p - q).sum(-1).max() / 2


def test_rankings_lead_to_the_rlhf_optimum():
    world = make_world()
    reference = make_reference()
    loss = mean_loss(losses.plackett_luce_loss, toy.all_rankings(world, num_ranked=3), reference, beta=BETA)
    assert_reaches(loss, reference, toy.optimal_policy(reference, world.rewards, beta=BETA))


def test_what_is_left_at_the_optimum_is_the_entropy_of_the_feedback():
    world, reference = make_world(), make_reference()
    optimum = toy.optimal_policy(reference, world.rewards, beta=BETA)
    pairs, rankings = toy.all_preferences(world), toy.all_rankings(world, num_ranked=3)
    left = mean_loss(losses.dpo_loss, pairs, reference, beta=BETA)(optimum)
    np.testing.assert_allclose(left, toy.bayes_prediction(world.rewards)["loss"], rtol=1e-12)
    left = mean_loss(losses.plackett_luce_loss, rankings, reference, beta=BETA)(optimum)
    np.testing.assert_allclose(left, -jnp.mean(rankings.weights * jnp.log(rankings.weights / 6)), rtol=1e-12)


def test_robust_dpo_reaches_the_rlhf_optimum_from_flipped_labels():
    world = make_world()
    reference = make_reference()
    data = toy.all_preferences(world, flip_probability=FLIP)
    loss = mean_loss(losses.robust_dpo_loss, data, reference, beta=BETA, label_smoothing=FLIP)
    assert_reaches(loss, reference, toy.optimal_policy(reference, world.rewards, beta=BETA))


def test_people_of_another_temperature_have_another_scale_of_reward():
    world = make_world()
    reference = make_reference()
    loss = mean_loss(losses.dpo_loss, toy.all_preferences(world, temperature=0.5), reference, beta=BETA)
    assert_reaches(loss, reference, toy.optimal_policy(reference, world.rewards, beta=BETA / 2))


def test_r_dpo_reaches_the_optimum_of_a_reward_that_pays_for_length():
    world = make_world()
    data, reference, alpha = toy.all_preferences(world), make_reference(), 0.1
    loss = mean_loss(with_lengths(losses.length_regularized_dpo_loss, data), data, reference, beta=BETA, alpha=alpha)
    assert_reaches(loss, reference, toy.optimal_policy(reference, world.rewards - alpha * LENGTHS, beta=BETA))


@pytest.mark.parametrize(
    ("loss", "length"),
    [(partial(losses.length_regularized_dpo_loss, alpha=0.1), 7), (losses.length_normalized_dpo_loss, 1)],
)
def test_equally_long_responses_lead_to_the_rlhf_optimum(loss, length):
    world = make_world()
    data, reference = toy.all_preferences(world), make_reference()
    mean = mean_loss(with_lengths(loss, data, np.full_like(LENGTHS, length)), data, reference, beta=BETA)
    assert_reaches(mean, reference, toy.optimal_policy(reference, world.rewards, beta=BETA))


def test_length_normalised_dpo_divides_beta_by_a_common_length():
    world = make_world()
    data, reference = toy.all_preferences(world), make_reference()
    loss = with_lengths(losses.length_normalized_dpo_loss, data, np.full_like(LENGTHS, 2))
    assert_reaches(
        mean_loss(loss, data, reference, beta=BETA),
        reference,
        toy.optimal_policy(reference, world.rewards, beta=BETA / 2),
    )


def test_length_normalised_dpo_lets_each_nat_of_a_long_response_count_for_less():
    """Its optimum is no RLHF optimum: log-ratio = length * (r + constant) / beta, with a constant for each prompt."""
    world = make_world()
    data, reference = toy.all_preferences(world), make_reference()

    def tilted(row, constant):
        return np.asarray(reference[row] + LENGTHS[row] * (world.rewards[row] + constant) / BETA)

    loss = mean_loss(with_lengths(losses.length_normalized_dpo_loss, data), data, reference, beta=BETA)
    assert_reaches(loss, reference, normalised(tilted, [(-5, 5), (-5, 5)]))


def normalised(tilted, brackets):
    """A table of log-probabilities, with the constant for each prompt that makes the row sum to one."""

    def excess(constant, row):
        return np.sum(np.exp(tilted(row, constant))) - 1

    rows = enumerate(brackets)
    return jnp.array([tilted(row, optimize.brentq(excess, *ends, args=(row,), xtol=1e-15)) for row, ends in rows])


@pytest.mark.parametrize(
    "loss", [partial(losses.simpo_loss, gamma=0.0), partial(losses.cpo_loss, sft_weight=0.0)], ids=["simpo", "cpo"]
)
def test_without_a_reference_it_is_as_if_the_reference_were_uniform(loss):
    world = make_world()
    start = make_reference()
    target = toy.optimal_policy(jnp.zeros_like(start), world.rewards, beta=BETA)
    assert_reaches(mean_loss(without_reference(loss), toy.all_preferences(world), start, beta=BETA), start, target)
    assert total_variation(target, toy.optimal_policy(start, world.rewards, beta=BETA)) > 0.05


@pytest.mark.parametrize(("loss", "tau"), [(losses.ipo_loss, BETA), (losses.squared_loss, BETA / 2)])
def test_ipo_tilts_the_reference_by_the_probability_of_winning(loss, tau):
    """Azar et al. 2023, 2310.12036, Eq. 7 with Psi the identity; a response ties with itself."""
    world = make_world()
    reference = make_reference()
    versus = jax.nn.sigmoid(world.rewards[:, :, None] - world.rewards[:, None, :])
    target = jax.nn.log_softmax(reference + versus.mean(-1) / tau)
    assert_reaches(mean_loss(loss, toy.all_preferences(world), reference, beta=BETA), reference, target)


def test_bco_reaches_the_rlhf_optimum_if_it_knows_the_shift_of_each_prompt():
    r"""Labels have the log-odds r - mean(r), and the optimum has the implicit reward r - beta log Z."""
    world = make_world()
    reference, labels = make_reference(), toy.all_labels(world)
    shift = world.rewards.mean(-1) - BETA * toy.log_partition(reference, world.rewards, beta=BETA)
    loss = mean_loss(losses.bco_loss, labels, reference, beta=BETA, shift=shift[labels.prompts])
    assert_reaches(loss, reference, toy.optimal_policy(reference, world.rewards, beta=BETA))


def test_beta_dpo_reaches_the_rlhf_optimum_if_its_mean_margin_is_that_of_the_optimum():
    world = countable_world()
    reference, data = make_reference(), counted_preferences(world)
    optimum = toy.optimal_policy(reference, world.rewards, beta=BETA)
    chosen, rejected = (toy.lookup(optimum - reference, data.prompts, side) for side in data.responses)
    for surplus, reaches in ((0.0, True), (0.1, False)):
        moments = losses.MarginMoments(jax.random.key(0), jnp.mean(chosen - rejected) - surplus, 1.0)
        loss = mean_loss(losses.beta_dpo_loss, data, reference, beta=BETA, alpha=0.4, moments=moments, keep=1.0)
        assert (steepest(loss, optimum) < NO_SLOPE) == reaches


def test_counted_comparisons_lead_dpo_to_the_optimum():
    """The control for losses of whole batches: this data, too, has no slope there."""
    world = countable_world()
    reference = make_reference()
    optimum = toy.optimal_policy(reference, world.rewards, beta=BETA)
    assert steepest(mean_loss(losses.dpo_loss, counted_preferences(world), reference, beta=BETA), optimum) < NO_SLOPE


# The optimum of RLHF with another divergence

DIVERGENCES = {
    "forward_kl": (losses.forward_kl, lambda t: -np.log(1 - t), 1.0, lambda z: -jnp.log(z)),
    "jensen_shannon": (
        losses.jensen_shannon,
        lambda t: logit(np.exp(t) / 2),
        np.log(2),
        lambda z: z * jnp.log(z) - (z + 1) * jnp.log((z + 1) / 2),
    ),
    "alpha_divergence": (
        losses.alpha_divergence(0.5),
        lambda t: -2 * np.log(1 - t / 2),
        2.0,
        lambda z: -4 * jnp.sqrt(z) + 2 * z,
    ),
    "chi_square_kl": (
        losses.chi_square_kl,
        lambda t: np.log(special.wrightomega(t)),
        60.0,
        lambda z: (z - 1) ** 2 / 2 + z * jnp.log(z),
    ),
}
"""The link, its inverse worked out by hand, what it stays below (or far above what it attains), and f itself."""


def optimum_by_divergence(world, reference, inverse, ceiling):
    rewards = np.asarray(world.rewards) / BETA

    def tilted(row, constant):
        return np.asarray(reference[row]) + inverse(rewards[row] + constant)

    return normalised(tilted, [(-60, ceiling - largest - 1e-9) for largest in rewards.max(-1)])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_dpo_reaches_the_optimum_of_its_own_divergence(name):
    divergence, inverse, ceiling, f = DIVERGENCES[name]
    world = make_world()
    reference, data = make_reference(), toy.all_preferences(world)
    target = optimum_by_divergence(world, reference, inverse, ceiling)

    def regularised_reward(logits):
        log_probs = jax.nn.log_softmax(logits)
        penalty = jnp.sum(jnp.exp(reference) * f(jnp.exp(log_probs - reference)), axis=-1)
        return jnp.sum(toy.expected_reward(log_probs, world.rewards) - BETA * penalty)

    assert steepest(regularised_reward, target) < NO_SLOPE
    loss = mean_loss(losses.with_divergence(losses.dpo_loss, divergence), data, reference, beta=BETA)
    assert_reaches(loss, reference, target)
    by_kl = toy.optimal_policy(reference, world.rewards, beta=BETA)
    assert steepest(loss, by_kl) > CLEAR_SLOPE
    assert steepest(mean_loss(losses.dpo_loss, data, reference, beta=BETA), target) > CLEAR_SLOPE


@pytest.mark.parametrize("max_reward", [np.inf, 1.0])
def test_chi_po_reaches_the_optimum_of_chi_squared_plus_kl(max_reward):
    world = make_world()
    reference, data = make_reference(), toy.all_preferences(world)
    target = optimum_by_divergence(world, reference, *DIVERGENCES["chi_square_kl"][1:3])
    loss = mean_loss(losses.chi_po_loss, data, reference, beta=BETA, max_reward=max_reward)
    assert_reaches(loss, reference, target)
