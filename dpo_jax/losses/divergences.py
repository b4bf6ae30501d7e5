r"""Other divergences than KL: functions that replace the log-ratio.

RLHF with :math:`D_f(\pi \| \pi_{ref}) = E_{\pi_{ref}}[f(\pi / \pi_{ref})]` in place of KL has the optimum
:math:`r(x, y) = \beta f'(\pi^*(y|x) / \pi_{ref}(y|x)) + const(x)`. A loss of the margin becomes one for the divergence
if :math:`f'` of the ratio replaces its logarithm. The functions here map the log-ratio :math:`u` to :math:`f'(e^u)`.

Source: Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
Constraints", arXiv 2309.16240, Table 1. Exponentials continue along their tangent where the exponent exceeds 22 (177 in
float64), to stay finite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.losses import margin
from dpo_jax.losses.ratios import bounded_exp, difference, fitted, power_score
from dpo_jax.types import Numeric, PreferenceLoss

Divergence: TypeAlias = Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]
"""From the log-ratio u of policy to reference to f'(exp(u)), elementwise; it must increase."""

LOSSES_OF_THE_MARGIN = tuple(f for f in vars(margin).values() if getattr(f, "__module__", "") == margin.__name__)
"""Losses of a pair that depend only on the difference of its log-ratios."""

_LIBRARY = __name__.split(".")[0]
_OF_DIFFERENCES = (f"{_LIBRARY}.losses.margin", f"{_LIBRARY}.losses.ranked")


def with_divergence(loss: PreferenceLoss, divergence: Divergence) -> PreferenceLoss:
    """A loss of differences of log-ratios, for RLHF with another divergence than KL.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(with_divergence(margin.dpo_loss, forward_kl)(policy, reference, beta=0.5))  # margin e - 1/e
    [0.2691]

    Args:
      loss: one of `LOSSES_OF_THE_MARGIN`; `plackett_luce_loss`; or any other function that depends only on differences
        of log-ratios.
      divergence: `reverse_kl`, `forward_kl`, `jensen_shannon`, `chi_square_kl`, `alpha_divergence(alpha)`, or another
        function.

    Returns:
      A loss with the same arguments.

    Raises:
      ValueError: the loss is another one of this library, or made by it, perhaps inside `functools.partial` or
        `jax.jit`. In a loss of separate log-ratios, the normalisation of the optimum, which depends on the prompt,
        would not cancel. Apply additions (`with_sft`, `weighted_sum`) after the divergence, and only one divergence.
        Functions from outside of the library are not checked.
      TypeError: an argument is no function.
    """
    if not (callable(loss) and callable(divergence)):
        raise TypeError(f"with_divergence needs a loss and a link, both functions, got {loss!r} and {divergence!r}")
    function = _unwrapped(loss)
    home = getattr(function, "__module__", None) or ""
    if home.split(".")[0] == _LIBRARY and home not in _OF_DIFFERENCES:
        allowed = ", ".join(allowed.__name__ for allowed in LOSSES_OF_THE_MARGIN)
        name = getattr(function, "__qualname__", type(function).__name__).split(".")[0]
        raise ValueError(
            f"{name} cannot take a divergence: only in losses of differences of scores does the "
            f"normalisation of the optimal policy cancel. These are {allowed}, plackett_luce_loss; additions come after"
        )

    def loss_with_divergence(policy: Any, reference: Any, **hyperparameters: Any) -> Float[Array, "*batch"]:
        checks.reference(reference)
        checks.rankings(policy, reference)
        ratios = [difference(logps, others) for logps, others in zip(policy, reference, strict=True)]
        scores = [_score(divergence, ratio) for ratio in ratios]
        highest = jax.lax.stop_gradient(reduce(jnp.maximum, scores))
        relative = tuple(difference(score, highest) for score in scores)  # zero or negative, as log-probabilities are
        return loss(relative, jax.tree.map(jnp.zeros_like, relative), **hyperparameters)

    return loss_with_divergence


def reverse_kl(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r""":math:`f'(e^u) = u` (up to a constant), with :math:`f(z) = z \log z`: KL(policy || reference), as in DPO."""
    return log_ratio


def forward_kl(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r""":math:`f'(e^u) = 1 - e^{-u}` (up to a constant), with :math:`f(z) = -\log z`: KL(reference || policy)."""
    return 1 - bounded_exp(-log_ratio)


def jensen_shannon(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r""":math:`f'(e^u) = \log 2 + \log \sigma(u)`, with :math:`f(z) = z \log z - (z + 1) \log \frac{z + 1}{2}`.

    Twice the Jensen-Shannon divergence. It is bounded above, so larger rewards cannot be expressed.
    """
    return jnp.log(2.0).astype(log_ratio.dtype) + jax.nn.log_sigmoid(log_ratio)


def chi_square_kl(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r""":math:`f'(e^u) = e^u + u` (up to a constant), with :math:`f(z) = \frac{1}{2} (z - 1)^2 + z \log z`.

    Chi-squared plus KL. `dpo_loss` with it is `chi_po_loss` without clipping (arXiv 2407.13399).
    """
    return bounded_exp(log_ratio) + log_ratio


def alpha_divergence(alpha: Numeric) -> Divergence:
    r"""A function from :math:`u` to :math:`f'(e^u) = (e^{(\alpha - 1) u} - 1) / (\alpha - 1)`.

    The limit of alpha 1 is `reverse_kl`, and alpha 0 is `forward_kl`. This is TRL's alpha since 1.16; that of Wang et
    al. and of TRL up to 0.28 is one minus this one.

    Args:
      alpha: finite; a scalar, or one value for each comparison; may be traced.
    """
    checks.finite("alpha", alpha)

    def link(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        (fitting,) = fitted(log_ratio, alpha=alpha)
        return power_score(log_ratio, fitting - 1)

    return link


def _score(divergence: Divergence, ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    score = divergence(ratio)
    checks.same_shape(log_ratios=ratio, scores=score)
    return score.astype(ratio.dtype)


def _unwrapped(loss: Any) -> Any:
    """The function behind partials and wrappers, in any order."""
    inner = loss.func if isinstance(loss, partial) else inspect.unwrap(loss)
    return loss if inner is loss else _unwrapped(inner)
