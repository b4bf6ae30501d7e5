"""Makes `example_comparisons.csv`: an invented tea tasting, to try `fit_comparisons` on.

Eight teas are compared in pairs at three times of day. How good they truly are comes from a toy world, and what the
tasters say is drawn from it: `python -m experiments.example_comparisons`.
"""

import csv
from pathlib import Path

import jax

from dpo_jax import toy

PATH = Path(__file__).with_suffix(".csv")
TIMES = ("breakfast", "afternoon", "evening")
TEAS = ("Assam", "Ceylon", "Darjeeling", "Earl Grey", "Genmaicha", "Keemun", "Rooibos", "Sencha")


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


if __name__ == "__main__":
    with PATH.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows())
