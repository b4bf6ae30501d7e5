r"""Losses of the margin: functions of the difference of the log-ratios.

.. math::
    \Delta = \log \frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log \frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}

A constant added to both log-ratios changes nothing, so whatever depends on the prompt alone (:math:`\log Z`) cancels.
That is why these losses can take other divergences (`with_divergence`).

Every loss takes `policy` and `reference`, each a pair (chosen, rejected) of log-probabilities in nats, summed over the
tokens of a response unless its docstring says otherwise (`sequence_logps`); the reference is a constant to the caller.
Every loss returns one number per comparison, in the dtype of the log-probabilities. Hyperparameters are scalars, or
have one value per comparison. Errors are those of `dpo_loss`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from dpo_jax import checks
from dpo_jax.losses.ratios import bounded_exp, checked_margin, difference, smoothed_logistic, square, times
from dpo_jax.types import Numeric, PairLike


def dpo_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    label_smoothing: Numeric = 0.0,
) -> Float[Array, "*batch"]:
    r"""Direct Preference Optimization loss, with optional label smoothing.

    .. math::
        -(1 - \epsilon) \log \sigma(\beta \Delta) - \epsilon \log \sigma(-\beta \Delta), \qquad
        \Delta = \log \frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log \frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}

    With :math:`\epsilon = 0` this is Rafailov et al. 2023, "Direct Preference Optimization", arXiv 2305.18290, Eq. 7;
    with :math:`\epsilon > 0`, the conservative DPO of Mitchell 2023, "A note on DPO with noisy preferences".

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(dpo_loss(policy, reference, beta=0.5))  # -log sigmoid(0.5 * 2)
    [0.3133]

    Args:
      policy: log-probabilities (nats, summed over the tokens of a response) of the chosen and the rejected responses
        under the policy.
      reference: the same under the reference policy, taken as constants by the caller.
      beta: strength of the pull towards the reference; positive. A scalar, or one value for each comparison.
      label_smoothing: assumed probability that a label is flipped; at least 0, below 1/2. Likewise.

    Returns:
      The loss in nats, one per comparison. The caller takes the mean.

    Raises:
      TypeError: an argument is not a pair of floating-point arrays, or they differ in dtype.
      ValueError: shapes differ, a hyperparameter is out of its range, or a log-probability is positive by more than
        rounding (checked unless they are traced). An axis of tokens cannot be detected here; objectives reject it
        (`train.preference_objective`).
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("label_smoothing", label_smoothing, "[0, 0.5)")
    margin, beta, label_smoothing = checked_margin(policy, reference, beta=beta, label_smoothing=label_smoothing)
    return smoothed_logistic(times(beta, margin), label_smoothing)


def robust_dpo_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    label_smoothing: Numeric,
) -> Float[Array, "*batch"]:
    r"""Robust DPO: an unbiased estimate, from flipped labels, of the DPO loss on the labels before the flip.

    .. math:: \frac{-(1 - \epsilon) \log \sigma(\beta \Delta) + \epsilon \log \sigma(-\beta \Delta)}{1 - 2 \epsilon}

    Source: Chowdhury et al. 2024, "Provably Robust DPO", arXiv 2403.00409, Sec. 3.1.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(robust_dpo_loss(policy, reference, beta=0.5, label_smoothing=0.25))
    [-0.1867]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: strength of the pull towards the reference; positive.
      label_smoothing: the probability with which labels are flipped; at least 0, below 1/2.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("label_smoothing", label_smoothing, "[0, 0.5)")
    margin, beta, label_smoothing = checked_margin(policy, reference, beta=beta, label_smoothing=label_smoothing)
    logits = times(beta, margin)
    return -jax.nn.log_sigmoid(logits) - times(label_smoothing / (1 - 2 * label_smoothing), logits)


def ipo_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Identity Preference Optimization: regression of the margin onto a constant, so that it stays bounded.

    .. math:: \left( \Delta - \frac{1}{2 \beta} \right)^2

    Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv
    2310.12036, Eq. 17, where beta is called tau. The paper sums log-probabilities over tokens; TRL averages them. Here
    the caller decides.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(ipo_loss(policy, reference, beta=0.5))  # (2 - 1)^2
    [1.]

    Args:
      policy, reference: pairs of log-probabilities (sums, or means as in TRL); their margin is :math:`\Delta` (see
        `dpo_loss`).
      beta: strength of the pull towards the reference; positive. The target margin is 1/(2 beta) nats.
    """
    checks.interval("beta", beta, "(0, inf)")
    margin, beta = checked_margin(policy, reference, beta=beta)
    return square(margin - 1 / (2 * beta))


def hinge_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Hinge loss on log-ratios (RSO's hinge-norm, after SLiC): no gradient beyond a margin of 1.

    .. math:: \max(0, 1 - \beta \Delta)

    Source: Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization", arXiv 2309.06657
    (hinge-norm), after Zhao et al. 2023, "SLiC-HF", arXiv 2305.10425, where there is no reference.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(hinge_loss(policy, reference, beta=0.25))
    [0.5]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: the inverse of the margin (nats) from which on a comparison counts as learnt; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    margin, beta = checked_margin(policy, reference, beta=beta)
    return jax.nn.relu(1 - times(beta, margin))


def squared_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Squared member of Generalized Preference Optimization.

    .. math:: (\beta \Delta - 1)^2

    Source: Tang et al. 2024, "Generalized Preference Optimization", arXiv 2402.05749, Table 1, which calls it IPO. It
    aims at a margin of 1/beta, `ipo_loss` at 1/(2 beta), and it is smaller by a factor of beta squared.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(squared_loss(policy, reference, beta=0.25))
    [0.25]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: strength of the pull towards the reference; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    margin, beta = checked_margin(policy, reference, beta=beta)
    return square(times(beta, margin) - 1)


def truncated_quadratic_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Truncated quadratic (squared hinge) member of Generalized Preference Optimization.

    .. math:: \max(0, 1 - \beta \Delta)^2

    Source: Tang et al. 2024, "Generalized Preference Optimization", arXiv 2402.05749, Table 1.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(truncated_quadratic_loss(policy, reference, beta=0.75))
    [0.]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: the inverse of the margin (nats) from which on a comparison counts as learnt; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    margin, beta = checked_margin(policy, reference, beta=beta)
    return square(jax.nn.relu(1 - times(beta, margin)))


def exponential_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Exponential member of Generalized Preference Optimization: the loss of AdaBoost.

    .. math:: \exp(-\beta \Delta)

    Source: Tang et al. 2024, "Generalized Preference Optimization", arXiv 2402.05749, Table 1. To stay finite it goes
    on along its tangent where the exponent exceeds 22 (177 in float64).

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(exponential_loss(policy, reference, beta=0.5))
    [0.3679]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: strength of the pull towards the reference; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    margin, beta = checked_margin(policy, reference, beta=beta)
    return bounded_exp(-times(beta, margin))


def savage_loss(
    policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""Savage member of Generalized Preference Optimization: bounded, not convex, forgiving towards wrong labels.

    .. math:: \sigma(-\beta \Delta)^2

    Source: Masnadi-Shirazi and Vasconcelos 2008, "On the Design of Loss Functions for Classification"; Tang et al.
    2024, "Generalized Preference Optimization", arXiv 2402.05749, Table 1.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(savage_loss(policy, reference, beta=0.5))
    [0.0723]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: strength of the pull towards the reference; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    margin, beta = checked_margin(policy, reference, beta=beta)
    return jnp.square(jax.nn.sigmoid(-times(beta, margin)))


def exo_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    label_smoothing: Numeric,
) -> Float[Array, "*batch"]:
    r"""Efficient Exact Optimization from pairs: reverse KL from the policy's preference to the smoothed label.

    .. math::
        \sigma(\beta \Delta) \log \frac{\sigma(\beta \Delta)}{1 - \epsilon}
        + \sigma(-\beta \Delta) \log \frac{\sigma(-\beta \Delta)}{\epsilon}

    Source: Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", arXiv 2402.00856, Eq.
    16. DPO is the forward KL.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(exo_loss(policy, reference, beta=0.5, label_smoothing=0.1))
    [0.1140]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: strength of the pull towards the reference; positive.
      label_smoothing: the probability that the label gives to the rejected response; above 0, since the logarithm of
        a hard label is infinite, and below 1/2.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("label_smoothing", label_smoothing, "(0, 0.5)")
    margin, beta, label_smoothing = checked_margin(policy, reference, beta=beta, label_smoothing=label_smoothing)
    logits = times(beta, margin)
    chosen = times(jax.nn.sigmoid(logits), jax.nn.log_sigmoid(logits) - jnp.log1p(-label_smoothing))
    return chosen + times(jax.nn.sigmoid(-logits), jax.nn.log_sigmoid(-logits) - jnp.log(label_smoothing))


def discopop_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    temperature: Numeric = 0.05,
) -> Float[Array, "*batch"]:
    r"""DiscoPOP (log-ratio modulated loss): a blend of logistic and exponential loss, discovered by a language model.

    .. math::
        -(1 - g) \log \sigma(\beta \Delta) + g\, e^{-\beta \Delta}, \qquad g = \sigma(\beta \Delta / \tau)

    Source: Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models", arXiv
    2406.08414, Eq. 5. It is not convex; for a small temperature it has a local minimum left of zero.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(discopop_loss(policy, reference, beta=0.5))
    [0.3679]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: strength of the pull towards the reference; positive.
      temperature: :math:`\tau`, how wide the blend is; above 0, at most 1, so that the loss stays bounded by a
        multiple of the margin.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("temperature", temperature, "(0, 1]")
    margin, beta, temperature = checked_margin(policy, reference, beta=beta, temperature=temperature)
    logits = times(beta, margin)
    tempered = times(1 / temperature, logits)
    logistic = times(jax.nn.sigmoid(-tempered), -jax.nn.log_sigmoid(logits))
    return logistic + jnp.exp(difference(jax.nn.log_sigmoid(tempered), logits))


def offset_dpo_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    offset: Numeric,
) -> Float[Array, "*batch"]:
    r"""DPO with an offset: the required margin grows with how much better the chosen response was judged.

    .. math:: -\log \sigma(\beta \Delta - \delta)

    Source: Amini et al. 2024, "Direct Preference Optimization with an Offset", arXiv 2402.10571; there
    :math:`\delta = \alpha \log(r_w - r_l)` for known scores. In a training batch, per-comparison offsets come as
    `Preferences.columns`.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(offset_dpo_loss(policy, reference, beta=0.5, offset=1.0))
    [0.6931]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: strength of the pull towards the reference; positive.
      offset: target margin, in units of reward; finite.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.finite("offset", offset)
    margin, beta, offset = checked_margin(policy, reference, beta=beta, offset=offset)
    return -jax.nn.log_sigmoid(times(beta, margin) - offset)


def length_regularized_dpo_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    alpha: Numeric,
    lengths: PairLike[Real[Array, "*batch"]],
) -> Float[Array, "*batch"]:
    r"""R-DPO: DPO for a reward with a penalty of `alpha` per token.

    .. math:: -\log \sigma(\beta \Delta + \alpha |y_w| - \alpha |y_l|)

    Source: Park et al. 2024, "Disentangling Length from Quality in Direct Preference Optimization", arXiv 2403.19159,
    Eq. 9. Length explains part of the preference for a longer chosen response, so its gradient is smaller. If all
    responses are equally long, this is DPO.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> lengths = (jnp.array([7]), jnp.array([5]))
    >>> print(length_regularized_dpo_loss(policy, reference, beta=0.5, alpha=0.1, lengths=lengths))
    [0.2633]

    Args:
      policy, reference: pairs of log-probabilities (sums); their margin is :math:`\Delta` (see `dpo_loss`).
      beta: strength of the pull towards the reference; positive.
      alpha: price of a token, in units of reward; zero or positive.
      lengths: how many tokens the chosen and the rejected responses have.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("alpha", alpha, "[0, inf)")
    margin, beta, alpha = checked_margin(policy, reference, beta=beta, alpha=alpha)
    checks.lengths(lengths, margin.shape)
    longer_by = (lengths[0] - lengths[1]).astype(margin.dtype)
    return -jax.nn.log_sigmoid(times(beta, margin) + alpha * longer_by)
