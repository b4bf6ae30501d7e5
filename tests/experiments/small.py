"""A pipeline with the tutorial's steps and few data: seconds to compile, milliseconds to run."""

from experiments.lab.pipeline import Pipeline

PIPELINE = Pipeline(num_demonstrations=64, num_preferences=96, sft_epochs=4, num_epochs=4, batch_size=24)
