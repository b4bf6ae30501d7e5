"""The claims: each a sentence, an effect with its interval, a verdict, and the numbers behind it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.claims.evidence import (
    CLIPS,
    EXPLORERS,
    FASTER,
    HACKED_BETAS,
    MANY_BETAS,
    POWERS,
    RATED,
    REGULARISED,
    SMOOTHED,
    SMOOTHINGS,
)
from experiments.dpo_vs_rlhf import LEARNING_RATES
from experiments.lab.claim_figure import Measured
from experiments.lab.feedback import SETTINGS
from experiments.lab.judging import (
    NOTHING,
    Claim,
    Estimate,
    by_condition,
    equivalence,
    estimate,
    series,
    verdict,
)
from experiments.lab.pipeline import BETA, BETAS, TUTORIAL

SMALLEST, LARGEST = MANY_BETAS.index(BETAS[0]), MANY_BETAS.index(BETAS[-1])
USUAL = MANY_BETAS.index(BETA)


def judge(evidence: dict[str, Any]) -> dict[str, Claim]:
    """All claims by name, in the order of the notebook."""
    return {
        make.__name__: make(evidence)
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
            ipo_keeps_regularisation,
            kto_unpaired,
            orpo_without_sft,
            simpo_without_reference,
            smoothing_helps,
        )
    }


def same_policy(evidence: dict[str, Any]) -> Claim:
    """Takeaway 1: DPO and RLHF come to the same policy."""
    dpo = evidence["dpo"]
    difference = dpo["expected_reward"] - dpo["rlhf_reward"]
    effect = estimate(difference[USUAL])
    return Claim(
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
    uniform, on_policy = evidence["dpo"], evidence["dpo on policy"]
    fell = {
        "uniform responses": uniform["share_of_chosen_that_fell"][USUAL],
        "responses of the SFT policy": on_policy["share_of_chosen_that_fell"],
    }
    effects = {name: estimate(0.5 - share) for name, share in fell.items()}
    return Claim(
        "(As the above is often read:) DPO makes preferred responses more probable.",
        "share of chosen responses that become more probable, minus one half, at β = 0.1, uniform responses compared",
        effects["uniform responses"],
        by_condition(effects, "which responses are compared", matters=0.05),
        {
            "Share of chosen that became less probable": {
                "uniform responses compared": series(MANY_BETAS, uniform["share_of_chosen_that_fell"]),
                "responses of the SFT policy compared": series([BETA], [fell["responses of the SFT policy"]]),
            }
        },
        "β",
        {f"share of chosen that became less probable, {name}": estimate(share) for name, share in fell.items()},
        log=True,
    )


def implicit_reward(evidence: dict[str, Any]) -> Claim:
    """Section 5: the implicit reward knows what is good."""
    dpo, model = evidence["dpo"], evidence["exact"]["ranking_accuracy"]
    effect = estimate(dpo["ranking_accuracy"][USUAL] - 0.5)
    return Claim(
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
    dpo, optimal = evidence["dpo"], evidence["exact"]["optimal_reward"]
    reward = dpo["expected_reward"]
    effect = estimate(reward[USUAL] - reward[SMALLEST])
    gap = dpo["training_accuracy"] - dpo["new_accuracy"]
    return Claim(
        "Small β can overfit to the preferences.",
        "true reward at β = 0.1 minus that at β = 0.01",
        effect,
        verdict(effect, matters=NOTHING),
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
    gain, excess = exact["gain"], exact["overestimate"]
    effect = estimate(gain[USUAL] - gain[SMALLEST])
    return Claim(
        "RLHF: reward hacking is possible.",
        "true reward lost where the reward model is maximised at β = 0.01 instead of 0.1, and scores higher",
        effect,
        verdict(effect, matters=NOTHING),
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
        "reward model, maximised exactly": exact["gain"][USUAL] - exact["gain"][SMALLEST],
    }
    as_trained = estimate(lost["PPO, as many steps"] - lost["DPO"])
    converged = estimate(lost["reward model, maximised exactly"] - lost["DPO, trained to the end"])
    return Claim(
        "DPO: reward hacking is less likely, as there is no explicit reward model.",
        "true reward lost from β = 0.1 to β = 0.01, by PPO minus by DPO, in equally many steps",
        as_trained,
        by_condition({"in equally many steps": as_trained, "converged": converged}, "how long they train"),
        {
            "Gain in true reward over SFT": {
                "DPO": series(MANY_BETAS, dpo["gain"]),
                "reward model, maximised exactly": series(MANY_BETAS, exact["gain"]),
                "DPO, trained to the end": series(HACKED_BETAS, ends - evidence["exact"]["sft_reward"]),
            },
            "Overrated by its own reward": {
                "DPO, by its implicit reward": series(MANY_BETAS, dpo["overestimate"]),
                "RLHF, by the reward model": series(MANY_BETAS, exact["overestimate"]),
                "DPO, trained to the end": series(HACKED_BETAS, evidence["dpo to the end"]["overestimate"]),
            },
        },
        "β",
        {
            **{f"lost by {name}": estimate(values) for name, values in lost.items()},
            "converged, lost by RLHF minus by DPO": converged,
            "DPO overrated at beta 0.1": estimate(dpo["overestimate"][USUAL]),
            "DPO overrated at beta 0.1, trained to the end": estimate(evidence["dpo to the end"]["overestimate"][1]),
            "RLHF overrated at beta 0.1": estimate(exact["overestimate"][USUAL]),
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
        "RLHF (PPO) is sensitive to hyperparameters, DPO is more stable.",
        "share of runs that end worse than SFT, over eight learning rates from 3e-5 to 0.1: PPO minus DPO",
        effects["PPO, reward model"],
        by_condition(algorithms, "the algorithm", matters=0.01),
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
    tuning, reported = (evidence["by_clip"][where] for where in ("tuning", "reported"))
    gains = reported - evidence["exact"]["sft_reward"]
    labels = [f"learning rate {factor * TUTORIAL.learning_rate:g}" for factor in FASTER]
    spreads: dict[str, Estimate] = {}
    chosen: dict[str, float] = {}
    for label, tried, gain in zip(labels, tuning.mean(axis=-1), gains, strict=True):
        best, worst = int(np.nanargmax(tried)), int(np.nanargmin(tried))
        spreads[label] = estimate(gain[best] - gain[worst])
        chosen |= {f"best clip, {label}": float(CLIPS[best]), f"worst clip, {label}": float(CLIPS[worst])}
    return Claim(
        "RLHF (PPO) is sensitive to hyperparameters: its clip.",
        f"true reward with the best clip minus that with the worst, of five from 0.02 to 2, at a {labels[0]}; best and "
        "worst in other worlds",
        spreads[labels[0]],
        by_condition(spreads, "the learning rate"),
        {
            "Gain in true reward over SFT": {
                label: series(CLIPS, gain) for label, gain in zip(labels, gains, strict=True)
            }
        },
        "Clip",
        {**{f"best minus worst, {label}": effect for label, effect in spreads.items()}, **chosen},
        log=True,
    )


def dpo_cheaper(evidence: dict[str, Any]) -> Claim:
    """Section 5: DPO costs less."""
    ratio = evidence["cost"]["rlhf"] / evidence["cost"]["dpo"]
    effect = estimate(ratio)
    return Claim(
        "Compute: RLHF high (rollouts), DPO lower (just forward and backward).",
        "seconds of reward model and PPO divided by seconds of DPO, as many steps for each of the three; nine timings",
        effect,
        verdict(Estimate(effect.mean - 1, effect.half)),
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
    effects = [estimate(on - off) for on, off in zip(reward["online"], reward["offline"], strict=True)]
    by_coverage = by_condition({f"{power:g}": e for power, e in zip(POWERS, effects, strict=True)})
    sft, stored = evidence["exact"]["sft_reward"], evidence["dpo"]["gain"][USUAL]
    as_many, labels = POWERS.index(1.0), {"DPO, offline": "offline", "DPO, online": "online", "XPO": "xpo"}
    return Claim(
        "RLHF can explore online, DPO is offline: a trade-off.",
        "true reward of online DPO minus that of DPO on a uniform reference's responses, as many labels",
        effects[POWERS.index(0.0)],
        "depends on how well the reference covers good responses" if "depends" in by_coverage else by_coverage,
        {
            "Expected true reward": {label: series(coverage, reward[name]) for label, name in labels.items()},
            "Regret": {label: series(coverage, found[name]["regret"]) for label, name in labels.items()},
        },
        "Log coverage coefficient (larger is worse)",
        {
            **{f"at log coverage {c:.2f}": e for c, e in zip(coverage, effects, strict=True)},
            "gain of DPO on 1,800 stored comparisons": estimate(stored),
            "gain of DPO on 46,400 comparisons of SFT responses": estimate(reward["offline"][as_many] - sft),
            "gain of online DPO on 46,400 comparisons": estimate(reward["online"][as_many] - sft),
            "gain of the optimum": estimate(found["offline"]["optimal_reward"][as_many] - sft),
        },
    )


def over_dpo(evidence: dict[str, Any], name: str) -> dict[str, Estimate]:
    """What a loss earns over DPO in each setting, both tuned."""
    learned = evidence["variants"]
    return {
        setting: estimate(learned[name][setting]["expected_reward"] - learned["dpo"][setting]["expected_reward"])
        for setting in SETTINGS
    }


def over_sft(evidence: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    """What a loss earns over SFT in each setting, world by world."""
    sft = evidence["variants_sft_reward"]
    return {setting: evidence["variants"][name][setting]["expected_reward"] - sft for setting in SETTINGS}


def gains_panel(evidence: dict[str, Any], names: Mapping[str, str]) -> dict[str, dict[str, Measured]]:
    """Gains over SFT of some losses in every setting."""
    gains = {label: over_sft(evidence, name) for name, label in names.items()}
    return {"Gain in true reward over SFT": {label: series(gain, gain.values()) for label, gain in gains.items()}}


def ipo_robust(evidence: dict[str, Any]) -> Claim:
    """Section 6: IPO withstands noise."""
    effects = over_dpo(evidence, "ipo")
    return Claim(
        "IPO is more robust: to noise.",
        "true reward of IPO minus that of DPO, both tuned, with a fifth of the labels flipped",
        effects["noisy"],
        by_condition(effects),
        gains_panel(evidence, {"dpo": "DPO", "ipo": "IPO"}),
        "Labels",
        {f"IPO minus DPO, {setting}": effect for setting, effect in effects.items()},
    )


def ipo_keeps_regularisation(evidence: dict[str, Any]) -> Claim:
    """Section 6: what IPO's paper promises, that labels without noise do not undo the pull to the reference."""
    found = evidence["regularisation"]
    merit = {name: found[name]["merit"] for name in REGULARISED}
    margin = {name: found[name]["margin"] for name in REGULARISED}
    effects = {
        f"learning rate {rate:g}": estimate(merit["ipo"][i] - merit["dpo"][i])
        for i, rate in enumerate(LEARNING_RATES)
        if rate >= TUTORIAL.learning_rate
    }
    usual = f"learning rate {TUTORIAL.learning_rate:g}"
    effect = effects.get(usual) or next(iter(effects.values()))
    return Claim(
        "IPO is more robust: its regularisation survives labels that are never wrong.",
        "expected reward minus β KL of IPO minus that of DPO, β = 0.1, at the smallest learning rate of 0.001 or more",
        effect,
        by_condition(effects, "the learning rate"),
        {
            "Expected reward minus β KL": {name.upper(): series(LEARNING_RATES, merit[name]) for name in REGULARISED},
            "Margin of the training pairs (nats)": {
                name.upper(): series(LEARNING_RATES, margin[name]) for name in REGULARISED
            },
        },
        "Learning rate",
        {
            **{f"IPO minus DPO, {name}": effect for name, effect in effects.items()},
            **{
                f"margin of {name.upper()}, learning rate {rate:g}": estimate(margin[name][i])
                for name in REGULARISED
                for i, rate in enumerate(LEARNING_RATES)
            },
        },
        log=True,
    )


def smoothing_helps(evidence: dict[str, Any]) -> Claim:
    """Beyond the notebook: conservative and robust DPO expect that labels are flipped."""
    reward = evidence["smoothing"]["expected_reward"]
    place = SMOOTHINGS.index(0.2)
    trainings = {
        f"{name.replace('dpo', 'DPO')}, {rate}": (i, j)
        for i, name in enumerate(SMOOTHED)
        for j, rate in enumerate(("tuned", "ten times the learning rate"))
    }
    effects = {name: estimate(reward[i, j, place] - reward[i, j, 0]) for name, (i, j) in trainings.items()}
    first = next(iter(effects))
    sft = evidence["variants_sft_reward"]
    return Claim(
        "Label smoothing helps where labels are flipped (conservative and robust DPO).",
        "true reward with a smoothing of 0.2 minus that without, a fifth of labels flipped, all else as tuned for DPO",
        effects[first],
        by_condition(effects, "the method and the learning rate"),
        {
            "Gain in true reward over SFT": {
                name: series(SMOOTHINGS, reward[i, j] - sft) for name, (i, j) in trainings.items()
            }
        },
        "Label smoothing",
        effects,
    )


def kto_unpaired(evidence: dict[str, Any]) -> Claim:
    """Section 6: KTO needs no pairs."""
    effects = over_dpo(evidence, "kto on labels")
    gains = {setting: estimate(gain) for setting, gain in over_sft(evidence, "kto on labels").items()}
    return Claim(
        "KTO works with just good and bad labels, no pairs needed.",
        "true reward of KTO on 3,600 labels minus that of SFT, clean labels",
        gains["clean"],
        by_condition(gains),
        gains_panel(
            evidence, {"dpo": "DPO, 1,800 pairs", "kto": "KTO, the same pairs split", "kto on labels": "KTO, labels"}
        ),
        "Labels",
        {
            **{f"KTO on labels over SFT, {setting}": gain for setting, gain in gains.items()},
            **{f"KTO on labels minus DPO, {setting}": effect for setting, effect in effects.items()},
        },
    )


def orpo_without_sft(evidence: dict[str, Any]) -> Claim:
    """Section 6: ORPO needs no SFT."""
    effects = over_dpo(evidence, "orpo from scratch")
    gains = {setting: estimate(gain) for setting, gain in over_sft(evidence, "orpo from scratch").items()}
    return Claim(
        "ORPO combines SFT and preference in one loss.",
        "true reward of ORPO from a fresh network, on comparisons alone, minus that of SFT, clean labels",
        gains["clean"],
        by_condition(gains),
        gains_panel(evidence, {"dpo": "SFT, then DPO", "orpo": "SFT, then ORPO", "orpo from scratch": "ORPO alone"}),
        "Labels",
        {
            **{f"ORPO alone over SFT, {setting}": gain for setting, gain in gains.items()},
            **{f"ORPO alone minus SFT and DPO, {setting}": effect for setting, effect in effects.items()},
        },
    )


def simpo_without_reference(evidence: dict[str, Any]) -> Claim:
    """Section 6: SimPO needs no reference."""
    effects = over_dpo(evidence, "simpo")
    return Claim(
        "SimPO is reference-free (and no worse for it).",
        "true reward of SimPO minus that of DPO, both tuned, clean labels; no worse if above -0.01",
        effects["clean"],
        by_condition({name: Estimate(e.mean + NOTHING, e.half) for name, e in effects.items()}, matters=0.0),
        gains_panel(evidence, {"dpo": "DPO", "simpo": "SimPO"}),
        "Labels",
        {f"SimPO minus DPO, {setting}": effect for setting, effect in effects.items()},
    )
