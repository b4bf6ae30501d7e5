import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses, toy
from dpo_jax.losses import sequence_logps

VOCABULARY = 5
TOKENS = np.array([[2, 0, 1, 3, 4, 1], [-100, 3, 3, 0, 2, 2], [1, 4, 0, 2, -1, 99]])
MASK = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]], bool)  # padding left, none, right
LOGITS = 3 * np.random.default_rng(0).normal(size=(*TOKENS.shape, VOCABULARY)).astype(np.float32)


def scored(logits, tokens, mask, **options):
    return sequence_logps(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(mask), **options)


def in_loops(logits, tokens, mask, mean=False):
    rows = []
    for row in range(len(tokens)):
        places = np.flatnonzero(mask[row])
        terms = [logits[row, t - 1, tokens[row, t]] - np.log(np.exp(logits[row, t - 1]).sum()) for t in places]
        rows.append(sum(terms) / (max(len(terms), 1) if mean else 1))
    return np.float64(rows)


@pytest.mark.parametrize("mean", [False, True])
def test_it_is_as_in_plain_loops(mean):
    expected = in_loops(np.longdouble(LOGITS), TOKENS, MASK, mean)
    for dtype in (bool, int, np.float32):
        found = scored(LOGITS, TOKENS, MASK.astype(dtype), mean=mean)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    swept = jax.jit(jax.vmap(lambda *row: sequence_logps(*row, mean=mean)))
    np.testing.assert_allclose(swept(jnp.asarray(LOGITS), TOKENS, MASK), expected, rtol=1e-5)


def test_of_one_token_it_is_the_entry_of_a_table():
    """The logits of the last token of the prompt are the row of the table."""
    table, prompts, responses = jnp.asarray(LOGITS[:, 0]), jnp.array([0, 2, 1]), jnp.array([4, 0, 3])
    logits = jnp.stack([jnp.full((3, VOCABULARY), jnp.nan), table[prompts], jnp.full((3, VOCABULARY), jnp.nan)], 1)
    tokens = jnp.stack([jnp.zeros(3, int), jnp.ones(3, int), responses], axis=1)
    found = sequence_logps(logits, tokens, jnp.array([[False, False, True]] * 3))
    np.testing.assert_array_equal(found, toy.lookup(jax.nn.log_softmax(table), prompts, responses))


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_what_predicts_no_token_of_the_response_does_not_count(rubbish):
    predicts = np.roll(MASK, -1, axis=1)
    predicts[:, -1] = False
    spoilt = np.where(predicts[..., None], LOGITS, np.float32(rubbish))
    clean, polluted = (
        jax.value_and_grad(lambda logits: scored(logits, TOKENS, MASK).sum())(jnp.asarray(logits))
        for logits in (LOGITS, spoilt)
    )
    np.testing.assert_array_equal(clean[0], polluted[0])
    np.testing.assert_array_equal(clean[1], polluted[1])
    np.testing.assert_array_equal(np.any(clean[1] != 0, axis=-1), predicts)


def test_sums_are_in_float32_at_least_and_a_response_without_tokens_has_none():
    found = scored(jnp.asarray(LOGITS, jnp.bfloat16), TOKENS, MASK)
    assert found.dtype == jnp.float32
    rounded = np.longdouble(np.float32(jnp.asarray(LOGITS, jnp.bfloat16)))
    np.testing.assert_allclose(found, in_loops(rounded, TOKENS, MASK), rtol=1e-5)
    for mean in (False, True):
        np.testing.assert_array_equal(scored(LOGITS, TOKENS, np.zeros_like(MASK), mean=mean), 0)


def test_what_cannot_be_scored_is_an_error_or_where_traced_not_a_number():
    outside, first = TOKENS.copy(), MASK.copy()
    outside[0, 4], outside[2, 2], first[1, 0] = VOCABULARY, -100, True
    with pytest.raises(ValueError, match=r"tokens must be between 0 and 4, got 5 in row \(0, 4\)"):
        scored(LOGITS, outside, MASK)
    with pytest.raises(ValueError, match="mask must not cover the first token of a row"):
        scored(LOGITS, TOKENS, first)
    traced = jax.jit(sequence_logps)(jnp.asarray(LOGITS), outside, first)
    np.testing.assert_array_equal(np.isnan(traced), [True, True, True])
    traced = jax.jit(sequence_logps)(jnp.asarray(LOGITS), outside, MASK)
    np.testing.assert_array_equal(np.isnan(traced), [True, False, True])


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS, TOKENS, MASK[:, 1:]), ValueError, "shapes must be equal"),
        ((LOGITS[:, :-1], TOKENS, MASK), ValueError, "shapes must be equal"),
        ((LOGITS, np.float32(TOKENS), MASK), TypeError, "tokens must hold integers"),
        ((np.int32(LOGITS), TOKENS, MASK), TypeError, "logits must hold floating-point numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sequence_logps(*arguments)


def test_its_sums_are_what_losses_eat():
    chosen = scored(LOGITS, TOKENS, MASK)
    pair = chosen, chosen - 1
    np.testing.assert_allclose(losses.dpo_loss(pair, (chosen, chosen), beta=1.0), np.log1p(np.exp(-1)), rtol=1e-5)
