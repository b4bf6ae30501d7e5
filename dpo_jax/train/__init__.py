"""Training: objectives, and the loop that minimises them. Independent of the kind of responses."""

from dpo_jax.train.chunks import in_chunks as in_chunks
from dpo_jax.train.fit import Evaluated as Evaluated
from dpo_jax.train.fit import NonFiniteError as NonFiniteError
from dpo_jax.train.fit import TrainState as TrainState
from dpo_jax.train.fit import advance as advance
from dpo_jax.train.fit import evaluate as evaluate
from dpo_jax.train.fit import fit as fit
from dpo_jax.train.fit import init_state as init_state
from dpo_jax.train.fit import run_epoch as run_epoch
from dpo_jax.train.fit import update as update
from dpo_jax.train.objectives import Batchwise as Batchwise
from dpo_jax.train.objectives import Running as Running
from dpo_jax.train.objectives import policy_gradient_objective as policy_gradient_objective
from dpo_jax.train.objectives import preference_objective as preference_objective
from dpo_jax.train.objectives import reference_free_objective as reference_free_objective
from dpo_jax.train.objectives import sft_objective as sft_objective
from dpo_jax.train.objectives import unpaired_objective as unpaired_objective
from dpo_jax.train.objectives import with_reference as with_reference
from dpo_jax.train.online import fit_online as fit_online
from dpo_jax.train.statistics import batch_reference_point as batch_reference_point
from dpo_jax.train.statistics import moving_reference as moving_reference
from dpo_jax.train.statistics import running_margin_moments as running_margin_moments
from dpo_jax.train.statistics import running_shift as running_shift
from dpo_jax.train.tokens import token_policy_gradient_objective as token_policy_gradient_objective
