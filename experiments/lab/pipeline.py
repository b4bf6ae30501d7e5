"""The standard experiment: a world, supervised fine-tuning, comparisons, training by a preference loss, exact measures.

Its numbers are those of the PyTorch tutorial that this project reimplements. They stand in `Pipeline`, once; tests shrink
them. `Pipeline.prepare` makes what all runs of a seed share, for `sweep.grid(..., prepare=...)`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float, Key

from dpo_jax import toy
from dpo_jax.types import Metrics, Params, Preferences

BETA = 0.1
BETAS = (0.01, 0.1, 0.5, 2.0)

Table = Float[Array, "prompts responses"]


class TrainedPolicy(NamedTuple):
    """What training made, and how good it is.

    Attributes:
      params: the network's parameters.
      history: for each metric an array `[epochs]`.
      log_probs: the policy as a table (nats).
      expected_reward: exact, for each prompt.
      sampled_reward: the mean over sampled responses, for each prompt, as in the tutorial.
    """

    params: Params
    history: Metrics
    log_probs: Table
    expected_reward: Float[Array, " prompts"]
    sampled_reward: Float[Array, " prompts"]


class Start(NamedTuple):
    """What every run of one seed starts from.

    Attributes:
      key: for what comes next.
      world: prompts, responses and true rewards.
      sft: the policy after supervised fine-tuning; the reference.
      preferences: human comparisons, with their log-probabilities under the reference.
    """

    key: Key[Array, ""]
    world: toy.World
    sft: TrainedPolicy
    preferences: Preferences


@dataclass(frozen=True)
class Pipeline:
    """The sizes of the standard experiment.

    Attributes:
      num_prompts, num_responses: of the world.
      num_demonstrations: what SFT imitates.
      sft_epochs, sft_batch_size, sft_learning_rate: of SFT.
      num_comparisons: 1,800; the tutorial draws 2,000 pairs and drops those of a response with itself, a tenth.
      num_epochs, batch_size, learning_rate: of preference optimization.
      num_samples: responses to each prompt for sampled rewards.
    """

    num_prompts: int = 5
    num_responses: int = 10
    num_demonstrations: int = 500
    sft_epochs: int = 100
    sft_batch_size: int = 32
    sft_learning_rate: float = 1e-2
    num_comparisons: int = 1800
    num_epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 1e-3
    num_samples: int = 200

    @property
    def policy(self) -> toy.ToyLM:
        """The network."""
        return toy.ToyLM(num_responses=self.num_responses)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of preference optimization in each epoch, whatever the data."""
        return -(-self.num_comparisons // self.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of preference optimization."""
        return self.steps_per_epoch * self.num_epochs
