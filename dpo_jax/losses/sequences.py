"""From a language model's logits to the input of losses: one log-probability for each response."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one


def sequence_logps(
    logits: Float[Array, "*batch tokens vocabulary"],
    tokens: Int[Array, "*batch tokens"],
    mask: Bool[Array, "*batch tokens"] | Int[Array, "*batch tokens"] | Float[Array, "*batch tokens"],
    *,
    mean: bool = False,
) -> Float[Array, "*batch"]:
    r"""Log-probabilities of responses: sums, or means, over their tokens.

    .. math:: \log \pi(y|x) = \sum_{t \in y} \log \mathrm{softmax}(z_{t-1})[y_t]

    A row holds the tokens of a prompt and of its response, and logits :math:`z_t` that predict token :math:`t + 1`, as
    causal language models give them: the shift is done here. `mask` marks the response: not the prompt, not the
    padding, but its end token if the model generates it. So the logits of the last token of the prompt predict the
    first token of the response. Do not pass an attention mask, which covers the prompt.

    Most losses take sums; SimPO, AlphaPO and ORPO take means. Losses cannot detect the wrong choice: with sums, SimPO's
    margins are too large by a factor of the number of tokens, and the loss falls to 0 at once.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]]))
    >>> tokens = jnp.array([[0, 0, 1, -100]])
    >>> mask = jnp.array([[False, True, True, False]])  # prompt, response of two tokens, padding
    >>> print(sequence_logps(logits, tokens, mask))  # log 0.5 + log 0.1
    [-2.9957]
    >>> print(sequence_logps(logits, tokens, mask, mean=True))
    [-1.4979]

    Args:
      logits: of all tokens. Logits that predict no token of the response are ignored, even NaN.
      tokens: ids. Those outside the response are ignored; they may be -100, for instance.
      mask: true, or positive, where a token belongs to the response; padding may be on either side. The first token of
        a row must not be marked, because no logits predict it: a prompt has at least one token, such as a start token.
      mean: divide by the number of tokens of the response.

    Returns:
      One number (nats) for each row, in float32 at least. 0 for a response without tokens.

    Raises:
      TypeError: logits are not floating-point numbers, or tokens not integers.
      ValueError: shapes do not fit; the mask covers the first place of a row; or a token of the response is not in the
        vocabulary. Where mask or tokens are traced, such a row is NaN.
    """
    checks.floating("logits", logits)
    checks.same_shape(logits_of_one_token=logits[..., 0], tokens=tokens, mask=mask)
    checks.integers("tokens", tokens)
    if not checks.is_traced(mask) and np.any(np.asarray(mask)[..., 0] > 0):
        raise ValueError(
            "mask must not cover the first token of a row, which no logits predict: "
            "mark the tokens of the response alone, and let the prompt begin with a start token"
        )
    if not checks.is_traced((tokens, mask)):
        checks.ids("tokens", np.where(np.asarray(mask) > 0, tokens, 0), logits.shape[-1])
    return _of_marked(logits, tokens, mask, mean)


@partial(as_one, static_argnames="mean")
def _of_marked(logits: Array, tokens: Array, mask: Array, mean: bool) -> Float[Array, "*batch"]:
    targets, counts = tokens[..., 1:], mask[..., 1:] > 0
    known = (targets >= 0) & (targets < logits.shape[-1])
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    log_probs = jax.nn.log_softmax(jnp.where(counts[..., None], logits[..., :-1, :], 0).astype(dtype))
    entries = jnp.take_along_axis(log_probs, jnp.where(counts & known, targets, 0)[..., None], axis=-1)[..., 0]
    sums = jnp.sum(jnp.where(counts, jnp.where(known, entries, jnp.nan), 0), axis=-1)
    sums = jnp.where(mask[..., 0] > 0, jnp.nan, sums)
    return sums / jnp.maximum(jnp.sum(counts, axis=-1), 1) if mean else sums
