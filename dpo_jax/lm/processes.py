"""What several processes, joined by `jax.distributed`, agree on: all compute, the first writes files."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def agreed(value: bool) -> bool:
    """What the first process found, for all: of a folder that it changes, others may see an earlier or later state."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(value))


def wait_for_all(what: str) -> None:
    """Goes on when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
