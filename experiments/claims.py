"""The notebook's claims about DPO, RLHF and their variants, each as a measured statement over a thousand worlds.

A claim is judged by an effect with a 95 % interval over worlds. It holds if the interval lies above the smallest effect
worth speaking of (0.01 in reward), fails if it lies below, and otherwise neither is shown. Where it holds under some
conditions only, it depends. `experiments/evidence.py` does the measuring.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax import checks, figures
from dpo_jax.figures import Measured
from dpo_jax.intervals import half_width
from experiments import harness
from experiments.dpo_vs_rlhf import LEARNING_RATES
from experiments.evidence import CLIP_RATES, CLIPS, EXPLORERS, HACKED_BETAS, MANY_BETAS, POWERS, RATED, gather
from experiments.loss_variants import SETTINGS
from experiments.notebook import BETA, BETAS

SMALLEST, LARGEST = MANY_BETAS.index(BETAS[0]), MANY_BETAS.index(BETAS[-1])
USUAL = MANY_BETAS.index(BETA)
NOTHING = 0.01
"""A difference in reward that is nothing to speak of. The luck of tuning alone is worth 0.007: so much lie two losses
apart that are one in other units (`experiments/loss_variants.py`)."""
HOLDS, FAILS, OPEN = "holds", "fails", "not shown"


@dataclass(frozen=True)
class Options:
    """The notebook's claims, measured: for each an effect with a 95 % interval, a verdict and a figure."""

    seed: int = 0
    """The first seed to report; the others follow it. Tuning uses the seeds after them."""
    num_seeds: int = 1024
    """How many worlds to measure in."""
    num_tuning_seeds: int = 64
    """How many other worlds to choose hyperparameters in."""
    num_candidates: int = 32
    """How many sets of hyperparameters to try for each loss."""
    out: Path = Path("results/claims")
    """Folder for summary.json and the figures."""


class Estimate(NamedTuple):
    """A mean over worlds, and half the width of its 95 % interval."""

    mean: float
    half: float

    @property
    def interval(self) -> list[float]:
        return [self.mean - self.half, self.mean + self.half]


@dataclass(frozen=True)
class Claim:
    """One claim and what became of it.

    Attributes:
      id: names it, and its figure.
      claim: what the notebook says.
      quantity: what the effect is.
      effect: its mean and interval.
      verdict: holds, fails, not shown, or depends on what.
      details: other numbers that belong to it, by name.
      panels: what its figure shows; see `figures.claim`.
      xlabel: and over what.
      log: whether that is shown by its logarithm.
    """

    id: str
    claim: str
    quantity: str
    effect: Estimate
    verdict: str
    panels: Mapping[str, Mapping[str, Measured]]
    xlabel: str
    details: Mapping[str, Estimate | float] = field(default_factory=dict)
    log: bool = False


def estimate(values: Any) -> Estimate:
    """Over the last axis, worlds; NaN if any training came to a halt."""
    values = np.asarray(values, np.float64)
    statistics = harness.mean_and_stderr(values)
    return Estimate(float(statistics["mean"]), float(half_width(statistics["stderr"], len(values))))


def verdict(effect: Estimate, *, beyond: float = 0.0) -> str:
    """Whether the interval lies above or below what counts."""
    low, high = effect.interval
    if low > beyond:
        return HOLDS
    return FAILS if high <= beyond else OPEN


def equivalence(effect: Estimate) -> str:
    """Whether a difference is nothing to speak of."""
    low, high = effect.interval
    if low > -NOTHING and high < NOTHING:
        return HOLDS
    return FAILS if low > NOTHING or high < -NOTHING else OPEN


def series(x: Any, rows: Any) -> Measured:
    """A point for each row of values over worlds."""
    estimates = [estimate(row) for row in rows]
    return Measured(list(x), [e.mean for e in estimates], [e.half for e in estimates])


def judge(evidence: dict[str, Any]) -> list[Claim]:
    """All claims, in the order of the notebook."""
    return [
        make(evidence)
        for make in (
            same_policy,
            widens_margins,
            raises_chosen,
            implicit_reward,
            small_beta_is_aggressive,
            small_beta_overfits,
            large_beta_stays,
            reward_model_exploited,
            dpo_not_exploited,
            ppo_sensitive_to_learning_rate,
            ppo_sensitive_to_clip,
            dpo_cheaper,
            exploration_helps,
            ipo_robust,
            kto_unpaired,
            orpo_without_sft,
            simpo_without_reference,
        )
    ]


def same_policy(evidence: dict[str, Any]) -> Claim:
    """Takeaway 1: DPO and RLHF come to the same policy."""
    dpo = evidence["dpo"]
    difference = dpo["expected_reward"] - dpo["rlhf_reward"]
    effect = estimate(difference[USUAL])
    return Claim(
        "same_policy",
        "DPO skips the reward model by showing that the optimal policy has a closed form.",
        "reward of DPO minus that of RLHF with perfect reinforcement learning, from the same comparisons, at β = 0.1",
        effect,
        equivalence(effect),
        {
            "Expected true reward": {
                "DPO": series(MANY_BETAS, dpo["expected_reward"]),
                "reward model, maximised exactly": series(MANY_BETAS, dpo["rlhf_reward"]),
            },
            "Total variation between the two": {"distance": series(MANY_BETAS, dpo["distance_to_rlhf"])},
        },
        "β",
        {"distance at beta 0.1": estimate(dpo["distance_to_rlhf"][USUAL])},
        log=True,
    )


def widens_margins(evidence: dict[str, Any]) -> Claim:
    """Takeaway 2: chosen gains on rejected."""
    dpo = evidence["dpo"]
    effect = estimate(dpo["margin_change"][USUAL])
    return Claim(
        "widens_margins",
        "The DPO loss directly increases the probability of preferred responses relative to rejected ones.",
        "change of the log-ratio (nats) of chosen to rejected by training, mean over the training pairs, at β = 0.1",
        effect,
        verdict(effect),
        {
            "Change of log-probability (nats)": {"chosen minus rejected": series(MANY_BETAS, dpo["margin_change"])},
            "Share of pairs that widen": {"pairs": series(MANY_BETAS, dpo["share_of_widened_pairs"])},
        },
        "β",
        {"share of pairs that widen at beta 0.1": estimate(dpo["share_of_widened_pairs"][USUAL])},
        log=True,
    )


def raises_chosen(evidence: dict[str, Any]) -> Claim:
    """Takeaway 2, as it is often read: chosen gains."""
    dpo = evidence["dpo"]
    effect = estimate(0.5 - dpo["share_of_chosen_that_fell"][USUAL])
    return Claim(
        "raises_chosen",
        "(As the above is often read:) DPO makes preferred responses more probable.",
        "share of chosen responses that become more probable, minus one half, at β = 0.1",
        effect,
        verdict(effect),
        {
            "Share of chosen that became less probable": {
                "DPO": series(MANY_BETAS, dpo["share_of_chosen_that_fell"]),
            }
        },
        "β",
        {"share of chosen that became less probable": estimate(dpo["share_of_chosen_that_fell"][USUAL])},
        log=True,
    )


def implicit_reward(evidence: dict[str, Any]) -> Claim:
    """Section 5: the implicit reward knows what is good."""
    dpo, model = evidence["dpo"], evidence["exact"]["ranking_accuracy"]
    effect = estimate(dpo["ranking_accuracy"][USUAL] - 0.5)
    return Claim(
        "implicit_reward",
        "A higher log-ratio means that the response is better (the implicit reward).",
        "share of pairs of responses that the implicit reward orders as the true one does, minus one half, at β = 0.1",
        effect,
        verdict(effect),
        {
            "Share of pairs ordered rightly": {
                "implicit reward of DPO": series(MANY_BETAS, dpo["ranking_accuracy"]),
                "reward model": series(MANY_BETAS, [model] * len(MANY_BETAS)),
            }
        },
        "β",
        {
            "implicit reward": estimate(dpo["ranking_accuracy"][USUAL]),
            "reward model": estimate(model),
            "implicit reward over reward model": estimate(dpo["ranking_accuracy"][USUAL] - model),
        },
        log=True,
    )


def small_beta_is_aggressive(evidence: dict[str, Any]) -> Claim:
    """Section 4: a small beta goes far."""
    kl = evidence["dpo"]["kl_to_reference"]
    effect = estimate(kl[SMALLEST] - kl[USUAL])
    return Claim(
        "small_beta_is_aggressive",
        "Small β: aggressive optimisation.",
        "KL to the reference (nats) at β = 0.01 minus that at β = 0.1",
        effect,
        verdict(effect),
        {"KL to the reference (nats)": {"DPO": series(MANY_BETAS, kl)}},
        "β",
        log=True,
    )


def small_beta_overfits(evidence: dict[str, Any]) -> Claim:
    """Section 4: and too far."""
    dpo, optimal = evidence["dpo"], evidence["exact"]["optimal_reward"].T
    reward = dpo["expected_reward"]
    effect = estimate(reward[USUAL] - reward[SMALLEST])
    gap = dpo["training_accuracy"] - dpo["new_accuracy"]
    return Claim(
        "small_beta_overfits",
        "Small β can overfit to the preferences.",
        "true reward at β = 0.1 minus that at β = 0.01",
        effect,
        verdict(effect, beyond=NOTHING),
        {
            "Expected true reward": {
                "DPO": series(MANY_BETAS, reward),
                "optimum for that β": series(MANY_BETAS, optimal),
            },
            "Accuracy": {
                "training comparisons": series(MANY_BETAS, dpo["training_accuracy"]),
                "new comparisons": series(MANY_BETAS, dpo["new_accuracy"]),
            },
        },
        "β",
        {
            "reward at the optimum, beta 0.01 over 0.1": estimate(optimal[SMALLEST] - optimal[USUAL]),
            "accuracy lost on new comparisons, beta 0.01": estimate(gap[SMALLEST]),
            "accuracy lost on new comparisons, beta 0.1": estimate(gap[USUAL]),
            "accuracy lost on new comparisons, beta 2": estimate(gap[LARGEST]),
            "share of worlds where the small beta is worse": float(np.mean(reward[SMALLEST] < reward[USUAL])),
        },
        log=True,
    )


def large_beta_stays(evidence: dict[str, Any]) -> Claim:
    """Section 4: a large beta stays near."""
    dpo = evidence["dpo"]
    kl, gain = dpo["kl_to_reference"], dpo["gain"]
    effect = estimate(kl[USUAL] - kl[LARGEST])
    return Claim(
        "large_beta_stays",
        "Large β: conservative, stays close to SFT.",
        "KL to the reference (nats) at β = 0.1 minus that at β = 2",
        effect,
        verdict(effect),
        {
            "KL to the reference (nats)": {"DPO": series(MANY_BETAS, kl)},
            "Gain in true reward over SFT": {"DPO": series(MANY_BETAS, gain)},
        },
        "β",
        {"KL at beta 2": estimate(kl[LARGEST]), "gain at beta 2": estimate(gain[LARGEST])},
        log=True,
    )


def reward_model_exploited(evidence: dict[str, Any]) -> Claim:
    """Section 5: RLHF hacks its reward model."""
    exact = evidence["exact"]["maximised"]
    gain, excess = exact["gain"].T, exact["overestimate"].T
    effect = estimate(gain[USUAL] - gain[SMALLEST])
    return Claim(
        "reward_model_exploited",
        "RLHF: reward hacking is possible.",
        "true reward lost where the reward model is maximised at β = 0.01 instead of 0.1, and scores higher",
        effect,
        verdict(effect, beyond=NOTHING),
        {
            "Gain over SFT, reward model maximised": {
                "true reward": series(MANY_BETAS, gain),
                "by the reward model": series(MANY_BETAS, gain + excess),
            },
        },
        "β",
        {
            "score gained from beta 0.1 to 0.01": estimate((gain + excess)[SMALLEST] - (gain + excess)[USUAL]),
            "overrated at beta 0.01": estimate(excess[SMALLEST]),
        },
        log=True,
    )


def dpo_not_exploited(evidence: dict[str, Any]) -> Claim:
    """Section 5: DPO has none to hack."""
    dpo, exact = evidence["dpo"], evidence["exact"]["maximised"]
    ends = evidence["dpo to the end"]["expected_reward"]
    lost = {
        "DPO": dpo["gain"][USUAL] - dpo["gain"][SMALLEST],
        "PPO, as many steps": evidence["ppo"]["expected_reward"][1] - evidence["ppo"]["expected_reward"][0],
        "DPO, trained to the end": ends[1] - ends[0],
        "reward model, maximised exactly": exact["gain"].T[USUAL] - exact["gain"].T[SMALLEST],
    }
    as_trained = estimate(lost["PPO, as many steps"] - lost["DPO"])
    at_rest = estimate(lost["reward model, maximised exactly"] - lost["DPO, trained to the end"])
    return Claim(
        "dpo_not_exploited",
        "DPO: reward hacking is less likely, as there is no explicit reward model.",
        "true reward lost from β = 0.1 to β = 0.01, by PPO minus by DPO, in equally many steps",
        as_trained,
        by_condition({"as many steps": as_trained, "both at rest": at_rest}, "how long they train"),
        {
            "Gain in true reward over SFT": {
                "DPO": series(MANY_BETAS, dpo["gain"]),
                "reward model, maximised exactly": series(MANY_BETAS, exact["gain"].T),
                "DPO, trained to the end": series(HACKED_BETAS, ends - evidence["exact"]["sft_reward"]),
            },
            "Overrated by its own reward": {
                "DPO, by its implicit reward": series(MANY_BETAS, dpo["overestimate"]),
                "RLHF, by the reward model": series(MANY_BETAS, exact["overestimate"].T),
                "DPO, trained to the end": series(HACKED_BETAS, evidence["dpo to the end"]["overestimate"]),
            },
        },
        "β",
        {
            **{f"lost by {name}": estimate(values) for name, values in lost.items()},
            "at rest, lost by RLHF minus by DPO": at_rest,
            "DPO overrated at beta 0.1": estimate(dpo["overestimate"][USUAL]),
            "DPO overrated at beta 0.1, trained to the end": estimate(evidence["dpo to the end"]["overestimate"][1]),
            "RLHF overrated at beta 0.1": estimate(exact["overestimate"].T[USUAL]),
        },
        log=True,
    )


def ppo_sensitive_to_learning_rate(evidence: dict[str, Any]) -> Claim:
    """Section 5: PPO needs care."""
    sft = evidence["exact"]["sft_reward"]
    gains = {name: found["expected_reward"] - sft for name, found in evidence["by_rate"].items()}
    worse = {name: ~(gain > 0) for name, gain in gains.items()}
    share = {name: lost.mean(axis=0) for name, lost in worse.items()}
    effects = {name: estimate(share[name] - share["DPO"]) for name in RATED if name != "DPO"}
    algorithms = {name.removesuffix(", reward model"): effect for name, effect in effects.items()}
    return Claim(
        "ppo_sensitive_to_learning_rate",
        "RLHF (PPO) is sensitive to hyperparameters, DPO is more stable.",
        "share of runs that end worse than SFT, over eight learning rates from 3e-5 to 0.1: PPO minus DPO",
        effects["PPO, reward model"],
        by_condition(algorithms, "the algorithm", beyond=0.0),
        {
            "Gain in true reward over SFT": {name: series(LEARNING_RATES, gain) for name, gain in gains.items()},
            "Share of runs worse than SFT": {name: series(LEARNING_RATES, lost) for name, lost in worse.items()},
        },
        "Learning rate",
        {
            **{f"share worse than SFT, {name}": estimate(values) for name, values in share.items()},
            **{f"{name} minus DPO": effect for name, effect in effects.items()},
            **{f"learning rates within 0.01 of the best, {name}": near_best(gain) for name, gain in gains.items()},
        },
        log=True,
    )


def near_best(gains: np.ndarray) -> float:
    """How many learning rates have a mean gain within 0.01 of the best one's."""
    means = np.nan_to_num(gains, nan=-1.0).mean(axis=1)
    return float(np.sum(means > means.max() - 0.01))


def ppo_sensitive_to_clip(evidence: dict[str, Any]) -> Claim:
    """Section 5: and with its clip, too."""
    gains = evidence["by_clip"] - evidence["exact"]["sft_reward"]

    def spread(gain: np.ndarray) -> Estimate:
        means = gain.mean(axis=1)
        return estimate(gain[np.nanargmax(means)] - gain[np.nanargmin(means)])

    labels = [f"learning rate {rate:g}" for rate in CLIP_RATES]
    spreads = {label: spread(gain) for label, gain in zip(labels, gains, strict=True)}
    return Claim(
        "ppo_sensitive_to_clip",
        "RLHF (PPO) is sensitive to hyperparameters: its clip.",
        f"true reward with the best clip minus that with the worst, of five from 0.02 to 2, at a {labels[0]}",
        spreads[labels[0]],
        by_condition(spreads, "the learning rate"),
        {
            "Gain in true reward over SFT": {
                label: series(CLIPS, gain) for label, gain in zip(labels, gains, strict=True)
            }
        },
        "Clip",
        {f"best minus worst, {label}": effect for label, effect in spreads.items()},
        log=True,
    )


def dpo_cheaper(evidence: dict[str, Any]) -> Claim:
    """Section 5: DPO costs less."""
    ratio = evidence["cost"]["rlhf"] / evidence["cost"]["dpo"]
    effect = estimate(ratio)
    return Claim(
        "dpo_cheaper",
        "Compute: RLHF high (rollouts), DPO lower (just forward and backward).",
        "seconds of reward model and PPO divided by seconds of DPO, as many steps for each of the three; nine timings",
        effect,
        verdict(effect, beyond=1.0),
        {
            "Milliseconds per run": {
                "": series(["DPO", "reward model + PPO"], [1000 * evidence["cost"][name] for name in ("dpo", "rlhf")])
            }
        },
        "After SFT, among 64 that train together",
        {
            "milliseconds of DPO": estimate(1000 * evidence["cost"]["dpo"]),
            "milliseconds of RLHF": estimate(1000 * evidence["cost"]["rlhf"]),
        },
    )


def exploration_helps(evidence: dict[str, Any]) -> Claim:
    """Takeaway 5: it pays to explore."""
    found = evidence["exploration"]
    coverage = [float(np.mean(values)) for values in found["offline"]["log_coverage"]]
    reward = {name: found[name]["expected_reward"] for name in EXPLORERS}
    help_ = [estimate(on - off) for on, off in zip(reward["online"], reward["offline"], strict=True)]
    by_coverage = by_condition({f"{power:g}": e for power, e in zip(POWERS, help_, strict=True)})
    return Claim(
        "exploration_helps",
        "RLHF can explore online, DPO is offline: a trade-off.",
        "true reward of online DPO minus that of DPO on a uniform reference's responses, as many labels",
        help_[POWERS.index(0.0)],
        "depends on how well the reference covers good responses" if "depends" in by_coverage else by_coverage,
        {
            "Expected true reward": {
                label: series(coverage, reward[name])
                for label, name in {"DPO, offline": "offline", "DPO, online": "online", "XPO": "xpo"}.items()
            },
            "Regret": {
                label: series(coverage, found[name]["regret"])
                for label, name in {"DPO, offline": "offline", "DPO, online": "online", "XPO": "xpo"}.items()
            },
        },
        "Log coverage coefficient (larger is worse)",
        {f"at log coverage {c:.2f}": e for c, e in zip(coverage, help_, strict=True)},
    )


def over_dpo(evidence: dict[str, Any], name: str) -> dict[str, Estimate]:
    """What a loss earns over DPO in each setting, both tuned."""
    learned = evidence["variants"]
    return {
        setting: estimate(learned[name][setting]["expected_reward"] - learned["dpo"][setting]["expected_reward"])
        for setting in SETTINGS
    }


def gains_panel(evidence: dict[str, Any], names: Mapping[str, str]) -> dict[str, dict[str, Measured]]:
    """Gains over SFT of some losses in every setting."""
    sft = evidence["variants_sft_reward"]
    return {
        "Gain in true reward over SFT": {
            label: series(
                list(SETTINGS), [evidence["variants"][name][setting]["expected_reward"] - sft for setting in SETTINGS]
            )
            for name, label in names.items()
        }
    }


def by_condition(effects: Mapping[str, Estimate], condition: str = "the labels", *, beyond: float = NOTHING) -> str:
    """A verdict if all conditions agree; otherwise which say what."""
    verdicts = {name: verdict(effect, beyond=beyond) for name, effect in effects.items()}
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    if HOLDS not in verdicts.values():
        unclear = " and ".join(name for name, found in verdicts.items() if found == OPEN)
        return f"{FAILS}, but for {unclear}, where it is {OPEN}"
    return f"depends on {condition}: " + ", ".join(f"{name} {found}" for name, found in verdicts.items())


def ipo_robust(evidence: dict[str, Any]) -> Claim:
    """Section 6: IPO stands noise and certainty."""
    effects = over_dpo(evidence, "ipo")
    return Claim(
        "ipo_robust",
        "IPO is more robust.",
        "true reward of IPO minus that of DPO, both tuned, where a fifth of the labels is flipped",
        effects["noisy"],
        by_condition(effects),
        gains_panel(evidence, {"dpo": "DPO", "ipo": "IPO"}),
        "Labels",
        {f"IPO minus DPO, {setting}": effect for setting, effect in effects.items()},
    )


def kto_unpaired(evidence: dict[str, Any]) -> Claim:
    """Section 6: KTO needs no pairs."""
    effects = over_dpo(evidence, "kto, labels")
    sft = evidence["variants_sft_reward"]
    over_sft = {
        setting: estimate(evidence["variants"]["kto, labels"][setting]["expected_reward"] - sft) for setting in SETTINGS
    }
    return Claim(
        "kto_unpaired",
        "KTO works with just good and bad labels, no pairs needed.",
        "true reward of KTO on 3,600 labels minus that of SFT, clean labels",
        over_sft["clean"],
        by_condition(over_sft),
        gains_panel(
            evidence, {"dpo": "DPO, 1,800 pairs", "kto": "KTO, the same pairs split", "kto, labels": "KTO, labels"}
        ),
        "Labels",
        {
            **{f"KTO on labels over SFT, {setting}": effect for setting, effect in over_sft.items()},
            **{f"KTO on labels minus DPO, {setting}": effect for setting, effect in effects.items()},
        },
    )


def orpo_without_sft(evidence: dict[str, Any]) -> Claim:
    """Section 6: ORPO needs no SFT."""
    sft, scratch = evidence["variants_sft_reward"], evidence["orpo_from_scratch"]
    over_sft = {setting: estimate(scratch[setting]["expected_reward"] - sft) for setting in SETTINGS}
    over_two = {
        setting: estimate(scratch[setting]["expected_reward"] - evidence["variants"]["dpo"][setting]["expected_reward"])
        for setting in SETTINGS
    }
    panels = gains_panel(evidence, {"dpo": "SFT, then DPO", "orpo": "SFT, then ORPO"})
    panels["Gain in true reward over SFT"]["ORPO alone"] = series(
        list(SETTINGS), [scratch[setting]["expected_reward"] - sft for setting in SETTINGS]
    )
    return Claim(
        "orpo_without_sft",
        "ORPO combines SFT and preference in one loss.",
        "true reward of ORPO from a fresh network, on comparisons alone, minus that of SFT, clean labels",
        over_sft["clean"],
        by_condition(over_sft),
        panels,
        "Labels",
        {
            **{f"ORPO alone over SFT, {setting}": effect for setting, effect in over_sft.items()},
            **{f"ORPO alone minus SFT and DPO, {setting}": effect for setting, effect in over_two.items()},
        },
    )


def simpo_without_reference(evidence: dict[str, Any]) -> Claim:
    """Section 6: SimPO needs no reference."""
    effects = over_dpo(evidence, "simpo")
    return Claim(
        "simpo_without_reference",
        "SimPO is reference-free.",
        "true reward of SimPO minus that of DPO, both tuned, clean labels",
        effects["clean"],
        by_condition(effects, beyond=-NOTHING),
        gains_panel(evidence, {"dpo": "DPO", "simpo": "SimPO"}),
        "Labels",
        {f"SimPO minus DPO, {setting}": effect for setting, effect in effects.items()},
    )


def as_entry(claim: Claim) -> dict[str, Any]:
    """A claim as it stands in the summary."""
    details = {
        name: value if isinstance(value, float) else {"effect": value.mean, "interval": value.interval}
        for name, value in claim.details.items()
    }
    return {
        "id": claim.id,
        "claim": claim.claim,
        "quantity": claim.quantity,
        "effect": claim.effect.mean,
        "interval": claim.effect.interval,
        "verdict": claim.verdict,
        "details": details,
        "figure": {
            "xlabel": claim.xlabel,
            "log": claim.log,
            "panels": {
                name: {label: measured._asdict() for label, measured in lines.items()}
                for name, lines in claim.panels.items()
            },
        },
    }


def print_results(claims: list[Claim]) -> None:
    """Prints the claims with their verdicts."""
    harness.print_table(
        "What the notebook claims, measured: effects with 95% intervals",
        ["claim", "effect", "verdict"],
        [[claim.id, f"{claim.effect.mean:+.4f} ± {claim.effect.half:.4f}", claim.verdict] for claim in claims],
    )


def main(options: Options) -> None:
    """Measures, judges, and writes the results."""
    harness.check_seeds(options.seed, options.num_seeds + options.num_tuning_seeds)
    with harness.clear_errors():
        checks.size("--num-seeds", options.num_seeds, at_least=2)
        checks.size("--num-tuning-seeds", options.num_tuning_seeds)
        checks.size("--num-candidates", options.num_candidates)
    out = harness.output_folder(options.out)
    harness.enable_compilation_cache()
    watch, start = harness.Stopwatch(), time.perf_counter()
    seeds = np.arange(options.seed, options.seed + options.num_seeds + options.num_tuning_seeds).astype(np.uint32)
    harness.console.print(
        f"The notebook's claims in {options.num_seeds:,} worlds, and {options.num_tuning_seeds:,} more for tuning. "
        f"{harness.FIRST_START}"
    )
    reported, tuning = np.split(seeds, [options.num_seeds])
    claims = judge(gather(reported, tuning, options.num_candidates, watch))
    seconds = {"total": time.perf_counter() - start, "compile": watch.compile, "run": watch.run}
    sizes = {name: getattr(options, name) for name in ("seed", "num_seeds", "num_tuning_seeds", "num_candidates")}
    harness.save_summary({**sizes, "claims": [as_entry(c) for c in claims], **harness.provenance(**seconds)}, out)
    for claim in claims:
        figure = figures.claim(claim.panels, xlabel=claim.xlabel, log=claim.log)
        harness.save_figure(figure, out / f"{claim.id}.png")
    print_results(claims)
    harness.console.print(
        f"{seconds['total']:.0f} s in all: {watch.compile:.0f} s on tracing and on waiting for the compiler and "
        f"{watch.run:.0f} s on running, by two threads. Figures and summary.json are in {out}."
    )


if __name__ == "__main__":
    main(harness.parse(Options))
