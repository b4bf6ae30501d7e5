"""Experiments compiled for a GPU or a TPU that is only described: memory, kernels, and the bytes they move.

XLA compiles for a described device without having one. The optimised program says which kernels run, how often, and
what each reads and writes; the device's bandwidth then gives a lower bound on the time. All of it is estimated, nothing
is measured: caches can save traffic, starting a kernel takes time, padding is not counted, and a few kernels read less
than is counted here.

What has to be installed is in `experiments/lab/described.py`.
"""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmark.workloads import DPO, EXPERIMENT_STEPS, EXPERIMENT_WORK, SFT, run_experiment
from experiments.lab import commands, console, files
from experiments.lab.described import DEVICES, Device, described, memory

NUM = {"h200": 131072, "v5e": 64}
"""How many experiments at once; XLA compiles slowly for the TPU, the more experiments the more slowly."""


@dataclass(frozen=True)
class Options:
    """What experiments would cost on a device that is only described: memory, kernels, bytes moved. Nothing runs."""

    device: Literal["h200", "v5e"] = "h200"
    """Which device: an NVIDIA H200 or a TPU v5e."""
    num: int | None = None
    """How many experiments at once; by default 131,072 on the GPU, and 64 on the TPU, for which XLA compiles slowly."""
    bandwidth: float | None = None
    """Bytes per second that its memory can copy; by default 4.3e12 on the GPU, and 8.19e11 on the TPU."""
    out: Path = Path("results/described_devices")
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

ITEM_BYTES = {"pred": 1, "bf16": 2} | {f"{kind}{8 * size}": size for size in (1, 2, 4, 8) for kind in "suf"}
"""XLA's names of types say their bits."""
LINE = re.compile(r"^  (ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done")
"""What is no kernel, or the end of one."""
OPAQUE = ("custom-call", "conditional", "async-start")
"""What does not say what it moves."""
NAMES_OF_MEMORY = ("AllocateBuffer", "ConcatBitcast")
"""Custom calls on a TPU that move nothing."""
PARTS = ("slice", "dynamic-slice", "gather")
"""What reads only as much of its first operand as it returns."""
STEPS_IN_TURN = SFT.steps + DPO.steps
"""Optimizer steps of an experiment that wait for one another: its DPO runs train at once."""


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
            yield from kernels(module, _called(instruction, "body"), runs * _trips(module, instruction))
        elif instruction.opcode == "call":
            yield from kernels(module, _called(instruction, "to_apply"), runs)
        elif instruction.opcode == "fusion":
            yield Kernel(instruction.name, runs, fusion_bytes(module[_called(instruction, "calls")]))
        elif instruction.opcode == "copy":
            yield Kernel(instruction.name, runs, 2 * num_bytes(instruction.shape))
        elif instruction.opcode == "copy-start":  # its shape names both places
            yield Kernel(instruction.name, runs, num_bytes(instruction.shape))
        elif instruction.opcode == "slice-start":  # its shape names the whole array, then the part that is copied
            yield Kernel(instruction.name, runs, num_bytes(instruction.shape.split("), ")[1].split("S(")[0]))
        elif instruction.opcode in OPAQUE and not any(name in instruction.attributes for name in NAMES_OF_MEMORY):
            raise ValueError(f"nothing is known of what this moves: {instruction}")
        elif instruction.opcode not in (*FREE, *OPAQUE):
            yield Kernel(instruction.name, runs, fusion_bytes(_alone(module[computation], instruction)))


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
    """The size of an array, or of a tuple of arrays, whose shape is written as `f32[2,3]{1,0}`.

    Arrays in a core's own memory, `f32[2,3]{1,0:S(1)}`, count nothing.
    """
    arrays = re.findall(r"(\w+)\[([\d,]*)\](?!\{[^}]*S\(\d)", shape)
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


def _trips(module: Module, loop: Instruction) -> int:
    """How often a loop is known to go round; 1 if that depends on numbers."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    *_, test = condition = module[_called(loop, "condition")]
    limits = [int(line.operands[0]) for line in condition if line.opcode == "constant" and line.operands[0].isdigit()]
    return limits[0] if test.opcode == "compare" and "direction=LT" in test.attributes and len(limits) == 1 else 1


def _alone(computation: Computation, instruction: Instruction) -> Computation:
    """A fusion of this instruction only."""
    inputs = [other._replace(opcode="parameter") for other in computation if other.name in instruction.operands]
    return [*inputs, instruction._replace(is_root=True)]


def _called(instruction: Instruction, role: str) -> str:
    name = re.search(rf"{role}=%?([\w.-]+)", instruction.attributes)
    assert name, instruction
    return name[1]


def compiled_for(device: Device, num: int) -> jax.stages.Compiled:
    """The program that makes experiments on a described device. Errors are those of `described`."""
    sharding = NamedSharding(Mesh(np.array(described(device)[:1]), ("devices",)), PartitionSpec("devices"))
    lowered = jax.jit(jax.vmap(run_experiment), in_shardings=sharding, out_shardings=sharding).lower(
        jax.ShapeDtypeStruct((num,), jnp.uint32)
    )
    return lowered.compile(compiler_options=device.compiler_options)


def estimate(text: str, num: int, bandwidth: float) -> dict[str, Any]:
    """How many kernels, how many bytes, and how long at least, by estimate."""
    found = list(kernels(*read_module(text)))
    total = sum(kernel.runs * kernel.bytes for kernel in found)
    costly = sorted(found, key=lambda kernel: kernel.runs * kernel.bytes, reverse=True)
    return {
        "num": num,
        "bandwidth": bandwidth,
        "kernels_per_step": sum(kernel.runs for kernel in found) / STEPS_IN_TURN,
        "bytes_per_step_and_run": total / (num * EXPERIMENT_STEPS),
        "least_bytes_per_step_and_run": EXPERIMENT_WORK.bytes / EXPERIMENT_STEPS,
        "seconds_at_least": total / bandwidth,
        "seconds_at_least_for_100000": total / bandwidth * 100_000 / num,
        "kernels": [kernel._asdict() for kernel in costly],
    }


def main() -> None:
    """Compiles, estimates, and writes the summary."""
    options = commands.parse(Options)
    device = DEVICES[options.device]
    num, bandwidth = options.num or NUM[options.device], options.bandwidth or device.bandwidth
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so there is no need to look for a device
    folder = files.output_folder(options.out)
    start = time.perf_counter()
    with commands.clear_errors():
        program = compiled_for(device, num)
        summary = estimate(str(program.as_text()), num, bandwidth)
    summary |= {"memory": memory(program), "compile_seconds": time.perf_counter() - start, "device": device.name}
    files.save_summary({**summary, "versions": files.provenance()["versions"]}, folder)
    console.print_table(
        f"{num:,} experiments on a described {device.name}, estimated",
        ("kernel", "runs", "bytes per run", "share"),
        (
            (kernel["name"], f"{kernel['runs']:,}", f"{kernel['bytes'] / num:,.0f}", f"{share:.1%}")
            for kernel in summary["kernels"][:25]
            for share in [kernel["runs"] * kernel["bytes"] / (summary["seconds_at_least"] * bandwidth)]
        ),
    )
    console.say(
        f"compiled in {summary['compile_seconds']:.0f} s; {summary['memory']['temp'] / 1e6:,.0f} MB of temporaries; "
        f"{summary['kernels_per_step']:.0f} kernels a step, {summary['bytes_per_step_and_run']:,.0f} bytes per step "
        f"and run: at {bandwidth:.1e} bytes/s, 100,000 experiments take about "
        f"{summary['seconds_at_least_for_100000']:.1f} s at least"
    )


if __name__ == "__main__":
    main()
