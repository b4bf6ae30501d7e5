"""Parameters and tokens spread over four simulated devices, of one process or of two, are trained as on one."""

import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from jax.sharding import PartitionSpec

from dpo_jax.lm.sharding import spec_of

PROGRAM = """
import json
import sys
from functools import partial
from pathlib import Path
import jax

port, num_processes, number, folder = *map(int, sys.argv[1:4]), Path(sys.argv[4])
jax.config.update("jax_num_cpu_devices", 4 // num_processes)
if num_processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, number)
import optax
from dpo_jax import lm, losses, train
from dpo_jax.lm.sharding import to_host
from tests.lm import tiny

Auto = jax.sharding.AxisType.Auto
model = tiny.model()
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(Auto, Auto))
spread = model._replace(params=lm.shard(model.params, mesh))
usual = {
    "objective": partial(train.preference_objective, loss=losses.dpo_loss, beta=0.1),
    "optimizer": lambda: optax.adam(1e-2),
    "num_epochs": 2,
    "batch_size": 4,
    "steps_per_checkpoint": 2,
}
found = {}
for name, options in {"all": {}, "adapter": {"lora": lm.LoRA(rank=4)}}.items():
    here = folder / name
    data = lm.with_reference(spread, tiny.pairs(12), cache=here / "reference")
    if number == 0:
        alone = lm.tune(jax.random.key(1), model, lm.with_reference(model, tiny.pairs(12)), **usual, **options)
    together = lm.tune(jax.random.key(1), spread, data, folder=here / "run", **usual, **options)
    again = lm.tune(jax.random.key(1), spread, data, folder=here / "run", **usual, **options)
    four, resumed = (list(map(to_host, jax.tree.leaves(tuned.params))) for tuned in (together, again))
    found[name] = {
        "resumed": all((a == b).all() for a, b in zip(four, resumed)),
        "devices": len(jax.tree.leaves(together.params)[0].sharding.device_set),
    }
    if number == 0:
        one = list(map(to_host, jax.tree.leaves(alone.params)))
        found[name]["apart"] = float(max(abs(a - b).max() for a, b in zip(one, four)))
    if name == "all":
        lm.save(here / "model", spread._replace(params=together.params))
        read = jax.tree.leaves(lm.load(here / "model").params)
        found[name]["saved"] = all((a == to_host(b)).all() for a, b in zip(four, read))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_four_devices_train_as_one(tmp_path, num_processes):
    command = [sys.executable, "-c", PROGRAM, str(free_port()), str(num_processes)]
    processes = [
        subprocess.Popen([*command, str(i), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(num_processes)
    ]
    for i, process in enumerate(processes):
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        for found in json.loads(printed.splitlines()[-1]).values():
            assert found.pop("devices") == 4
            assert i > 0 or found.pop("apart") < 1e-5
            assert all(found.values()), found
    lines = (tmp_path / "all" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_each_of_four_devices_does_about_a_quarter_of_the_work():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone, shared = json.loads(done.stdout.splitlines()[-1])
    assert shared < 0.4 * alone


WORK = """
import dataclasses
import json
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
from dpo_jax import lm
from tests.lm import tiny

model = lm.init(jax.random.key(0), dataclasses.replace(tiny.CONFIG, hidden_size=64, intermediate_size=256))
data = tiny.pairs(16)
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
capacity = lm.capacity_of(data.prompts, data.responses, multiple=4)

def flops(params, mesh):
    log_prob = lm.log_prob_fn(model.decoder, capacity=capacity, mesh=mesh)
    total = lambda params: sum(map(jnp.sum, log_prob(params, data.prompts, data.responses)))
    return jax.jit(jax.grad(total)).lower(params).compile().cost_analysis()["flops"]

print(json.dumps([flops(model.params, None), flops(lm.shard(model.params, mesh), mesh)]))
"""


def test_arrays_are_spread_along_their_largest_axis_that_fits():
    mesh = SimpleNamespace(shape={"fsdp": 4})
    assert spec_of((8, 12), mesh) == PartitionSpec(None, "fsdp")
    assert spec_of((8, 10), mesh) == PartitionSpec("fsdp", None)
    assert spec_of((2, 8, 8), mesh) == PartitionSpec(None, "fsdp", None)
    assert spec_of((8,), mesh) == spec_of((3, 5), mesh) == spec_of((), mesh) == PartitionSpec()
