"""Random permutations without sorting.

`jax.random.permutation` sorts random numbers, which is slow under `vmap` on a CPU. A keyed bijection of the index range
needs only integer arithmetic, elementwise.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32

from dpo_jax import checks


def permutation(key: Key[Array, ""], num: int) -> Int[Array, " num"]:
    """A random permutation of `0 .. num - 1`, for shuffling data.

    The indices fill a grid. Each round rolls every column by a random amount, then every row: a generalised Feistel
    network, which is a bijection for all amounts. If the grid is larger than `num`, indices that leave the range are
    shuffled again until they are back in it (cycle walking), which preserves bijection and uniformity.

    Args:
      key: typed PRNG key.
      num: how many indices; static.

    Source: Mitchell et al. 2021, "Bandwidth-Optimal Random Shuffling for GPUs", arXiv 2106.06161; Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains", for the grid and the cycle walk.
    """
    checks.key(key)
    checks.size("num", num)
    rows, columns = _grid(num)
    round_keys = jax.random.bits(key, (_num_rounds(num), 2), jnp.uint32)

    def roll(place: tuple[Array, Array], keys: UInt32[Array, " 2"]) -> tuple[tuple[Array, Array], None]:
        row, column = place
        row = _wrap(row + _amount(column, keys[0], rows), rows)
        return (row, _wrap(column + _amount(row, keys[1], columns), columns)), None

    def deal(index: UInt32[Array, " num"]) -> UInt32[Array, " num"]:
        # a loop, so that XLA shuffles once, not again in every operation that reads the order
        (row, column), _ = jax.lax.scan(roll, (index // columns, index % columns), round_keys)
        return row * columns + column

    shuffled = deal(jnp.arange(num, dtype=jnp.uint32))
    if rows * columns > num:
        shuffled = jax.lax.while_loop(
            lambda index: jnp.any(index >= num),
            lambda index: jnp.where(index < num, index, deal(index)),
            shuffled,
        )
    return shuffled.astype(jnp.int32)


def _grid(num: int) -> tuple[int, int]:
    """The sides of the tightest near-square grid for `num` indices.

    One side is even: rolling a line of odd length is an even permutation, and with two odd sides only half of all
    permutations could be reached.
    """
    root = max(2, math.isqrt(num))
    grids = [(side, -(-num // side)) for side in range(root, max(2, root // 2) - 1, -1)]
    even = [(rows, columns) for rows, columns in grids if rows * columns % 2 == 0]
    return min(even, key=lambda grid: grid[0] * grid[1])


def _num_rounds(num: int) -> int:
    """The number of rounds. A small grid mixes slowly, because each roll has few possible amounts.

    The uniformity tests of the suite fail with 2 rounds at 290 indices, and with 4 at 5 indices, where they count how
    often each of the `num!` permutations occurs.
    """
    return 16 if num < 256 else 4


def _amount(x: UInt32[Array, " num"], key: UInt32[Array, ""], below: int) -> UInt32[Array, " num"]:
    """A keyed hash of `x` in `0 .. below - 1`: as many leading bits as can be multiplied by `below` in 32 bits.

    The amounts are not exactly uniform, which does not affect the bijection and is cheaper than a division.
    """
    bits = (below - 1).bit_length()
    return ((_hash(x, key) >> bits) * jnp.uint32(below)) >> (32 - bits)


def _wrap(x: UInt32[Array, " num"], side: int) -> UInt32[Array, " num"]:
    """`x` modulo `side`, for `x` below twice the side."""
    return jnp.where(x < side, x, x - side)


def _hash(x: UInt32[Array, " num"], key: UInt32[Array, ""]) -> UInt32[Array, " num"]:
    """A keyed 32-bit hash: the finaliser of MurmurHash3 (Appleby 2011) applied to `x + key`."""
    x = x + key
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
