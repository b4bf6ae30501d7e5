"""What papers say about responses of several tokens, each claim measured in a thousand worlds of strings.

A claim is judged by an effect with a 95 % interval over worlds (`lab/judging.py`). `evidence.py` measures,
`statements.py` says what follows.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from dpo_jax import checks
from experiments.lab import claims_page, commands, console, devices, files, page
from experiments.lab.judging import Claim
from experiments.lab.pipeline import Pipeline
from experiments.lab.statistics import Seconds
from experiments.lab.string_worlds import PIPELINE
from experiments.lab.tuning import Seeds
from experiments.token_claims.evidence import gather
from experiments.token_claims.statements import judge

PAGE = Path(__file__).parent / "README.md"


@dataclass(frozen=True)
class Options:
    """Claims about responses of several tokens: for each an effect with a 95 % interval, a verdict and a figure."""

    seed: int = 0
    """Decides everything random."""
    num_seeds: int = 1024
    """How many worlds to measure in."""
    num_tuning_seeds: int = 64
    """How many other worlds to choose betas and learning rates in."""
    out: Path = Path("results/token_claims")
    """Folder for summary.json and the figures."""


def print_results(claims: list[Claim]) -> None:
    """Prints the claims with their verdicts."""
    console.print_table(
        "Claims about tokens, measured: effects with 95% intervals",
        ["claim", "effect", "verdict"],
        [[claim.id, f"{claim.effect.mean:+.4f} ± {claim.effect.half:.4f}", claim.verdict] for claim in claims],
    )


def main(options: Options, pipeline: Pipeline = PIPELINE) -> None:
    """Measures, judges, and writes the results."""
    commands.check_seed(options.seed)
    commands.check_sizes(num_tuning_seeds=options.num_tuning_seeds)
    with commands.clear_errors():
        checks.size("--num-seeds", options.num_seeds, at_least=2)
    out, clock = files.output_folder(options.out), time.perf_counter()
    devices.use_all_cores()
    devices.enable_compilation_cache()
    console.say(
        f"Claims about tokens in {options.num_seeds:,} worlds of strings, and {options.num_tuning_seeds:,} more for "
        "tuning. The first start also compiles, for some minutes."
    )
    seconds = Seconds()
    seeds = Seeds.of(options.num_seeds, options.num_tuning_seeds)
    claims = judge(gather(options.seed, seeds, seconds, pipeline))
    took = {"total": time.perf_counter() - clock, **vars(seconds)}
    sizes = {name: getattr(options, name) for name in ("seed", "num_seeds", "num_tuning_seeds")}
    summary = {**sizes, "claims": [claims_page.as_entry(claim) for claim in claims], **files.provenance(**took)}
    files.save_summary(summary, out)
    page.update(claims_page.page_texts(summary, "token_claims"), out, path=PAGE)
    claims_page.save_figures(claims, out)
    print_results(claims)
    console.say(
        f"{took['total']:.0f} s in all: {took['compile']:.0f} s compiling and {took['run']:.0f} s running. Figures and "
        f"summary.json are in {out}."
    )


if __name__ == "__main__":
    main(commands.parse(Options))
