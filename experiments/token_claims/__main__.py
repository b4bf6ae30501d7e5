"""What papers say about responses of several tokens, each claim measured in a thousand worlds of strings.

A claim is judged by an effect with a 95 % interval over worlds (`lab/judging.py`). `evidence.py` measures,
`statements.py` says what follows.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.lab import claims_page, commands, studies
from experiments.lab.pipeline import Pipeline
from experiments.lab.string_worlds import PIPELINE
from experiments.token_claims.evidence import gather
from experiments.token_claims.statements import judge

TITLE, PAGE = "Claims about strings of tokens", Path(__file__).parent / "README.md"


@dataclass(frozen=True)
class Options(studies.Options):
    """Claims about responses of several tokens: for each an effect with a 95 % interval, a verdict and a figure."""

    num_seeds: int = 1024
    """How many worlds to measure in."""
    num_tuning_seeds: int = 64
    """How many other worlds to choose betas and learning rates in."""
    out: Path = Path("results/token_claims")
    """Folder for summary.json and the figures."""


def main(options: Options, pipeline: Pipeline = PIPELINE) -> None:
    """Measures, judges, and writes the results."""
    study = studies.begin(options, options.out, at_least=2)
    study.announce(TITLE)
    claims = judge(gather(pipeline, study))
    claims_page.publish(TITLE, claims, study, "token_claims", PAGE)
    study.end()


if __name__ == "__main__":
    main(commands.parse(Options))
