"""Losses of a policy pair and a reference pair of log-probabilities."""

import jax
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.types import Pair, PairLike, Scalar


def log_ratios(policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]]) -> Pair:
    """Log-probability ratios of policy to reference, `log pi(y|x) - log pi_ref(y|x)`, for chosen and rejected.

    Args:
      policy: log-probabilities (nats) of the chosen and the rejected responses under the policy.
      reference: the same under the reference policy.

    Raises:
      TypeError: an argument is not a pair of floating-point arrays, or the four differ in dtype.
      ValueError: the four arrays differ in shape.
    """
    checks.pair("policy", policy)
    checks.pair("reference", reference)
    arrays = {
        "policy_chosen": policy[0],
        "policy_rejected": policy[1],
        "reference_chosen": reference[0],
        "reference_rejected": reference[1],
    }
    checks.same_shape(**arrays)
    checks.same_dtype(**arrays)
    return Pair(policy[0] - reference[0], policy[1] - reference[1])


def dpo_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
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
      The loss in nats, one per comparison. The mean is left to the caller.

    Raises:
      TypeError: an argument is not a pair of floating-point arrays, or they differ in dtype.
      ValueError: shapes differ, or a hyperparameter is out of its range (checked unless it is traced).
    """
    checks.positive("beta", beta)
    checks.between("label_smoothing", label_smoothing, 0.0, 0.5)
    ratios = log_ratios(policy, reference)
    checks.broadcasts("beta", beta, ratios.chosen.shape)
    checks.broadcasts("label_smoothing", label_smoothing, ratios.chosen.shape)
    logits = beta * (ratios.chosen - ratios.rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)
