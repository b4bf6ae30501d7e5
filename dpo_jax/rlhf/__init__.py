"""RLHF: learners that try things out, against a reward model, the true reward, or fresh comparisons."""

from dpo_jax.rlhf.estimators import estimate_moments as estimate_moments
from dpo_jax.rlhf.estimators import group_moments as group_moments
from dpo_jax.rlhf.estimators import learner_gradient as learner_gradient
from dpo_jax.rlhf.estimators import policy_gradient as policy_gradient
from dpo_jax.rlhf.groups import Groups as Groups
from dpo_jax.rlhf.groups import best_of_n as best_of_n
from dpo_jax.rlhf.groups import collect_groups as collect_groups
from dpo_jax.rlhf.kl_control import AdaptiveKL as AdaptiveKL
from dpo_jax.rlhf.kl_control import update_coefficient as update_coefficient
from dpo_jax.rlhf.preferences import nash_md as nash_md
from dpo_jax.rlhf.preferences import online_dpo as online_dpo
from dpo_jax.rlhf.preferences import xpo as xpo
from dpo_jax.rlhf.reinforcement import ActorCritic as ActorCritic
from dpo_jax.rlhf.reinforcement import grpo as grpo
from dpo_jax.rlhf.reinforcement import ppo as ppo
from dpo_jax.rlhf.reinforcement import reinforce as reinforce
from dpo_jax.rlhf.reinforcement import rloo as rloo
from dpo_jax.rlhf.tokens import token_grpo as token_grpo
from dpo_jax.rlhf.tokens import token_ppo as token_ppo
