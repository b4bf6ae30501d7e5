"""Log-probabilities do not depend on how tokens are laid out: the oracle runs each response alone, without padding."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import lm, losses, train
from dpo_jax.lm.model import WORTH_HALVING, attention, causal_attention, rows
from dpo_jax.lm.scoring import target_logps
from dpo_jax.types import Demonstrations, Labels, Pair, Preferences
from tests.lm import tiny

HOST = tiny.pairs()
DATA = jax.tree.map(jnp.asarray, HOST)
MODEL = tiny.model()


def scorer(**options):
    return jax.jit(lm.log_prob_fn(MODEL.decoder, **options))


SCORE = scorer()
TOKENS = jax.jit(lm.token_log_prob_fn(MODEL.decoder))


def real(row):
    return [int(token) for token in row if token >= 0]


@jax.jit
def run_alone(params, tokens):
    return jax.nn.log_softmax(rows(MODEL.decoder, params, tokens[None])[0])


def alone(prompt, response, params=MODEL.params):
    """Log-probabilities of the tokens of a response."""
    tokens = real(prompt) + real(response)
    padded = np.array(tokens + [0] * (16 - len(tokens)), np.int32)  # causal: what follows does not matter
    log_probs = np.asarray(run_alone(params, padded))
    return np.array([log_probs[i - 1, tokens[i]] for i in range(len(real(prompt)), len(tokens))])


EXPECTED = Pair(
    *(np.array([alone(p, r).sum() for p, r in zip(DATA.prompts, side, strict=True)]) for side in DATA.responses)
)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5, rtol=0), found, expected)


def test_each_response_is_scored_as_if_alone():
    close(SCORE(MODEL.params, DATA.prompts, DATA.responses), EXPECTED)


def test_means_are_sums_over_the_number_of_tokens():
    found = scorer(mean=True)(MODEL.params, DATA.prompts, DATA.responses)
    close(found, jax.tree.map(lambda logps, r: logps / (r >= 0).sum(axis=1), EXPECTED, DATA.responses))


def test_order_and_company_of_rows_do_not_matter():
    order = np.random.default_rng(1).permutation(len(DATA.prompts))
    close(
        SCORE(MODEL.params, DATA.prompts[order], jax.tree.map(lambda r: r[order], DATA.responses)),
        jax.tree.map(lambda x: x[order], EXPECTED),
    )


def test_padding_may_stand_anywhere():
    def spread(tokens):
        """Each token, in its order, somewhere in a wider array."""
        rng, wide = np.random.default_rng(2), np.full((len(tokens), tokens.shape[1] + 3), -1, np.int32)
        for row, own in zip(wide, map(real, tokens), strict=True):
            row[np.sort(rng.choice(len(row), len(own), replace=False))] = own
        return jnp.asarray(wide)

    close(SCORE(MODEL.params, spread(DATA.prompts), jax.tree.map(spread, DATA.responses)), EXPECTED)


def test_a_capacity_that_is_just_enough_suffices():
    enough = lm.capacity_of(DATA.prompts, DATA.responses)
    lengths = [len(real(p)) + sum(len(real(side[i])) for side in DATA.responses) for i, p in enumerate(DATA.prompts)]
    assert enough.tokens == sum(lengths)
    assert len({*enough.rows}) == 4 and all(np.array(enough.rows) >= sorted(lengths, reverse=True))
    close(scorer(capacity=enough)(MODEL.params, DATA.prompts, DATA.responses), EXPECTED)


@pytest.mark.parametrize("place", ["tokens", "longest rows", "shortest rows", "scored"])
def test_what_does_not_fit_is_nan_and_the_rest_is_not(place):
    enough = lm.capacity_of(DATA.prompts, DATA.responses)
    if "rows" in place:
        changed = enough.rows[0 if place == "longest rows" else -1]
        short = enough._replace(rows=tuple(room - (room == changed) for room in enough.rows))
    else:
        short = enough._replace(**{place: getattr(enough, place) - 1})
    found = scorer(capacity=short)(MODEL.params, DATA.prompts, DATA.responses)
    wrong = np.isnan(found.chosen)
    assert wrong.any() and not wrong.all()
    np.testing.assert_array_equal(wrong, np.isnan(found.rejected))
    close(jax.tree.map(lambda x: x[~wrong], found), jax.tree.map(lambda x: x[~wrong], EXPECTED))


def test_a_row_without_tokens_is_nan_and_needs_no_room():
    empty = jax.tree.map(lambda leaf: leaf[:4].at[2].set(-1), (DATA.prompts, DATA.responses))
    found = scorer(capacity=lm.capacity_of(*empty))(MODEL.params, *empty)
    others = np.array([0, 1, 3])
    assert np.isnan(found.chosen[2])
    close(jax.tree.map(lambda x: x[others], found), jax.tree.map(lambda x: x[others], EXPECTED))


def test_more_rows_than_there_is_room_for_are_refused():
    few = lm.capacity_of(DATA.prompts[:3], DATA.responses.chosen[:3])
    with pytest.raises(ValueError, match="room for 3 rows, got 10"):
        lm.log_prob_fn(MODEL.decoder, capacity=few)(MODEL.params, DATA.prompts, DATA.responses)


@pytest.mark.parametrize(
    "bad", [{"prompts": -1}, {"prompts": 48}, {"prompts": -2}, {"responses": 48}, {"responses": -7}], ids=str
)
def test_a_bad_row_is_nan_and_touches_no_other(bad):
    prompts, (chosen, rejected) = np.array(DATA.prompts), jax.tree.map(np.array, DATA.responses)
    if "prompts" in bad:
        prompts[3] = bad["prompts"]
    else:
        chosen[3, 0] = bad["responses"]
    found = SCORE(MODEL.params, jnp.asarray(prompts), jax.tree.map(jnp.asarray, Pair(chosen, rejected)))
    others = np.arange(len(prompts)) != 3
    assert np.isnan(found.chosen[3]) and np.isnan(found.rejected[3])
    close(jax.tree.map(lambda x: x[others], found), jax.tree.map(lambda x: x[others], EXPECTED))


def test_tokens_have_their_own_log_probabilities():
    found = TOKENS(MODEL.params, DATA.prompts, DATA.responses.rejected)
    np.testing.assert_array_equal(found.mask, DATA.responses.rejected >= 0)
    for i, (prompt, response) in enumerate(zip(DATA.prompts, DATA.responses.rejected, strict=True)):
        np.testing.assert_allclose(found.values[i][found.mask[i]], alone(prompt, response), atol=5e-5)


def test_the_vocabulary_in_parts_gives_the_same_values_and_gradients():
    def total(params, at_once):
        score = lm.log_prob_fn(MODEL.decoder, scored_at_once=at_once)
        return sum(map(jnp.sum, score(params, DATA.prompts, DATA.responses)))

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    (whole, gradient), (parts, other) = run(MODEL.params, None), run(MODEL.params, 7)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max())), other, gradient)


def test_gradients_are_those_of_each_response_alone():
    weights = np.linspace(0.5, 2, len(DATA.prompts)).astype(np.float32)

    def shared(params):
        found = lm.log_prob_fn(MODEL.decoder)(params, DATA.prompts, DATA.responses)
        return jnp.sum(weights * found.chosen) - 0.5 * jnp.sum(weights * found.rejected)

    def apart(params):
        def one(prompt_length, tokens, length):
            log_probs = jax.nn.log_softmax(rows(MODEL.decoder, params, tokens[None])[0])
            of_next = jnp.take_along_axis(log_probs[:-1], tokens[1:, None], axis=1)[:, 0]
            places = jnp.arange(1, len(tokens))
            return jnp.sum(jnp.where((places >= prompt_length) & (places < length), of_next, 0))

        total = 0.0
        for side, sign in zip(HOST.responses, (1.0, -0.5), strict=True):
            joint = [real(p) + real(r) for p, r in zip(HOST.prompts, side, strict=True)]
            padded = np.array([row + [0] * (12 - len(row)) for row in joint], np.int32)
            starts, ends = np.array([len(real(p)) for p in HOST.prompts]), np.array(list(map(len, joint)))
            total += sign * jnp.sum(weights * jax.vmap(one)(starts, padded, ends))
        return total

    found, expected = jax.jit(jax.grad(shared))(MODEL.params), jax.jit(jax.grad(apart))(MODEL.params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * largest), found, expected)


FAMILIES = {
    "pairs": (DATA, partial(train.preference_objective, loss=losses.dpo_loss, beta=0.1)),
    "reference-free": (DATA, partial(train.reference_free_objective, loss=losses.simpo_loss, beta=2.0, gamma=0.5)),
    "rankings": (
        Preferences(DATA.prompts, (*DATA.responses, DATA.responses.chosen)),
        partial(train.preference_objective, loss=losses.plackett_luce_loss, beta=0.1),
    ),
    "labels": (
        Labels(DATA.prompts, DATA.responses.chosen, jnp.arange(len(DATA.prompts)) % 2 == 0),
        partial(train.unpaired_objective, loss=losses.kto_loss, beta=0.1, reference_point=0.0),
    ),
    "demonstrations": (Demonstrations(DATA.prompts, DATA.responses.chosen), train.sft_objective),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_objectives_of_every_family_take_it(family):
    data, make = FAMILIES[family]
    if hasattr(data, "reference_logps"):
        data = train.with_reference(SCORE, MODEL.params, data)
    loss, _ = make(SCORE)(MODEL.params, data)
    assert np.isfinite(loss)


@pytest.mark.parametrize("wrong", ["a row too few", "floats", "one axis"])
def test_arrays_that_are_no_tokens_are_refused(as_users_have_it, wrong):
    prompts = {"a row too few": DATA.prompts[:-1], "floats": DATA.prompts + 0.5, "one axis": DATA.prompts[:, 0]}[wrong]
    with pytest.raises((TypeError, ValueError), match=r"must (be an array of tokens|have as many rows)"):
        lm.log_prob_fn(MODEL.decoder)(MODEL.params, prompts, DATA.responses)


def test_long_rows_are_attended_in_halves_with_the_same_result():
    rng, length = np.random.default_rng(0), WORTH_HALVING + 1
    queries, keys, values = (jnp.asarray(rng.normal(size=(2, length, num, 4)), jnp.float32) for num in (4, 2, 2))
    visible = jnp.asarray(rng.random((2, length, length)) < 0.3) | jnp.eye(length, dtype=bool)[None]
    visible &= jnp.tril(jnp.ones((length, length), bool))[None]

    def value_and_gradient(attend):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(attend(*x, visible) ** 2), (0, 1, 2)))

    in_halves, whole = (value_and_gradient(attend) for attend in (causal_attention, attention))
    chex.assert_trees_all_close(in_halves(queries, keys, values), whole(queries, keys, values), rtol=2e-5, atol=2e-6)
    later = keys.at[:, -1].add(100.0)  # of the second half: only the last query sees it
    attended = causal_attention(queries, later, values, visible)
    np.testing.assert_array_equal(attended[:, :-1], causal_attention(queries, keys, values, visible)[:, :-1])


def test_logits_in_parts_need_less_memory():
    hidden, targets = jnp.zeros((4096, 16)), jnp.zeros(4096, jnp.int32)

    def memory(at_once):
        total = lambda params, x: jnp.sum(target_logps(MODEL.decoder, params, x, targets, at_once=at_once))  # noqa: E731
        program = jax.jit(jax.grad(total)).lower(MODEL.params, hidden).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory(64) < memory(4096) / 4


def test_in_bfloat16_rotary_positions_are_exact():
    """Beyond 256, neighbouring positions are one number in bfloat16."""
    decoder = tiny.model(dtype=jnp.bfloat16).decoder
    tokens, positions = jnp.zeros(2, jnp.int32), jnp.array([256, 257])
    _, queries = decoder.apply(MODEL.params, tokens, positions, lambda queries, *_: (queries, queries))
    first, second = np.float32(queries[0])
    assert np.abs(first - second).max() > 0.1


def test_kl_along_responses_sums_over_the_vocabulary():
    other = jax.tree.map(lambda leaf: 1.1 * leaf, MODEL.params)
    found = jax.jit(lm.kl_fn(MODEL.decoder, scored_at_once=7))(MODEL.params, other, DATA.prompts, DATA.responses.chosen)
    for i, (prompt, response) in enumerate(zip(HOST.prompts, HOST.responses.chosen, strict=True)):
        tokens = real(prompt) + real(response)
        padded = np.array(tokens + [0] * (16 - len(tokens)), np.int32)
        places = slice(len(real(prompt)) - 1, len(tokens) - 1)
        policy, reference = (
            np.asarray(run_alone(params, padded), np.float64)[places] for params in (MODEL.params, other)
        )
        np.testing.assert_allclose(found[i], np.sum(np.exp(policy) * (policy - reference)), atol=5e-5)
