"""The frontier of the DPO paper on a laptop: a language model writes kinder film reviews, and how far it goes for that.

The model continues neutral openings of film reviews. Pairs of its own continuations are ordered by the sentiment of
their words (VADER, a lexicon). Adapters with several betas learn from these pairs, all in one program. Reward is the
sentiment of fresh continuations; KL to the model is summed over the vocabulary at every token that was written. Beside
them: best-of-n, and imitation of the preferred continuations. Source: Rafailov et al. 2023, figure 2, whose model, data
and classifier are larger.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jaxtyping import Float, Int

from dpo_jax import checks, figures, lm, losses, train
from dpo_jax.lm.preferences import padded
from dpo_jax.types import Demonstrations, Pair, Params, Preferences
from experiments.lab import commands, console, devices, files, page
from experiments.lab.language import FAILURES, answers, kl_along, model_and_text, optimizer_of, within_prompts

SUBJECTS = (
    "The film", "The movie", "This picture", "The first half", "The second half", "The story", "The plot", "The script",
    "The lead actor", "The director", "The camera work", "The music", "The ending", "The opening scene", "The dialogue",
    "The cast", "The pace", "The setting", "The sequel", "The remake",
)  # fmt: skip
VERBS = ("is", "seems to be", "turns out to be")
OPENINGS = tuple(f"{subject} {verb}" for subject in SUBJECTS for verb in VERBS)
"""Neutral beginnings of film reviews, 60 of them."""

BEST_OF = (2, 4, 8)


@dataclass(frozen=True)
class Options:
    """Reward against KL on a language model: DPO with several betas, best-of-n, imitation of what is preferred."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the model: config.json, model.safetensors, tokenizer.json."""
    beta: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """The betas to try, each with an adapter of its own."""
    learning_rate: float = 2e-3
    """Highest learning rate: the best of four for the top 8 layers, tried on other samples; all layers want less."""
    num_samples: int = 16
    """Continuations of each opening, of which pairs are made; best-of-n is estimated for n below it."""
    num_pairs: int = 500
    """Pairs to learn from."""
    num_fresh: int = 4
    """Continuations of each opening by which a policy is judged; at least 2, which tell how uncertain that is."""
    max_tokens: int = 24
    """Tokens of a continuation."""
    num_epochs: int = 1
    """Passes over the pairs."""
    batch_size: int = 8
    """Pairs per optimizer step."""
    lora_rank: int = 16
    """Rank of the adapters."""
    top_layers: int | None = 8
    """How many layers have adapters, from the last: those below are computed once for all adapters."""
    seed: int = 0
    """Decides everything random."""
    out: Path = Path("results/lm_sentiment")
    """Folder for checkpoints, the figure and summary.json."""


def sentiment() -> Callable[[str], float]:
    """The sentiment of a text, from -1 to 1 (VADER: Hutto and Gilbert 2014)."""
    with commands.clear_errors():
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise ValueError("this experiment needs a lexicon: pip install vaderSentiment") from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


@dataclass(frozen=True)
class Sampler:
    """What all policies are measured by.

    Attributes:
      model: the reference.
      prompts: tokens of the openings, `[openings, length]`.
      score: the reward of a text.
      max_tokens: of a continuation.
    """

    model: lm.LanguageModel
    prompts: Int[np.ndarray, "openings length"]
    score: Callable[[str], float]
    max_tokens: int

    def write(self, key: Any, params: Params, num: int) -> tuple[lm.Generated, Float[np.ndarray, "openings num"]]:
        """Continuations of each opening, and their rewards."""
        text: Any = self.model.text
        written = answers(key, self.model, params, self.prompts, max_tokens=self.max_tokens, num=num)
        tokens = np.asarray(written.tokens)
        scores = [self.score(text.decode([t for t in row if t >= 0], skip_special=True)) for row in tokens.tolist()]
        return written, np.array(scores).reshape(len(self.prompts), num)

    def measure(self, key: Any, params: Params, num: int) -> dict[str, Any]:
        """Reward and KL of a policy on fresh continuations, with standard errors; openings count equally."""
        written, rewards = self.write(key, params, num)
        kl = kl_along(self.model, params, np.repeat(self.prompts, num, axis=0), written.tokens).reshape(rewards.shape)
        example = self.model.text.decode([int(t) for t in written.tokens[0] if t >= 0])  # type: ignore[union-attr]
        return {"reward": within_prompts(rewards), "kl": within_prompts(kl), "example": example}


def ordered_pairs(
    key: Any,
    prompts: Int[np.ndarray, "openings _"],
    tokens: Int[np.ndarray, "openings num length"],
    scores: Float[np.ndarray, "openings num"],
    num: int,
) -> Preferences:
    """Pairs of continuations of one opening, the kinder one chosen; drawn from all that differ in sentiment.

    Raises:
      ValueError: there are fewer.
    """
    differ = np.argwhere(scores[:, :, None] > scores[:, None, :])  # opening, chosen, rejected
    if len(differ) < num:
        raise ValueError(f"only {len(differ)} pairs differ in sentiment: lower --num-pairs or raise --num-samples")
    opening, chosen, rejected = differ[np.asarray(jax.random.permutation(key, len(differ)))[:num]].T
    data: Any = Preferences(prompts[opening], Pair(tokens[opening, chosen], tokens[opening, rejected]))
    return data


def best_of(scores: Float[np.ndarray, "openings num"], num: int) -> dict[str, Any]:
    """The best of several samples: its expected sentiment, and the bound of its KL (Beirami et al. 2024).

    All subsets of the samples count: the best of a subset is the i-th smallest of all with probability
    (i - 1 choose n - 1) / (all choose n). The error is that for given openings, by the jackknife over samples.
    """

    def expected(scores: Float[np.ndarray, "openings _"]) -> Float[np.ndarray, " openings"]:
        size = scores.shape[1]
        chance = np.array([math.comb(i, num - 1) for i in range(size)]) / math.comb(size, num)
        return np.sort(scores, axis=1) @ chance

    size = scores.shape[1]
    without_one = np.array([expected(np.delete(scores, i, axis=1)) for i in range(size)])
    error = np.sqrt((size - 1) * without_one.var(axis=0).sum()) / len(scores)
    kl = float(np.log(num) - (num - 1) / num)
    reward = {"mean": float(expected(scores).mean()), "stderr": float(error)}
    return {"reward": reward, "kl": {"mean": kl, "stderr": 0.0}}


def main(options: Options) -> None:
    """Runs the command."""
    commands.check_seed(options.seed)
    names = ("num_samples", "num_pairs", "num_fresh", "max_tokens", "num_epochs", "batch_size", "lora_rank")
    commands.check_sizes(**{name: getattr(options, name) for name in names})
    with commands.clear_errors():
        checks.size("--num-fresh", options.num_fresh, at_least=2)
    clock, out, seconds = time.perf_counter(), files.output_folder(options.out), {}
    devices.enable_compilation_cache()
    keys = jax.random.split(jax.random.key(options.seed), 5)
    score = sentiment()
    with commands.clear_errors():
        model, text = model_and_text(options.model)
        sampler = Sampler(model, padded([text.prompt(opening) for opening in OPENINGS]), score, options.max_tokens)
        with console.waiting("Writing continuations"):
            written, scores = sampler.write(keys[0], model.params, options.num_samples)
        seconds["writing"] = time.perf_counter() - clock
        tokens = np.asarray(written.tokens).reshape(*scores.shape, -1)
        pairs = ordered_pairs(keys[1], sampler.prompts, tokens, scores, options.num_pairs)
        with console.waiting("Reference"):
            pairs = lm.with_reference(model, pairs, cache=out / "reference")
    lora = lm.LoRA(rank=options.lora_rank, alpha=2.0 * options.lora_rank, top_layers=options.top_layers)
    num_steps = options.num_epochs * -(-options.num_pairs // options.batch_size)
    usual: dict[str, Any] = {"lora": lora, "num_epochs": options.num_epochs, "batch_size": options.batch_size}
    start = time.perf_counter()
    with console.training(f"{len(options.beta)} adapters") as show, commands.clear_errors(*FAILURES):
        grid = lm.tune_grid(
            keys[2],
            model,
            pairs,
            objective=partial(train.preference_objective, loss=losses.dpo_loss),
            optimizer=lambda: optimizer_of(options.learning_rate, num_steps),
            axes={"beta": options.beta},
            folder=out / "checkpoints",
            about={"learning_rate": options.learning_rate},
            report=show,
            **usual,
        )
    seconds["adapters"] = time.perf_counter() - start
    preferred: Any = Demonstrations(pairs.prompts, pairs.responses.chosen)
    with console.training("Imitation") as show, commands.clear_errors(*FAILURES):
        # same key: the same order of the data
        imitated = lm.tune(
            keys[2],
            model,
            preferred,
            objective=train.sft_objective,
            optimizer=lambda: optimizer_of(options.learning_rate, num_steps),
            report=show,
            **usual,
        )
    policies = {"model": model.params, "imitation": lm.merge(model.params, imitated.params, lora)}
    for beta in options.beta:
        policies[f"DPO, β = {beta:g}"] = lm.merge(model.params, grid.adapter(beta=beta), lora)
    results: dict[str, Any] = {}
    for name, params in policies.items():
        # same key: differences between policies are not those of the draws
        results[name] = sampler.measure(keys[3], params, options.num_fresh)
        found = results[name]
        console.say(f"{name}: sentiment {_shown(found['reward'])}, KL {_shown(found['kl'])}: {found['example']!r}")
    results |= {f"best of {n}": best_of(scores, n) for n in BEST_OF if n < options.num_samples}
    files.save_figure(_figure(results, options.beta), out / "frontier.png")
    seconds["total"] = time.perf_counter() - clock
    shown = {**asdict(options), "model": options.model.name}
    summary = {"options": shown, "policies": results, "num_fresh": options.num_fresh * len(OPENINGS)}
    summary |= files.provenance(**seconds)
    files.save_summary(summary, out)
    page.update({"lm_sentiment": page_table(summary)}, out, path=page.LANGUAGE_MODELS)
    console.say(
        f"{seconds['total']:.0f} s in all, {seconds['adapters']:.0f} s of it for {len(options.beta)} adapters. "
        f"The figure and summary.json are in {out}."
    )


def page_table(summary: dict[str, Any]) -> str:
    """The table of the page: sentiment and KL, with two standard errors; and how long it took."""
    rows = [[name, _shown(found["reward"]), _shown(found["kl"])] for name, found in summary["policies"].items()]
    num, minutes = len(summary["options"]["beta"]), {name: s / 60 for name, s in summary["seconds"].items()}
    took = (
        f"All took {minutes['total']:.0f} minutes on two cores, the {num} adapters {minutes['adapters']:.1f} of them."
    )
    return f"{page.table(['policy', 'sentiment', 'KL, nats'], rows)}\n\n{took}"


def _shown(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} ± {2 * found['stderr']:.3f}"


def _figure(results: dict[str, Any], betas: Sequence[float]) -> Any:
    """Sentiment against KL, with two standard errors."""
    groups = {
        "DPO": [f"DPO, β = {beta:g}" for beta in betas],
        "best of n (bound of its KL)": [name for name in results if name.startswith("best of")],
        "imitation of the preferred": ["imitation"],
        "model": ["model"],
    }
    points = {name: [(results[own]["kl"], results[own]["reward"]) for own in group] for name, group in groups.items()}
    labels = {"DPO": [f"β = {beta:g}" for beta in betas], "best of n (bound of its KL)": [f"n = {n}" for n in BEST_OF]}
    return figures.estimated_frontier(
        points, labels, xlabel="KL to the model (nats)", ylabel="Sentiment of fresh samples"
    )


if __name__ == "__main__":
    chosen = commands.parse(Options)
    devices.restart_with_huge_pages()
    main(chosen)
