"""Losses and statistics of whole batches. The last axis is the batch.

Their hyperparameters are scalars, and comparisons cannot have weights, because each loss depends on several
comparisons. State that persists between batches is passed explicitly: `state = update(state, ...)`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one
from dpo_jax.losses.ratios import checked_log_ratios, checked_margin, difference, smoothed_logistic, times
from dpo_jax.types import Numeric, PairLike


def aot_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    label_smoothing: Numeric = 0.0,
) -> Float[Array, "*batch"]:
    r"""Alignment via Optimal Transport, paired: the policy's margins should dominate the reference's in distribution.

    .. math::
        -(1 - \epsilon) \log \sigma(\beta \Delta_{(i)}) - \epsilon \log \sigma(-\beta \Delta_{(i)}), \qquad
        \Delta_{(i)} = \mathrm{sort}_i \log \frac{\pi(y_w|x)}{\pi(y_l|x)}
        - \mathrm{sort}_i \log \frac{\pi_{ref}(y_w|x)}{\pi_{ref}(y_l|x)}

    Source: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv 2406.05882.
    Entry i of the result belongs to the i-th smallest margins of the batch, not to comparison i.

    >>> import jax.numpy as jnp
    >>> policy = jnp.array([0.0, -2.0]), jnp.array([-3.0, -1.0])
    >>> reference = jnp.array([-2.0, -1.0]), jnp.array([-1.0, -2.0])
    >>> print(aot_loss(policy, reference, beta=0.5))  # margins -1 and 3 against -1 and 1
    [0.6931 0.3133]

    Args:
      policy, reference: pairs of log-probabilities (sums), with at least one axis.
      beta: strength of the pull towards the reference; positive.
      label_smoothing: assumed probability that a label is flipped; at least 0, below 1/2.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("label_smoothing", label_smoothing, "[0, 0.5)")
    checks.hyperparameters((), beta=beta, label_smoothing=label_smoothing)
    *_, beta, label_smoothing = checked_log_ratios(policy, reference, beta=beta, label_smoothing=label_smoothing)
    checks.batch("policy.chosen", policy[0])
    margins, reference_margins = difference(*policy), difference(*reference)
    logits = times(beta, difference(jnp.sort(margins), jnp.sort(reference_margins)))
    return smoothed_logistic(logits, label_smoothing)


def aot_unpaired_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    label_smoothing: Numeric = 0.0,
) -> Float[Array, "*batch"]:
    r"""Alignment via Optimal Transport, unpaired: log-ratios of good responses exceed those of bad ones in
    distribution.

    .. math::
        -(1 - \epsilon) \log \sigma(\beta \Delta_{(i)}) - \epsilon \log \sigma(-\beta \Delta_{(i)}), \qquad
        \Delta_{(i)} = \mathrm{sort}_i \log \frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}
        - \mathrm{sort}_i \log \frac{\pi(y_l|x')}{\pi_{ref}(y_l|x')}

    Source: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv 2406.05882.
    Chosen and rejected responses may answer different prompts, but must be equally many. Entry i of the result belongs
    to the i-th smallest log-ratios of the batch, not to row i.

    >>> import jax.numpy as jnp
    >>> policy = jnp.array([0.0, -2.0]), jnp.array([-3.0, -1.0])
    >>> reference = jnp.array([-2.0, -1.0]), jnp.array([-1.0, -2.0])
    >>> print(aot_unpaired_loss(policy, reference, beta=0.5))  # log-ratios -1 and 2 against -2 and 1
    [0.4741 0.4741]

    Args:
      policy, reference: pairs of log-probabilities (sums), with at least one axis.
      beta: strength of the pull towards the reference; positive.
      label_smoothing: assumed probability that a label is flipped; at least 0, below 1/2.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("label_smoothing", label_smoothing, "[0, 0.5)")
    checks.hyperparameters((), beta=beta, label_smoothing=label_smoothing)
    values = checked_log_ratios(policy, reference, beta=beta, label_smoothing=label_smoothing)
    chosen, rejected, beta, label_smoothing = values
    checks.batch("policy.chosen", policy[0])
    return smoothed_logistic(times(beta, difference(jnp.sort(chosen), jnp.sort(rejected))), label_smoothing)


def kto_reference_point(policy: Float[Array, "*batch"], reference: Float[Array, "*batch"]) -> Float[Array, ""]:
    r"""KTO's reference point, estimated from responses to other prompts: a biased estimate of KL(policy || reference).

    .. math:: z_0 = \max \left( 0, \frac{1}{m} \sum_{i=1}^m \log \frac{\pi(y_{i+1}|x_i)}{\pi_{ref}(y_{i+1}|x_i)} \right)

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, Sec.
    4.1. No gradient flows through it.

    >>> import jax.numpy as jnp
    >>> print(kto_reference_point(jnp.array([-1.0, -2.0]), jnp.array([-2.0, -2.5])))
    0.75

    Args:
      policy: log-probabilities (nats, sums over tokens) of mismatched responses under the policy: for each prompt of a
        batch, the response to another prompt of the batch.
      reference: the same under the reference policy.

    Returns:
      One number (nats) for the whole batch. Infinite log-ratios are excluded from the mean, which is 0 if no others are
      left.
    """
    checks.floating("policy", policy)
    checks.reference(reference)
    checks.same_shape(policy=policy, reference=reference)
    checks.same_dtype(policy=policy, reference=reference)
    checks.log_probabilities(policy=policy, reference=reference)
    mean, _ = _mean_of_finite(jax.lax.stop_gradient(difference(policy, reference)))
    return jnp.maximum(mean, 0)


class RunningMean(NamedTuple):
    """The mean of all numbers seen so far.

    Attributes:
      mean: zero at the start.
      num: their number, or the sum of their weights.
    """

    mean: Float[Array, ""] | float = 0.0
    num: Float[Array, ""] | float = 0.0


class Shift(NamedTuple):
    """BCO's shift: the mean implicit reward so far, good and bad responses counting equally.

    If all responses so far are good, or all are bad, it is their mean, as in TRL.

    Attributes:
      desirable, undesirable: the means of the implicit rewards of the good and of the bad ones.
    """

    desirable: RunningMean = RunningMean()
    undesirable: RunningMean = RunningMean()

    @property
    def value(self) -> Array | float:
        """The shift of `bco_pair_loss` and `bco_loss`."""
        both = jnp.minimum(self.desirable.num, self.undesirable.num) > 0
        return (self.desirable.mean + self.undesirable.mean) / jnp.where(both, 2.0, 1.0)


def update_shift(
    state: Shift,
    rewards: Float[Array, " batch"],
    desirable: Bool[Array, " batch"],
    weights: Float[Array, " batch"] | None = None,
) -> Shift:
    r"""Updates BCO's shift with a batch.

    .. math:: \delta = \tfrac{1}{2} (E_+[r] + E_-[r]), \qquad r = \beta \log
    \frac{\pi(y|x)}{\pi_{ref}(y|x)}

    Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656; as
    running means, as in TRL up to 0.28 (which, for unpaired data, weights all responses equally). No gradient flows
    through it.

    >>> import jax.numpy as jnp
    >>> print(update_shift(Shift(), jnp.array([0.5, 1.5, 0.0]), jnp.array([True, True, False])).value)
    0.5

    Args:
      state: the state after the previous batch; `Shift()` at the start.
      rewards: implicit rewards of the responses of a batch; infinite ones are ignored.
      desirable: which of them are good; of a pair, the chosen one.
      weights: how much each response counts; `None` means equally.
    """
    checks.floating("rewards", rewards)
    checks.boolean("desirable", desirable)
    weights = jnp.ones_like(rewards) if weights is None else weights
    checks.same_shape(rewards=rewards, desirable=desirable, weights=weights)
    checks.interval("weights", weights, "[0, inf)")
    rewards = jax.lax.stop_gradient(rewards)
    weights = jnp.where(jnp.isinf(rewards), 0, weights)
    sides = (weights * desirable, weights * ~desirable)
    return Shift(*(_updated(mean, rewards, side) for mean, side in zip(state, sides, strict=True)))


class MarginMoments(NamedTuple):
    """The state of beta-DPO: the distribution of margins, and a key for the next filter.

    Attributes:
      key: typed PRNG key.
      mean, std: exponential moving averages of the batches' means and standard deviations (nats); zero at the start.
    """

    key: Key[Array, ""]
    mean: Float[Array, ""] | float = 0.0
    std: Float[Array, ""] | float = 0.0


def update_margin_moments(
    state: MarginMoments, margins: Float[Array, " batch"], *, momentum: Numeric = 0.9
) -> MarginMoments:
    r"""Updates `MarginMoments` with the margins of a batch, before `beta_dpo_loss` reads them.

    .. math:: M_0 \leftarrow m M_0 + (1 - m)\, E[\Delta], \qquad s \leftarrow m s + (1 - m)\, \mathrm{std}[\Delta]

    Source: as for `beta_dpo_loss`. As in the authors' code, both averages start at zero without bias correction, so
    they are too small for some twenty batches. No gradient flows through it.

    >>> import jax, jax.numpy as jnp
    >>> print(update_margin_moments(MarginMoments(jax.random.key(0)), jnp.array([1.0, 3.0])).mean)
    0.2

    Args:
      state: the state after the previous batch; `MarginMoments(key)` at the start.
      margins: differences of log-ratios of a batch (nats); a single one leaves the standard deviation unchanged.
        Infinite ones are ignored.
      momentum: weight of the past; at least 0, below 1.
    """
    checks.interval("momentum", momentum, "[0, 1)")
    checks.hyperparameters((), momentum=momentum, mean=state.mean, std=state.std)
    checks.floating("margins", margins)
    checks.batch("margins", margins)
    margins = jax.lax.stop_gradient(margins).astype(jnp.promote_types(margins.dtype, jnp.float32))
    mean, num = _mean_of_finite(margins)
    variance = jnp.sum(jnp.where(jnp.isinf(margins), 0, margins - mean) ** 2) / jnp.maximum(num - 1, 1)
    std = jnp.where(num > 1, jnp.sqrt(variance), state.std)
    past, present = (state.mean, state.std), (jnp.where(num > 0, mean, state.mean), std)
    moments = (momentum * old + (1 - momentum) * new for old, new in zip(past, present, strict=True))
    return MarginMoments(jax.random.split(state.key, 1)[0], *(jnp.asarray(x, margins.dtype) for x in moments))


def beta_dpo_loss(
    policy: PairLike[Float[Array, " batch"]],
    reference: PairLike[Float[Array, " batch"]],
    *,
    beta: Numeric,
    alpha: Numeric,
    moments: MarginMoments,
    keep: float = 0.8,
) -> Float[Array, " batch"]:
    r"""beta-DPO: the beta of a batch grows with its margins, and outliers are dropped at random.

    .. math::
        -\log \sigma(\beta' \Delta_i) \text{ if kept}, \qquad
        \beta' = \beta\, (1 + \alpha (E_{kept}[\Delta] - M_0)), \qquad
        P(\text{keep } i) \propto \exp \left( -\tfrac{1}{2} ((\Delta_i - M_0) / s)^2 \right)

    where :math:`M_0` and :math:`s` are the mean and the spread of the margins so far.

    Source: Wu et al. 2024, "beta-DPO: Direct Preference Optimization with Dynamic beta", arXiv 2407.08639, Sec. 4. As
    in the authors' code, margins are not multiplied by beta, comparisons are kept without replacement, and
    :math:`\beta'` is at least 0.001. Losses of kept comparisons are scaled so that the batch mean is the mean over the
    kept ones; the others are zero.

    >>> import jax, jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0, -1.0]), jnp.array([-3.0, -3.0])), (jnp.array([-2.0, -2.0]),) * 2
    >>> moments = MarginMoments(jax.random.key(0), mean=1.0, std=1.0)
    >>> print(beta_dpo_loss(policy, reference, beta=0.5, alpha=1.0, moments=moments, keep=1.0))  # beta' = 1
    [0.1269 0.1269]

    Args:
      policy, reference: pairs of log-probabilities (sums).
      beta: strength of the pull towards the reference at the usual margin; positive.
      alpha: how much beta changes per nat of margin; zero or positive.
      moments: mean and spread of the margins so far (`update_margin_moments`), and the key of the filter.
      keep: the share of the comparisons that are kept, above 0, at most 1 (all of them); static.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("alpha", alpha, "[0, inf)")
    checks.interval("keep", keep, "(0, 1]")
    scalars = {"beta": beta, "alpha": alpha, "mean": moments.mean, "std": moments.std}
    checks.hyperparameters((), **scalars)
    margin, beta, alpha, mean, std = checked_margin(policy, reference, **scalars)
    checks.batch("policy.chosen", margin)
    constant = jax.lax.stop_gradient(margin)
    num = max(1, int(keep * margin.shape[0] + 1e-9))
    kept = _keep_likely(moments.key, (constant - mean) / jnp.maximum(std, jnp.finfo(margin.dtype).eps), num)
    mean_of_kept, num_finite = _mean_of_finite(jnp.where(kept, constant, jnp.inf))
    surplus = jnp.where(num_finite > 0, mean_of_kept - mean, 0)
    logits = times(jnp.maximum(beta * (1 + alpha * surplus), 1e-3), margin)
    return jnp.where(kept, -jax.nn.log_sigmoid(logits), 0) / jnp.mean(kept, dtype=margin.dtype)


@as_one
def _mean_of_finite(values: Float[Array, "*batch"]) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The mean of the values that are not infinite, 0 if all are; and their number. NaN propagates."""
    finite = ~jnp.isinf(values)
    num = jnp.sum(finite)
    return jnp.where(num > 0, jnp.mean(values, where=finite | (num == 0)), 0), num


@partial(as_one, static_argnames="num")
def _keep_likely(key: Key[Array, ""], distances: Float[Array, " batch"], num: int) -> Bool[Array, " batch"]:
    """Which `num` comparisons are kept, drawn without replacement by the normal density at their distances."""
    score = jax.random.gumbel(key, distances.shape, distances.dtype) - jnp.square(distances) / 2
    return jnp.argsort(jnp.argsort(-score)) < num


def _updated(state: RunningMean, values: Float[Array, " batch"], weights: Float[Array, " batch"]) -> RunningMean:
    """In float32 at least: a count in bfloat16 stops at 256."""
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    values, weights = values.astype(dtype), weights.astype(dtype)
    num = state.num + jnp.sum(weights)
    change = jnp.sum(jnp.where(weights > 0, weights * (values - state.mean), 0)) / jnp.where(num > 0, num, 1)
    return RunningMean(jnp.asarray(state.mean + change, dtype), jnp.asarray(num, dtype))
