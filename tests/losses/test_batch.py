import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import losses
from dpo_jax.losses import MarginMoments, Shift, beta_dpo_loss, update_margin_moments, update_shift
from dpo_jax.types import Pair

ZEROS = Pair(jnp.zeros(50), jnp.zeros(50))


def pair_of_margins(margins):
    margins = jnp.asarray(margins)
    return Pair(jnp.minimum(margins, 0), -jnp.maximum(margins, 0))


def test_aot_sees_distributions_not_comparisons():
    """Shuffling the reference against the policy changes nothing, and moves gradients to where they belong."""
    rng = np.random.default_rng(0)
    policy, reference = (Pair(*jnp.asarray(-rng.exponential(size=(2, 6)), jnp.float32)) for _ in range(2))
    shuffled = jax.tree.map(lambda side: side[::-1], reference)
    loss = losses.aot_loss(policy, reference, beta=0.5)
    np.testing.assert_allclose(losses.aot_loss(policy, shuffled, beta=0.5), loss, rtol=1e-6)
    assert not np.allclose(losses.dpo_loss(policy, shuffled, beta=0.5), losses.dpo_loss(policy, reference, beta=0.5))
    apart = (policy.chosen, shuffled.rejected), (reference.chosen, shuffled.rejected)
    assert losses.aot_unpaired_loss(*apart, beta=0.5).shape == (6,)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("loss", [losses.aot_loss, losses.aot_unpaired_loss])
def test_a_batch_is_needed_to_sort(loss):
    single = Pair(jnp.float32(-1.0), jnp.float32(-2.0))
    with pytest.raises(ValueError, match="must be a batch, with at least one axis, got a scalar"):
        loss(single, single, beta=0.5)


def test_the_shift_is_half_the_sum_of_the_means():
    rng, state = np.random.default_rng(1), Shift()
    seen = []
    for _ in range(4):
        rewards, good = np.float32(rng.normal(size=7)), rng.random(7) < 0.3
        seen.append((rewards, good))
        state = jax.jit(update_shift)(state, jnp.asarray(rewards), jnp.asarray(good))
    rewards, good = (np.concatenate(part) for part in zip(*seen, strict=True))
    np.testing.assert_allclose(state.value, (rewards[good].mean() + rewards[~good].mean()) / 2, rtol=1e-5)
    assert state.desirable.num == good.sum()


@pytest.mark.parametrize("good", [True, False])
def test_the_shift_of_one_side_is_the_mean_of_that_side(good):
    state = update_shift(Shift(), jnp.array([1.0, 3.0]), jnp.array([good, good]))
    assert state.value == 2.0
    assert update_shift(state, jnp.array([0.0]), jnp.array([not good])).value == 1.0
    assert Shift().value == 0.0


def test_what_is_infinite_does_not_count_in_statistics_and_stops_nothing():
    inf = jnp.inf
    rewards, good = jnp.array([1.0, -inf, inf, 2.0]), jnp.array([True, True, False, False])
    assert update_shift(Shift(), rewards, good).value == 1.5
    state = MarginMoments(jax.random.key(0), mean=jnp.float32(0.5), std=jnp.float32(2.0))
    moments = update_margin_moments(state, jnp.array([1.0, inf, 3.0, -inf]), momentum=0.0)
    np.testing.assert_allclose([moments.mean, moments.std], [2.0, np.sqrt(2)], rtol=1e-6)
    moments = update_margin_moments(state, jnp.array([inf, 1.0]), momentum=0.0)
    np.testing.assert_allclose([moments.mean, moments.std], [1.0, 2.0])
    moments = update_margin_moments(state, jnp.array([inf, -inf]), momentum=0.0)
    np.testing.assert_allclose([moments.mean, moments.std], [0.5, 2.0])
    logps = jnp.array([-1.0, -inf, -2.0, -inf])
    assert losses.kto_reference_point(logps, jnp.array([-2.0, -1.0, -inf, -inf])) == 0.5  # of 1 and 0
    assert losses.kto_reference_point(logps[1:2], jnp.array([-1.0])) == 0


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_a_masked_response_leaves_beta_dpo_to_the_others(keep):
    """With the rejected response masked, and the chosen one; in a batch of four."""
    moments, reference = MarginMoments(jax.random.key(0), mean=0.5, std=1.0), Pair(-jnp.ones(4), -jnp.ones(4))
    for side in (0, 1):
        policy = [jnp.array([-1.0, -0.5, -1.0, -2.0]), jnp.array([-1.0, -1.0, -2.0, -1.5])]
        policy[side] = policy[side].at[0].set(-jnp.inf)

        def loss(policy):
            return beta_dpo_loss(Pair(*policy), reference, beta=0.5, alpha=0.6, moments=moments, keep=keep)

        value, pull_back = jax.vjp(loss, policy)
        assert np.isfinite(value[1:]).all() and (value[0] == (np.inf if side == 0 and keep == 1 else 0))
        assert np.isfinite(np.array(pull_back(jnp.ones(4))[0])).all()


@pytest.mark.parametrize("loss", [losses.aot_loss, losses.aot_unpaired_loss])
def test_sorting_puts_masked_responses_last(loss):
    """Masked in policy and reference they meet in the paired loss, and cancel; masked in one they are the limit."""
    chosen, rejected = jnp.array([-1.0, -2.0, -0.5]), jnp.array([-1.5, -0.5, -1.0])
    reference, masked = Pair(jnp.array([-1.2, -0.7, -2.0]), jnp.array([-1.0, -1.6, -0.3])), rejected.at[1].set(-jnp.inf)

    def total(policy, reference, smoothing=0.0):
        return loss(policy, reference, beta=0.5, label_smoothing=smoothing)

    value, pull_back = jax.vjp(lambda policy: total(policy, reference), Pair(chosen, masked))
    limit = total(Pair(chosen, rejected.at[1].set(-1e5)), reference)
    np.testing.assert_allclose(value, limit, rtol=1e-5)
    assert np.isfinite(np.array(pull_back(jnp.ones(3))[0])).all()
    both = total(Pair(chosen, masked), reference._replace(rejected=reference.rejected.at[1].set(-jnp.inf)))
    assert np.isfinite(both).all()


@pytest.mark.usefixtures("as_users_have_it")
def test_statistics_take_what_belongs_to_them():
    with pytest.raises(ValueError, match=r"shapes must be equal.*weights \(2, 1\)"):
        update_shift(Shift(), jnp.ones(2), jnp.array([True, False]), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="weights must be in .0, inf."):
        update_shift(Shift(), jnp.ones(2), jnp.array([True, False]), -jnp.ones(2))
    wrong = MarginMoments(jax.random.key(0), mean=jnp.zeros(50))
    with pytest.raises(ValueError, match=r"mean must broadcast to the shape \(\)"):
        update_margin_moments(wrong, jnp.ones(50))
    with pytest.raises(ValueError, match=r"mean must broadcast to the shape \(\)"):
        beta_dpo_loss(ZEROS, ZEROS, beta=0.5, alpha=1.0, moments=wrong)


def test_weighted_responses_count_by_their_weights():
    rewards, good = jnp.array([1.0, 3.0, -1.0, 5.0]), jnp.array([True, True, False, False])
    state = update_shift(Shift(), rewards, good, jnp.array([3.0, 1.0, 2.0, 0.0]))
    np.testing.assert_allclose(state.value, ((3 * 1 + 3) / 4 - 1) / 2)
    assert state.undesirable.num == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_states_go_through_a_long_scan(dtype):
    """Also in bfloat16, where a count could not go beyond 256 if it had that dtype."""
    rewards = jnp.tile(jnp.array([0.0, 1.0], dtype), (600, 1))
    start = jax.tree.map(jnp.asarray, Shift())
    state, _ = jax.lax.scan(lambda s, r: (update_shift(s, r, jnp.array([True, False])), None), start, rewards)
    assert (state.value, state.desirable.num) == (0.5, 600)


@pytest.mark.parametrize("name", ["beta", "label_smoothing"])
@pytest.mark.parametrize("loss", [losses.aot_loss, losses.aot_unpaired_loss])
def test_sorting_leaves_no_comparison_to_have_a_hyperparameter_of_its_own(loss, name):
    with pytest.raises(ValueError, match=rf"{name} must broadcast to the shape \(\), got shape \(50,\)"):
        loss(ZEROS, ZEROS, **{"beta": 0.5, "label_smoothing": 0.1, name: jnp.full(50, 0.1)})


def test_no_gradient_flows_through_statistics():
    def value(scale):
        rewards = scale * jnp.array([1.0, 2.0])
        shift = update_shift(Shift(), rewards, jnp.array([True, False])).value
        moments = update_margin_moments(MarginMoments(jax.random.key(0)), rewards)
        return shift + moments.mean + moments.std + losses.kto_reference_point(-rewards, jnp.full(2, -3.0))

    assert jax.grad(value)(1.0) == 0


def test_margin_moments_are_moving_averages():
    state, batches = MarginMoments(jax.random.key(0)), np.random.default_rng(2).normal(1, 2, size=(5, 8))
    mean = std = 0.0
    keys = [state.key]
    for margins in batches:
        state = update_margin_moments(state, jnp.asarray(margins, jnp.float32), momentum=0.7)
        mean, std = 0.7 * mean + 0.3 * margins.mean(), 0.7 * std + 0.3 * margins.std(ddof=1)
        keys.append(state.key)
    np.testing.assert_allclose([state.mean, state.std], [mean, std], rtol=1e-5)
    assert len(np.unique(jax.random.key_data(jnp.stack(keys)), axis=0)) == 6  # each batch has a filter of its own
    with pytest.raises(ValueError, match="momentum must be in .0, 1."):
        update_margin_moments(state, jnp.ones(2), momentum=1.0)


@pytest.mark.parametrize("loss", [losses.aot_loss, losses.aot_unpaired_loss])
def test_the_last_axis_is_the_batch(loss):
    sides = jnp.asarray(-np.random.default_rng(0).exponential(size=(4, 3, 5)), jnp.float32)
    several = loss(Pair(*sides[:2]), Pair(*sides[2:]), beta=0.5)
    for row in range(3):
        alone = loss(Pair(*sides[:2, row]), Pair(*sides[2:, row]), beta=0.5)
        np.testing.assert_allclose(several[row], alone, rtol=1e-6)


@pytest.mark.parametrize(("keep", "num", "kept"), [(0.29, 100, 29), (0.1, 3, 1)])
def test_beta_dpo_keeps_a_share_that_is_rounded_down(keep, num, kept):
    moments, zeros = MarginMoments(jax.random.key(3), mean=0.0, std=1.0), Pair(jnp.zeros(num), jnp.zeros(num))
    loss = beta_dpo_loss(zeros, zeros, beta=0.5, alpha=0.0, moments=moments, keep=keep)
    assert np.sum(np.asarray(loss) > 0) == kept


def test_beta_dpo_keeps_its_share_and_the_mean_of_the_kept():
    margins = jnp.linspace(-2, 2, 50)
    moments = MarginMoments(jax.random.key(3), mean=0.0, std=1.0)
    loss = beta_dpo_loss(pair_of_margins(margins), ZEROS, beta=0.5, alpha=0.0, moments=moments, keep=0.8)
    kept = np.asarray(loss) > 0
    assert kept.sum() == 40
    np.testing.assert_allclose(loss.mean(), np.logaddexp(0, -0.5 * np.float64(margins))[kept].mean(), rtol=1e-5)


def test_beta_dpo_leaves_outliers_out():
    """Without replacement, one of two: the odds are those of the normal density."""
    margins, keys = jnp.array([0.0, 1.0]), jax.random.split(jax.random.key(4), 4000)
    zeros = Pair(jnp.zeros(2), jnp.zeros(2))

    def is_first_kept(key):
        moments = MarginMoments(key, mean=0.0, std=1.0)
        loss = beta_dpo_loss(pair_of_margins(margins), zeros, beta=0.5, alpha=0.0, moments=moments, keep=0.5)
        return loss[0] > 0

    num = int(jax.jit(jax.vmap(is_first_kept))(keys).sum())
    assert stats.binomtest(num, 4000, 1 / (1 + np.exp(-0.5))).pvalue > 1e-3


def test_beta_dpo_starts_from_a_policy_that_is_the_reference():
    """All margins zero, and so is their spread: nothing is divided by it."""
    moments = update_margin_moments(MarginMoments(jax.random.key(0)), jnp.zeros(50))
    options = {"beta": 0.5, "alpha": 0.6, "moments": moments}
    loss, gradient = jax.value_and_grad(lambda policy: beta_dpo_loss(policy, ZEROS, **options).mean())(ZEROS)
    chex.assert_tree_all_finite((loss, gradient))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-5)


def test_a_batch_of_one_leaves_the_spread_as_it_was():
    """The short last batch of an epoch may be that short."""
    moments = update_margin_moments(MarginMoments(jax.random.key(0), std=1.0), jnp.ones(1))
    np.testing.assert_allclose([moments.mean, moments.std], [0.1, 1.0], rtol=1e-6)
    single = pair_of_margins([1.0])
    loss = beta_dpo_loss(single, Pair(jnp.zeros(1), jnp.zeros(1)), beta=0.5, alpha=0.0, moments=moments)
    np.testing.assert_allclose(loss, np.logaddexp(0, -0.5), rtol=1e-6)


def test_beta_dpos_beta_stays_positive():
    moments = MarginMoments(jax.random.key(0), mean=100.0, std=1.0)
    loss = beta_dpo_loss(pair_of_margins(jnp.full(50, 2.0)), ZEROS, beta=0.5, alpha=1.0, moments=moments, keep=1.0)
    np.testing.assert_allclose(loss, np.logaddexp(0, -0.002), rtol=1e-5)


@pytest.mark.parametrize("keep", [0.0, 1.1])
def test_a_share_that_is_none_is_refused(keep):
    moments = MarginMoments(jax.random.key(0))
    with pytest.raises(ValueError, match="keep must be in .0, 1."):
        beta_dpo_loss(ZEROS, ZEROS, beta=0.5, alpha=1.0, moments=moments, keep=keep)
