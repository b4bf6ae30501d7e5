"""Functions for on-policy learners: draw prompts, sample responses, judge them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from dpo_jax import checks
from dpo_jax.toy.policy import generate, lookup, table_fn
from dpo_jax.toy.world import World, preference_probability
from dpo_jax.types import AskFn, Numeric, Params, PreferenceFn, RespondFn, Responses, RewardFn


def ask_uniformly(world: World, *, num: int) -> AskFn:
    """The function `key -> [num]` that draws uniform prompts."""
    checks.size("num", num)
    return lambda key: jax.random.randint(key, (num,), 0, world.num_prompts)


def ask_everything(world: World) -> AskFn:
    """The function `key -> [prompts]` that asks each prompt once, for any key."""
    return lambda _: jnp.arange(world.num_prompts)


def respond_fn(
    policy: nn.Module,
    embeddings: Float[Array, "prompts features"],
    *,
    group_size: int,
    reference_log_probs: Float[Array, "prompts responses"] | None = None,
    mix: Numeric = 0.0,
) -> RespondFn:
    r"""The function `(key, params, prompts) -> Responses` that samples a group of responses to each prompt.

    .. math:: y \sim \frac{1}{Z}\, \pi(y|x)^{1 - m}\, \pi_{ref}(y|x)^m

    Args:
      policy: the network that responds.
      embeddings: its input for each prompt.
      group_size: number of responses to each prompt; static.
      reference_log_probs: table of a reference policy, to be mixed in; `None` if there is none.
      mix: :math:`m`, weight of the reference, between 0 and 1.

    Raises:
      TypeError, ValueError: an argument is not as described, or a mix has no reference.
    """
    checks.size("group_size", group_size)
    checks.interval("mix", mix, "[0, 1]")
    if reference_log_probs is None and (checks.is_traced(mix) or mix):
        raise ValueError("mix needs a reference to mix in")
    table = table_fn(policy, embeddings)

    def respond(key: Key[Array, ""], params: Params, prompts: Int[Array, " n"]) -> Responses:
        log_probs = table(params)
        if reference_log_probs is not None:
            log_probs = geometric_mixture(log_probs, reference_log_probs, mix)
        groups = jnp.broadcast_to(prompts[:, None], (*prompts.shape, group_size))
        return Responses(generate(key, log_probs, groups))

    return respond


def enumerate_fn(policy: nn.Module, embeddings: Float[Array, "prompts features"]) -> RespondFn:
    """The function `(key, params, prompts) -> Responses` that gives every response, weighted by its probability.

    Learners then use exact expectations instead of samples.
    """
    table = table_fn(policy, embeddings)

    def respond(_: Key[Array, ""], params: Params, prompts: Int[Array, " n"]) -> Responses:
        log_probs = table(params)
        num_prompts, num_responses = log_probs.shape
        checks.ids("prompts", prompts, num_prompts)
        every = jnp.broadcast_to(jnp.arange(num_responses), (*prompts.shape, num_responses))
        weighed = log_probs.at[prompts].get(mode="fill", wrap_negative_indices=False)
        return Responses(every, jax.lax.stop_gradient(num_responses * jnp.exp(weighed)))

    return respond


def reward_fn(rewards: Float[Array, "prompts responses"]) -> RewardFn:
    """The function `(prompts, responses) -> rewards` of a table: true rewards, or those of a reward model."""
    return lambda prompts, responses: lookup(rewards, prompts, responses)


def preference_fn(
    rewards: Float[Array, "prompts responses"], *, temperature: Numeric = 1.0, flip_probability: Numeric = 0.0
) -> PreferenceFn:
    """The function `(prompts, responses, others) -> probabilities` of people who judge by rewards.

    Args:
      rewards: the table they judge by: true rewards, or those of a reward model.
      temperature, flip_probability: see `preference_probability`.
    """

    def prefer(prompts: Array, responses: Array, others: Array) -> Array:
        return preference_probability(
            *lookup(rewards, prompts, (responses, others)), temperature=temperature, flip_probability=flip_probability
        )

    return prefer


def general_preference_fn(preference: Float[Array, "prompts responses responses"]) -> PreferenceFn:
    """The function `(prompts, responses, others) -> probabilities` of any preference, even a cyclic one.

    Args:
      preference: the probability that the response of the row is preferred to that of the column; transposed entries
        add up to 1.

    Raises:
      ValueError: they do not (checked unless traced).
    """
    check_preference(preference)
    preference = jnp.asarray(preference)
    num_prompts, num_responses, _ = preference.shape

    def prefer(prompts: Array, responses: Array, others: Array) -> Array:
        checks.ids("prompts", prompts, num_prompts)
        checks.ids("responses", responses, num_responses)
        checks.ids("others", others, num_responses)
        checks.same_shape(prompts=prompts, responses=responses, others=others)
        return preference.at[prompts, responses, others].get(mode="fill", wrap_negative_indices=False)

    return prefer


def geometric_mixture(
    log_probs: Float[Array, "*n responses"], reference_log_probs: Float[Array, "*n responses"], share: Numeric
) -> Float[Array, "*n responses"]:
    r"""Log-probabilities of :math:`\pi^{1 - m} \pi_{ref}^m / Z`; a policy with weight 0 has no effect.

    Args:
      log_probs: table of a policy (nats).
      reference_log_probs: table of the policy that is mixed in.
      share: :math:`m`, the weight of the reference, between 0 and 1.
    """
    own = jnp.where(share == 1, 0.0, (1 - share) * log_probs)
    other = jnp.where(share == 0, 0.0, share * reference_log_probs)
    return jax.nn.log_softmax(own + other)


def check_preference(preference: Float[Array, "*n responses responses"]) -> None:
    """Each pair of responses has probabilities that add up to 1."""
    checks.interval("preference", preference, "[0, 1]")
    if checks.is_traced(preference):
        return
    table = np.asarray(preference)
    if not np.allclose(table + np.swapaxes(table, -1, -2), 1.0, rtol=0, atol=1e-5):
        raise ValueError("preference[..., i, j] + preference[..., j, i] must be 1 for all i and j")
