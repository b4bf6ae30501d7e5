"""Closed forms on tables: exact values of quantities that otherwise must be estimated.

Tables have a row for each prompt and a column for each response. Policies are tables of log-probabilities (nats).
Every function works on the last axis (responses) and keeps the axes before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one
from dpo_jax.toy.policy import at_least_float32
from dpo_jax.toy.world import preference_probability
from dpo_jax.types import Metrics, Numeric

IMPOSSIBLE = -1e30
"""Stands for a log-probability of -inf, where differences and gradients must be finite."""


def log_partition(
    reference_log_probs: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"], *, beta: Numeric
) -> Float[Array, "*n"]:
    r"""The log-partition function of the optimal policy.

    .. math:: \log Z(x) = \log \sum_y \pi_{ref}(y|x) \exp(r(x, y) / \beta)

    Source: Rafailov et al. 2023, arXiv 2305.18290, Eq. 4.

    Args:
      reference_log_probs: log-probabilities of the reference policy.
      rewards: rewards of the responses.
      beta: strength of the pull towards the reference; positive.
    """
    return jax.scipy.special.logsumexp(_tilted(reference_log_probs, rewards, beta), axis=-1)


def optimal_policy(
    reference_log_probs: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"], *, beta: Numeric
) -> Float[Array, "*n responses"]:
    r"""Log-probabilities of the policy that maximises expected reward minus beta times KL to the reference.

    .. math:: \log \pi^*(y|x) = \log \pi_{ref}(y|x) + r(x, y) / \beta - \log Z(x)

    Source: Rafailov et al. 2023, arXiv 2305.18290, Eq. 4. Arguments as for `log_partition`.
    """
    return jax.nn.log_softmax(_tilted(reference_log_probs, rewards, beta), axis=-1)


def optimal_policy_at_kl(
    reference_log_probs: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"], *, kl: Numeric
) -> Float[Array, "*n responses"]:
    r"""Log-probabilities of the policy of highest expected reward among those that are as far from the reference.

    It is the `optimal_policy` for the :math:`\beta` at which the mean of KL(policy || reference) over all prompts is
    the given one, found by bisection. Beyond the largest possible KL, that of the best responses alone, it is nearly
    these.

    Args:
      reference_log_probs: log-probabilities of the reference policy.
      rewards: rewards of the responses.
      kl: the divergence (nats), mean over prompts; zero or positive.
    """
    checks.interval("kl", kl, "[0, inf)")
    checks.same_shape(reference_log_probs=reference_log_probs, rewards=rewards)
    spread = jnp.max(rewards) - jnp.min(rewards)
    scaled = (rewards - jnp.max(rewards, axis=-1, keepdims=True)) / jnp.where(spread > 0, spread, 1)

    def policy(log_beta: Array) -> Array:
        return optimal_policy(reference_log_probs, scaled, beta=jnp.exp(log_beta))

    def halve(_: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        far = jnp.mean(kl_to_reference(policy(middle), reference_log_probs)) > kl
        return jnp.where(far, middle, low), jnp.where(far, high, middle)

    ends = jnp.asarray(-9.0, scaled.dtype), jnp.asarray(9.0, scaled.dtype)
    low, high = jax.lax.fori_loop(0, 40, halve, ends)
    return policy((low + high) / 2)


def coverage(log_probs: Float[Array, "*n responses"], reference_log_probs: Float[Array, "*n responses"]) -> Array:
    r"""How badly a reference covers a policy, for each prompt: 1 if they are equal, infinite if it misses a response.

    .. math:: \sum_y \frac{\pi(y|x)^2}{\pi_{ref}(y|x)}

    That is 1 plus the :math:`\chi^2` divergence. Source: Huang et al. 2024, arXiv 2407.13399, Sec. 2, the
    concentrability of a policy.

    Args:
      log_probs: log-probabilities of the policy, mostly the optimum.
      reference_log_probs: log-probabilities of the reference policy.
    """
    checks.same_shape(log_probs=log_probs, reference_log_probs=reference_log_probs)
    never = log_probs == -jnp.inf
    exponent = jnp.where(never, 0, 2 * log_probs) - jnp.where(never, 0, reference_log_probs)
    return jnp.sum(jnp.where(never, 0, jnp.exp(exponent)), axis=-1)


def best_of_n_policy(
    log_probs: Float[Array, "*n responses"], scores: Float[Array, "*n responses"], *, num: Numeric
) -> Float[Array, "*n responses"]:
    r"""Log-probabilities of the best of several samples, by a score; ties are broken at random.

    .. math::
        \pi_n(y) = \frac{\pi(y)}{\pi(s = s_y)} \left[ \pi(s \leq s_y)^n - \pi(s < s_y)^n \right]

    Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", arXiv 2401.01879, who also
    show that its KL to the policy is at most :math:`\log n - (n - 1) / n`.

    Works with logarithms, in float32 at least, and normalises, so that no probability underflows, however large n is.

    Args:
      log_probs: log-probabilities of the policy that samples.
      scores: the criterion: true rewards, or those of a reward model.
      num: :math:`n`, the number of samples; at least 1, not necessarily a whole number.

    Raises:
      ValueError: a score is NaN, among others. Where scores are traced their values are unknown; there, all
        log-probabilities of such a prompt are NaN.
    """
    checks.interval("num", num, "[1, inf)")
    checks.same_shape(log_probs=log_probs, scores=scores)
    checks.not_nan("scores", scores)
    finite = jnp.maximum(at_least_float32(log_probs), IMPOSSIBLE)
    num = jnp.asarray(num, finite.dtype)
    own, others = scores[..., :, None], scores[..., None, :]
    below, equal, up_to, above = (
        jax.nn.logsumexp(jnp.where(which, finite[..., None, :], IMPOSSIBLE), axis=-1)
        for which in (others < own, others == own, others <= own, others > own)
    )
    none_above = -num * jax.nn.softplus(above - up_to)  # n log P(s <= s_y)
    none_equal = num * jax.nn.softplus(equal - below)  # n log P(s <= s_y) - n log P(s < s_y)
    rare = none_equal < jnp.finfo(finite.dtype).eps
    won = jnp.where(rare, jnp.log(num) + equal - below, jnp.log(-jnp.expm1(-jnp.where(rare, 1, none_equal))))
    best = jax.nn.log_softmax(finite - equal + none_above + won, axis=-1)
    best = jnp.where(log_probs == -jnp.inf, -jnp.inf, best)
    known = ~jnp.any(jnp.isnan(scores), axis=-1, keepdims=True)
    return jnp.where(known, best, jnp.nan).astype(log_probs.dtype)


def implicit_reward(
    log_probs: Float[Array, "*n responses"], reference_log_probs: Float[Array, "*n responses"], *, beta: Numeric
) -> Float[Array, "*n responses"]:
    r"""The reward under which a policy is optimal, up to a constant for each prompt.

    .. math:: \hat r(x, y) = \beta \log \frac{\pi(y|x)}{\pi_{ref}(y|x)}

    Zero, with a gradient of zero, where neither policy can give the response; infinite where only one can.

    Source: Rafailov et al. 2023, arXiv 2305.18290, Sec. 4 (after Eq. 7) and Theorem 1.

    Args:
      log_probs: log-probabilities of the policy.
      reference_log_probs: log-probabilities of the reference policy.
      beta: strength of the pull towards the reference; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.same_shape(log_probs=log_probs, reference_log_probs=reference_log_probs)
    never = (log_probs == -jnp.inf) & (reference_log_probs == -jnp.inf)
    return beta * (jnp.where(never, 0, log_probs) - jnp.where(never, 0, reference_log_probs))


def recovered_reward(
    log_probs: Float[Array, "*n responses"],
    reference_log_probs: Float[Array, "*n responses"],
    log_partition: Float[Array, "*n"],
    *,
    beta: Numeric,
) -> Float[Array, "*n responses"]:
    r"""The reward of which a policy is the optimum, given the log-partition function: the inverse of `optimal_policy`.

    .. math:: r(x, y) = \beta \log \frac{\pi(y|x)}{\pi_{ref}(y|x)} + \beta \log Z(x)

    Source: Rafailov et al. 2023, arXiv 2305.18290, Eq. 5. Arguments as for `implicit_reward`.
    """
    return implicit_reward(log_probs, reference_log_probs, beta=beta) + beta * log_partition[..., None]


@as_one
def expected_reward(
    log_probs: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"]
) -> Float[Array, "*n"]:
    """The reward that a policy earns on average, for each prompt.

    A response of probability zero adds nothing, even if its reward is infinite.
    """
    checks.same_shape(log_probs=log_probs, rewards=rewards)
    probs = jnp.exp(log_probs)
    return jnp.sum(probs * jnp.where((probs == 0) & jnp.isinf(rewards), 0, rewards), axis=-1)


@as_one
def kl_to_reference(
    log_probs: Float[Array, "*n responses"], reference_log_probs: Float[Array, "*n responses"]
) -> Float[Array, "*n"]:
    """The Kullback-Leibler divergence KL(policy || reference) in nats, for each prompt.

    Infinite if the policy has a possible response of reference probability zero. Responses whose probability is zero,
    or underflows, add nothing. Rounding errors are about 1e-7 nats in float32, so tiny divergences may be negative.
    """
    checks.same_shape(log_probs=log_probs, reference_log_probs=reference_log_probs)
    possible = jnp.exp(log_probs) > 0
    log_ratio = jnp.where(possible, log_probs, 0.0) - jnp.where(possible, reference_log_probs, 0.0)
    return jnp.sum(jnp.exp(log_probs) * log_ratio, axis=-1)


def win_rate(
    log_probs: Float[Array, "*n responses"],
    opponent: Float[Array, "*n responses"],
    rewards: Float[Array, "*n responses"],
    *,
    temperature: Numeric = 1.0,
) -> Float[Array, "*n"]:
    """The probability that people prefer a policy's response to an opponent's, for each prompt.

    Both respond independently; a tie counts as 1/2.

    Args:
      log_probs: log-probabilities of the policy.
      opponent: log-probabilities of the policy it is compared with.
      rewards: rewards of the responses.
      temperature: noise of the comparisons (`preference_probability`); 0 compares true rewards.
    """
    checks.same_shape(log_probs=log_probs, opponent=opponent, rewards=rewards)
    wins = preference_probability(rewards[..., :, None], rewards[..., None, :], temperature=temperature)
    pairs = jnp.exp(log_probs)[..., :, None] * jnp.exp(opponent)[..., None, :]
    return jnp.sum(pairs * wins, axis=(-2, -1))


def regret(
    log_probs: Float[Array, "*n responses"],
    reference_log_probs: Float[Array, "*n responses"],
    rewards: Float[Array, "*n responses"],
    *,
    beta: Numeric,
) -> Float[Array, "*n"]:
    r"""How far a policy falls short of the optimum of the RLHF objective, for each prompt.

    .. math:: J(\pi^*) - J(\pi) = \beta\, KL(\pi \| \pi^*), \qquad J(\pi) = E_\pi[r] - \beta\, KL(\pi \| \pi_{ref})

    Source: the identity follows from Rafailov et al. 2023, arXiv 2305.18290, App. A.1. Arguments as elsewhere. Rounding
    errors are those of the divergence times beta: do not use it in float32 beyond a beta of about 1e4.
    """
    return beta * kl_to_reference(log_probs, optimal_policy(reference_log_probs, rewards, beta=beta))


def bayes_prediction(
    rewards: Float[Array, "*n responses"], *, temperature: Numeric = 1.0, flip_probability: Numeric = 0.0
) -> Metrics:
    """How well the true rewards predict comparisons of uniform pairs of distinct responses: a bound for any model.

    Args:
      rewards: rewards of the responses.
      temperature, flip_probability: how people compare (`preference_probability`).

    Returns:
      `loss`, the entropy of a comparison (nats), and `accuracy`, how often the better response is preferred; means
      over prompts.
    """
    wins = preference_probability(
        rewards[..., :, None], rewards[..., None, :], temperature=temperature, flip_probability=flip_probability
    )
    distinct = ~np.eye(rewards.shape[-1], dtype=bool)
    entropy = jax.scipy.special.entr(wins) + jax.scipy.special.entr(1 - wins)
    return {
        "loss": jnp.mean(entropy[..., distinct]),
        "accuracy": jnp.mean(jnp.maximum(wins, 1 - wins)[..., distinct]),
    }


@as_one
def ranking_accuracy(scores: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"]) -> Float[Array, "*n"]:
    """The share of pairs of distinct responses that a score orders as the true rewards do; ties of either count half.

    NaN for a prompt where a score or a reward is NaN.

    Args:
      scores: rewards of a reward model, implicit rewards, or log-probabilities.
      rewards: the true ones.
    """
    checks.same_shape(scores=scores, rewards=rewards)
    said, true = (
        (values[..., :, None] > values[..., None, :]) * 1.0 - (values[..., :, None] < values[..., None, :])
        for values in (scores, rewards)
    )
    known = ~jnp.any(jnp.isnan(scores) | jnp.isnan(rewards), axis=-1)
    right = jnp.where(known[..., None, None], (1 + said * true) / 2, jnp.nan)
    return jnp.mean(right[..., ~np.eye(rewards.shape[-1], dtype=bool)], axis=-1)


def reward_error(scores: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"]) -> Float[Array, "*n"]:
    """The root mean squared error of a reward model, whatever its level: comparisons do not tell the level.

    Args:
      scores: rewards of the model, in the units of the true ones.
      rewards: the true ones.
    """
    checks.same_shape(scores=scores, rewards=rewards)
    return jnp.std(scores - rewards, axis=-1)


def frontier(
    reference_log_probs: Float[Array, "*n responses"],
    rewards: Float[Array, "*n responses"],
    betas: Float[Array, " betas"],
) -> Metrics:
    """The exact reward-KL frontier: no policy earns more at the same KL to the reference than the optimal ones do.

    Args:
      reference_log_probs: log-probabilities of the reference policy.
      rewards: rewards of the responses.
      betas: one point of the frontier for each.

    Returns:
      `expected_reward` and `kl_to_reference`, arrays `[betas]`, means over prompts.
    """
    checks.interval("betas", betas, "(0, inf)")
    return jax.vmap(
        lambda beta: evaluate(optimal_policy(reference_log_probs, rewards, beta=beta), reference_log_probs, rewards)
    )(betas)


def evaluate(
    log_probs: Float[Array, "*n responses"],
    reference_log_probs: Float[Array, "*n responses"],
    rewards: Float[Array, "*n responses"],
) -> Metrics:
    """`expected_reward` and `kl_to_reference` of a policy, means over prompts."""
    return {
        "expected_reward": jnp.mean(expected_reward(log_probs, rewards)),
        "kl_to_reference": jnp.mean(kl_to_reference(log_probs, reference_log_probs)),
    }


def _tilted(
    reference_log_probs: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"], beta: Numeric
) -> Float[Array, "*n responses"]:
    checks.interval("beta", beta, "(0, inf)")
    checks.same_shape(reference_log_probs=reference_log_probs, rewards=rewards)
    never = (reference_log_probs == -jnp.inf) & (rewards == jnp.inf)
    return reference_log_probs + jnp.where(never, 0, rewards) / beta
