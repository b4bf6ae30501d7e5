"""Thousands of complete experiments as one program: `grid` maps a pure function over axes and seeds."""

from dpo_jax.fast.compiling import compile_fast as compile_fast
from dpo_jax.sweep.axes import static as static
from dpo_jax.sweep.grid import grid as grid
from dpo_jax.sweep.grid import prepare as prepare
from dpo_jax.sweep.planning import Plan as Plan
from dpo_jax.sweep.planning import plan as plan
from dpo_jax.sweep.processes import OtherProcessError as OtherProcessError
from dpo_jax.sweep.processes import join_processes as join_processes
from dpo_jax.sweep.progress import Progress as Progress
from dpo_jax.sweep.results import open_results as open_results
from dpo_jax.sweep.starts import Starts as Starts
from dpo_jax.sweep.store import DamagedStoreError as DamagedStoreError
from dpo_jax.sweep.summary import summarise as summarise
