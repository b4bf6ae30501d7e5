r"""Losses of the policy alone, without a reference.

.. math:: \ell_w = \log \pi(y_w|x), \qquad \ell_l = \log \pi(y_l|x)

Every loss takes `policy`, a pair (chosen, rejected) of log-probabilities in nats. Some take sums over the tokens of a
response and some take means, as their docstrings say; the caller divides by the length (`sequence_logps`). Losses are
elementwise, so they can detect neither a wrong choice nor an axis of tokens. Every loss returns one number per
comparison. Hyperparameters are scalars, or have one value per comparison. Errors are those of `simpo_loss`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.losses.ratios import difference, fitted, log1mexp, power_score, times
from dpo_jax.types import Numeric, PairLike


def simpo_loss(policy: PairLike[Float[Array, "*batch"]], *, beta: Numeric, gamma: Numeric) -> Float[Array, "*batch"]:
    r"""Simple Preference Optimization: the mean log-probability per token is the reward, with a target margin.

    .. math:: -\log \sigma(\beta \ell_w - \beta \ell_l - \gamma)

    Takes **means** over tokens. With sums, margins are too large by a factor of the number of tokens: the loss is soon
    0, and shorter responses are favoured. Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a
    Reference-Free Reward", arXiv 2405.14734, Eq. 6. TRL adds the NLL of the chosen response by default (`cpo_alpha=1`);
    the paper does not (`with_sft` does).

    >>> import jax.numpy as jnp
    >>> print(simpo_loss((jnp.array([-1.0]), jnp.array([-3.0])), beta=2.0, gamma=1.0))  # -log sigmoid(2 * 2 - 1)
    [0.0486]

    Args:
      policy: log-probabilities (nats, means over tokens) of the chosen and the rejected responses.
      beta: scale of the reward; positive.
      gamma: target margin, in units of reward; zero or positive.

    Raises:
      TypeError: `policy` is not a pair of floating-point arrays, or they differ in dtype.
      ValueError: shapes differ, a hyperparameter is out of its range, or a log-probability is positive by more than
        rounding (checked unless they are traced).
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("gamma", gamma, "[0, inf)")
    chosen, rejected, beta, gamma = _checked(policy, beta=beta, gamma=gamma)
    return -jax.nn.log_sigmoid(times(beta, difference(chosen, rejected)) - gamma)


def alphapo_loss(
    policy: PairLike[Float[Array, "*batch"]], *, beta: Numeric, gamma: Numeric, alpha: Numeric
) -> Float[Array, "*batch"]:
    r"""AlphaPO: SimPO with a reward that is a power of the likelihood.

    .. math::
        -\log \sigma(\beta r_w - \beta r_l - \gamma), \qquad r = \frac{1 - e^{-\alpha \ell}}{\alpha}

    Takes **means** over tokens. Source: Gupta et al. 2025, "AlphaPO: Reward Shape Matters for LLM Alignment", arXiv
    2501.03884. The limit of alpha 0 is SimPO. To stay finite, the exponential continues along its tangent where its
    exponent exceeds 22 (177 in float64).

    >>> import jax.numpy as jnp
    >>> print(alphapo_loss((jnp.array([-1.0]), jnp.array([-3.0])), beta=2.0, gamma=1.0, alpha=-0.5))
    [0.4615]

    Args:
      policy: pair of log-probabilities (means).
      beta: scale of the reward; positive.
      gamma: target margin, in units of reward; zero or positive.
      alpha: shape of the reward; finite.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("gamma", gamma, "[0, inf)")
    checks.finite("alpha", alpha)
    *logps, beta, gamma, alpha = _checked(policy, beta=beta, gamma=gamma, alpha=alpha)
    chosen, rejected = (power_score(logp, -jnp.asarray(alpha)) for logp in logps)
    return -jax.nn.log_sigmoid(times(beta, difference(chosen, rejected)) - gamma)


def cpo_loss(
    policy: PairLike[Float[Array, "*batch"]], *, beta: Numeric, sft_weight: Numeric = 1.0
) -> Float[Array, "*batch"]:
    r"""Contrastive Preference Optimization: DPO with a uniform reference, plus the NLL of the chosen response.

    .. math:: -\log \sigma(\beta \ell_w - \beta \ell_l) - \lambda \ell_w

    Takes **sums** over tokens. Source: Xu et al. 2024, "Contrastive Preference Optimization", arXiv 2401.08417, Eq. 3
    and the NLL with :math:`\lambda = 1`. TRL's NLL is a mean over tokens.

    >>> import jax.numpy as jnp
    >>> print(cpo_loss((jnp.array([-1.0]), jnp.array([-3.0])), beta=0.5))
    [1.3133]

    Args:
      policy: pair of log-probabilities (sums).
      beta: scale of the reward; positive.
      sft_weight: :math:`\lambda`; zero or positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("sft_weight", sft_weight, "[0, inf)")
    chosen, rejected, beta, sft_weight = _checked(policy, beta=beta, sft_weight=sft_weight)
    return -jax.nn.log_sigmoid(times(beta, difference(chosen, rejected))) - times(sft_weight, chosen)


def orpo_loss(policy: PairLike[Float[Array, "*batch"]], *, odds_weight: Numeric) -> Float[Array, "*batch"]:
    r"""Odds Ratio Preference Optimization: fine-tuning on the chosen response, with an odds-ratio term.

    .. math::
        -\ell_w - \lambda \log \sigma \left( \log \frac{o_w}{o_l} \right), \qquad
        o = \frac{e^{\ell}}{1 - e^{\ell}}

    Takes **means** over tokens. Source: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference
    Model", arXiv 2403.07691, Eq. 6 and 7. TRL's NLL covers the prompt too. A probability of 1 has infinite odds and is
    clamped just below 1.

    >>> import jax.numpy as jnp
    >>> print(orpo_loss((jnp.log(jnp.array([0.8])), jnp.log(jnp.array([0.5]))), odds_weight=1.0))  # odds 4 and 1
    [0.4463]

    Args:
      policy: pair of log-probabilities (means), zero or negative.
      odds_weight: :math:`\lambda`; zero or positive. TRL calls it beta.
    """
    checks.interval("odds_weight", odds_weight, "[0, inf)")
    *logps, odds_weight = _checked(policy, odds_weight=odds_weight)
    chosen_odds, rejected_odds = (logp - log1mexp(logp) for logp in logps)
    return -logps[0] - times(odds_weight, jax.nn.log_sigmoid(difference(chosen_odds, rejected_odds)))


def unlikelihood_loss(policy: PairLike[Float[Array, "*batch"]], *, alpha: Numeric) -> Float[Array, "*batch"]:
    r"""Unlikelihood, a baseline of the DPO paper: chosen responses up, rejected ones down, without bound.

    .. math:: -\ell_w + \alpha \ell_l

    Takes **sums** over tokens. Source: Rafailov et al. 2023, arXiv 2305.18290, Sec. 6 (after Welleck et al. 2019, arXiv
    1908.04319, who keep it bounded by :math:`-\log(1 - p)`).

    >>> import jax.numpy as jnp
    >>> print(unlikelihood_loss((jnp.array([-1.0]), jnp.array([-3.0])), alpha=0.5))
    [-0.5]

    Args:
      policy: pair of log-probabilities (sums).
      alpha: weight of the rejected response, between 0 and 1.
    """
    checks.interval("alpha", alpha, "[0, 1]")
    chosen, rejected, alpha = _checked(policy, alpha=alpha)
    return difference(times(alpha, rejected), chosen)


def sft_loss(policy: PairLike[Float[Array, "*batch"]]) -> Float[Array, "*batch"]:
    r"""Preferred fine-tuning, a baseline of the DPO paper: the NLL of the chosen response; the rejected one is ignored.

    .. math:: -\ell_w

    Takes **sums** over tokens (or means, which weights tokens differently). Source: Rafailov et al. 2023, arXiv
    2305.18290, Sec. 6, "Preferred-FT".

    >>> import jax.numpy as jnp
    >>> print(sft_loss((jnp.array([-1.0]), jnp.array([-3.0]))))
    [1.]

    Args:
      policy: pair of log-probabilities (sums).
    """
    chosen, _ = _checked(policy)
    return -chosen


def _checked(policy: Any, **hyperparameters: Numeric) -> tuple[Any, ...]:
    """The two log-probabilities, and the hyperparameters in their order, `fitted` to them."""
    checks.pair("policy", policy)
    sides = {"policy_chosen": policy[0], "policy_rejected": policy[1]}
    checks.same_shape(**sides)
    checks.same_dtype(**sides)
    checks.log_probabilities(**sides)
    return (*policy, *fitted(policy[0], **hyperparameters))
