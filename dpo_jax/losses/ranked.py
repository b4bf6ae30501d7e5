"""Losses of rankings: K responses to one prompt, from best to worst."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one
from dpo_jax.losses.ratios import difference, fitted, times
from dpo_jax.types import Numeric


def plackett_luce_loss(
    policy: Sequence[Float[Array, "*batch"]], reference: Sequence[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""DPO for rankings under the Plackett-Luce model: each place is a choice of the best remaining response.

    .. math::
        -\sum_{k=1}^{K-1} \log \frac{e^{\beta u_k}}{\sum_{j=k}^K e^{\beta u_j}}, \qquad
        u_k = \log \frac{\pi(y_k|x)}{\pi_{ref}(y_k|x)}

    Source: Rafailov et al. 2023, "Direct Preference Optimization", arXiv 2305.18290, App. A.3, Eq. 20. With K = 2 it is
    `dpo_loss`.

    >>> import jax.numpy as jnp
    >>> policy, reference = jnp.array([[-1.0], [-2.0], [-3.0]]), jnp.array([[-2.0], [-2.0], [-2.0]])
    >>> print(plackett_luce_loss(tuple(policy), tuple(reference), beta=1.0))  # log ratios 1, 0, -1
    [0.7209]

    Args:
      policy: K arrays of log-probabilities (nats, sums over tokens) of the responses from best to worst, under the
        policy; K is at least 2.
      reference: the same under the reference policy, constants to the caller.
      beta: strength of the pull towards the reference; positive.

    Returns:
      The loss in nats, one per ranking.

    Raises:
      TypeError: an argument is not a sequence of floating-point arrays, or they differ in dtype.
      ValueError: shapes or numbers of responses differ, beta is not positive, or a log-probability is (checked unless
        they are traced).
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.reference(reference)
    checks.rankings(policy, reference)
    (beta,) = fitted(policy[0], beta=beta)
    rewards = [times(beta, difference(logps, others)) for logps, others in zip(policy, reference, strict=True)]
    choices = (_choice(rewards[place:]) for place in range(len(rewards) - 1))
    return sum(choices, jnp.zeros_like(rewards[0]))


@as_one
def _choice(rewards: Sequence[Float[Array, "*batch"]]) -> Float[Array, "*batch"]:
    """The negative log-probability that the first is chosen; it has a gradient even if it is infinite."""
    leads = jnp.stack([difference(reward, rewards[0]) for reward in rewards])
    infinite = leads == jnp.inf
    finite = jax.nn.logsumexp(jnp.where(infinite, -jnp.inf, leads), axis=0)
    return jnp.where(infinite.any(axis=0), jnp.where(infinite, leads, 0).sum(axis=0), finite)
