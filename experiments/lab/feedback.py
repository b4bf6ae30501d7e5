"""What people say about responses: settings, and feedback of three kinds, drawn when it is asked for."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from dpo_jax import toy, train
from dpo_jax.types import Labels, Numeric, Preferences
from experiments.lab.pipeline import Pipeline, Start

NUM_RANKED = 4


class Setting(NamedTuple):
    """How feedback arises. All numbers may be traced.

    Attributes:
      judge_temperature, flip_probability: how people judge, see `toy.preference_probability`.
      on_policy: 1 if they judge responses of the SFT policy, 0 if they judge uniform ones.
    """

    judge_temperature: Numeric = 1.0
    flip_probability: Numeric = 0.0
    on_policy: Numeric = 0.0


SETTINGS = {
    "clean": Setting(),
    "noisy": Setting(flip_probability=0.2),
    "deterministic": Setting(judge_temperature=0.0),
    "on-policy": Setting(on_policy=1.0),
}
"""People judge by the Bradley-Terry model; a fifth of their labels is flipped; they are always right; they judge
responses of the SFT policy."""


def coin_tosses(setting: Setting) -> Setting:
    """The same responses with coin tosses for labels: a control."""
    return Setting(flip_probability=0.5, on_policy=setting.on_policy)


@dataclass(frozen=True)
class Feedback:
    """What people say in one world, with log-probabilities under the SFT policy.

    Attributes:
      pipeline: how many comparisons there are.
      key: for all kinds of feedback; each kind uses its own part of it.
      start: the world and the SFT policy.
      setting: how people judge.
    """

    pipeline: Pipeline
    key: Key[Array, ""]
    start: Start
    setting: Setting

    def pairs(self) -> Preferences:
        """Comparisons of two responses."""
        return self.pipeline.comparisons(self._key(0), self.start, **self._judged)

    def labels(self) -> Labels:
        """Single responses, called good or bad: twice as many as comparisons."""
        num = 2 * self.pipeline.num_preferences
        return self._scored(toy.sample_labels(self._key(1), self.start.world, num=num, **self._judged))

    def rankings(self) -> Preferences:
        """Rankings of four responses: a third as many as comparisons."""
        num = self.pipeline.num_preferences // (NUM_RANKED - 1)
        judged = {"num_ranked": NUM_RANKED, **self._judged}
        return self._scored(toy.sample_rankings(self._key(2), self.start.world, num=num, **judged))

    def split_pairs(self) -> Labels:
        """The comparisons read as labels."""
        return toy.split_pairs(self.pairs())

    def _key(self, kind: int) -> Key[Array, ""]:
        return jax.random.fold_in(self.key, kind)

    @property
    def _judged(self) -> dict[str, Any]:
        return {
            "log_probs": jax.nn.log_softmax(self.setting.on_policy * self.start.log_probs),
            "temperature": self.setting.judge_temperature,
            "flip_probability": self.setting.flip_probability,
        }

    def _scored(self, data: Any) -> Any:
        return train.with_reference(self.pipeline.log_prob(self.start.world), self.start.params, data)
