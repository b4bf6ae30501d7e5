"""Parameters spread over devices: what is larger than one device, or should be computed by several."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "fsdp"
"""The axis of a mesh over which parameters are spread."""


def shard(tree: Any, mesh: Mesh) -> Any:
    """Spreads each array over the devices of the mesh's axis `fsdp`, along its largest axis that they divide.

    Arrays without such an axis, such as scales of norms, are copied to all devices. Whatever is computed from them is
    spread by XLA: `lm.tune(key, model._replace(params=lm.shard(model.params, mesh)), ...)`, with
    `mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))`.

    Raises:
      ValueError: the mesh has no such axis.
    """
    if AXIS not in mesh.axis_names:
        raise ValueError(f"the mesh must have an axis {AXIS!r}, has {', '.join(mesh.axis_names)}")
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec_of(leaf.shape, mesh))), tree)


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


def on_one_mesh(tree: Any) -> Any:
    """Copies what is on one device to all devices of the mesh that other arrays of the tree are spread over."""
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if isinstance(leaf.sharding, NamedSharding)]
    if not meshes:
        return tree
    everywhere = NamedSharding(meshes[0], PartitionSpec())

    def placed(leaf: Any) -> Any:
        return leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, everywhere)

    return jax.tree.map(placed, tree)
