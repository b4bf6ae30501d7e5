"""Every way to learn from feedback that the library has, as one list: a loss, its data, and its hyperparameters."""

import difflib
import inspect
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dpo_jax import losses, toy, train
from dpo_jax.types import LogProbFn, Numeric, Objective, Params, Preferences
from experiments.lab.feedback import Feedback
from experiments.lab.pipeline import Start
from experiments.lab.tuning import Range

Hyperparameters = Mapping[str, Numeric]


class Setup(NamedTuple):
    """What a method may use besides its hyperparameters.

    Attributes:
      key: for methods that are random.
      log_prob: scores responses.
      table: the function from parameters to a table of log-probabilities.
      reference_params: parameters of the SFT policy.
      reference_log_probs: its table.
    """

    key: Key[Array, ""]
    log_prob: LogProbFn
    table: Callable[[Params], Float[Array, "prompts responses"]]
    reference_params: Params
    reference_log_probs: Float[Array, "prompts responses"]


@dataclass(frozen=True)
class Method:
    """A way to learn from feedback.

    Attributes:
      name: of the loss, mostly.
      family: the kind of its input, or what it adds to a loss.
      objective: from a setup and hyperparameters to an objective.
      ranges: the hyperparameters to tune, and where; the learning rate, which all methods tune, is not among them.
      optional: hyperparameters that have a default in the loss and are not tuned.
      data: which feedback it learns from.
      initial: from a key and a start to the parameters that training starts from.
    """

    name: str
    family: str
    objective: Callable[[Setup, Hyperparameters], Objective]
    ranges: Mapping[str, Range]
    data: Callable[[Feedback], Any] = Feedback.pairs
    initial: Callable[[Key[Array, ""], Start], Params] = lambda _, start: start.params
    optional: tuple[str, ...] = ()

    @property
    def usual(self) -> dict[str, float]:
        """Values of hyperparameters where nobody chose; none for a loss of your own."""
        return {name: own.usual for name, own in self.ranges.items() if own.usual is not None}


MARGIN, BOTH_RATIOS, BATCH, RANKED = "margin", "both log-ratios", "batch statistics", "rankings"
REFERENCE_FREE, UNPAIRED, ADDITION = "reference-free", "single responses", "with an addition"

BETA = Range(0.003, 30.0)
UNKNOWN = Range(0.01, 10.0)
"""For hyperparameters of which nothing is known."""
SMOOTHING = Range(0.003, 0.45, usual=0.1)
SFT_WEIGHT = Range(1e-5, 3.0, usual=1.0)
TARGET_MARGIN = Range(0.01, 3.0, usual=0.1)


def of_loss(
    name: str, family: str, objective_of: Any, loss: Any, ranges: Mapping[str, Range], data: Any = Feedback.pairs
) -> Method:
    """A method that is a loss and its hyperparameters; `objective_of` is a function of `train`."""

    def objective(setup: Setup, h: Hyperparameters) -> Objective:
        made: Objective = objective_of(setup.log_prob, loss, **h)
        return made

    parameters = inspect.signature(loss).parameters.values()
    optional = tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in ranges)
    return Method(name, family, objective, ranges, data, optional=optional)


def pairwise(name: str, loss: Any, family: str = MARGIN, **ranges: Range) -> Method:
    """A method whose loss takes policy and reference, and nothing but tuned hyperparameters."""
    return of_loss(name, family, train.preference_objective, loss, {"beta": BETA, **ranges})


def reference_free(name: str, loss: Any, **ranges: Range) -> Method:
    """A method whose loss takes the policy alone."""
    return of_loss(name, REFERENCE_FREE, train.reference_free_objective, loss, ranges)


def method_of(name: str, loss: Callable[..., Array]) -> Method:
    """A method made of your own loss, by its positional arguments; its keyword arguments are hyperparameters.

    Args:
      name: of the method.
      loss: `(policy, reference, *, beta, ...)` of pairs, `(policy, *, ...)` without a reference, or
        `(policy, reference, desirable, *, beta, ...)` of single responses. Hyperparameters with a default are optional.

    Raises:
      TypeError: it takes something else.
    """
    parameters = inspect.signature(loss).parameters.values()
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    keywords = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    ranges = {p.name: UNKNOWN for p in keywords if p.default is p.empty}
    if len(positional) == 1:
        return reference_free(name, loss, **ranges)
    if "beta" not in [p.name for p in keywords]:
        raise TypeError(f"{name} must take beta, as a keyword: it also scales the implicit rewards of the metrics")
    if len(positional) == 2:
        return pairwise(name, loss, "your own", **ranges)
    if len(positional) == 3:
        ranges = {"beta": UNKNOWN, **ranges}
        return of_loss(name, UNPAIRED, train.unpaired_objective, loss, ranges, Feedback.split_pairs)
    raise TypeError(
        f"{name} must take (policy), (policy, reference) or (policy, reference, desirable), and hyperparameters as "
        f"keywords; it takes ({', '.join(positional)})"
    )


def load_function(path: Path, name: str) -> Callable[..., Any]:
    """A function from a file.

    Raises:
      OSError: there is no such file.
      ValueError: the file cannot be run, or has no such function.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        found = runpy.run_path(str(path))
    except Exception as problem:
        raise ValueError(f"{path} cannot be run: {type(problem).__name__}: {problem}") from problem
    if not callable(found.get(name)):
        names = ", ".join(known for known, value in found.items() if callable(value) and not known.startswith("_"))
        raise ValueError(f"{path} has no function {name!r}; it has: {names or 'none'}")
    return found[name]


def kto(setup: Setup, h: Hyperparameters) -> Objective:
    """KTO with the reference point estimated from each batch."""
    point = train.batch_reference_point(setup.log_prob, setup.reference_params)
    return train.unpaired_objective(setup.log_prob, losses.kto_loss, reference_point=point, **h)


def kto_exact(setup: Setup, h: Hyperparameters) -> Objective:
    """KTO with the exact KL for its reference point."""

    def point(params: Params, *_: Any) -> Float[Array, ""]:
        kl = toy.kl_to_reference(setup.table(params), setup.reference_log_probs)
        return jnp.maximum(jnp.mean(kl), 0)

    return train.unpaired_objective(setup.log_prob, losses.kto_loss, reference_point=point, **h)


def bco(setup: Setup, h: Hyperparameters) -> Objective:
    """BCO of single responses with its running shift."""
    shift = train.running_shift(beta=h["beta"])
    return train.unpaired_objective(setup.log_prob, losses.bco_loss, shift=shift, **h)


def bco_pair(setup: Setup, h: Hyperparameters) -> Objective:
    """BCO of pairs with its running shift."""
    shift = train.running_shift(beta=h["beta"])
    return train.preference_objective(setup.log_prob, losses.bco_pair_loss, shift=shift, **h)


def beta_dpo(setup: Setup, h: Hyperparameters) -> Objective:
    """beta-DPO with its filter."""
    moments = train.running_margin_moments(setup.key)
    return train.preference_objective(setup.log_prob, losses.beta_dpo_loss, moments=moments, **h)


def rpo(setup: Setup, h: Hyperparameters) -> Objective:
    """DPO with an SFT term."""
    loss = losses.with_sft(losses.dpo_loss, weight=h["sft_weight"])
    return train.preference_objective(setup.log_prob, loss, beta=h["beta"])


def mpo(setup: Setup, h: Hyperparameters) -> Objective:
    """DPO, BCO and SFT in the proportions of the MPO paper."""
    terms = ((0.8, losses.dpo_loss), (0.2, partial(losses.bco_pair_loss, shift=0.0)))
    loss = losses.with_sft(losses.weighted_sum(*terms), weight=1.0)
    return train.preference_objective(setup.log_prob, loss, **h)


def wpo(setup: Setup, h: Hyperparameters) -> Objective:
    """DPO whose comparisons count as much as the policy would have written them."""

    def weights(params: Params, batch: Preferences, logps: Any) -> Float[Array, " batch"]:
        alignment = jax.nn.logsumexp(2 * setup.table(params), axis=-1)[batch.prompts]
        return losses.wpo_weights(logps, (alignment, alignment))

    return train.preference_objective(setup.log_prob, losses.with_weights(losses.dpo_loss), weights=weights, **h)


def tr_dpo(setup: Setup, h: Hyperparameters) -> Objective:
    """DPO whose reference follows the policy a little each step."""
    dpo = train.preference_objective(setup.log_prob, losses.dpo_loss, beta=h["beta"])
    return train.moving_reference(dpo, setup.log_prob, setup.reference_params, mix=h["mix"], steps_per_move=1)


def divergence(name: str, link: Any) -> Method:
    """DPO under another divergence than KL."""
    return pairwise(f"dpo with {name}", losses.with_divergence(losses.dpo_loss, link))


METHODS = (
    pairwise("dpo", losses.dpo_loss),
    pairwise("conservative dpo", losses.dpo_loss, label_smoothing=SMOOTHING),
    pairwise("robust dpo", losses.robust_dpo_loss, label_smoothing=SMOOTHING),
    pairwise("ipo", losses.ipo_loss),
    pairwise("hinge", losses.hinge_loss),
    pairwise("squared", losses.squared_loss),
    pairwise("truncated quadratic", losses.truncated_quadratic_loss),
    pairwise("exponential", losses.exponential_loss),
    pairwise("savage", losses.savage_loss),
    pairwise("exo", losses.exo_loss, label_smoothing=SMOOTHING),
    pairwise("discopop", losses.discopop_loss, temperature=Range(0.05, 1.0, usual=0.05)),
    pairwise("offset dpo", losses.offset_dpo_loss, offset=Range(-1.0, 1.0, linear=True, usual=0.0)),
    divergence("forward KL", losses.forward_kl),
    divergence("Jensen-Shannon", losses.jensen_shannon),
    divergence("alpha 0.5", losses.alpha_divergence(0.5)),
    pairwise("chi-po", losses.chi_po_loss, BOTH_RATIOS),
    pairwise("nca", losses.nca_loss, BOTH_RATIOS),
    pairwise("sppo", losses.sppo_loss, BOTH_RATIOS),
    pairwise("apo-zero", losses.apo_zero_loss, BOTH_RATIOS),
    pairwise("apo-down", losses.apo_down_loss, BOTH_RATIOS),
    pairwise("dpo-positive", losses.dpo_positive_loss, BOTH_RATIOS, penalty=Range(0.01, 10.0, usual=1.0)),
    Method("bco on pairs", BATCH, bco_pair, {"beta": BETA}),
    pairwise("aot", losses.aot_loss, BATCH),
    pairwise("unpaired aot", losses.aot_unpaired_loss, BATCH),
    Method("beta-dpo", BATCH, beta_dpo, {"beta": BETA, "alpha": Range(0.1, 2.0, usual=0.5)}),
    of_loss(
        "plackett-luce of 4",
        RANKED,
        train.preference_objective,
        losses.plackett_luce_loss,
        {"beta": BETA},
        Feedback.rankings,
    ),
    reference_free("simpo", losses.simpo_loss, beta=BETA, gamma=TARGET_MARGIN),
    reference_free(
        "alphapo", losses.alphapo_loss, beta=BETA, gamma=TARGET_MARGIN, alpha=Range(-1.0, 1.0, linear=True, usual=0.5)
    ),
    reference_free("cpo", losses.cpo_loss, beta=BETA, sft_weight=SFT_WEIGHT),
    reference_free("orpo", losses.orpo_loss, odds_weight=Range(0.03, 100.0, usual=0.1)),
    reference_free("unlikelihood", losses.unlikelihood_loss, alpha=Range(0.0, 1.0, linear=True, usual=0.5)),
    reference_free("preferred fine-tuning", losses.sft_loss),
    Method("kto", UNPAIRED, kto, {"beta": BETA}, Feedback.split_pairs),
    Method("kto with exact KL", UNPAIRED, kto_exact, {"beta": BETA}, Feedback.split_pairs),
    Method("kto on labels", UNPAIRED, kto, {"beta": BETA}, Feedback.labels),
    Method("bco", UNPAIRED, bco, {"beta": BETA}, Feedback.split_pairs),
    Method("bco on labels", UNPAIRED, bco, {"beta": BETA}, Feedback.labels),
    of_loss(
        "unpaired apo-zero",
        UNPAIRED,
        train.unpaired_objective,
        losses.apo_zero_unpaired_loss,
        {"beta": BETA},
        Feedback.split_pairs,
    ),
    Method("rpo", ADDITION, rpo, {"beta": BETA, "sft_weight": SFT_WEIGHT}),
    Method("mpo", ADDITION, mpo, {"beta": BETA}),
    Method("wpo", ADDITION, wpo, {"beta": BETA}),
    Method("tr-dpo", ADDITION, tr_dpo, {"beta": BETA, "mix": Range(0.0003, 0.3, usual=0.001)}),
)
"""All of them. Not here: what differs from DPO only where responses have more than one token (length-normalised and
length-regularised DPO, LD-DPO)."""

OF_PAIRS = {method.name: method for method in METHODS if method.data in (Feedback.pairs, Feedback.split_pairs)}
"""The losses that learn from comparisons of two responses."""

OF_TOKENS = {
    method.name: method for method in METHODS if method.data is Feedback.pairs and method.name not in ("wpo", "tr-dpo")
}
"""Those that need nothing but log-probabilities of the two responses, so that responses may be of any kind."""


def method_named(name: str, known: Mapping[str, Method]) -> tuple[str, Method]:
    """A loss of the library by its name, or a function in a file: `my_file.py:focal_loss`.

    Raises:
      OSError, TypeError, ValueError: there is no such loss or file, or the function is no loss.
    """
    if name in known:
        return name, known[name]
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return function, method_of(function, load_function(Path(path), function))
    if name.endswith(".py"):
        raise ValueError(f"--loss: name a function of the file, as in {name}:my_loss")
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}; or my_file.py:my_loss"
    raise ValueError(f"--loss: there is no {name!r}{meant}")
