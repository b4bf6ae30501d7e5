"""Training steps of a language model compiled for GPUs or TPUs that are only described: the memory of each device.

The model has the sizes of SmolLM2-135M, computes in bfloat16 and keeps parameters in float32. Parameters are spread
over the axis `fsdp` of the described devices, and tokens over all of them; activations are computed again for the
gradient. Nothing runs, so nothing is measured. What has to be installed is in `experiments/lab/described.py`.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax import lm, losses, train
from dpo_jax.lm.folder import shapes
from dpo_jax.lm.sharding import spec_of
from dpo_jax.types import Pair
from experiments.lab import commands, console, files, page
from experiments.lab.described import DEVICES, Device, described, memory
from experiments.lm_benchmark import workload

LORA = lm.LoRA(rank=16)


@dataclass(frozen=True)
class Options:
    """Memory of a step on devices that are only described. Nothing runs."""

    device: Literal["h200", "v5e"] = "h200"
    """Which devices: an NVIDIA H200, or the four chips of a TPU v5e host."""
    num_pairs: int = 32
    """Pairs per step."""
    num_adapters: int = 16
    """How many adapters in one program, beside the step of all parameters."""
    out: Path = Path("results/lm_described")
    """Folder for summary.json."""


def step_program(device: Device, mesh: Mesh, num_pairs: int, num_adapters: int | None = None) -> jax.stages.Compiled:
    """An optimizer step on all parameters, or on several adapters with a beta each."""
    decoder = lm.Decoder(workload.SMOLLM2, dtype=jnp.bfloat16, scan=True, remat=True)
    zeros = np.zeros(num_pairs, np.float32)
    data = workload.pairs(workload.SMOLLM2.vocab_size, num_pairs)._replace(reference_logps=Pair(zeros, zeros))
    capacity = lm.capacity_of(data.prompts, data.responses, multiple=128)
    log_prob = lm.log_prob_fn(decoder, capacity=capacity, mesh=mesh)
    optimizer = optax.adam(1e-6)

    def step(state: Any, batch: Any, base: Any, beta: Any) -> Any:
        score = lm.adapted(log_prob, base, LORA) if num_adapters else log_prob
        objective = train.preference_objective(score, losses.dpo_loss, beta=beta)
        return train.update(state, batch, objective=objective, optimizer=optimizer)

    def start(trained: Any) -> train.TrainState:
        return train.init_state(trained, objective=lambda *_: None, optimizer=optimizer)  # type: ignore[arg-type]

    model = shapes(decoder)
    betas: Any = 0.1
    if num_adapters:
        one = jax.eval_shape(lambda key: lm.init_adapter(key, decoder, LORA), jax.random.key(0))
        trained: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_adapters, *x.shape), x.dtype), one)
        step, start = jax.vmap(step, (0, None, None, 0)), jax.vmap(start)
        betas = jax.ShapeDtypeStruct((num_adapters,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    state = jax.eval_shape(start, trained if num_adapters else model)
    base = model if num_adapters else None
    lowered = jax.jit(step, donate_argnums=0).lower(
        _spread(state, mesh), _copied(data, mesh), _spread(base, mesh), betas
    )
    return lowered.compile(compiler_options=device.compiler_options)


def _spread(tree: Any, mesh: Mesh) -> Any:
    """Shapes of arrays that are spread as `lm.shard` does it."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(x.shape, mesh))), tree
    )


def _copied(tree: Any, mesh: Mesh) -> Any:
    """Shapes of arrays of which each device has a copy."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def main(options: Options) -> None:
    """Compiles, and writes the summary."""
    commands.check_sizes(num_pairs=options.num_pairs, num_adapters=options.num_adapters)
    device, out = DEVICES[options.device], files.output_folder(options.out)
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so there is no need to look for a device
    with commands.clear_errors():
        mesh = Mesh(np.array(described(device)), ("fsdp",), axis_types=(AxisType.Auto,))
    steps: dict[str, Any] = {}
    for name, num in {"all parameters": None, f"{options.num_adapters} adapters": options.num_adapters}.items():
        start = time.perf_counter()
        program = step_program(device, mesh, options.num_pairs, num)
        steps[name] = {"compile_seconds": time.perf_counter() - start, "memory": memory(program)}
    versions = files.provenance()["versions"]
    summary = {"device": device.name, "num_devices": mesh.size, "num_pairs": options.num_pairs, "steps": steps}
    title = f"{options.num_pairs} pairs a step on {mesh.size} described {device.name}: for each device"
    console.print_table(title, columns_of(summary), rows_of(summary))
    files.save_summary({**summary, "versions": versions}, out)
    page.update({out.name: page_table(summary)}, out, path=page.LANGUAGE_MODELS)


def columns_of(summary: dict[str, Any]) -> tuple[str, ...]:
    """The heads of a table of memory."""
    return (f"{summary['num_devices']} x {summary['device']}", "arguments, MB", "temporaries, MB", "compiled in, s")


def rows_of(summary: dict[str, Any]) -> list[list[str]]:
    """Memory of each device, and the time that compiling takes, for each step."""
    return [
        [
            name,
            *(f"{step['memory'][kind] / 1e6:,.0f}" for kind in ("argument", "temp")),
            f"{step['compile_seconds']:.0f}",
        ]
        for name, step in summary["steps"].items()
    ]


def page_table(summary: dict[str, Any]) -> str:
    """The table of the page."""
    return page.table(columns_of(summary), rows_of(summary), numbers=True)


if __name__ == "__main__":
    main(commands.parse(Options))
