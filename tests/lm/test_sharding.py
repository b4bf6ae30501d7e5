"""Parameters spread over four simulated devices are trained as on one."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from jax.sharding import PartitionSpec

from dpo_jax.lm.sharding import spec_of

PROGRAM = """
import json
from functools import partial
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np, optax
from dpo_jax import lm, losses, train
from tests.lm import tiny

model = tiny.model()
data = lm.with_reference(model, tiny.pairs(12))
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
spread = model._replace(params=lm.shard(model.params, mesh))
dpo = partial(train.preference_objective, loss=losses.dpo_loss, beta=0.1)
usual = {"objective": dpo, "optimizer": lambda: optax.adam(1e-2), "num_epochs": 2, "batch_size": 4}
found = {}
for name, options in {"all": {}, "adapter": {"lora": lm.LoRA(rank=4)}}.items():
    one, four = (lm.tune(jax.random.key(1), m, data, **usual, **options) for m in (model, spread))
    both = zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params))
    apart = [np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in both]
    found[name] = float(max(apart)), len(jax.tree.leaves(four.params)[0].sharding.device_set)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_four_devices_train_as_one():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for apart, num_devices in json.loads(done.stdout.splitlines()[-1]).values():
        assert apart < 1e-5 and num_devices == 4


def test_arrays_are_spread_along_their_largest_axis_that_fits():
    mesh = SimpleNamespace(shape={"fsdp": 4})
    assert spec_of((8, 12), mesh) == PartitionSpec(None, "fsdp")
    assert spec_of((8, 10), mesh) == PartitionSpec("fsdp", None)
    assert spec_of((2, 8, 8), mesh) == PartitionSpec(None, "fsdp", None)
    assert spec_of((8,), mesh) == spec_of((3, 5), mesh) == spec_of((), mesh) == PartitionSpec()
