"""Preference losses: one pure, elementwise function per paper."""

from dpo_jax.losses.pairwise import dpo_loss as dpo_loss
from dpo_jax.losses.pairwise import log_ratios as log_ratios
