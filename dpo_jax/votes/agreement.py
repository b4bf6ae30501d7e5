"""How far judges agree."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dpo_jax.votes.strengths import Votes


class Agreement(NamedTuple):
    """How often each judge voted as other judges did on the same two responses to the same prompt.

    Attributes:
      pairs: the number of pairs of a vote of this judge and one of another judge that can be compared.
      agreement: the share of them that are the same: same response, or both a tie; NaN if there are none.
      overall: the share among all pairs of votes of different judges.
    """

    pairs: Int[np.ndarray, " judges"]
    agreement: Float[np.ndarray, " judges"]
    overall: float


def agreement(votes: Votes, judges: Any, prompts: Any = None) -> Agreement:
    """Compares each judge with the others.

    Args:
      votes: the votes.
      judges: the id of the judge of each vote.
      prompts: the id of the prompt of each vote; `None` if there is one prompt.
    """
    chosen, rejected = (np.asarray(side, np.int64) for side in votes.responses)
    judges = np.asarray(judges, np.int64)
    low, high = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    pair = low * (high.max() + 1) + high
    prompt = np.zeros_like(low) if prompts is None else np.asarray(prompts, np.int64)
    verdict = (chosen > rejected).astype(np.int64)
    if votes.ties is not None:
        verdict = np.where(votes.ties, 2, verdict)
    num_judges = int(judges.max()) + 1

    def others(*columns: np.ndarray) -> np.ndarray:
        """For each vote, the number of votes of other judges that share all columns."""
        ids, own = np.zeros_like(judges), np.zeros_like(judges)
        for column in columns:
            _, ids = np.unique(ids * (column.max() + 1) + column, return_inverse=True)
        _, own = np.unique(ids * num_judges + judges, return_inverse=True)
        return np.bincount(ids)[ids] - np.bincount(own)[own]

    pairs = np.bincount(judges, others(pair, prompt), num_judges)
    agreed = np.bincount(judges, others(pair, prompt, verdict), num_judges)
    shares = np.divide(agreed, pairs, out=np.full(num_judges, np.nan), where=pairs > 0)
    return Agreement(pairs.astype(int), shares, float(agreed.sum() / pairs.sum()) if pairs.any() else float("nan"))
