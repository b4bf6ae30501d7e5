"""The claims about tokens: each a sentence, papers, an effect with its interval, a verdict, and further numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.lab.claim_figure import Measured
from experiments.lab.judging import Claim, Estimate, by_condition, equivalence, estimate, in_words, series, verdict
from experiments.lab.string_worlds import BETA, STRINGS
from experiments.token_claims.evidence import (
    AFTER_LENGTH,
    AGGREGATIONS,
    BETAS,
    CHI_BETAS,
    DISTANCES,
    KEPT,
    KEPT_BETAS,
    RATES,
    STRENGTHS,
)
from experiments.token_claims.population import ON_ALL_PAIRS, SMALL_BETAS

USUAL = BETAS.index(BETA)
TRUTHFUL, FOND, UNIFORM = range(3)
"""Judges of the runs called `dpo`."""
REWARD, LETTERS, SHARE = 0.05, 0.1, 0.02
"""The smallest differences that matter: in reward, whose standard deviation over strings is about 1; in letters of six;
and in shares and probabilities."""
NAMES = {"dpo": "DPO", "r-dpo": "R-DPO", "ld-dpo": "LD-DPO", "sampo": "SamPO", "ln-dpo": "LN-DPO", "simpo": "SimPO"}


def judge(evidence: dict[str, Any]) -> dict[str, Claim]:
    """All claims by name: length, then what happens to probabilities, then data, credit, and learners that sample."""
    return {
        make.__name__: make(evidence)
        for make in (
            dpo_lengthens,
            r_dpo_removes,
            ld_dpo_and_sampo,
            means_fix_length,
            sums_or_means,
            chosen_falls,
            similar_pairs,
            gradients_tell,
            squeezing,
            keepers_cost_nothing,
            unseen_strings,
            online_where_far,
            chi_po_escapes,
            credit_without_labels,
            early_tokens,
            implicit_generalises_worse,
            ranking_accuracy_low,
            grpo_favours_length,
            rloo_suffices,
        )
    }


def elsewhere(evidence: dict[str, Any], measure: Callable[[dict[str, Any]], Any]) -> dict[str, Estimate]:
    """An effect on DPO under other conditions, in fewer worlds."""
    return {f"with {name}": estimate(measure(found)) for name, found in evidence["elsewhere"].items()}


def best_of(found: dict[str, Any], place: int | tuple[int, ...], score: str = "merit") -> dict[str, Any]:
    """The results at the best of several values, which is chosen in the tuning worlds."""
    best = int(np.argmax(np.nan_to_num(found["tuning"][score][place].mean(axis=-1), nan=-np.inf)))
    return {name: values[place][best] for name, values in found["reported"].items()}


def by_name(effects: Mapping[str, Estimate]) -> Measured:
    """Effects as marks over their names."""
    return Measured(list(effects), [e.mean for e in effects.values()], [e.half for e in effects.values()])


def no_loss(effect: Estimate) -> Estimate:
    """The effect by which "at no loss" is judged: what is lost must be less than what matters."""
    return Estimate(effect.mean + REWARD, effect.half)


def dpo_lengthens(evidence: dict[str, Any]) -> Claim:
    """DPO's strings beside those of the best policy by the judge's own taste."""
    found = evidence["dpo"]["longer_than_asked"]
    judges = {"judges indifferent to length": TRUTHFUL, "judges fond of length": FOND}
    effects = {name: estimate(found[place, USUAL]) for name, place in judges.items()}
    beyond_truth = estimate(evidence["dpo"]["longer"][FOND, USUAL])
    return Claim(
        "DPO makes answers longer than the labels ask for.",
        "letters of DPO's strings, minus those of the policy that the judges like best at the same KL; β = 0.5",
        effects["judges indifferent to length"],
        by_condition(effects, "the judges", matters=LETTERS),
        {
            "Letters beyond what judges ask for": {name: series(BETAS, found[place]) for name, place in judges.items()},
            "Letters beyond the true optimum": {
                name: series(BETAS, evidence["dpo"]["longer"][place]) for name, place in judges.items()
            },
        },
        "β",
        {
            **effects,
            "letters beyond the true optimum, judges fond of length": beyond_truth,
            **elsewhere(evidence, lambda found: found["longer_than_asked"]),
        },
        log=True,
        papers=("2403.19159", "2310.03716"),
    )


def _after_length(evidence: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What losses come to, each at its best beta, on the labels of judges who are fond of length."""
    return {name: best_of(evidence["after length"], place) for place, name in enumerate(AFTER_LENGTH)}


def _length_panels(evidence: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, Measured]]:
    at_best = _after_length(evidence)
    return {
        "Letters beyond the best policy": {"at its best β": _marks(at_best, names, "longer")},
        "Reward − β KL": {"at its best β": _marks(at_best, names, "merit")},
    }


def _marks(found: Mapping[str, Any], names: Sequence[str], measure: str) -> Measured:
    """What losses come to, as marks over their names."""
    return series([NAMES[name] for name in names], [found[name][measure] for name in names])


def r_dpo_removes(evidence: dict[str, Any]) -> Claim:
    """R-DPO, told the judge's price of a letter."""
    at_best = _after_length(evidence)
    left = estimate(at_best["r-dpo"]["longer"])
    gain = estimate(at_best["r-dpo"]["merit"] - at_best["dpo"]["merit"])
    return Claim(
        "A price for each token (R-DPO) removes the length bias of the labels.",
        "letters of R-DPO's strings beyond the best policy at the same KL, labels fond of length, the judge's price",
        left,
        equivalence(left, within=LETTERS),
        _length_panels(evidence, ["dpo", "r-dpo"]),
        "Loss",
        {
            "the same of DPO": estimate(at_best["dpo"]["longer"]),
            "reward − β KL, R-DPO minus DPO": gain,
        },
        papers=("2403.19159",),
    )


def ld_dpo_and_sampo(evidence: dict[str, Any]) -> Claim:
    """LD-DPO and SamPO know nothing of the judge."""
    at_best = _after_length(evidence)
    shorter = {n: estimate(at_best["dpo"]["longer"] - at_best[n]["longer"]) for n in ("ld-dpo", "sampo")}
    gains = {n: estimate(at_best[n]["merit"] - at_best["dpo"]["merit"]) for n in ("ld-dpo", "sampo")}
    effects = {f"{NAMES[n]}: shorter": effect for n, effect in shorter.items()}
    free = {f"{NAMES[n]}: no loss": no_loss(effect) for n, effect in gains.items()}
    words = {name: verdict(effect, matters=LETTERS) for name, effect in effects.items()}
    words |= {name: verdict(effect) for name, effect in free.items()}
    return Claim(
        "LD-DPO and SamPO remove the length bias at no loss.",
        "letters by which LD-DPO's strings are shorter than DPO's, each beyond the best policy at its KL, labels fond "
        "of length",
        effects["LD-DPO: shorter"],
        in_words(words),
        _length_panels(evidence, ["dpo", "ld-dpo", "sampo"]),
        "Loss",
        {
            **effects,
            **{f"reward − β KL, {NAMES[n]} minus DPO": gain for n, gain in gains.items()},
            **{f"letters too many, {NAMES[n]}": estimate(at_best[n]["longer"]) for n in ("ld-dpo", "sampo")},
        },
        papers=("2409.06411", "2406.10957"),
    )


def _population(evidence: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The minima of losses on infinite data, each at its best beta."""
    return {name: best_of(evidence["population"], place) for place, name in enumerate(ON_ALL_PAIRS)}


def means_fix_length(evidence: dict[str, Any]) -> Claim:
    """SimPO and length-normalised DPO, on samples with biased labels and on infinite unbiased data."""
    at_best, minima = _after_length(evidence), _population(evidence)
    effects = {
        f"{NAMES[n]}, judges fond of length": estimate(np.abs(at_best["dpo"]["longer"]) - np.abs(at_best[n]["longer"]))
        for n in ("simpo", "ln-dpo")
    }
    on_all = {
        "SimPO, infinite data": "simpo",
        "SimPO with γ = 0.5, infinite data": "simpo with a margin",
        "LN-DPO, infinite data": "ln-dpo",
    }
    off = {name: np.abs(found["longer"]) for name, found in minima.items()}
    effects |= {name: estimate(off["dpo"] - off[loss]) for name, loss in on_all.items()}
    short = {name: estimate(minima[loss]["short_of_frontier"]) for name, loss in on_all.items()}
    first, names = next(iter(effects)), ("dpo", "simpo", "ln-dpo")
    return Claim(
        "Means over tokens (SimPO, length-normalised DPO) fix the length.",
        "letters by which SimPO is closer than DPO to the length of the best policy at its KL, labels fond of length",
        effects[first],
        by_condition(effects, "the labels", matters=LETTERS),
        {
            "Letters beyond the best policy": {
                "labels fond of length": _marks(at_best, names, "longer"),
                "infinite data, truthful labels": _marks(minima, names, "longer"),
            },
            "Reward short of the frontier": {"infinite data": _marks(minima, names, "short_of_frontier")},
        },
        "Loss",
        {**effects, **{f"reward short of the frontier, {name}": e for name, e in short.items()}},
        papers=("2405.14734", "2411.15124"),
    )


def sums_or_means(evidence: dict[str, Any]) -> Claim:
    """IPO and ORPO, which two code bases apply to sums and to means."""
    minima = _population(evidence)
    effects = {
        "IPO": estimate(minima["ipo on sums"]["merit"] - minima["ipo on means"]["merit"]),
        "ORPO": estimate(minima["orpo on sums"]["merit"] - minima["orpo"]["merit"]),
    }
    names = ("dpo", "ipo on sums", "ipo on means", "orpo on sums", "orpo")
    return Claim(
        "It makes little difference whether IPO and ORPO see sums or means over tokens.",
        "reward − β KL at the minimum of IPO on sums minus that on means, infinite data, each at its best β",
        effects["IPO"],
        in_words({name: equivalence(effect, within=REWARD) for name, effect in effects.items()}),
        {
            "Reward − β KL, short of the optimum": {
                loss: series(SMALL_BETAS, _short_of_optimum(evidence, loss)) for loss in names
            },
            "Letters beyond the best policy": {
                loss: series(SMALL_BETAS, evidence["population"]["reported"]["longer"][ON_ALL_PAIRS.index(loss)])
                for loss in names
            },
        },
        "β (IPO, DPO), weight of the odds (ORPO)",
        {f"{name}, sums minus means": effect for name, effect in effects.items()},
        log=True,
        papers=("2310.12036", "2403.07691"),
    )


def _short_of_optimum(evidence: dict[str, Any], loss: str) -> np.ndarray:
    found = evidence["population"]["reported"]
    place = ON_ALL_PAIRS.index(loss)
    return np.asarray(found["optimal_merit"][place] - found["merit"][place])


def chosen_falls(evidence: dict[str, Any]) -> Claim:
    """The log-probability of chosen strings."""
    found = evidence["dpo"]
    who = {"pairs of the SFT policy": TRUTHFUL, "uniform pairs": UNIFORM}
    effects = {name: estimate(found["fell"][place, USUAL] - 0.5) for name, place in who.items()}
    return Claim(
        "In DPO the chosen response loses probability.",
        "share of chosen strings that become less probable, minus one half; pairs of the SFT policy, β = 0.5",
        effects["pairs of the SFT policy"],
        by_condition(effects, "which strings are compared", matters=SHARE),
        {
            "Change of log-probability (nats)": {
                f"{side}, {name}": series(BETAS, found[f"{side}_change"][place])
                for name, place in who.items()
                for side in ("chosen", "rejected")
            },
            "Share of chosen strings that fall": {name: series(BETAS, found["fell"][p]) for name, p in who.items()},
        },
        "β",
        {
            **{f"share minus one half, {name}": effect for name, effect in effects.items()},
            **{
                f"change of chosen (nats), {name}": estimate(found["chosen_change"][place, USUAL])
                for name, place in who.items()
            },
            **elsewhere(evidence, lambda found: found["fell"] - 0.5),
        },
        log=True,
        papers=("2404.12358", "2406.07327"),
    )


def similar_pairs(evidence: dict[str, Any]) -> Claim:
    """Chosen strings by their edit distance from the rejected ones."""
    found = evidence["alike"]
    effect = estimate(found["chosen_change"][-1] - found["chosen_change"][0])
    return Claim(
        "... and most so where chosen and rejected are alike.",
        "change of the log-probability (nats) of chosen strings at edit distance 4, minus that at distance 1; β = 0.5",
        effect,
        verdict(effect),
        {
            "Change of log-probability (nats)": {
                "chosen": series(DISTANCES, found["chosen_change"]),
                "chosen minus rejected": series(DISTANCES, found["margin_change"]),
            },
            "Share of chosen strings that fall": {"chosen": series(DISTANCES, found["fell"])},
        },
        "Edit distance of chosen and rejected",
        {
            f"change of chosen (nats), distance {distance}": estimate(found["chosen_change"][i])
            for i, distance in enumerate(DISTANCES)
        },
        papers=("2410.08847", "2402.13228"),
    )


def gradients_tell(evidence: dict[str, Any]) -> Claim:
    """Gradient entanglement: by the pair's own gradients, and by those of all pairs."""
    found = evidence["dpo"]
    who = {"pairs of the SFT policy": TRUTHFUL, "uniform pairs": UNIFORM}
    ways = {"the pair's own gradients": "told_alone", "gradients of all pairs": "told_by_all"}
    usual = {name: np.maximum(found["fell"][p, USUAL], 1 - found["fell"][p, USUAL]) for name, p in who.items()}
    effects = {
        f"{way}, {name}": estimate(found[key][p, USUAL] - usual[name])
        for way, key in ways.items()
        for name, p in who.items()
    }
    first = next(iter(effects))
    return Claim(
        "The inner product of the gradients of chosen and rejected tells whether chosen rises or falls.",
        "share of pairs whose direction is told by the pair's own gradients at the start, minus the share of the more "
        "frequent direction; pairs of the SFT policy, β = 0.5",
        effects[first],
        by_condition(effects, "which gradients are meant", matters=SHARE),
        {
            "Share of pairs whose direction is told": {
                **{
                    way: by_name({n: estimate(found[key][p, USUAL]) for n, p in who.items()})
                    for way, key in ways.items()
                },
                "the more frequent direction": by_name({n: estimate(usual[n]) for n in who}),
            }
        },
        "Pairs",
        {
            f"share told by {way}, {n}": estimate(found[key][p, USUAL])
            for way, key in ways.items()
            for n, p in who.items()
        },
        papers=("2410.13828",),
    )


def squeezing(evidence: dict[str, Any]) -> Claim:
    """The most probable string of the SFT policy."""
    found = evidence["dpo"]
    who = {"uniform pairs": UNIFORM, "pairs of the SFT policy": TRUTHFUL}
    beyond = found["mode_change"] - found["mode_change_of_best"]
    effects = {name: estimate(beyond[place, USUAL]) for name, place in who.items()}
    return Claim(
        "DPO squeezes probability into what was most probable already, worst where data are off-policy.",
        "change of the probability of the SFT policy's most probable string, minus that of the best policy at equal "
        "KL; uniform pairs, β = 0.5",
        effects["uniform pairs"],
        by_condition(effects, "which strings are compared", matters=SHARE),
        {
            "Change of probability of the mode": {
                **{f"DPO, {name}": series(BETAS, found["mode_change"][p]) for name, p in who.items()},
                "best policy at DPO's KL": series(BETAS, found["mode_change_of_best"][TRUTHFUL]),
            },
            "Change of entropy (nats)": {name: series(BETAS, found["entropy_change"][p]) for name, p in who.items()},
        },
        "β",
        {
            **effects,
            **{f"change of entropy (nats), {n}": estimate(found["entropy_change"][p, USUAL]) for n, p in who.items()},
            **elsewhere(evidence, lambda found: found["mode_change"] - found["mode_change_of_best"]),
        },
        log=True,
        papers=("2407.10490",),
    )


def keepers_cost_nothing(evidence: dict[str, Any]) -> Claim:
    """RPO and DPO-positive, as strong as it takes to keep chosen strings probable, beside DPO."""
    who = {"pairs of the SFT policy": 0, "uniform pairs": 1}
    shown = {"rpo": "RPO", "dpo-positive": "DPO-positive"}
    plain = {pairs: best_of(evidence["kept by nothing"], (0, judge, 0)) for pairs, judge in who.items()}
    kept = {
        (name, pairs): best_that_keeps(evidence["keepers"], (place, judge))
        for place, name in enumerate(KEPT)
        for pairs, judge in who.items()
    }
    costs, changes = (
        {
            f"{label}, {pairs}": estimate(kept[name, pairs][what] - plain[pairs][what])
            for name, label in shown.items()
            for pairs in who
        }
        for what in ("merit", "chosen_change")
    )
    lines = {
        f"{label}, {pairs}": [
            best_of(evidence["keepers"], (place, judge, strength)) for strength in range(len(STRENGTHS))
        ]
        for place, label in enumerate(shown.values())
        for pairs, judge in who.items()
    }
    first = next(iter(costs))
    return Claim(
        "An NLL term (RPO) or DPO-positive keeps chosen responses probable, at no cost.",
        "reward − β KL of RPO, as strong as it takes that chosen strings lose at most 0.1 nats on average, minus that "
        "of DPO; pairs of the SFT policy, each at its best β",
        costs[first],
        in_words({name: verdict(no_loss(effect)) for name, effect in costs.items()}),
        {
            "Change of chosen (nats)": {
                name: series(STRENGTHS, [f["chosen_change"] for f in found]) for name, found in lines.items()
            },
            "Reward − β KL": {name: series(STRENGTHS, [f["merit"] for f in found]) for name, found in lines.items()},
        },
        "Strength",
        {
            **{f"reward − β KL, minus DPO: {name}": effect for name, effect in costs.items()},
            **{f"change of chosen (nats), DPO, {n}": estimate(f["chosen_change"]) for n, f in plain.items()},
            **{f"change of chosen (nats), minus DPO: {name}": effect for name, effect in changes.items()},
        },
        log=True,
        papers=("2404.19733", "2402.13228"),
    )


def best_that_keeps(found: dict[str, Any], place: tuple[int, ...]) -> dict[str, Any]:
    """The results at the best strength and beta of those that keep chosen strings probable in the tuning worlds.

    If none does, those that come closest.
    """
    tuning = {name: values[place].mean(axis=-1) for name, values in found["tuning"].items()}
    keeps = tuning["chosen_change"] >= -0.1
    score = np.where(keeps, tuning["merit"], -np.inf) if keeps.any() else tuning["chosen_change"]
    best = np.unravel_index(int(np.argmax(np.nan_to_num(score, nan=-np.inf))), score.shape)
    assert score.shape == (len(STRENGTHS), len(KEPT_BETAS))
    return {name: values[place][best] for name, values in found["reported"].items()}


def unseen_strings(evidence: dict[str, Any]) -> Claim:
    """Probability of strings that are in no pair."""
    found = {name: values[TRUTHFUL] for name, values in evidence["dpo"].items()}
    effect = estimate((found["unseen"] - found["unseen_before"])[USUAL])
    return Claim(
        "DPO gives probability to responses that nobody showed.",
        "probability of strings that are in no pair, after DPO minus before; pairs of the SFT policy, β = 0.5",
        effect,
        verdict(effect),
        {
            "Probability of unseen strings": {
                "SFT": series(BETAS, found["unseen_before"]),
                "DPO": series(BETAS, found["unseen"]),
                "best policy at DPO's KL": series(BETAS, found["unseen_of_best"]),
            },
            "Mean reward of DPO's strings": {
                "unseen": series(BETAS, found["unseen_reward"]),
                "seen": series(BETAS, found["seen_reward"]),
            },
        },
        "β",
        {
            "after DPO": estimate(found["unseen"][USUAL]),
            "before": estimate(found["unseen_before"][USUAL]),
            "of the best policy at DPO's KL": estimate(found["unseen_of_best"][USUAL]),
            "reward of unseen strings minus that of seen ones": estimate(
                (found["unseen_reward"] - found["seen_reward"])[USUAL]
            ),
            **elsewhere(evidence, lambda found: found["unseen"] - found["unseen_before"]),
        },
        log=True,
        papers=("2404.10719",),
    )


def online_where_far(evidence: dict[str, Any]) -> Claim:
    """Online DPO beside offline DPO, with as many labels and steps."""
    gain = {name: found["merit"][1] - found["merit"][0] for name, found in evidence["online"].items()}
    effects = {"reference near the peak": estimate(gain["near"]), "reference far from it": estimate(gain["far"])}
    covers = {"near": evidence["exact"]["coverage"], "far": evidence["far"]["coverage"]}
    more = estimate(gain["far"] - gain["near"])
    return Claim(
        "On-policy data win where the best responses are far from the reference.",
        "gain in reward − β KL by online over offline DPO, as many labels and steps: a reference that avoids good "
        "strings minus one that prefers them",
        more,
        verdict(more, matters=REWARD),
        {"Reward − β KL, online minus offline": {"DPO": by_name(effects)}},
        "Reference",
        {
            **effects,
            **{f"logarithm of the coverage, {name}": estimate(np.log(values)) for name, values in covers.items()},
        },
        papers=("2404.14367",),
    )


def chi_po_escapes(evidence: dict[str, Any]) -> Claim:
    """Small betas and few pairs: DPO and chi-PO."""
    reward = evidence["chi-po"]["expected_reward"]
    best = reward.mean(-1).argmax(-1)
    lost = {name: reward[i, best[i]] - reward[i, 0] for i, name in enumerate(("DPO", "χPO"))}
    effects = {"loses less than DPO": estimate(lost["DPO"] - lost["χPO"])}
    words = {
        "loses less than DPO": verdict(effects["loses less than DPO"], matters=REWARD),
        "loses nothing": verdict(no_loss(estimate(-lost["χPO"]))),
    }
    return Claim(
        "χPO escapes overoptimisation.",
        "reward that DPO loses from its best β to β = 0.003, minus the same of χPO; 128 pairs, a third of them flipped",
        effects["loses less than DPO"],
        in_words(words),
        {
            "Expected reward": {n: series(CHI_BETAS, reward[i]) for i, n in enumerate(("DPO", "χPO"))},
            "KL to the reference (nats)": {
                n: series(CHI_BETAS, evidence["chi-po"]["kl_to_reference"][i]) for i, n in enumerate(("DPO", "χPO"))
            },
        },
        "β",
        {
            **{f"reward lost, {name}": estimate(values) for name, values in lost.items()},
            "best reward, χPO minus DPO": estimate(reward[1, best[1]] - reward[0, best[0]]),
        },
        log=True,
        papers=("2407.13399",),
    )


def credit_without_labels(evidence: dict[str, Any]) -> Claim:
    """Token log-ratios beside soft advantages."""
    found = evidence["dpo"]["credit"]
    effect = estimate(found[TRUTHFUL, USUAL])
    return Claim(
        "DPO's log-ratios of tokens are advantages: it learns credit without labels of tokens.",
        "correlation of β times the log-ratio of a token with its soft advantage, tokens of the SFT policy; β = 0.5",
        effect,
        verdict(effect, matters=0.5),
        {
            "Correlation with the soft advantage": {
                "pairs of the SFT policy": series(BETAS, found[TRUTHFUL]),
                "uniform pairs": series(BETAS, found[UNIFORM]),
                "judges fond of length": series(BETAS, found[FOND]),
            }
        },
        "β",
        {
            "uniform pairs": estimate(found[UNIFORM, USUAL]),
            "judges fond of length": estimate(found[FOND, USUAL]),
            **elsewhere(evidence, lambda found: found["credit"]),
        },
        log=True,
        papers=("2404.12358", "2412.01981"),
    )


def early_tokens(evidence: dict[str, Any]) -> Claim:
    """The size of soft advantages, place by place."""
    size = evidence["exact"]["advantage_by_place"]
    effect = estimate(size[0] - size[-1])
    return Claim(
        "Early tokens matter more.",
        "size (root mean square, in units of reward) of the soft advantage of the first token minus that of the sixth",
        effect,
        verdict(effect, matters=REWARD),
        {"Size of the soft advantage": {"tokens of the SFT policy": series(range(1, STRINGS.horizon + 1), size)}},
        "Place of the token",
        {f"token {place}": estimate(values) for place, values in enumerate(size, 1)},
        papers=("2502.14340",),
    )


def implicit_generalises_worse(evidence: dict[str, Any]) -> Claim:
    """DPO's implicit reward beside a reward model of the same network."""
    implicit, explicit = (best_of(evidence["models"], place, "accuracy") for place in (0, 1))
    where = {
        "strings of the SFT policy": "accuracy",
        "uniform strings": "shifted_accuracy",
    }
    effects = {name: estimate(explicit[key] - implicit[key]) for name, key in where.items()}
    return Claim(
        "DPO's implicit reward generalises worse than a reward model.",
        "accuracy on new comparisons of a reward model minus that of DPO's implicit reward, uniform strings",
        effects["uniform strings"],
        by_condition(effects, "which strings are compared", matters=SHARE),
        {
            "Accuracy on new comparisons": {
                "reward model": by_name({name: estimate(explicit[key]) for name, key in where.items()}),
                "DPO's implicit reward": by_name({name: estimate(implicit[key]) for name, key in where.items()}),
            }
        },
        "Compared are",
        {
            **{f"difference, {name}": effect for name, effect in effects.items()},
            "accuracy of the true rewards, strings of the SFT policy": estimate(explicit["possible"]),
        },
        papers=("2409.03650", "2503.01067"),
    )


def ranking_accuracy_low(evidence: dict[str, Any]) -> Claim:
    """How often a policy's likelihood orders the training pairs as labelled."""
    found = {name: values[TRUTHFUL] for name, values in evidence["dpo"].items()}
    effects = {
        "the best policy at DPO's KL": estimate((found["ranked_by_best"] - found["ranked"])[USUAL]),
        "the true rewards": estimate((found["ranked_by_truth"] - found["ranked"])[USUAL]),
    }
    effect = effects["the true rewards"]
    return Claim(
        "After training, policies still order few pairs rightly by likelihood, far from what is possible.",
        "share of training pairs whose chosen string has the higher true reward, minus the share in which it is more "
        "probable under DPO; β = 0.5",
        effect,
        by_condition(effects, "what is possible", matters=SHARE),
        {
            "Share of pairs": {
                "DPO": series(BETAS, found["ranked"]),
                "best policy at DPO's KL": series(BETAS, found["ranked_by_best"]),
                "true rewards": series(BETAS, found["ranked_by_truth"]),
            }
        },
        "β",
        {
            "under DPO": estimate(found["ranked"][USUAL]),
            "under the best policy at DPO's KL": estimate(found["ranked_by_best"][USUAL]),
            "by the true rewards": estimate(found["ranked_by_truth"][USUAL]),
            **elsewhere(evidence, lambda found: found["ranked_by_truth"] - found["ranked"]),
        },
        log=True,
        papers=("2405.19534",),
    )


def grpo_favours_length(evidence: dict[str, Any]) -> Claim:
    """GRPO's aggregations."""
    found = evidence["aggregation"]
    grpo, fixed = 0, 2
    effects = {
        "exact gradient, letters per unit of reward": estimate(
            found["longer_per_reward"][grpo] - found["longer_per_reward"][fixed]
        ),
        "letters after training": estimate(found["expected_length"][grpo] - found["expected_length"][fixed]),
        "letters of bad strings after training": estimate(found["length_of_bad"][grpo] - found["length_of_bad"][fixed]),
    }
    return Claim(
        "GRPO's mean over each response's tokens makes responses, bad ones above all, longer; Dr. GRPO does not.",
        "letters of bad strings after training with GRPO's aggregation, minus those with Dr. GRPO's",
        effects["letters of bad strings after training"],
        by_condition(effects, "what is measured", matters=LETTERS / 2),
        {
            "Letters": {
                "all strings": by_name({n: estimate(found["expected_length"][i]) for i, n in enumerate(AGGREGATIONS)}),
                "bad strings": by_name({n: estimate(found["length_of_bad"][i]) for i, n in enumerate(AGGREGATIONS)}),
            },
            "Letters per unit of reward, exact gradient": {
                "at the start": by_name(
                    {n: estimate(found["longer_per_reward"][i]) for i, n in enumerate(AGGREGATIONS)}
                )
            },
        },
        "Aggregation",
        {
            **effects,
            "reward after training, GRPO's minus Dr. GRPO's": estimate(
                found["expected_reward"][grpo] - found["expected_reward"][fixed]
            ),
            "letters of bad strings before training": estimate(found["length_of_bad_before"][grpo]),
        },
        papers=("2503.20783",),
    )


def rloo_suffices(evidence: dict[str, Any]) -> Claim:
    """RLOO on whole strings beside PPO with a value for each token."""
    ppo, rloo = (best_of(evidence["learners"], place) for place in (0, 1))
    effect = estimate(rloo["merit"] - ppo["merit"])
    noise = evidence["noise"]
    merits = evidence["learners"]["reported"]["merit"]
    variance = {"RLOO": "rloo", "PPO, true values": "ppo", "PPO, no values": "ppo_without_values"}
    return Claim(
        "RLOO on whole responses does as well as PPO with a value for each token, or better.",
        "reward − β KL of RLOO minus that of PPO with generalised advantages, as many samples, each at its best rate",
        effect,
        verdict(no_loss(effect), matters=0.0),
        {
            "Reward − β KL": {n: series(RATES, merits[i]) for i, n in enumerate(("PPO by token", "RLOO"))},
        },
        "Learning rate",
        {
            "RLOO minus PPO": effect,
            **{
                f"variance of the first gradient over its square, {name}: logarithm": estimate(np.log(noise[key]))
                for name, key in variance.items()
            },
        },
        log=True,
        papers=("2402.14740",),
    )
