r"""Preferences without a reward: games between responses, their equilibria, and algorithms that find them.

A preference is a table whose entry :math:`P(y \succ y')` is the probability that the response of the row is preferred
to that of the column. It may be cyclic, as in rock, paper, scissors. Then no reward explains it, and the best policy is
the Nash equilibrium of the game: no other policy is preferred to it. Every function but `nash_equilibrium` works on the
last axes and keeps those before them.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.toy.exact import kl_to_reference
from dpo_jax.toy.interaction import check_preference, geometric_mixture
from dpo_jax.toy.policy import at_least_float32
from dpo_jax.toy.world import preference_probability
from dpo_jax.types import Numeric


def preference_table(
    rewards: Float[Array, "*n responses"], *, temperature: Numeric = 1.0, flip_probability: Numeric = 0.0
) -> Float[Array, "*n responses responses"]:
    """The preference of people who judge by rewards (`preference_probability`)."""
    return preference_probability(
        rewards[..., :, None], rewards[..., None, :], temperature=temperature, flip_probability=flip_probability
    )


def nash_equilibrium(preference: Float[np.ndarray, "responses responses"]) -> Float[np.ndarray, " responses"]:
    """Probabilities of a Nash equilibrium, by linear programming.

    Args:
      preference: of one prompt. There may be many equilibria; one of them is returned.
    """
    from scipy import optimize

    check_preference(jnp.asarray(preference))
    size = len(preference)
    table = np.asarray(preference, np.float64)
    no_worse = (table - table.T) / 2  # against each response it wins half the time or more
    solution = optimize.linprog(
        np.zeros(size), A_ub=no_worse, b_ub=np.full(size, 1e-12), A_eq=np.ones((1, size)), b_eq=[1.0]
    )
    if not solution.success:
        raise ValueError(f"no equilibrium found: {solution.message}")
    probs = np.maximum(solution.x, 0)
    return probs / probs.sum()


def exploitability(
    log_probs: Float[Array, "*n responses"], preference: Float[Array, "*n responses responses"]
) -> Float[Array, "*n"]:
    r"""The win rate of the best response to a policy, minus 1/2: zero at the equilibrium.

    .. math:: \max_y P(y \succ \pi) - \frac{1}{2}
    """
    return jnp.max(_against(log_probs, preference), axis=-1) - 0.5


def regularized_exploitability(
    log_probs: Float[Array, "*n responses"],
    reference_log_probs: Float[Array, "*n responses"],
    preference: Float[Array, "*n responses responses"],
    *,
    tau: Numeric,
) -> Float[Array, "*n"]:
    r"""The gain of the best response to a policy, with a penalty on the KL to the reference.

    .. math::
        \max_{\pi'} \left[ P(\pi' \succ \pi) - \tau\, KL(\pi' \| \pi_{ref}) \right] - \frac{1}{2} + \tau\, KL(\pi \|
        \pi_{ref})

    Zero only at the regularised equilibrium. Source: the preference of Munos et al. 2023, "Nash Learning from Human
    Feedback", arXiv 2312.00886, Eq. 3.

    Args:
      log_probs: table of the policy (nats).
      reference_log_probs: table of the reference policy.
      preference: table of preference probabilities.
      tau: penalty per nat of KL; positive.
    """
    checks.interval("tau", tau, "(0, inf)")
    best = tau * jax.nn.logsumexp(reference_log_probs + _against(log_probs, preference) / tau, axis=-1)
    return best - 0.5 + tau * kl_to_reference(log_probs, reference_log_probs)


def nash_md_step(
    log_probs: Float[Array, "*n responses"],
    reference_log_probs: Float[Array, "*n responses"],
    preference: Float[Array, "*n responses responses"],
    *,
    tau: Numeric,
    learning_rate: Numeric,
) -> Float[Array, "*n responses"]:
    r"""One step of Nash mirror descent: from the mixture of policy and reference towards a best response.

    .. math::
        \pi_{mix} \propto \pi^{1 - \eta \tau} \pi_{ref}^{\eta \tau}, \qquad
        \pi' \propto \pi_{mix}\, e^{\eta P(\cdot \succ \pi_{mix})}

    Source: Munos et al. 2023, arXiv 2312.00886, Sec. 6.

    Args:
      log_probs, reference_log_probs, preference, tau: see `regularized_exploitability`.
      learning_rate: :math:`\eta`; positive, at most 1 / tau.
    """
    checks.interval("tau", tau, "(0, inf)")
    checks.interval("learning_rate", learning_rate, "(0, inf)")
    share = learning_rate * tau
    if not checks.is_traced(share) and np.any(np.asarray(share) > 1 + 1e-5):
        raise ValueError(f"learning_rate must be at most 1 / tau, got {learning_rate}")
    share = jnp.minimum(share, 1.0)
    mixed = geometric_mixture(log_probs, reference_log_probs, share)
    return jax.nn.log_softmax(mixed + learning_rate * _against(mixed, preference))


def regularized_equilibrium(
    reference_log_probs: Float[Array, "*n responses"],
    preference: Float[Array, "*n responses responses"],
    *,
    tau: Numeric,
    num_steps: int,
) -> Float[Array, "*n responses"]:
    r"""Log-probabilities near the regularised equilibrium, by Nash mirror descent from the reference (Nash-MD).

    Step `t` has the learning rate :math:`2 / (\tau (t + 2))`; then
    :math:`KL(\pi^* \| \pi_T) \leq 8 / (\tau^2 (T + 1))`. Source: Munos et al. 2023, arXiv 2312.00886, Theorem 1. Steps
    are computed in float32 at least, because they become small.

    Args:
      reference_log_probs, preference, tau: see `regularized_exploitability`.
      num_steps: static.
    """
    checks.interval("tau", tau, "(0, inf)")
    checks.size("num_steps", num_steps)
    check_preference(preference)
    start, preference, tau = map(at_least_float32, (reference_log_probs, preference, tau))
    step = partial(nash_md_step, reference_log_probs=start, preference=preference, tau=tau)
    rates = 2 / (tau * (jnp.arange(num_steps) + 2.0))
    found, _ = jax.lax.scan(lambda log_probs, rate: (step(log_probs, learning_rate=rate), None), start, rates)
    return found.astype(reference_log_probs.dtype)


def _against(
    log_probs: Float[Array, "*n responses"], preference: Float[Array, "*n responses responses"]
) -> Float[Array, "*n responses"]:
    """The probability that each response is preferred to a response of a policy."""
    return jnp.sum(preference * jnp.exp(log_probs)[..., None, :], axis=-1)
