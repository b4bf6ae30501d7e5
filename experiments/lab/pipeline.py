"""The tutorial's experiment as pure functions, with its numbers in one place.

    world -> demonstrations -> SFT policy -> comparisons -> training by a loss -> exact evaluation

`Pipeline.start` is everything up to the SFT policy; it depends on the key alone, so sweeps make it once for each seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from jaxtyping import Array, Float, Key

from dpo_jax import losses, toy, train
from dpo_jax.types import LogProbFn, Metrics, Numeric, Objective, Params, Preferences

BETA = 0.1
BETAS = (0.01, 0.1, 0.5, 2.0)
POLICY = toy.ToyLM(num_responses=10)


class Start(NamedTuple):
    """What all runs of one seed start from.

    Attributes:
      key: for all that follows.
      world: prompts, responses and true rewards.
      params: parameters of the SFT policy, the reference.
      log_probs: its table.
      history: of SFT.
    """

    key: Key[Array, ""]
    world: toy.World
    params: Params
    log_probs: Float[Array, "prompts responses"]
    history: Metrics


@dataclass(frozen=True)
class Pipeline:
    """The steps of the experiment, and the tutorial notebook's numbers.

    Attributes:
      make_world: from a key to a world: prompts, responses and rewards; see `toy.World`.
      policy: the network.
      demonstrator: from a world to the table of the policy that demonstrates; `None` demonstrates good responses in
        proportion to their reward.
      num_demonstrations: of how many demonstrations SFT learns.
      num_preferences: how many comparisons are made. The notebook draws 2,000 pairs and drops the tenth of them that
        pairs a response with itself.
      sft_epochs, sft_batch_size, sft_learning_rate: of SFT.
      num_epochs, batch_size, learning_rate: of training on comparisons.
    """

    make_world: Callable[[Key[Array, ""]], toy.World] = toy.make_world
    policy: nn.Module = POLICY
    demonstrator: Callable[[toy.World], Float[Array, "prompts responses"]] | None = None
    num_demonstrations: int = 500
    num_preferences: int = 1800
    sft_epochs: int = 100
    sft_batch_size: int = 32
    sft_learning_rate: float = 1e-2
    num_epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 1e-3

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.num_preferences // self.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of training on comparisons."""
        return self.num_epochs * self.steps_per_epoch

    def log_prob(self, world: toy.World) -> LogProbFn:
        """Scores responses: `(params, prompts, responses) -> log-probabilities`."""
        return toy.log_prob_fn(self.policy, world.embeddings)

    def table(self, world: toy.World) -> Callable[[Params], Float[Array, "prompts responses"]]:
        """The function from parameters to a table of log-probabilities."""
        return toy.table_fn(self.policy, world.embeddings)

    def start(self, key: Key[Array, ""]) -> Start:
        """Makes a world, and a policy that imitates demonstrations."""
        world_key, demonstration_key, init_key, fit_key, rest = jax.random.split(key, 5)
        world = self.make_world(world_key)
        shown = None if self.demonstrator is None else self.demonstrator(world)
        params, history = train.fit(
            fit_key,
            self.policy.init(init_key, world.embeddings),
            toy.sample_demonstrations(demonstration_key, world, num=self.num_demonstrations, log_probs=shown),
            objective=train.sft_objective(self.log_prob(world)),
            optimizer=optax.adam(self.sft_learning_rate),
            num_epochs=self.sft_epochs,
            batch_size=self.sft_batch_size,
        )
        return Start(rest, world, params, self.table(world)(params), history)

    def comparisons(self, key: Key[Array, ""], start: Start, **judged: Any) -> Preferences:
        """Comparisons that carry their log-probabilities under the SFT policy; see `toy.sample_preferences`."""
        pairs = toy.sample_preferences(key, start.world, num=self.num_preferences, **judged)
        return train.with_reference(self.log_prob(start.world), start.params, pairs)

    def fit(
        self,
        key: Key[Array, ""],
        params: Params,
        data: Any,
        *,
        objective: Objective,
        learning_rate: Numeric | None = None,
        evaluate: Callable[[Params], Metrics] | None = None,
    ) -> tuple[Params, Metrics]:
        """Trains for the pipeline's number of optimizer steps, in larger batches if there are more data."""
        return train.fit(
            key,
            params,
            data,
            objective=objective,
            optimizer=optax.adam(self.learning_rate if learning_rate is None else learning_rate),
            num_epochs=self.num_epochs,
            batch_size=max(1, len(data.prompts) * self.batch_size // self.num_preferences),
            evaluate=evaluate,
        )

    def dpo(
        self,
        key: Key[Array, ""],
        start: Start,
        pairs: Preferences,
        beta: Numeric,
        learning_rate: Numeric | None = None,
    ) -> tuple[Params, Metrics]:
        """Direct Preference Optimization from the SFT policy, evaluated exactly after each epoch."""
        objective = train.preference_objective(self.log_prob(start.world), losses.dpo_loss, beta=beta)
        return self.fit(
            key,
            start.params,
            pairs,
            objective=objective,
            learning_rate=learning_rate,
            evaluate=partial(self.evaluate, start),
        )

    def evaluate(self, start: Start, params: Params) -> Metrics:
        """Exact expected reward and KL to the SFT policy, means over prompts."""
        return toy.evaluate(self.table(start.world)(params), start.log_probs, start.world.rewards)


TUTORIAL = Pipeline()
"""With the tutorial's numbers."""
