import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses import generalized_advantages, token_rewards

MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0],  # padding on both sides
        [1, 1, 0, 0, 1, 1],  # padding in between
        [0, 0, 0, 0, 0, 0],
    ],
    bool,
)
NUM = len(MASK)
_rng = np.random.default_rng(0)
LOGPS, REFERENCE = -3 * _rng.random((2, *MASK.shape))
REWARDS = _rng.normal(size=NUM)
TOKEN_REWARDS, VALUES = _rng.normal(size=(2, *MASK.shape))
OF_ROWS = np.array([0.0, 0.3, 0.7, 0.95, 1.0])
RUBBISH = [np.nan, np.inf, -np.inf, 1e30]


def rewards_in_loops(beta):
    found, beta = np.zeros(MASK.shape), np.broadcast_to(beta, NUM)
    for row in range(NUM):
        tokens = np.flatnonzero(MASK[row])
        for t in tokens:
            found[row, t] = -beta[row] * (LOGPS[row, t] - REFERENCE[row, t]) + (t == tokens[-1]) * REWARDS[row]
    return found


def advantages_in_loops(rewards, values, mask, decay, discount):
    """The sum of the equation, term by term, over the tokens of each row."""
    found = np.zeros(mask.shape)
    decay, discount = (np.broadcast_to(number, len(mask)) for number in (decay, discount))
    for row in range(len(mask)):
        tokens = np.flatnonzero(mask[row])
        later = [*values[row, tokens[1:]], 0.0]
        errors = rewards[row, tokens] + discount[row] * np.array(later[: len(tokens)]) - values[row, tokens]
        for i, t in enumerate(tokens):
            found[row, t] = sum((discount[row] * decay[row]) ** (j - i) * errors[j] for j in range(i, len(tokens)))
    return found


def rewarded(logps=LOGPS, reference=REFERENCE, mask=MASK, **options):
    return token_rewards(*map(jnp.asarray, (REWARDS, logps, reference, mask)), **options)


def credited(rewards=TOKEN_REWARDS, values=VALUES, mask=MASK, **options):
    return generalized_advantages(*map(jnp.asarray, (rewards, values, mask)), **options)


# Rewards of tokens


@pytest.mark.parametrize("beta", [0.0, 0.1, OF_ROWS])
def test_rewards_are_as_in_plain_loops(beta):
    with jax.enable_x64(True):
        np.testing.assert_allclose(rewarded(beta=jnp.asarray(beta)), rewards_in_loops(beta), rtol=1e-14)


def test_they_add_up_to_the_reward_minus_the_kl_of_the_response():
    kl = losses.k1_estimate(*(jnp.asarray(np.where(MASK, array, 0).sum(-1)) for array in (LOGPS, REFERENCE)))
    expected = np.where(MASK.any(-1), REWARDS, 0) - 0.3 * kl
    np.testing.assert_allclose(rewarded(beta=0.3).sum(-1), expected, rtol=1e-5, atol=1e-6)


def test_a_response_without_tokens_earns_nothing_and_a_reward_that_is_not_a_number_stays_at_its_token():
    rewards = jnp.asarray(REWARDS).at[jnp.array([0, 4])].set(jnp.nan)
    found = token_rewards(rewards, *map(jnp.asarray, (LOGPS, REFERENCE, MASK)), beta=0.3)
    np.testing.assert_array_equal(np.argwhere(np.isnan(found)), [[0, 5]])


# Advantages and returns of tokens


@pytest.mark.parametrize(("decay", "discount"), [(0.95, 1.0), (0.5, 0.9), (0.7, 0.0), (OF_ROWS, OF_ROWS[::-1])])
def test_advantages_are_as_in_plain_loops(decay, discount):
    with jax.enable_x64(True):
        advantages, returns = credited(decay=jnp.asarray(decay), discount=jnp.asarray(discount))
    exact = advantages_in_loops(TOKEN_REWARDS, VALUES, MASK, decay, discount)
    np.testing.assert_allclose(advantages, exact, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(returns, exact + np.where(MASK, VALUES, 0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_tokens", [1, 8, 21])
def test_responses_may_be_short_or_long_and_only_long_ones_need_a_loop(num_tokens):
    rng = np.random.default_rng(num_tokens)
    rewards, values = rng.normal(size=(2, 3, num_tokens))
    mask = np.arange(num_tokens) < np.array([[num_tokens], [num_tokens // 2 + 1], [1]])
    estimate = jax.jit(lambda *arrays: generalized_advantages(*arrays, decay=0.95, discount=0.99))
    arrays = (jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask))
    exact = advantages_in_loops(rewards, values, mask, 0.95, 0.99)
    np.testing.assert_allclose(estimate(*arrays)[0], exact, rtol=1e-4, atol=1e-5)
    assert ("while" in estimate.lower(*arrays).as_text()) == (num_tokens > 8)


def test_without_decay_they_are_the_rewards_to_come_minus_the_value():
    to_come = np.cumsum(np.where(MASK, TOKEN_REWARDS, 0)[:, ::-1], axis=1)[:, ::-1]
    advantages, returns = credited(decay=1.0)
    np.testing.assert_allclose(advantages, np.where(MASK, to_come - VALUES, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(MASK, to_come, 0), rtol=1e-5, atol=1e-6)


def test_with_full_decay_they_are_the_temporal_difference():
    whole = np.ones_like(MASK)
    after = np.concatenate([VALUES[:, 1:], np.zeros((NUM, 1))], axis=1)
    advantages, returns = credited(mask=whole, decay=0.0, discount=0.9)
    np.testing.assert_allclose(advantages, TOKEN_REWARDS + 0.9 * after - VALUES, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, TOKEN_REWARDS + 0.9 * after, rtol=1e-5, atol=1e-6)


def test_values_that_are_right_leave_no_advantage():
    to_come = np.cumsum(TOKEN_REWARDS[:, ::-1], axis=1)[:, ::-1]
    for decay in (0.0, 0.6, 1.0):
        advantages, returns = credited(values=to_come, mask=np.ones_like(MASK), decay=decay)
        np.testing.assert_allclose(advantages, 0, atol=1e-5)
        np.testing.assert_allclose(returns, to_come, rtol=1e-5, atol=1e-5)


def test_the_derivative_is_the_estimate_of_the_change():
    """Advantages are linear in rewards and values."""
    changes = np.random.default_rng(1).normal(size=(2, *MASK.shape))
    points, changes = (
        [jnp.asarray(array, jnp.float32) for array in arrays] for arrays in ((TOKEN_REWARDS, VALUES), changes)
    )
    _, slopes = jax.jvp(lambda *arrays: credited(*arrays, decay=0.8, discount=0.9), points, changes)
    np.testing.assert_allclose(slopes, credited(*changes, decay=0.8, discount=0.9), rtol=1e-5, atol=1e-6)


# Both


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_what_does_not_belong_to_a_response_does_not_count(rubbish):
    def totals(rewards, values, logps, reference):
        advantages, returns = credited(rewards, values, decay=0.9)
        total = jnp.sum(jnp.sin(advantages)) + jnp.sum(jnp.cos(returns))
        return total + jnp.sum(jnp.sin(rewarded(logps, reference, beta=0.3)))

    arrays = TOKEN_REWARDS, VALUES, LOGPS, REFERENCE
    measured = jax.value_and_grad(totals, argnums=(0, 1, 2, 3))
    clean, polluted = (
        measured(*(jnp.asarray(np.where(MASK, array, other), jnp.float32) for array in arrays))
        for other in (0, rubbish)
    )
    np.testing.assert_array_equal(clean[0], polluted[0])
    np.testing.assert_array_equal(clean[1], polluted[1])
    assert np.isfinite(clean[1]).all()
    assert not np.any(np.array(clean[1])[:, ~MASK]) and np.all(np.array(clean[1])[:, MASK])


def test_a_token_that_is_not_a_number_shows_in_its_response_alone():
    spoilt = VALUES.copy()
    spoilt[3, 1] = np.nan
    advantages, _ = credited(values=spoilt, decay=0.9)
    np.testing.assert_array_equal(np.argwhere(np.isnan(advantages)), [[3, 0], [3, 1]])


def test_the_mask_may_hold_any_numbers():
    for dtype in (int, np.float32):
        mask = MASK.astype(dtype)
        np.testing.assert_array_equal(rewarded(mask=mask, beta=0.3), rewarded(beta=0.3))
        np.testing.assert_array_equal(credited(mask=mask, decay=0.9), credited(decay=0.9))


def test_a_single_response_and_rows_by_vmap_are_as_in_a_batch():
    arrays = [jnp.asarray(array) for array in (REWARDS, LOGPS, REFERENCE, TOKEN_REWARDS, VALUES, MASK)]

    def both(reward, logps, reference, rewards, values, mask, number):
        of_tokens = token_rewards(reward, logps, reference, mask, beta=number)
        return of_tokens, generalized_advantages(rewards, values, mask, decay=number, discount=number)

    numbers = jnp.asarray(OF_ROWS)
    whole = both(*arrays, numbers)
    for found in (jax.jit(jax.vmap(both))(*arrays, numbers), both(*(array[None] for array in arrays), numbers[None])):
        found = jax.tree.map(lambda array: array.reshape(MASK.shape), found)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), found, whole)
    alone = both(*(array[3] for array in arrays), 0.95)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other[3], rtol=1e-5, atol=1e-6), alone, whole)


def test_dtypes_stay_and_sums_are_in_float32():
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (TOKEN_REWARDS, VALUES, REWARDS, LOGPS, REFERENCE)]
    rewards, values = (np.float64(array) for array in narrow[:2])
    estimates = credited(*narrow[:2], decay=np.float64(0.9), discount=jnp.float32(1.0))
    assert all(array.dtype == jnp.bfloat16 for array in estimates)
    exact = advantages_in_loops(rewards, values, MASK, 0.9, 1.0)
    np.testing.assert_allclose(np.float64(estimates[0]), exact, rtol=2**-8, atol=1e-6)  # rounded once
    assert token_rewards(*narrow[2:], jnp.asarray(MASK), beta=jnp.float32(0.3)).dtype == jnp.bfloat16


# Bad input


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": jnp.ones(3)}, ValueError, r"logps_of_one_token \(2,\), rewards \(3,\)"),
        ({"rewards": jnp.ones((2, 3))}, ValueError, r"logps_of_one_token \(2,\), rewards \(2, 3\)"),
        ({"mask": jnp.ones((2, 1), bool)}, ValueError, r"logps \(2, 3\), reference_logps \(2, 3\), mask \(2, 1\)"),
        ({"reference_logps": -jnp.ones((2, 4))}, ValueError, "shapes must be equal"),
        (
            {"logps": jnp.array([[-1, 0.5, 0]] * 2)},
            ValueError,
            r"logps must be zero or negative.* got 0.5 in row \(0, 1",
        ),
        ({"logps": jnp.ones((2, 3), int)}, TypeError, "logps must hold floating-point numbers"),
        ({"rewards": [1.0, 2.0]}, TypeError, "rewards must be an array"),
        ({"rewards": jnp.ones(2, jnp.bfloat16)}, TypeError, "dtypes must be equal"),
        ({"logps": jnp.float32(-1), "rewards": jnp.float32(1)}, ValueError, "logps must be a batch"),
        ({"beta": -0.1}, ValueError, "beta must be in .0, inf., got -0.1"),
        ({"beta": np.nan}, ValueError, "beta must be in .0, inf., got nan"),
        ({"beta": jnp.ones((2, 1))}, ValueError, r"beta must broadcast to the shape \(2,\), got shape \(2, 1\)"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(change, error, message):
    arguments = {"rewards": jnp.ones(2), "logps": -jnp.ones((2, 3)), "reference_logps": -jnp.ones((2, 3))}
    arguments |= {"mask": jnp.ones((2, 3), bool), "beta": 0.1, **change}
    with pytest.raises(error, match=message):
        token_rewards(**arguments)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": jnp.ones(2)}, ValueError, r"rewards \(2,\), values \(2, 3\), mask \(2, 3\)"),
        ({"mask": jnp.ones((2, 4), bool)}, ValueError, "shapes must be equal"),
        ({"values": jnp.ones((2, 3), int)}, TypeError, "values must hold floating-point numbers"),
        ({"rewards": [[1.0]]}, TypeError, "rewards must be an array"),
        ({"values": jnp.ones((2, 3), jnp.bfloat16)}, TypeError, "dtypes must be equal"),
        ({"rewards": jnp.float32(1), "values": jnp.float32(1)}, ValueError, "values must be a batch"),
        ({"decay": 1.1}, ValueError, "decay must be in .0, 1., got 1.1"),
        ({"decay": jnp.array([0.5, -0.5])}, ValueError, "decay must be in .0, 1., got -0.5 in row 1"),
        ({"discount": np.nan}, ValueError, "discount must be in .0, 1., got nan"),
        ({"decay": jnp.ones((2, 3))}, ValueError, r"decay must broadcast to the shape \(2,\), got shape \(2, 3\)"),
    ],
)
def test_advantages_that_make_no_sense_are_refused(change, error, message):
    arguments = {"rewards": jnp.ones((2, 3)), "values": jnp.ones((2, 3)), "mask": jnp.ones((2, 3), bool), "decay": 0.9}
    with pytest.raises(error, match=message):
        generalized_advantages(**{**arguments, **change})
