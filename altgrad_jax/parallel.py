"""How a step is run on devices: data parallelism through `jax.pmap`.

The state is replicated and, seen from here, has no device axis: pmap takes and returns it with axes `None`, so a
checkpoint does not depend on the number of devices. The batch is split over its leading axis, and its share of every
host over that host's devices.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from altgrad_jax.interrupt import GracefulStop
from altgrad_jax.state import TrainState
from altgrad_jax.step import AXIS

Array = jax.Array
RunDiagnose = Callable[..., dict[str, Any]]
RunUpdateMeasure = Callable[[Any, Any], dict[str, Any]]
RunEval = Callable[[TrainState, Array], Array]


STOP_CHECK_STEPS = 10


def is_primary() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return jax.process_index() == 0


def any_host_stops(step: int, stop: GracefulStop) -> bool:
    """Whether to stop after this step: with several hosts, all must leave the loop at the same one.

    They ask each other every ten steps, since the question makes the host wait for its devices. A signal that one has
    been sent is then noted by all.
    """
    if jax.process_count() == 1:
        return stop.requested
    if step % STOP_CHECK_STEPS:
        return False
    found = int(multihost_utils.process_allgather(np.array(stop.number)).max())
    if found:
        stop.ask(found)
    return bool(found)


class DataParallel:
    """Runs the same step on every device, each on its part of the batch.

    Attributes:
      devices: the local devices used.
      hosts: number of processes training together.
    """

    def __init__(self, device_count: int = 0, devices: list[jax.Device] | None = None):
        """Uses the first `device_count` local devices, 0 meaning all of them; or `devices`, to compile for."""
        self.hosts = jax.process_count()
        hosts = [jax.local_devices(process_index=host)[: device_count or None] for host in range(self.hosts)]
        if devices is not None:
            hosts = [devices]
        self.devices = hosts[jax.process_index()]
        self._everywhere = [device for devices in hosts for device in devices]
        self._mesh = Mesh(np.array(self.devices), (AXIS,))
        # Threads of a CPU's virtual devices wait for each other inside a step; with a second step queued behind the
        # first there are not enough of them, and both stand still.
        self._one_at_a_time = len(self.devices) > 1 and self.devices[0].platform == "cpu"

    @property
    def device_count(self) -> int:
        """Devices of all hosts."""
        return len(self._everywhere)

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of an array that every local device holds whole."""
        return NamedSharding(self._mesh, PartitionSpec())

    def abstract(self, tree: Any) -> Any:
        """Shapes and dtypes with the sharding that `replicate` gives."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), tree)

    def shard(self, batch: np.ndarray, microbatches: int | None = None) -> Array:
        """Splits this host's rows over its devices, on them: [..., D * ..., T + 1] -> [D, ..., (A,) B, T + 1].

        An axis before the rows, of steps, stays after that of the devices.
        """
        count = len(self.devices)
        *steps, rows, length = batch.shape
        split = (
            (count, rows // count) if microbatches is None else (count, microbatches, rows // (count * microbatches))
        )
        return self.place(np.moveaxis(batch.reshape(*steps, *split, length), len(steps), 0))

    def place(self, batch: np.ndarray) -> Array:
        """Puts an array whose leading axis is that of this host's devices on them."""
        return jax.device_put(batch, NamedSharding(self._mesh, PartitionSpec(AXIS)))

    def abstract_batch(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch, with the sharding that `shard` gives."""
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=NamedSharding(self._mesh, PartitionSpec(AXIS)))

    def train_step(self, step: Callable) -> "DeviceStep":
        """(state, sharded batch) -> (state, metrics); the state passed in is donated."""
        return self._settled(self._pmap(step, donate=True))

    def eval_step(self, step: Callable) -> "DeviceStep":
        """(state, sharded batch) -> metrics; the state is kept."""
        return self._settled(self._pmap(step, donate=False))

    def diagnose_step(self, step: Callable[..., dict[str, Array]]) -> Callable[..., dict[str, Array]]:
        """(state, sharded batch, **static options) -> values; the state is kept. One program a set of options."""

        @cache
        def program(**options: bool) -> Callable:
            return self._settled(self._pmap(partial(step, **options), donate=False))

        return lambda state, batch, **options: program(**options)(state, batch)

    def on_one_device(self, tree: Any) -> Any:
        """Arrays that all devices hold, as the first one has them: what is computed of them is computed once."""
        return jax.tree.map(lambda x: x.addressable_data(0), tree)

    def _pmap(self, step: Callable, donate: bool) -> Callable:
        return jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=self._everywhere,
            donate_argnums=(0,) if donate else (),
        )

    def _settled(self, run: Any) -> "DeviceStep":
        return DeviceStep(run, self._one_at_a_time)

    def to_global(self, tree: Any) -> Any:
        """Replicated over this host's devices -> replicated over all hosts' devices, as checkpoints store it."""
        if self.hosts == 1:
            return tree
        mesh = Mesh(np.array(self._everywhere), (AXIS,))
        return multihost_utils.host_local_array_to_global_array(tree, mesh, PartitionSpec())

    def to_global_abstract(self, tree: Any) -> Any:
        """Shapes and dtypes with the sharding that `to_global` gives."""
        if self.hosts == 1:
            return tree
        sharding = NamedSharding(Mesh(np.array(self._everywhere), (AXIS,)), PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def to_local(self, tree: Any) -> Any:
        """The inverse of `to_global`."""
        if self.hosts == 1:
            return tree
        mesh = Mesh(np.array(self._everywhere), (AXIS,))
        return multihost_utils.global_array_to_host_local_array(tree, mesh, PartitionSpec())


class DeviceStep:
    """A step on its devices, called like the function that it was made of."""

    def __init__(self, mapped: Any, one_at_a_time: bool):
        self._mapped, self._one_at_a_time = mapped, one_at_a_time

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        out = self._mapped(*args)
        return jax.block_until_ready(out) if self._one_at_a_time else out

    def compile(self, *args: Any, options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        """The program for arguments like these, or of these shapes; a call with such arguments then runs this one.

        With XLA `options` of its own it is a program apart.
        """
        return self._mapped.lower(*args).compile(compiler_options=options)
