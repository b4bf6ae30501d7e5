r"""Losses of both log-ratios of a comparison, not only of their difference.

.. math::
    C = \log \frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}, \qquad R = \log \frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}, \qquad
    \Delta = C - R

They depend on whether the chosen response becomes more likely, not only on its lead over the rejected one. The
normalisation :math:`\log Z` does not cancel, so they cannot take other divergences (`with_divergence`).

Every loss takes `policy` and `reference`, each a pair (chosen, rejected) of log-probabilities in nats, summed over the
tokens of a response unless its docstring says otherwise; the reference is a constant to the caller. Every loss returns
one number per comparison. Hyperparameters are scalars, or have one value per comparison. Errors are those of
`dpo_loss`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from dpo_jax import checks
from dpo_jax.losses.ratios import bounded_exp, checked_log_ratios, difference, square, times
from dpo_jax.types import Numeric, PairLike


def nca_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Noise Contrastive Alignment from pairs: the chosen response is contrasted with the reference.

    .. math:: -\log \sigma(\beta C) - \tfrac{1}{2} \log \sigma(-\beta C) - \tfrac{1}{2} \log \sigma(-\beta R)

    Source: Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369,
    Sec. 4.1 (NCA with K = 2 and a hard label).

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(nca_loss(policy, reference, beta=0.5))
    [1.1981]

    Args:
      policy, reference: pairs of log-probabilities (sums); C and R are the log-ratios of chosen and rejected.
      beta: strength of the pull towards the reference; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    chosen, rejected, beta = checked_log_ratios(policy, reference, beta=beta)
    chosen, rejected = times(beta, chosen), times(beta, rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * (jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected))


def bco_pair_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    shift: Numeric,
) -> Float[Array, "*batch"]:
    r"""Binary Classifier Optimization on pairs: the implicit reward classifies responses as chosen or rejected.

    .. math:: -\log \sigma(\beta C - \delta) - \log \sigma(-(\beta R - \delta))

    Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656.
    TRL up to 0.28 takes the running mean for the shift, as the paper does; later releases take 0.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(bco_pair_loss(policy, reference, beta=0.5, shift=0.0))
    [0.9482]

    Args:
      policy, reference: pairs of log-probabilities (sums); C and R are the log-ratios of chosen and rejected.
      beta: strength of the pull towards the reference; positive.
      shift: :math:`\delta`, the mean implicit reward so far (`Shift`), in units of reward, without gradient.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.finite("shift", shift)
    chosen, rejected, beta, shift = checked_log_ratios(policy, reference, beta=beta, shift=shift)
    return -jax.nn.log_sigmoid(times(beta, chosen) - shift) - jax.nn.log_sigmoid(shift - times(beta, rejected))


def sppo_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Self-Play Preference Optimization with hard labels: regresses each log-ratio onto a constant.

    .. math:: \left( C - \frac{1}{2 \beta} \right)^2 + \left( R + \frac{1}{2 \beta} \right)^2

    Source: Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", arXiv 2405.00675, Eq. 4.7
    with winning probabilities of 1 and 0, and :math:`\eta = 1 / \beta`.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(sppo_loss(policy, reference, beta=0.25))  # (1 - 2)^2 + (-1 + 2)^2
    [2.]

    Args:
      policy, reference: pairs of log-probabilities (sums); C and R are the log-ratios of chosen and rejected.
      beta: strength of the pull towards the reference; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    chosen, rejected, beta = checked_log_ratios(policy, reference, beta=beta)
    return square(chosen - 1 / (2 * beta)) + square(rejected + 1 / (2 * beta))


def apo_zero_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Anchored Preference Optimization, zero: chosen responses up, rejected ones down, each against the reference.

    .. math:: 1 - \sigma(\beta C) + \sigma(\beta R)

    For chosen responses that are better than the policy's. Source: D'Oosterlinck et al. 2024, "Anchored Preference
    Optimization and Contrastive Revisions", arXiv 2408.06266, Eq. 7 (without the constant).

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(apo_zero_loss(policy, reference, beta=0.5))
    [0.7551]

    Args:
      policy, reference: pairs of log-probabilities (sums); C and R are the log-ratios of chosen and rejected.
      beta: strength of the pull towards the reference; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    chosen, rejected, beta = checked_log_ratios(policy, reference, beta=beta)
    return jax.nn.sigmoid(-times(beta, chosen)) + jax.nn.sigmoid(times(beta, rejected))


def apo_down_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Anchored Preference Optimization, down: both responses down, the rejected one further.

    .. math:: \sigma(\beta C) + 1 - \sigma(\beta \Delta)

    For chosen responses that are worse than the policy's. Source: D'Oosterlinck et al. 2024, "Anchored Preference
    Optimization and Contrastive Revisions", arXiv 2408.06266, Eq. 8 (without the constant).

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(apo_down_loss(policy, reference, beta=0.5))
    [0.8914]

    Args:
      policy, reference: pairs of log-probabilities (sums); C and R are the log-ratios of chosen and rejected.
      beta: strength of the pull towards the reference; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    chosen, rejected, beta = checked_log_ratios(policy, reference, beta=beta)
    return jax.nn.sigmoid(times(beta, chosen)) + jax.nn.sigmoid(-times(beta, difference(chosen, rejected)))


def dpo_positive_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    penalty: Numeric,
) -> Float[Array, "*batch"]:
    r"""DPO-Positive: DPO with a penalty if the chosen response is less likely than under the reference.

    .. math:: -\log \sigma(\beta (\Delta - \lambda \max(0, -C)))

    Source: Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive", arXiv
    2402.13228, Eq. 3.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-3.0]), jnp.array([-5.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(dpo_positive_loss(policy, reference, beta=0.5, penalty=2.0))  # 2 nats of margin, 1 nat lost
    [0.6931]

    Args:
      policy, reference: pairs of log-probabilities (sums); C and R are the log-ratios of chosen and rejected.
      beta: strength of the pull towards the reference; positive.
      penalty: :math:`\lambda`, reduction of the margin for each nat that the chosen log-probability falls; zero (DPO)
        or positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("penalty", penalty, "[0, inf)")
    chosen, rejected, beta, penalty = checked_log_ratios(policy, reference, beta=beta, penalty=penalty)
    lost = times(penalty, jax.nn.relu(-chosen))
    return -jax.nn.log_sigmoid(times(beta, difference(difference(chosen, rejected), lost)))


def chi_po_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    max_reward: Numeric = math.inf,
) -> Float[Array, "*batch"]:
    r"""Chi-squared Preference Optimization: DPO with a divergence that grows fast where the reference is small.

    .. math::
        -\log \sigma \left( \mathrm{clip}_{\pm 2 m} \left[ \beta \phi(e^C) - \beta \phi(e^R) \right] \right), \qquad
        \phi(z) = z + \log z

    Source: Huang et al. 2024, "Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization
    via Chi-Squared Preference Optimization", arXiv 2407.13399, Algorithm 1. To stay finite, :math:`e^C` continues along
    its tangent where C exceeds 22 (177 in float64).

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(chi_po_loss(policy, reference, beta=0.5))
    [0.1076]

    Args:
      policy, reference: pairs of log-probabilities (sums); C and R are the log-ratios of chosen and rejected.
      beta: strength of the pull towards the reference; positive.
      max_reward: :math:`m`, the largest reward; comparisons whose margin exceeds twice that have no gradient. Positive,
        or infinite for no clipping.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("max_reward", max_reward, "(0, inf]")
    chosen, rejected, beta, max_reward = checked_log_ratios(policy, reference, beta=beta, max_reward=max_reward)
    margin = times(beta, difference(bounded_exp(chosen) + chosen, bounded_exp(rejected) + rejected))
    return -jax.nn.log_sigmoid(jnp.clip(margin, -2 * max_reward, 2 * max_reward))


def length_normalized_dpo_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    lengths: PairLike[Real[Array, "*batch"]],
) -> Float[Array, "*batch"]:
    r"""Length-normalised DPO: log-ratios are divided by the number of tokens.

    .. math:: -\log \sigma \left( \beta \left( \frac{C}{|y_w|} - \frac{R}{|y_l|} \right) \right)

    Source: Lambert et al. 2024, "Tulu 3", arXiv 2411.15124. Where all responses have one token this is DPO;
    `dpo_loss` of means is the same. Since :math:`\log Z` is divided by different lengths, it does not cancel.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> lengths = (jnp.array([2]), jnp.array([1]))
    >>> print(length_normalized_dpo_loss(policy, reference, beta=2.0, lengths=lengths))
    [0.0486]

    Args:
      policy, reference: pairs of log-probabilities (sums); C and R are the log-ratios of chosen and rejected.
      beta: strength of the pull towards the reference, in units of reward per nat and token; positive.
      lengths: how many tokens the chosen and the rejected responses have, at least 1.
    """
    checks.interval("beta", beta, "(0, inf)")
    chosen, rejected, beta = checked_log_ratios(policy, reference, beta=beta)
    checks.lengths(lengths, chosen.shape)
    chosen_length, rejected_length = (length.astype(chosen.dtype) for length in lengths)
    return -jax.nn.log_sigmoid(times(beta, difference(chosen / chosen_length, rejected / rejected_length)))
