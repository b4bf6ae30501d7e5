"""What is written agrees with what is scored, and each row is written as if alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import lm, rlhf
from tests.lm import tiny

MODEL = tiny.model()
PROMPTS = jnp.asarray(tiny.tokens(np.random.default_rng(5), 4, 1, 5))
STOP = 7


def writer(**options):
    return jax.jit(lm.generate_fn(MODEL.decoder, **{"max_tokens": 6, "stops": {STOP}, **options}))


GREEDY = writer(choose=lm.greedy)
MANY = writer(group_size=64)
SCORE = jax.jit(lm.log_prob_fn(MODEL.decoder))


def test_log_probabilities_are_those_of_scoring(key):
    written = MANY(key, MODEL.params, PROMPTS)
    score = jax.jit(lm.token_log_prob_fn(MODEL.decoder))
    scored = score(MODEL.params, jnp.repeat(PROMPTS, 64, axis=0), written.tokens)
    np.testing.assert_allclose(written.logps, scored.values, atol=2e-5)


def test_a_response_ends_with_its_first_stop_or_at_the_limit(key):
    tokens = np.asarray(MANY(key, MODEL.params, PROMPTS).tokens)
    lengths = (tokens >= 0).sum(axis=1)
    assert len({*lengths}) > 1
    for row, length in zip(tokens, lengths, strict=True):
        assert np.all(row[:length] >= 0) and np.all(row[length:] == -1)
        assert np.all(row[: length - 1] != STOP)
        assert length == 6 or row[length - 1] == STOP


def test_neighbouring_tokens_are_drawn_independently(key):
    uniform = jax.tree.map(jnp.zeros_like, MODEL.params)
    tokens = np.asarray(MANY(key, uniform, PROMPTS).tokens)
    assert np.mean(tokens[:, 0] == tokens[:, 1]) < 0.1  # 1 in 48


def test_greedy_takes_the_most_probable_token_each_time(key):
    tokens = np.asarray(GREEDY(key, MODEL.params, PROMPTS).tokens)
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        for place in range((row >= 0).sum()):
            trials = np.full((48, 6), -1, np.int32)
            trials[:, :place] = row[:place]
            trials[:, place] = np.arange(48)
            found = SCORE(MODEL.params, jnp.broadcast_to(prompt[None], (48, 5)), jnp.asarray(trials))
            assert row[place] == np.argmax(found)


def test_rows_do_not_depend_on_others_or_on_padding(key):
    wide = jnp.concatenate([jnp.full((4, 2), -1, jnp.int32), PROMPTS], axis=1)
    all_at_once = GREEDY(key, MODEL.params, PROMPTS)
    np.testing.assert_array_equal(all_at_once.tokens, GREEDY(key, MODEL.params, wide).tokens)
    np.testing.assert_array_equal(all_at_once.tokens[2:3], GREEDY(key, MODEL.params, PROMPTS[2:3]).tokens)


def test_first_tokens_are_drawn_with_the_probabilities_of_the_model(key):
    num = 4000
    drawn = writer(max_tokens=1, group_size=num)(key, MODEL.params, PROMPTS[:1]).tokens
    counts = np.bincount(np.asarray(drawn)[:, 0], minlength=48)
    logps = SCORE(MODEL.params, jnp.broadcast_to(PROMPTS[:1], (48, 5)), jnp.arange(48, dtype=jnp.int32)[:, None])
    expected = num * np.exp(np.asarray(logps, np.float64))
    rare = expected < 5
    table = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(table[0], table[1] * num / table[1].sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.4}, {0}),
        ({"top_k": 3, "top_p": 0.85}, {0, 1, 2}),
        ({"temperature": 1e-3}, {0}),
        ({}, {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_samplers_draw_what_they_may(key, options, allowed):
    log_probs = jnp.log(jnp.array([0.45, 0.3, 0.15, 0.1]))
    drawn = jax.vmap(lm.sampler(**options), (0, None))(jax.random.split(key, 400), log_probs)
    assert {*drawn.tolist()} == allowed


def test_a_higher_temperature_flattens(key):
    log_probs = jnp.log(jnp.array([0.8, 0.2]))
    drawn = jax.vmap(lm.sampler(temperature=2.0), (0, None))(jax.random.split(key, 4000), log_probs)
    assert abs(drawn.mean() - 1 / 3) < 0.03


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}], ids=str
)
def test_samplers_refuse_what_makes_no_sense(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        lm.sampler(**options)


def test_a_prompt_without_tokens_gets_no_response(key):
    empty = PROMPTS.at[1].set(-1)
    tokens = GREEDY(key, MODEL.params, empty).tokens
    assert np.all(tokens[1] == -1)
    np.testing.assert_array_equal(tokens[2], GREEDY(key, MODEL.params, PROMPTS).tokens[2])


def test_prompts_need_no_room_for_padding(key):
    room = int(jnp.sum(PROMPTS >= 0))
    all_fit = writer(choose=lm.greedy, prompt_tokens=room)(key, MODEL.params, PROMPTS)
    np.testing.assert_array_equal(all_fit.tokens, GREEDY(key, MODEL.params, PROMPTS).tokens)
    one_less = writer(choose=lm.greedy, prompt_tokens=room - 1)(key, MODEL.params, PROMPTS).tokens
    assert np.all(one_less[-1] == -1)
    np.testing.assert_array_equal(one_less[:-1], all_fit.tokens[:-1])


def test_the_best_of_a_group_is_chosen(key):
    respond = jax.jit(lm.respond_fn(MODEL.decoder, max_tokens=3, stops={STOP}, group_size=8))
    groups = respond(key, MODEL.params, PROMPTS).responses
    assert groups.shape == (4, 8, 3)

    def reward(prompts, responses):
        return jnp.sum(responses, axis=-1)

    best = rlhf.best_of_n(key, MODEL.params, PROMPTS, respond=respond, reward=reward)
    np.testing.assert_array_equal(jnp.sum(best, axis=-1), jnp.max(jnp.sum(groups, axis=-1), axis=1))


@pytest.mark.slow
def test_scanned_layers_write_the_same(key):
    scanned = tiny.model(scan=True)
    params = {"params": {**MODEL.params["params"]}}
    layers = [params["params"].pop(f"layers_{i}") for i in range(2)]
    params["params"]["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    write = lm.generate_fn(scanned.decoder, max_tokens=6, stops={STOP}, choose=lm.greedy)
    np.testing.assert_array_equal(write(key, params, PROMPTS).tokens, GREEDY(key, MODEL.params, PROMPTS).tokens)
