"""GPUs and TPUs that are only described: XLA compiles for them without having one.

The GPU needs JAX's CUDA plugin (`pip install "jax[cuda12]"`), the TPU libtpu (`pip install "jax[tpu]"`).
"""

import os
from typing import Any, NamedTuple

import jax

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


class Device(NamedTuple):
    """A device that XLA can compile for without having it.

    Attributes:
      name: of the product.
      needs: what to install.
      topology: arguments of JAX's `get_topology_desc`.
      bandwidth: bytes per second that its memory can copy, unless the user says.
      compiler_options: of XLA.
    """

    name: str
    needs: str
    topology: dict[str, Any]
    bandwidth: float
    compiler_options: dict[str, str | bool]


DEVICES = {
    "h200": Device(
        "NVIDIA H200",
        "jax[cuda12]",
        {"topology_name": "", "platform": "cuda", "target_config": H200, "topology": "1x1x1"},
        bandwidth=4.3e12,
        compiler_options={"xla_gpu_autotune_level": "0"},  # tuning needs the card
    ),
    "v5e": Device(
        "TPU v5e",
        "jax[tpu]",
        {"topology_name": "v5e:2x2", "platform": "tpu"},
        bandwidth=8.19e11,  # of Google's data sheet
        compiler_options={},
    ),
}
NO_TPU_HERE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
"""Environment variables with which libtpu neither looks for a TPU nor complains that there is none."""


def described(device: Device) -> list[jax.Device]:
    """The devices of a description.

    Raises:
      ValueError: JAX cannot describe them; something is not installed.
    """
    from jax.experimental import topologies

    os.environ.update(NO_TPU_HERE | dict(os.environ))
    try:
        return list(topologies.get_topology_desc(**device.topology).devices)
    except RuntimeError as problem:
        raise ValueError(f'JAX cannot compile for {device.name}: pip install "{device.needs}" ({problem})') from problem


def memory(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes that a program takes on its device, as XLA has planned them."""
    sizes = program.memory_analysis()
    return {
        kind: int(getattr(sizes, f"{kind}_size_in_bytes")) for kind in ("argument", "output", "temp", "generated_code")
    }
