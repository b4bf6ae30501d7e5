"""What commands that tune language models share: objectives, an optimizer, held-out pairs."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from dpo_jax import checks, lm
from dpo_jax.types import LogProbFn, Objective, Pair, Params
from experiments.lab.methods import METHODS, OF_TOKENS, RANKED, UNPAIRED, Method, Setup

OF_MEANS = ("simpo", "alphapo", "orpo")
"""Losses that take means over tokens."""

OF_LABELS = ("kto", "bco", "unpaired apo-zero")
OF_RANKINGS = ("plackett-luce of 4",)

FAILURES = (TypeError, ValueError, OSError, FloatingPointError, lm.UntrainedError)
"""What ends a command with one line: bad input, a full disk, training that does not work."""

OF_LANGUAGE = {method.name: method for method in METHODS if method.name in {*OF_TOKENS, *OF_LABELS, *OF_RANKINGS}}
"""Losses that tune language models: those that need nothing but log-probabilities of responses."""


def model_and_text(folder: Path, **options: Any) -> tuple[lm.LanguageModel, lm.Text]:
    """A model and its tokenizer; see `lm.load`.

    Raises:
      ValueError: there is no tokenizer.
    """
    model = lm.load(folder, **options)
    if model.text is None:
        raise ValueError(f"{folder} has no tokenizer.json")
    return model, model.text


def is_kto(method: Method) -> bool:
    """Whether a method is the library's KTO; a function of that name is not."""
    return method is OF_LANGUAGE["kto"]


def takes_means(method: Method, mean: bool | None) -> bool:
    """Whether a method takes means over tokens: as asked, or as its paper does."""
    return any(method is OF_LANGUAGE[name] for name in OF_MEANS) if mean is None else mean


def hyperparameters_of(method: Method, fixed: Mapping[str, float], others: Collection[Method] = ()) -> dict[str, float]:
    """The hyperparameters of a method: usual ones, and those of the user that it takes.

    Those that none of the methods must have are given to all: a loss says itself what it does not know.
    """
    of_others = {name for other in others for name in other.ranges} - {*method.ranges}
    known = {**method.usual, **fixed}
    return {name: value for name, value in known.items() if name in {*method.ranges, *fixed} - of_others}


def kind_of_data(method: Method) -> str:
    """What a method learns from."""
    if is_kto(method):
        return "labels with mismatched responses"
    return {RANKED: "rankings", UNPAIRED: "labels"}.get(method.family, "pairs")


def read(method: Method, path: Path, text: lm.Text, *, max_length: int, key: Key[Array, ""]) -> tuple[Any, lm.Report]:
    """The data of a file that a method learns from, and the report."""
    kind = kind_of_data(method)
    if kind == "pairs":
        return lm.read_preferences(path, text, max_length=max_length)
    if kind == "rankings":
        return lm.read_rankings(path, text, max_length=max_length)
    labels, report = lm.read_labels(path, text, max_length=max_length)
    return lm.with_mismatched(key, labels) if is_kto(method) else labels, report


def objective_of(method: Method, h: Mapping[str, float]) -> Callable[..., Objective]:
    """Makes the objective of a method that needs nothing but log-probabilities."""

    def make(log_prob: LogProbFn, **varied: Any) -> Objective:
        nothing: Any = None
        setup = Setup(jax.random.key(0), log_prob, nothing, nothing, nothing)
        return method.objective(setup, {**h, **varied})

    kto: Any = partial(lm.kto_objective, **h)  # type: ignore[arg-type]
    return kto if is_kto(method) else make


def optimizer_of(learning_rate: Any, num_steps: int) -> optax.GradientTransformation:
    """Adam with a short warm-up, a cosine to zero, and gradients of at most norm 1; the rate may be traced."""
    shape = optax.warmup_cosine_decay_schedule(0.1, 1.0, max(1, num_steps // 20), max(2, num_steps))
    descent = optax.scale_by_learning_rate(lambda step: learning_rate * shape(step))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), descent)


def split(key: Key[Array, ""], data: Any, *, held_out: float, at_most: int | None) -> tuple[Any, Any]:
    """Rows to train on, and a share of them that is held out. Rows of equal prompts stay together.

    Raises:
      ValueError: an argument is out of range, or too few rows would be left on a side.
    """
    checks.interval("--held-out", held_out, "(0, 1)")
    if at_most is not None:
        checks.size("--max-rows", at_most)
    order = np.asarray(jax.random.permutation(key, len(data.prompts)))[:at_most]
    prompts = [np.asarray(data.prompts[row]).tobytes() for row in order]
    counts = Counter(prompts)  # in the order of the rows
    before = np.cumsum([0, *counts.values()])
    chosen = {prompt for prompt, num in zip(counts, before, strict=False) if num < round(held_out * len(order))}
    is_out = np.array([prompt in chosen for prompt in prompts])
    if is_out.sum() < 2 or is_out.all():
        raise ValueError(f"--held-out: {held_out} of {len(order)} rows leaves too few to judge or to train on")
    rest, out = (jax.tree.map(lambda leaf, rows=rows: leaf[rows], data) for rows in (order[~is_out], order[is_out]))
    return rest, out


def judged(make: Any, data: Any, logps: Any) -> dict[str, dict[str, float]]:
    """Means over held-out rows, with their standard errors.

    Raises:
      FloatingPointError: a loss is not finite.
    """
    rows = lm.evaluate_rows(make, data, logps)
    if wrong := int(np.sum(~np.isfinite(rows["loss"]))):
        raise FloatingPointError(f"the loss of {wrong} of {len(rows['loss'])} held-out rows is NaN or infinite")
    lengths = {f"{name}_tokens": np.sum(tokens >= 0, axis=1) for name, tokens in _named(data.responses).items()}
    return {name: lm.mean_and_stderr(values) for name, values in {**rows, **lengths}.items()}


def _named(responses: Any) -> dict[str, Any]:
    """The responses of rows, by what they are called."""
    if isinstance(responses, lm.Matched):
        return {"response": responses.own}
    if isinstance(responses, Pair):
        return responses._asdict()
    if isinstance(responses, tuple):
        return {f"response_{i}": tokens for i, tokens in enumerate(responses, start=1)}
    return {"response": responses}


def within_prompts(values: Float[np.ndarray, "prompts samples"]) -> dict[str, float]:
    """The mean over samples for given prompts, which count equally, and its standard error."""
    values = np.asarray(values, np.float64)
    error = np.sqrt(values.var(axis=1, ddof=1).mean() / values.size)
    return {"mean": float(values.mean()), "stderr": float(error)}


def answers(
    key: Key[Array, ""],
    model: lm.LanguageModel,
    params: Params,
    prompts: Int[np.ndarray, "prompts length"],
    *,
    max_tokens: int,
    num: int = 1,
) -> lm.Generated:
    """What a policy writes to each prompt (`lm.generate_fn`), by one program for all policies of a model."""
    stops = tuple(sorted(model.text.stops))  # type: ignore[union-attr]
    return _writer(model.decoder, max_tokens, stops, num, int(np.sum(prompts >= 0)))(key, params, jnp.asarray(prompts))


def kl_along(
    model: lm.LanguageModel,
    params: Params,
    prompts: Int[np.ndarray, "n length"],
    tokens: Int[Array, "n max_tokens"],
) -> Float[np.ndarray, " n"]:
    """KL of a policy to a model (nats) along answers, by one program for all policies. See `lm.kl_fn`."""
    longest = lm.capacity_of(prompts, np.zeros(tokens.shape, np.int32))
    return np.asarray(_kl(model.decoder, longest)(params, model.params, jnp.asarray(prompts), tokens))


@cache
def _writer(decoder: lm.Decoder, max_tokens: int, stops: tuple[int, ...], num: int, prompt_tokens: int) -> Any:
    write = lm.generate_fn(decoder, max_tokens=max_tokens, stops=stops, group_size=num, prompt_tokens=prompt_tokens)
    return jax.jit(write, compiler_options=lm.precise_options())


@cache
def _kl(decoder: lm.Decoder, capacity: lm.Capacity) -> Any:
    return jax.jit(lm.kl_fn(decoder, capacity=capacity), compiler_options=lm.precise_options())
