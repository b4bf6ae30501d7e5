"""Direct Preference Optimization in JAX: pure functions, a world with an exact ground truth, vectorised experiments.

Import the rooms of the house: `from dpo_jax import losses, toy, train`.
"""
