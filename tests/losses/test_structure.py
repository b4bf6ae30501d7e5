from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses.structure import mixes_rows

NUM = 6
PAIR = jnp.zeros(NUM), jnp.zeros(NUM)
TABLE = jnp.arange(5.0)


def mixes(of_margin, rows=PAIR):
    """Of a user's own loss of the margin."""
    return mixes_rows(lambda policy, reference: of_margin(policy[0] - policy[1] - reference[0]), rows, rows)


@pytest.mark.parametrize(
    "of_margin",
    [
        lambda m: jnp.where(m > 0, jnp.clip(m, -1, 1), jax.nn.gelu(m)),
        lambda m: TABLE[jnp.clip(m.astype(jnp.int32), 0, 4)] * jnp.arange(NUM, dtype=m.dtype),
        jax.vmap(lambda x: jax.lax.cond(x > 0, jax.nn.softplus, jnp.square, x)),
        jax.vmap(lambda x: jax.lax.while_loop(lambda y: jnp.abs(y) > 1, lambda y: y / 2, x)),
        lambda m: jax.lax.map(jnp.sin, m),
        lambda m: jnp.tanh(m[:, None] * TABLE[None]) @ TABLE,
        lambda m: m + jax.random.normal(jax.random.key(0), m.shape),
    ],
    ids=["where", "lookup", "cond", "while", "map", "matmul", "noise"],
)
def test_rows_that_keep_to_themselves(of_margin):
    assert not mixes(of_margin)


@pytest.mark.parametrize(
    "of_margin",
    [
        lambda m: m - jnp.mean(m),
        lambda m: m * jax.lax.stop_gradient(jnp.std(m)),
        lambda m: m - jnp.max(m),
        jnp.sort,
        jnp.cumsum,
        lambda m: m - jnp.roll(m, 1),
        lambda m: jnp.repeat(m[::2] + m[1::2], 2),
        lambda m: m / jnp.sum(m),
        lambda m: jax.lax.cond(jnp.mean(m) > 1, jnp.square, jnp.sin, m),
        lambda m: jnp.where(m > jnp.median(m), m, 0.0),
        lambda m: m / jnp.sum(m > 0),
        lambda m: jax.lax.scan(lambda last, x: (x, x - last), 0.0, m)[1],
        lambda m: m * jnp.sum(m[:, None] == m[None], axis=1),
        jnp.mean,
    ],
    ids=[
        *("mean", "std", "max", "sort", "cumsum", "roll", "neighbours"),
        *("share", "cond", "median", "count", "scan", "ties", "scalar"),
    ],
)
def test_rows_that_depend_on_others(of_margin):
    assert mixes(of_margin)


def test_any_two_rows_of_a_large_batch_are_told_apart():
    rows = jnp.zeros(100), jnp.zeros(100)
    assert mixes(lambda m: m.at[0].add(m[64]), rows)
    assert mixes(lambda m: m.at[99].add(m[98]), rows)


def test_random_numbers_disturb_nobody(capfd):
    """Neither the search for NaN nor what a loss prints."""

    def of_margin(margin):
        jax.debug.print("margin {}", margin)
        return jnp.log(margin)

    with jax.debug_nans(True):
        assert not mixes(of_margin)
    assert "margin" not in capfd.readouterr().out


def test_a_single_row_depends_on_no_other():
    assert not mixes(jnp.sort, rows=(jnp.zeros(1), jnp.zeros(1)))


@pytest.mark.slow
def test_hyperparameters_may_be_traced_also_in_closures():
    seen = []

    def look(beta, key):
        moments = losses.MarginMoments(key, beta, beta)
        beta_dpo = partial(losses.beta_dpo_loss, beta=beta, keep=1.0)
        seen.append(mixes_rows(beta_dpo, PAIR, PAIR, alpha=beta, moments=moments))
        seen.append(mixes_rows(losses.with_sft(losses.aot_loss, weight=beta), PAIR, PAIR, beta=beta))
        seen.append(not mixes_rows(losses.with_sft(losses.dpo_loss, weight=beta), PAIR, PAIR, beta=beta))
        return beta

    betas, keys = jnp.ones(2), jax.random.split(jax.random.key(0), 2)
    jax.jit(jax.vmap(jax.grad(look)))(betas, keys)
    mesh = jax.make_mesh((1,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("runs")
    jax.jit(jax.shard_map(jax.vmap(look), mesh=mesh, in_specs=split, out_specs=split))(betas, keys)
    assert seen == [True] * 6


def test_weights_of_a_loss_of_whole_batches_are_refused():
    mixed = losses.with_sft(losses.weighted_sum((0.5, losses.dpo_loss), (0.5, losses.aot_loss)), weight=0.1)
    weights = jnp.ones(NUM)
    with pytest.raises(ValueError, match=r"weights in with_sft\(weighted_sum\(dpo_loss, aot_loss\)\)"):
        losses.with_weights(mixed)(PAIR, PAIR, beta=0.1, weights=weights)
    scaled = losses.with_weights(mixed)(PAIR, PAIR, beta=0.1, weights=2.0)
    np.testing.assert_allclose(scaled, 2 * mixed(PAIR, PAIR, beta=0.1))
