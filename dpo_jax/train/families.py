"""Which objective fits a loss, from the signature of the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from dpo_jax.losses.structure import name_of

_FITTING = {
    ("policy", "reference"): "use train.preference_objective",
    ("policy",): "use train.reference_free_objective",
    ("rewards",): "use train.reference_free_objective",
    ("policy", "reference", "desirable"): "use train.unpaired_objective",
    ("logps", "old_logps", "advantages"): "use train.policy_gradient_objective",
    ("logps", "advantages"): "use train.policy_gradient_objective and a function that drops the old log-probabilities",
    ("values", "old_values", "returns"): "it is the loss of a value function, which rlhf.ppo adds",
}
_BY_NUMBER = {
    1: "use train.reference_free_objective",
    2: "use train.preference_objective",
    3: "use train.unpaired_objective for labels, or train.policy_gradient_objective for rollouts",
}


def check_call(loss: Callable[..., Array], wanted: tuple[str, ...], hyperparameters: dict[str, Any]) -> None:
    """The loss can be called with the arrays that an objective has, and with these hyperparameters.

    Args:
      loss: a loss, perhaps a partial or a wrapper.
      wanted: names of the arrays that the objective passes by position.
      hyperparameters: passed by name.

    Raises:
      TypeError: the loss is of another family (the message names the objective that fits), or a hyperparameter is
        missing or unknown.
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function, such as losses.dpo_loss, got {loss!r}")
    name, parameters = name_of(loss), inspect.signature(loss).parameters.values()
    free = [p for p in parameters if p.name not in hyperparameters]
    by_position, required = _by_position(free), arrays_of(loss, hyperparameters)
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    possible = len(required) <= len(wanted) and (any_number or len(wanted) <= len(by_position))
    if not possible or (required != wanted and required in _FITTING and not any_number):
        fitting = _FITTING.get(required) or _BY_NUMBER.get(len(required))
        raise TypeError(
            f"{name} is called with ({', '.join(wanted)}) by this objective, but takes ({', '.join(required)})"
            + (f": {fitting}" if fitting else "")
        )
    if missing := [p.name for p in free if p.kind is p.KEYWORD_ONLY and p.default is p.empty]:
        raise TypeError(
            f"{name} needs {', '.join(missing)}: give the objective a value for this hyperparameter by name"
        )
    known = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name not in required[: len(wanted)]]
    unknown = sorted(hyperparameters.keys() - set(known))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        raise TypeError(f"{name} has no hyperparameter {', '.join(unknown)}; it takes {', '.join(taken) or 'none'}")


def arrays_of(loss: Callable[..., Array], hyperparameters: dict[str, Any]) -> tuple[str, ...]:
    """Names of the arrays that a loss needs by position."""
    free = [p for p in inspect.signature(loss).parameters.values() if p.name not in hyperparameters]
    return tuple(p.name for p in _by_position(free) if p.default is p.empty)


def _by_position(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
