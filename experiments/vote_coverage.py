"""How often 95 % intervals of strengths hold the truth: many simulated polls, each with a truth of its own.

Five responses have strengths from a standard normal distribution; votes fall on random pairs. Each poll is fitted, its
votes are redrawn and fitted again, and its curvature is inverted, as `fit_comparisons` does. Intervals are counted for
every strength and for every difference of two.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dpo_jax import sweep, votes
from dpo_jax.types import Pair
from experiments.lab import commands, console, devices, files, page

NUM_RESPONSES = 5
PAGE = Path(votes.__file__).with_name("README.md")
METHODS = {"bootstrap": "fits of redrawn votes", "curvature": "curvature of the likelihood"}


@dataclass(frozen=True)
class Options:
    """Counts how often 95 % intervals of strengths hold the truth."""

    num_polls: int = 1000
    """Simulated polls of each size."""
    num_votes: tuple[int, ...] = (50, 500, 5000)
    """Votes in a poll."""
    num_fits: int = 400
    """Fits of redrawn votes for each poll."""
    seed: int = 0
    """Decides everything that is random."""
    out: Path = Path("results/vote_coverage")
    """Folder for summary.json."""


def main(options: Options) -> None:
    """Simulates polls, counts the intervals that hold the truth, and saves the shares."""
    commands.check_seed(options.seed)
    commands.check_sizes(num_polls=options.num_polls, num_fits=options.num_fits, num_votes=min(options.num_votes))
    out = files.output_folder(options.out)
    devices.enable_compilation_cache()
    start = time.perf_counter()
    coverage = []
    keys = jax.random.split(jax.random.key(options.seed), len(options.num_votes))
    for num_votes, key in zip(options.num_votes, keys, strict=True):
        with console.progress(f"Polls of {num_votes} votes") as report:
            run = partial(poll, num_votes=num_votes, num_fits=options.num_fits)
            results = sweep.grid(run, key, num_seeds=options.num_polls, report=report)
        for name, held in results.items():
            method, what = str(name).split(" ", 1)
            coverage.append({"votes": num_votes, "method": method, "of": what, **share(held.values)})
    seconds = time.perf_counter() - start
    summary = {"num_polls": options.num_polls, "num_fits": options.num_fits, "seed": options.seed, "coverage": coverage}
    files.save_summary({**summary, **files.provenance(compile_and_run=seconds)}, out)
    columns, rows = table(coverage)
    console.print_table("How often 95 % intervals hold the truth", columns, rows)
    page.update({"vote_coverage": page.table(columns, rows)}, out, path=PAGE)


def poll(key: Key[Array, ""], *, num_votes: int, num_fits: int) -> dict[str, Float[Array, ""]]:
    """Shares of the intervals of one simulated poll that hold the truth."""
    truth_key, votes_key, refits_key = jax.random.split(key, 3)
    truth = jax.random.normal(truth_key, (NUM_RESPONSES,))
    kinds, counts, kind_of_vote = ballots(votes_key, truth, num_votes)
    fitted = votes.fit(kinds._replace(weights=counts), NUM_RESPONSES)

    def refit(key: Key[Array, ""]) -> Array:
        weights, virtual = votes.redraw(key, num_votes, NUM_RESPONSES)
        summed = jax.ops.segment_sum(weights, kind_of_vote, len(counts))
        return votes.fit(kinds._replace(weights=summed), NUM_RESPONSES, prior=virtual, start=fitted).strengths

    refits = jax.vmap(refit)(jax.random.split(refits_key, num_fits))
    covariance = votes.covariance(kinds._replace(weights=counts), NUM_RESPONSES, fitted)[:NUM_RESPONSES, :NUM_RESPONSES]
    found = {}
    for what, contrasts in (("strengths", jnp.eye(NUM_RESPONSES) - 1 / NUM_RESPONSES), ("differences", differences())):
        true, estimate = contrasts @ truth, contrasts @ fitted.strengths
        low, high = jnp.quantile(refits @ contrasts.T, jnp.array([0.025, 0.975]), axis=0)
        stderr = jnp.sqrt(jnp.einsum("cr,rs,cs->c", contrasts, covariance, contrasts))
        found[f"bootstrap {what}"] = jnp.mean((low <= true) & (true <= high))
        found[f"curvature {what}"] = jnp.mean(jnp.abs(estimate - true) <= 1.96 * stderr)
    return found


def ballots(key: Key[Array, ""], truth: Array, num_votes: int) -> tuple[votes.Votes, Array, Array]:
    """Votes between random pairs: the kinds of votes, how many there are of each, and the kind of each vote."""
    one_key, other_key, outcome_key = jax.random.split(key, 3)
    one = jax.random.randint(one_key, (num_votes,), 0, NUM_RESPONSES)
    other = (one + jax.random.randint(other_key, (num_votes,), 1, NUM_RESPONSES)) % NUM_RESPONSES
    won = jax.random.bernoulli(outcome_key, jax.nn.sigmoid(truth[one] - truth[other]))
    kind = jnp.where(won, one * NUM_RESPONSES + other, other * NUM_RESPONSES + one)
    pairs = jnp.arange(NUM_RESPONSES**2)
    kinds = votes.Votes(Pair(pairs // NUM_RESPONSES, pairs % NUM_RESPONSES))
    return kinds, jnp.bincount(kind, length=len(pairs)).astype(float), kind


def differences() -> Float[Array, "pairs responses"]:
    """A row for each pair of responses: 1 for the one, -1 for the other."""
    ones, others = jnp.triu_indices(NUM_RESPONSES, 1)
    return jnp.eye(NUM_RESPONSES)[ones] - jnp.eye(NUM_RESPONSES)[others]


def share(held: np.ndarray) -> dict[str, float]:
    """The mean over polls, and its standard error."""
    return {"mean": float(held.mean()), "stderr": float(held.std(ddof=1) / np.sqrt(held.size))}


def table(coverage: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The shares: a row for each kind of interval, a column for each number of votes."""
    sizes = list(dict.fromkeys(entry["votes"] for entry in coverage))
    cells = {
        (entry["method"], entry["of"], entry["votes"]): f"{entry['mean']:.1%} ± {entry['stderr']:.1%}"
        for entry in coverage
    }
    kinds = list(dict.fromkeys((entry["of"], entry["method"]) for entry in coverage))
    rows = [[f"{of}, by {METHODS[method]}", *(cells[method, of, size] for size in sizes)] for of, method in kinds]
    return ["interval of", *(f"{size:,} votes" for size in sizes)], rows


if __name__ == "__main__":
    main(commands.parse(Options))
