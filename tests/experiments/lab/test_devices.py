"""Commands that compute on a CPU start again with huge pages, once."""

import os
import subprocess
import sys

import pytest

from experiments.lab import devices

SCRIPT = """
import os
from experiments.lab import devices
print("started", os.environ.get("GLIBC_TUNABLES"), flush=True)
devices.restart_with_huge_pages()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_command_starts_again_with_huge_pages_once():
    without = {name: value for name, value in os.environ.items() if name not in devices.HUGE_PAGES}
    run = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(run, env={**without, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["started None", "started glibc.malloc.hugetlb=1"]
    chosen = {**without, "GLIBC_TUNABLES": "glibc.malloc.check=0"}
    done = subprocess.run(run, env=chosen, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["started glibc.malloc.check=0"]
