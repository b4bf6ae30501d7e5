"""The tutorial notebook's claims about DPO, RLHF and their variants, each measured in a thousand worlds.

A claim is judged by an effect with a 95 % interval over worlds (`judging.py`). `evidence.py` measures, `statements.py`
says what follows.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.claims.evidence import gather
from experiments.claims.statements import judge
from experiments.lab import claims_page, commands, console, studies
from experiments.lab.pipeline import TUTORIAL, Pipeline

TITLE, PAGE = "The notebook's claims", Path(__file__).parent / "README.md"
ENOUGH_CANDIDATES, ENOUGH_TUNING_SEEDS = 16, 32
"""With fewer, the luck of tuning decides some verdicts."""


@dataclass(frozen=True)
class Options(studies.Options):
    """The notebook's claims, measured: for each an effect with a 95 % interval, a verdict and a figure."""

    num_seeds: int = 1024
    """How many worlds to measure in."""
    num_tuning_seeds: int = 64
    """How many other worlds to choose hyperparameters in."""
    num_candidates: int = 32
    """How many sets of hyperparameters to try for each loss."""
    out: Path = Path("results/claims")
    """Folder for summary.json and the figures."""


def main(options: Options, pipeline: Pipeline = TUTORIAL) -> None:
    """Measures, judges, and writes the results."""
    study = studies.begin(options, options.out, at_least=2)
    study.announce(TITLE)
    claims = judge(gather(pipeline, study, options.num_candidates))
    claims_page.publish(TITLE, claims, study, "claims", PAGE)
    if options.num_candidates < ENOUGH_CANDIDATES or options.num_tuning_seeds < ENOUGH_TUNING_SEEDS:
        console.say(
            f"Beware: with {options.num_candidates} candidates in {options.num_tuning_seeds} tuning worlds, luck in "
            f"tuning decides the verdicts on losses; the reported results have {Options.num_candidates} in "
            f"{Options.num_tuning_seeds}."
        )
    study.end()


if __name__ == "__main__":
    main(commands.parse(Options))
