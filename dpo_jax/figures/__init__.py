"""Results as Matplotlib figures."""

from dpo_jax.figures.benchmark_figures import cost_per_step as cost_per_step
from dpo_jax.figures.benchmark_figures import roofline as roofline
from dpo_jax.figures.length_figures import lengths as lengths
from dpo_jax.figures.lm_figures import language_betas as language_betas
from dpo_jax.figures.lm_figures import tuning as tuning
from dpo_jax.figures.loss_figures import LossFamily as LossFamily
from dpo_jax.figures.loss_figures import loss_family as loss_family
from dpo_jax.figures.loss_figures import loss_frontiers as loss_frontiers
from dpo_jax.figures.loss_figures import loss_gains as loss_gains
from dpo_jax.figures.rlhf_figures import Points as Points
from dpo_jax.figures.rlhf_figures import learned_rewards as learned_rewards
from dpo_jax.figures.rlhf_figures import learning_rates as learning_rates
from dpo_jax.figures.rlhf_figures import overoptimisation as overoptimisation
from dpo_jax.figures.rlhf_figures import reinforcement as reinforcement
from dpo_jax.figures.rlhf_figures import rlhf_frontier as rlhf_frontier
from dpo_jax.figures.string_figures import prefix_tree as prefix_tree
from dpo_jax.figures.sweep_figures import frontiers as frontiers
from dpo_jax.figures.sweep_figures import heat_maps as heat_maps
from dpo_jax.figures.sweep_figures import lines as lines
from dpo_jax.figures.training_figures import beta_ablation as beta_ablation
from dpo_jax.figures.training_figures import frontier as frontier
from dpo_jax.figures.training_figures import training as training
from dpo_jax.figures.vote_figures import calibration as calibration
from dpo_jax.figures.vote_figures import strengths as strengths
from dpo_jax.figures.vote_figures import win_probabilities as win_probabilities
