import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import losses
from dpo_jax.types import Pair

POLICY = Pair(jnp.array([-1.0, -0.2, -7.0]), jnp.array([-3.0, -2.5, -0.1]))
REFERENCE = Pair(jnp.array([-2.0, -0.3, -6.0]), jnp.array([-2.0, -2.0, -0.5]))


def test_an_sft_term_goes_with_losses_that_have_no_reference_too():
    loss = losses.with_sft(losses.simpo_loss, weight=0.5)(POLICY, beta=1.0, gamma=0.1)
    np.testing.assert_allclose(loss, losses.simpo_loss(POLICY, beta=1.0, gamma=0.1) - 0.5 * POLICY.chosen, rtol=1e-6)


@pytest.mark.usefixtures("as_users_have_it")
def test_an_sft_term_needs_a_chosen_response():
    single = jnp.array([-1.0, -2.0])
    with pytest.raises(TypeError, match="with_sft needs a loss of pairs or rankings"):
        losses.with_sft(losses.bco_loss, weight=1.0)(single, single, single < 0, beta=0.5, shift=0.0)


def test_weights_of_terms_may_be_swept():
    def total(weight):
        mixed = losses.weighted_sum((weight, losses.dpo_loss), (1 - weight, losses.ipo_loss))
        return losses.with_sft(mixed, weight=weight)(POLICY, REFERENCE, beta=0.5).sum()

    weights = jnp.array([0.0, 0.3])
    swept = jax.jit(jax.vmap(total))(weights)
    np.testing.assert_allclose(swept[0], losses.ipo_loss(POLICY, REFERENCE, beta=0.5).sum(), rtol=1e-6)
    np.testing.assert_allclose(swept, [total(weight) for weight in weights], rtol=1e-6)


def test_terms_and_weights_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="weighted_sum needs at least one term"):
        losses.weighted_sum()
    with pytest.raises(ValueError, match="weight must be finite, got nan"):
        losses.weighted_sum((float("nan"), losses.dpo_loss))
    with pytest.raises(ValueError, match="weight must be in .0, inf., got -1"):
        losses.with_sft(losses.dpo_loss, weight=-1)


def test_wpo_weights_average_one_for_what_the_policy_would_write():
    """Sampled alignment: over responses drawn from the policy, the mean of p / sum of squares is one."""
    probs = np.array([0.5, 0.3, 0.2])
    alignment = jnp.full(9, np.log(np.sum(probs**2)))
    first, second = (jnp.asarray(np.log(probs))[ids.ravel()] for ids in np.indices((3, 3)))
    weights = losses.wpo_weights((first, second), (alignment, alignment))
    np.testing.assert_allclose(np.sum(weights * np.outer(probs, probs).ravel()), 1.0, rtol=1e-5)


def test_no_gradient_flows_through_wpo_weights():
    gradient = jax.grad(lambda policy: losses.wpo_weights(policy, REFERENCE).sum())(POLICY)
    assert not jnp.any(gradient.chosen) and not jnp.any(gradient.rejected)


def test_weighted_comparisons_count_by_their_weights():
    weights = jnp.array([0.0, 1.0, 2.5])
    loss = losses.with_weights(losses.dpo_loss)(POLICY, REFERENCE, beta=0.5, weights=weights)
    np.testing.assert_allclose(loss, weights * losses.dpo_loss(POLICY, REFERENCE, beta=0.5), rtol=1e-6)
    for wrong, message in (
        (jnp.ones((3, 1)), "weights must broadcast"),
        (-weights, "weights must be in .0, inf."),
    ):
        with pytest.raises(ValueError, match=message):
            losses.with_weights(losses.dpo_loss)(POLICY, REFERENCE, beta=0.5, weights=wrong)


def test_weights_have_one_value_for_each_comparison_or_for_all():
    """Neither a column, which would make a table of losses, nor more digits than the losses have."""
    column, row = jnp.ones((3, 1)), jnp.array([0.5, 0.0, 2.0])
    narrow = jax.tree.map(lambda side: side.astype(jnp.bfloat16), (POLICY, REFERENCE))
    with jax.numpy_rank_promotion("allow"):
        for made in (
            lambda weight: losses.with_sft(losses.dpo_loss, weight=weight),
            lambda weight: losses.weighted_sum((1.0, losses.dpo_loss), (weight, losses.ipo_loss)),
        ):
            with pytest.raises(ValueError, match=r"weight must broadcast to the shape \(3,\), got shape \(3, 1\)"):
                made(column)(POLICY, REFERENCE, beta=0.5)
            assert made(row)(*narrow, beta=0.5).dtype == jnp.bfloat16
        with pytest.raises(ValueError, match=r"shapes must be equal, got one_term \(3,\), another_term \(\)"):
            mean = losses.weighted_sum(
                (1.0, losses.dpo_loss), (1.0, lambda *x, beta: losses.ipo_loss(*x, beta=beta).mean())
            )
            mean(POLICY, REFERENCE, beta=0.5)
        with pytest.raises(ValueError, match=r"alpha must broadcast to the shape \(3,\), got shape \(3, 1\)"):
            losses.length_desensitized_logps(-jnp.ones((3, 4)), jnp.ones(3, int), jnp.ones(3, int), alpha=0.5 * column)
    expected = losses.dpo_loss(POLICY, REFERENCE, beta=0.5) - row * POLICY.chosen
    np.testing.assert_allclose(losses.with_sft(losses.dpo_loss, weight=row)(POLICY, REFERENCE, beta=0.5), expected)
    by_row = losses.length_desensitized_logps(
        -jnp.ones((3, 4)), jnp.full(3, 4), jnp.ones(3, int), alpha=jnp.array([0, 0.5, 1])
    )
    np.testing.assert_allclose(by_row, [-1, -2.5, -4])


def test_what_has_no_weight_may_be_infinite():
    masked, weights = Pair(POLICY.chosen.at[0].set(-jnp.inf), POLICY.rejected), jnp.array([0.0, 1.0, 1.0])
    weighted = losses.with_weights(losses.dpo_loss)
    for loss in (
        lambda policy: weighted(policy, REFERENCE, beta=0.5, weights=weights),
        lambda policy: losses.weighted_sum((weights, losses.dpo_loss))(policy, REFERENCE, beta=0.5),
        lambda policy: losses.weighted_sum((0.0, losses.ipo_loss), (0.0, losses.sppo_loss))(
            policy, REFERENCE, beta=0.5
        ),
        lambda policy: losses.with_sft(losses.apo_zero_loss, weight=0.0)(policy, REFERENCE, beta=0.5) * weights,
    ):
        value, gradient = jax.value_and_grad(lambda policy: loss(policy).sum())(masked)  # noqa: B023
        assert np.isfinite(value) and np.isfinite(np.array(gradient)).all()
    with_weights = losses.wpo_weights(masked, Pair(-jnp.ones(3), -jnp.ones(3)))
    assert with_weights[0] == 0 and weighted(masked, REFERENCE, beta=0.5, weights=with_weights)[0] == 0
    tokens = jnp.array([[-1.0, -jnp.inf]])
    assert losses.length_desensitized_logps(tokens, jnp.array([2]), jnp.array([1]), alpha=0.0) == -1


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tokens_past_the_common_length_count_for_less(alpha):
    rng = np.random.default_rng(0)
    tokens, lengths, common = -rng.random((4, 6)), np.array([6, 3, 1, 4]), np.array([2, 3, 1, 6])
    expected = [sum((1 if t < common[i] else alpha) * tokens[i, t] for t in range(lengths[i])) for i in range(4)]
    logps = losses.length_desensitized_logps(
        jnp.asarray(tokens, jnp.float32), jnp.asarray(lengths), jnp.asarray(common), alpha=alpha
    )
    np.testing.assert_allclose(logps, expected, rtol=1e-5)


LENGTHS, COMMON = np.array([6, 3, 1, 4, 5, 0]), np.array([2, 3, 1, 4, 0, 0])


def test_as_many_tokens_are_drawn_as_the_shorter_response_has(key):
    """In every draw: no fewer, no more, and none behind the end."""
    draw = jax.jit(lambda key: losses.down_sampling_mask(key, jnp.asarray(LENGTHS), jnp.asarray(COMMON), num_tokens=7))
    masks = np.asarray(jax.vmap(draw)(jax.random.split(key, 200)))
    assert masks.dtype == bool and masks.shape == (200, 6, 7)
    np.testing.assert_array_equal(masks.sum(-1), np.broadcast_to(COMMON, (200, 6)))
    assert not np.any(masks & (np.arange(7) >= LENGTHS[:, None]))
    np.testing.assert_array_equal(draw(key), draw(key))
    too_long = jax.jit(lambda lengths: losses.down_sampling_mask(key, lengths, lengths + 2, num_tokens=7))
    np.testing.assert_array_equal(too_long(jnp.asarray(LENGTHS)).sum(-1), LENGTHS)


def test_every_set_of_tokens_is_equally_likely_and_rows_are_independent(key):
    """Chi-square: ten sets of two tokens out of five, and of three out of five, in two rows and in both together."""
    lengths, common = jnp.array([5, 5]), jnp.array([2, 3])
    draw = jax.vmap(lambda key: losses.down_sampling_mask(key, lengths, common, num_tokens=6))
    masks = np.asarray(draw(jax.random.split(key, 20_000)))
    codes = masks @ (1 << np.arange(6))
    numbers = [np.unique(column, return_inverse=True)[1] for column in codes.T]
    for sets, num_sets in ((numbers[0], 10), (numbers[1], 10), (10 * numbers[0] + numbers[1], 100)):
        counts = np.bincount(sets, minlength=num_sets)
        assert stats.chisquare(counts).pvalue > 1e-3, counts
        assert len(counts) == num_sets


def test_sums_over_drawn_tokens_are_in_expectation_the_common_length_times_the_mean(key):
    """The mean over all sets of tokens, each drawn about as often."""
    tokens = -np.random.default_rng(0).random((6, 7))
    draw = jax.vmap(lambda key: losses.down_sampling_mask(key, jnp.asarray(LENGTHS), jnp.asarray(COMMON), num_tokens=7))
    masks = np.asarray(draw(jax.random.split(key, 5000)))
    means = np.where(np.arange(7) < LENGTHS[:, None], tokens, 0).sum(-1) / np.maximum(LENGTHS, 1)
    np.testing.assert_allclose((masks * tokens).sum(-1).mean(0), COMMON * means, atol=0.02)


def test_one_mask_serves_policy_and_reference(key):
    """A response that policy and reference like equally has a log-ratio of 0, whatever is drawn."""
    policy, reference = -jax.random.uniform(key, (2, 6, 7))
    reference = reference.at[0].set(policy[0])
    mask = losses.down_sampling_mask(jax.random.key(1), jnp.asarray(LENGTHS), jnp.asarray(COMMON), num_tokens=7)
    sums = [jnp.sum(logps, axis=-1, where=mask) for logps in (policy, reference)]
    gaps = np.where(mask, policy - reference, 0).sum(-1)
    assert gaps[0] == 0 and gaps[1] != 0
    np.testing.assert_allclose(losses.k1_estimate(*sums), gaps, atol=1e-6)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("lengths", "common", "num_tokens", "error", "message"),
    [
        ([4, 9], [1, 1], 8, ValueError, r"lengths must be in .0, 8., got 9 in row 1"),
        ([4, 3], [1, 4], 8, ValueError, r"lengths - common_lengths must be in .0, inf., got -1 in row 1"),
        ([4, 3], [1, -1], 8, ValueError, r"common_lengths must be in .0, inf., got -1 in row 1"),
        ([4, 3], [1], 8, ValueError, r"lengths \(2,\), common_lengths \(1,\)"),
        ([4.0, 3.0], [1, 1], 8, TypeError, "lengths must hold integers"),
        ([4, 3], [1.0, 1.0], 8, TypeError, "common_lengths must hold integers"),
        ([4, 3], [1, 1], 0, ValueError, "num_tokens must be at least 1, got 0"),
        ([4, 3], [1, 1], 8.0, TypeError, "num_tokens must be a whole number"),
    ],
)
def test_tokens_that_cannot_be_drawn_are_refused(lengths, common, num_tokens, error, message, key):
    with pytest.raises(error, match=message):
        losses.down_sampling_mask(key, jnp.array(lengths), jnp.array(common), num_tokens=num_tokens)
    with pytest.raises(TypeError, match="key must be a typed key"):
        losses.down_sampling_mask(0, jnp.array([1]), jnp.array([1]), num_tokens=1)


def test_one_token_is_one_token():
    tokens, ones = jnp.array([[-0.5], [-2.0]]), jnp.ones(2, int)
    logps = losses.length_desensitized_logps(tokens, ones, ones, alpha=0.3)
    np.testing.assert_allclose(logps, tokens[:, 0])
    pairs = (losses.length_normalized_dpo_loss, {}), (losses.length_regularized_dpo_loss, {"alpha": 0.7})
    lengths = Pair(jnp.ones(3, int), jnp.ones(3, int))
    for loss, extra in pairs:
        values = loss(POLICY, REFERENCE, beta=0.5, lengths=lengths, **extra)
        np.testing.assert_allclose(values, losses.dpo_loss(POLICY, REFERENCE, beta=0.5), rtol=1e-6)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (jnp.ones((2, 3)), TypeError, "lengths must be a pair"),
        ((jnp.ones(2), jnp.ones(3)), ValueError, r"lengths.chosen must have the shape \(3,\)"),
        ((jnp.ones(3), jnp.array([1, 0, 2])), ValueError, "lengths.rejected must be in .1, inf., got 0 in row 1"),
    ],
)
def test_impossible_lengths_are_refused(lengths, error, message):
    with pytest.raises(error, match=message):
        losses.length_normalized_dpo_loss(POLICY, REFERENCE, beta=0.5, lengths=lengths)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_of_tokens_is_a_share(alpha):
    with pytest.raises(ValueError, match="alpha must be in .0, 1."):
        losses.length_desensitized_logps(-jnp.ones((1, 2)), jnp.ones(1, int), jnp.ones(1, int), alpha=alpha)
