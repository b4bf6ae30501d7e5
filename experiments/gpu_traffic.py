"""What notebooks would cost on a GPU that is not there: the kernels that XLA makes for it, and the bytes they move.

XLA compiles for a described card without having one. The optimised program says which kernels run, how often, and what
each reads and writes; the card's bandwidth then tells about how long that takes at least. It is a reckoning and no
measurement: caches can save traffic, starting a kernel takes time, and a few kernels read less than is counted here.

Needs JAX's CUDA plugin (`pip install "jax[cuda12]"`), and no card.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import harness
from experiments.benchmark import DPO, NOTEBOOK_STEPS, NOTEBOOK_WORK, SFT, notebook

H200 = """
    gpu_device_info {
      cuda_compute_capability { major: 9 minor: 0 }
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150000000000
    }
    platform_name: "CUDA" device_description_str: "NVIDIA H200"
    dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
"""
"""An H200, as XLA's GpuTargetConfigProto describes it."""


@dataclass(frozen=True)
class Options:
    """Which kernels notebooks would run on a GPU, and how many bytes they would move."""

    num: int = 131072
    """How many notebooks at once."""
    bandwidth: float = 4.3e12
    """Bytes per second that the card can copy."""
    out: Path = Path("results/gpu_traffic")
    """Folder for summary.json."""


class Instruction(NamedTuple):
    """A line of a program in XLA's language.

    Attributes:
      name: of its result.
      shape: of its result, as it is written.
      opcode: what it does.
      operands: names of what it does it to.
      attributes: the rest of the line.
      is_root: whether its result is that of the computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


Computation = list[Instruction]
Module = dict[str, Computation]

ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
LINE = re.compile(r"^  (ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
"""What is no kernel."""
PARTS = ("slice", "dynamic-slice", "gather")
"""What reads only as much of its first operand as it returns."""
STEPS_IN_TURN = SFT.steps + 2 * DPO.steps
"""Optimizer steps of a notebook that wait for one another: the ablation trains all values of beta at once."""


class Kernel(NamedTuple):
    """A kernel of a program.

    Attributes:
      name: as the compiler calls it.
      runs: how often it runs.
      bytes: how many it reads and writes each time.
    """

    name: str
    runs: int
    bytes: int


def read_module(text: str) -> tuple[Module, str]:
    """The computations of a program, by name, and the name of the one it starts with."""
    module: Module = {}
    entry = current = ""
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.-]+) ", line)):
            current = head[2]
            module[current] = []
            entry = current if head[1] else entry
        elif current and (match := LINE.match(line)):
            root, name, shape, opcode, operands, attributes = match.groups()
            listed = re.sub(r"\{.*?\}|\[.*?\]", "", operands).split(",")
            names = tuple(operand.split(" ")[-1].lstrip("%") for operand in listed if operand)
            module[current].append(Instruction(name, shape, opcode, names, attributes, bool(root)))
    return module, entry


def kernels(module: Module, computation: str, runs: int = 1) -> Iterator[Kernel]:
    """All kernels that a computation runs; what is inside a loop runs as often as the loop is known to go round."""
    for instruction in module[computation]:
        if instruction.opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
            yield from kernels(module, _called(instruction, "body"), runs * (int(trips[1]) if trips else 1))
        elif instruction.opcode == "call":
            yield from kernels(module, _called(instruction, "to_apply"), runs)
        elif instruction.opcode == "fusion":
            yield Kernel(instruction.name, runs, fusion_bytes(module[_called(instruction, "calls")]))
        elif instruction.opcode == "copy":
            yield Kernel(instruction.name, runs, 2 * num_bytes(instruction.shape))
        elif instruction.opcode not in FREE:
            raise ValueError(f"nothing is known of what this moves: {instruction}")


def fusion_bytes(fusion: Computation) -> int:
    """Bytes that a fused kernel reads and writes; where it only looks at a part of something, the part counts."""
    by_name = {instruction.name: instruction for instruction in fusion}
    root = next(instruction for instruction in fusion if instruction.is_root)
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    inputs = [instruction for instruction in fusion if instruction.opcode == "parameter"]
    return sum(_bytes_read(fusion, value) for value in inputs) + sum(
        _bytes_written(by_name, value) for value in results
    )


def num_bytes(shape: str) -> int:
    """The size of an array, or of a tuple of arrays, whose shape is written as `f32[2,3]{1,0}`."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(ITEM_BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size) for kind, sizes in arrays)


def _bytes_read(fusion: Computation, value: Instruction) -> int:
    whole, total = num_bytes(value.shape), 0
    for user in fusion:
        if value.name not in user.operands:
            continue
        if user.opcode in ("bitcast", "reshape"):
            total += _bytes_read(fusion, user)
        elif user.operands[0] == value.name and user.opcode in PARTS:
            total += num_bytes(user.shape)
        elif user.operands[0] != value.name or user.opcode != "dynamic-update-slice":  # which changes it where it is
            return whole
    return min(total, whole)


def _bytes_written(by_name: dict[str, Instruction], result: Instruction) -> int:
    while result.opcode == "bitcast":
        result = by_name[result.operands[0]]
    if result.opcode == "dynamic-update-slice" and by_name[result.operands[0]].opcode == "parameter":
        return num_bytes(by_name[result.operands[1]].shape)
    return num_bytes(result.shape)


def _called(instruction: Instruction, role: str) -> str:
    name = re.search(rf"{role}=%?([\w.-]+)", instruction.attributes)
    assert name, instruction
    return name[1]


def compiled_for(description: str, num: int) -> str:
    """The program that makes notebooks on a described card, as XLA has optimised it."""
    from jax.experimental import topologies

    card = topologies.get_topology_desc("", "cuda", target_config=description, topology="1x1x1")
    sharding = NamedSharding(Mesh(np.array(card.devices), ("devices",)), PartitionSpec("devices"))
    lowered = jax.jit(jax.vmap(notebook), in_shardings=sharding, out_shardings=sharding).lower(
        jax.ShapeDtypeStruct((num,), jnp.uint32)
    )
    return str(lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"}).as_text())  # tuning needs the card


def reckon(text: str, options: Options) -> dict[str, Any]:
    """How many kernels, how many bytes, and about how long at least."""
    found = list(kernels(*read_module(text)))
    total = sum(kernel.runs * kernel.bytes for kernel in found)
    costly = sorted(found, key=lambda kernel: kernel.runs * kernel.bytes, reverse=True)
    return {
        "num": options.num,
        "bandwidth": options.bandwidth,
        "kernels_per_step": sum(kernel.runs for kernel in found) / STEPS_IN_TURN,
        "bytes_per_step_and_run": total / (options.num * NOTEBOOK_STEPS),
        "least_bytes_per_step_and_run": NOTEBOOK_WORK.bytes / NOTEBOOK_STEPS,
        "seconds_at_least": total / options.bandwidth,
        "seconds_at_least_for_100000": total / options.bandwidth * 100_000 / options.num,
        "kernels": [kernel._asdict() for kernel in costly],
    }


def main() -> None:
    """Compiles, reckons, and writes the summary."""
    options = harness.parse(Options)
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so nobody need look for a card
    folder = harness.output_folder(options.out)
    with harness.clear_errors():
        summary = reckon(compiled_for(H200, options.num), options)
    harness.save_summary({**summary, "card": "NVIDIA H200", "versions": harness.provenance()["versions"]}, folder)
    harness.print_table(
        f"{options.num:,} notebooks on an H200, reckoned",
        ("kernel", "runs", "bytes per run", "share"),
        (
            (kernel["name"], f"{kernel['runs']:,}", f"{kernel['bytes'] / options.num:,.0f}", f"{share:.1%}")
            for kernel in summary["kernels"][:25]
            for share in [kernel["runs"] * kernel["bytes"] / (summary["seconds_at_least"] * options.bandwidth)]
        ),
    )
    harness.console.print(
        f"{summary['kernels_per_step']:.0f} kernels a step, {summary['bytes_per_step_and_run']:,.0f} bytes per step "
        f"and run: at {options.bandwidth:.1e} bytes/s, 100,000 notebooks take about "
        f"{summary['seconds_at_least_for_100000']:.1f} s at least"
    )


if __name__ == "__main__":
    main()
