"""One script for each claim. Run them from the root of the repository: `python -m experiments.tutorial`."""

import atexit
import gc

# Imports and tracing make many objects and hardly any garbage. To look for it rarely, and not once more at the end,
# shortens a script that lasts seconds.
gc.set_threshold(200_000)
atexit.register(gc.freeze)
