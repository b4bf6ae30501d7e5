"""Parameters and tokens spread over devices: what is larger than one device, or should be computed by several."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.lm.stream import Stream

AXIS = "fsdp"
"""The axis of a mesh over which parameters are spread."""


def shard(tree: Any, mesh: Mesh) -> Any:
    """Spreads each array over the devices of the mesh's axis `fsdp`, along its largest axis that they divide.

    Arrays without such an axis, such as scales of norms, are copied to all devices. Other axes of the mesh, such as
    `data`, hold copies. `lm.tune(key, model._replace(params=lm.shard(model.params, mesh)), ...)` divides the tokens of
    a batch between all devices, with `mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(Auto, Auto))` and
    `Auto = jax.sharding.AxisType.Auto`. The mesh may span several processes.

    Raises:
      ValueError: the mesh has no such axis.
    """
    if AXIS not in mesh.axis_names:
        raise ValueError(f"the mesh must have an axis {AXIS!r}, has {', '.join(mesh.axis_names)}")
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, spec_of(leaf.shape, mesh))), tree)


def spec_of(shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Along which axis an array of this shape is spread."""
    num = mesh.shape[AXIS]
    fitting = [i for i, size in enumerate(shape) if size % num == 0 and size > 1] if len(shape) > 1 else []
    if not fitting:
        return PartitionSpec()
    largest = max(fitting, key=lambda i: shape[i])
    return PartitionSpec(*(AXIS if i == largest else None for i in range(len(shape))))


def shardings(tree: Any) -> Any:
    """Where the arrays of a tree are."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that arrays of a tree are spread over, if there is one."""
    meshes = [x.sharding.mesh for x in jax.tree.leaves(tree) if isinstance(getattr(x, "sharding", None), NamedSharding)]
    return meshes[0] if meshes else None


def on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """Copies what is on one device to all devices of a mesh, if there is one."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> Any:
        return leaf if isinstance(leaf.sharding, NamedSharding) else put(leaf, everywhere)

    return jax.tree.map(placed, tree)


def put(array: Any, sharding: Any) -> Any:
    """Places an array, of which each process holds a copy, on the devices of all."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    held = to_host(array)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])


def to_host(array: Any) -> np.ndarray:
    """An array as NumPy has it; if it is spread over processes, all of them get the whole."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def spread(stream: Stream, mesh: Mesh | None) -> Stream:
    """Divides the tokens of a stream, and its rows, between all devices of a mesh, where their number allows it."""
    if mesh is None:
        return stream
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    names = ("tokens", "positions", "to_stream", "predictors", "targets", "to_rows", "visible")

    def divided(part: Any) -> Any:
        return part if len(part) % mesh.size else jax.lax.with_sharding_constraint(part, sharding)

    return stream._replace(**{name: jax.tree.map(divided, getattr(stream, name)) for name in names})
