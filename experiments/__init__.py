"""One script for each claim. Run them from the root of the repository: `python -m experiments.tutorial`."""
