"""The tutorial notebook's claims about DPO, RLHF and their variants, each measured in a thousand worlds.

A claim is judged by an effect with a 95 % interval over worlds (`judging.py`). `evidence.py` measures, `statements.py`
says what follows.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from dpo_jax import checks
from experiments.claims.evidence import Amounts, gather
from experiments.claims.statements import judge
from experiments.lab import claims_page, commands, console, devices, files, page
from experiments.lab.judging import Claim
from experiments.lab.pipeline import TUTORIAL, Pipeline
from experiments.lab.statistics import Seconds
from experiments.lab.tuning import Seeds

PAGE = Path(__file__).parent / "README.md"
ENOUGH_CANDIDATES, ENOUGH_TUNING_SEEDS = 16, 32
"""With fewer, the luck of tuning decides some verdicts."""


@dataclass(frozen=True)
class Options:
    """The notebook's claims, measured: for each an effect with a 95 % interval, a verdict and a figure."""

    seed: int = 0
    """Decides everything random."""
    num_seeds: int = 1024
    """How many worlds to measure in."""
    num_tuning_seeds: int = 64
    """How many other worlds to choose hyperparameters in."""
    num_candidates: int = 32
    """How many sets of hyperparameters to try for each loss."""
    out: Path = Path("results/claims")
    """Folder for summary.json and the figures."""


def print_results(claims: list[Claim]) -> None:
    """Prints the claims with their verdicts."""
    console.print_table(
        "The notebook's claims, measured: effects with 95% intervals",
        ["claim", "effect", "verdict"],
        [[claim.id, f"{claim.effect.mean:+.4f} ± {claim.effect.half:.4f}", claim.verdict] for claim in claims],
    )


def main(options: Options, pipeline: Pipeline = TUTORIAL) -> None:
    """Measures, judges, and writes the results."""
    commands.check_seed(options.seed)
    commands.check_sizes(num_tuning_seeds=options.num_tuning_seeds, num_candidates=options.num_candidates)
    with commands.clear_errors():
        checks.size("--num-seeds", options.num_seeds, at_least=2)
    out, clock = files.output_folder(options.out), time.perf_counter()
    devices.use_all_cores()
    devices.enable_compilation_cache()
    console.say(
        f"The notebook's claims in {options.num_seeds:,} worlds, and {options.num_tuning_seeds:,} more for tuning. The "
        "first start also compiles, for some minutes."
    )
    amounts = Amounts(Seeds.of(options.num_seeds, options.num_tuning_seeds), options.num_candidates)
    seconds = Seconds()
    claims = judge(gather(pipeline, options.seed, amounts, seconds))
    took = {"total": time.perf_counter() - clock, **vars(seconds)}
    sizes = {name: getattr(options, name) for name in ("seed", "num_seeds", "num_tuning_seeds", "num_candidates")}
    summary = {**sizes, "claims": [claims_page.as_entry(claim) for claim in claims], **files.provenance(**took)}
    files.save_summary(summary, out)
    page.update(claims_page.page_texts(summary, "claims"), out, path=PAGE)
    claims_page.save_figures(claims, out)
    print_results(claims)
    if options.num_candidates < ENOUGH_CANDIDATES or options.num_tuning_seeds < ENOUGH_TUNING_SEEDS:
        console.say(
            f"Beware: with {options.num_candidates} candidates in {options.num_tuning_seeds} tuning worlds, luck in "
            f"tuning decides the verdicts on losses; the reported results have {Options.num_candidates} in "
            f"{Options.num_tuning_seeds}."
        )
    console.say(
        f"{took['total']:.0f} s in all: {took['compile']:.0f} s compiling and {took['run']:.0f} s running. Figures and "
        f"summary.json are in {out}."
    )


if __name__ == "__main__":
    main(commands.parse(Options))
