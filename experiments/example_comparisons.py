"""Makes `example_comparisons.csv`: an invented tea tasting, to try `fit_comparisons` on.

Eight teas are compared in pairs at three times of day. How good they truly are comes from a toy world, and what the
tasters say is drawn from it: `python -m experiments.example_comparisons`.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import jax

from dpo_jax import toy
from experiments.lab import commands, console, files

PATH = Path(__file__).with_suffix(".csv")
TIMES = ("breakfast", "afternoon", "evening")
TEAS = ("Assam", "Ceylon", "Darjeeling", "Earl Grey", "Genmaicha", "Keemun", "Rooibos", "Sencha")


@dataclass(frozen=True)
class Options:
    """Makes an invented tea tasting, 600 comparisons, to try `fit_comparisons` on."""

    out: Path = PATH
    """The file to write."""


def rows() -> list[tuple[str, str, str]]:
    """The lines of the file, header included."""
    world_key, taste_key = jax.random.split(jax.random.key(11))
    world = toy.make_world(world_key, num_prompts=len(TIMES), num_responses=len(TEAS), sharpness=2.0)
    tastings = jax.device_get(toy.sample_preferences(taste_key, world, num=600, temperature=0.2))
    chosen, rejected = tastings.responses
    return [
        ("prompt", "chosen", "rejected"),
        *((TIMES[p], TEAS[c], TEAS[r]) for p, c, r in zip(tastings.prompts, chosen, rejected, strict=True)),
    ]


def write(path: Path) -> None:
    """Writes the file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows())


def main(options: Options) -> None:
    """Makes the tasting and writes its file."""
    files.save(files.output_folder(options.out.parent) / options.out.name, write)
    console.say(f"The comparisons are in {options.out}.")


if __name__ == "__main__":
    main(commands.parse(Options))
