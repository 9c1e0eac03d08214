"""Processes and devices: the start of several processes, the mesh, what lies on it, and what the processes agree on.

One process drives all devices of a host, or one of several on it its own; every one runs the same command. The state
is replicated, batches are sharded over the axis "batch".
"""

import collections
import ctypes
import functools
import importlib.util
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlml_jax import errors
from jlml_jax.errors import UserError, first_few

T = TypeVar("T")

BATCH_AXIS = "batch"

HEARTBEAT_TIMEOUT = 30  # seconds after which a process that is not heard of is taken for dead
LEAVING_TIMEOUT = 10  # seconds that a process which leaves with an error waits for the others to leave too


def keep_programs(folder: str) -> None:
    """Keeps the programs that XLA compiles in `folder`, a config's `compilation_cache`, for later processes."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))


_ACCELERATORS = ("jax_plugins", "libtpu")  # what is installed where JAX computes on anything but the host's processor
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory() -> None:
    """Lets the process keep the memory that it frees, if the host's own processor is all that JAX has.

    XLA's CPU backend allocates what a step needs anew every step, and glibc hands that much back to the kernel, which
    clears every page before it gives it out again: a tenth of the processor's time at 224x224. To be called before any
    device is used.

    Of glibc's arenas only the main thread's is kept whole, so the main thread is to run the steps, not one of JAX's.
    Other threads keep arenas of their own: with one for all, they would search what a compilation has left in pieces
    for each of a step's many small blocks, at almost twice the time a step.
    """
    if sys.platform == "linux" and not any(map(importlib.util.find_spec, _ACCELERATORS)):
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # another libc's allocator has its own ways
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


_FEW_CORES = 4  # fewer than the network has towers


def compiler_options() -> dict[str, Any]:
    """What XLA is told about a train step: on a CPU, what this processor gains by, as far as this jaxlib knows of it.

    Full-width vectors, where LLVM would take half of them; and on few cores an order of the operations that saves
    memory, where XLA's own keeps many of them ready to run side by side.
    """
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512}
    if (os.cpu_count() or 1) <= _FEW_CORES:
        options["xla_cpu_enable_concurrency_optimized_scheduler"] = False
    return {name: value for name, value in options.items() if _knows(name, value)}


@functools.cache
def _knows(option: str, value: Any) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={option: value}).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float) -> None:
    """Joins this process to the others of the job, before any device is touched; from then on only the first prints.

    With no argument but `timeout`, as Slurm, Kubernetes, Cloud TPU or Open MPI tell; nothing happens where they do
    not, or tell of one process alone.

    Args:
      coordinator: HOST:PORT of process 0, which listens there.
      timeout: seconds after which this process ends with status 2 unless all have joined.

    Raises:
      UserError: the arguments are incomplete or impossible, or what the scheduler tells is.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(f"{', '.join(given)} go together, but {' and '.join(missing)} is not given")
    if not missing:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} is not one of --num_processes={num_processes}: they count "
                            "from 0")
        if num_processes == 1:
            return
    elif _scheduled_alone():
        return
    # Its handler would swallow SIGTERM outside the training loop; stopping.py agrees on where to stop instead.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(timeout, _end_late, (coordinator, num_processes, process_id, timeout))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, local_device_ids=_slurm_device_ids(),
            initialization_timeout=round(timeout) + 60,  # JAX's own end is an abort with a stack trace
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    except ValueError as error:
        if missing and {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
            raise UserError("the pods of an indexed Job find each other by the package kubernetes, which is not "
                            "installed: pip install -e '.[k8s]', and let their service account list pods; or give "
                            "--coordinator, --num_processes and --process_id") from error
        if missing and "JAX_COORDINATOR_ADDRESS" not in os.environ:
            return  # no scheduler that JAX knows
        raise UserError(f"the processes cannot be joined: {error}") from error
    except RuntimeError as error:
        raise UserError(f"the processes cannot be joined: {error}; give --coordinator, --num_processes and "
                        "--process_id") from error
    finally:
        late.cancel()
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives


def _end_late(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float) -> None:
    who = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    where = f" at --coordinator={coordinator}" if coordinator else ""
    print(f"error: {who} did not find all the others{where} in {timeout:g} seconds; start them all within that time, "
          "see that process 0 can be reached, or give a longer --join_timeout", file=sys.stderr, flush=True)
    os._exit(2)


def _scheduled_alone(environment: dict[str, str] | os._Environ = os.environ) -> bool:
    """Whether the environment tells of a scheduler, but of no second process.

    JAX would start a coordinator for the one process, show a Slurm task one GPU, and fail in a pod that is no Job's.
    """
    tpu_hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if tpu_hosts:
        return "," not in tpu_hosts and environment.get("MEGASCALE_NUM_SLICES", "1") == "1"
    if "SLURM_JOB_ID" in environment:
        return environment.get("SLURM_NTASKS", "1") == "1"
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return environment["OMPI_COMM_WORLD_SIZE"] == "1"
    return "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" not in environment


def _slurm_device_ids(environment: dict[str, str] | os._Environ = os.environ) -> list[int] | None:
    """All GPUs of the node for a Slurm task that has it alone; JAX would take the first of them only."""
    alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if alone and gpus.isdigit() else None


def exit_status(command: Callable[[], None]) -> int:
    """`errors.exit_status`, for a command that may be one of several processes.

    Errors are told with the process's number. With an error on all processes they end together; a process that is
    alone in it does not wait for the others, which hang in a collective until they find it gone.
    """
    try:
        status = errors.exit_status(lambda: _with_process_named(command))
    except SystemExit as stop:
        status = stop.code
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(f"error: process {jax.process_index()} of {jax.process_count()} failed in the devices' runtime; if "
                  "another process ended before, its message says why; the same command on all of them goes on from "
                  "the last checkpoint", file=sys.stderr)
        _end_at_once(1)
    if status and jax.distributed.is_initialized():
        try:
            ocp.multihost.get_barrier_sync_fn()(key="leaving", timeout_ms=1000 * LEAVING_TIMEOUT)
        except RuntimeError:
            _end_at_once(status)
    return status


class _AgreedError(UserError):
    """Told by every process; it says itself whose error it was."""


def _with_process_named(command: Callable[[], None]) -> None:
    try:
        command()
    except UserError as error:
        if isinstance(error, _AgreedError) or not jax.distributed.is_initialized():
            raise
        raise UserError(f"process {jax.process_index()} of {jax.process_count()}: {error}") from error


def _end_at_once(status: int) -> None:
    """Ends the process without JAX's shutdown, which would wait for processes that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def all_of(value: Any) -> list[Any]:
    """The values (JSON) that the processes give, by process."""
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(encoded)))
    padded = multihost_utils.process_allgather(np.pad(encoded, (0, lengths.max() - len(encoded))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(padded, lengths, strict=True)]


def together(function: Callable[[], T]) -> T:
    """`function()` of this process; what is a UserError in one process is raised in all of them."""
    if jax.process_count() == 1:
        return function()
    value = error = None
    try:
        value = function()
    except UserError as raised:
        error = raised
    for number, message in enumerate(all_of(str(error) if error else None)):
        if message is not None:
            raise _AgreedError(f"process {number} of {jax.process_count()}: {message}") from error
    return value


def on_first_process(function: Callable[[], T]) -> T | None:
    """`function()` in process 0, for which the others wait; None in these. Errors as `together`."""
    return together(lambda: function() if jax.process_index() == 0 else None)


def first_then_others(function: Callable[[], T]) -> T:
    """`function()`, in process 0 before the others, so that one alone makes what all share; errors as `together`."""
    first = jax.process_index() == 0
    value = on_first_process(function)
    return together(lambda: value if first else function())


def refuse_differing(described: dict[str, Any]) -> None:
    """A UserError, in all processes, if what they were started with (JSON by name) is not the same in all."""
    first, *others = all_of(described)
    differing = [f"{name} ({first.get(name)!r} in process 0, {other.get(name)!r} in process {number})"
                 for number, other in enumerate(others, 1) for name in sorted(first.keys() | other.keys())
                 if first.get(name) != other.get(name)]
    if differing:
        raise _AgreedError(f"the processes differ in {first_few(differing)}; start all of them with the same command, "
                           "code, packages, data and --workdir")


def make_any_stop(mesh: Mesh) -> Callable[[int], Any]:
    """A function of the signal that this process was sent (0: none) to an array, the largest of all processes' signals.

    The array is not waited for.

    Every process must call it equally often. On one process it gives the number itself and runs nothing.
    """
    if jax.process_count() == 1:
        return lambda number: number
    largest = jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda number: largest(shard_batch(np.full(len(mesh.local_devices), number, np.int32), mesh))


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis over `devices`, by default all devices of all processes; each process's lie side by side.

    Raises:
      UserError: the processes have not equally many devices.
    """
    devices = jax.devices() if devices is None else devices
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} in process {process}" for process, count in sorted(counts.items()))
        raise UserError(f"the processes must have equally many devices, but there are {told}; start one process a "
                        "host, on hosts that are alike, or one a device")
    # Not jax.make_mesh, which may put devices of other processes between those of one: rows would change places.
    return Mesh(np.array(sorted(devices, key=lambda device: (device.process_index, device.id))), (BATCH_AXIS,))


def check_batch_size(batch_size: int, mesh: Mesh, field: str, micro_batches: int = 1) -> None:
    """Refuses a global batch that the mesh's devices, in `micro_batches` micro-batches, do not divide."""
    unit = mesh.size * micro_batches
    if batch_size < 1 or batch_size % unit:
        lower = batch_size // unit * unit or unit
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        accumulated = (f" in train.accumulation_steps={micro_batches} micro-batches" if micro_batches > 1 else "")
        raise UserError(f"{field}={batch_size} does not divide over {mesh.size} devices{processes}{accumulated}; "
                        f"use a multiple of {unit}, such as {lower}")


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree of host or local arrays, the same in every process (not checked), on every device of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # device_put would gather the tree from all processes on the host, to compare it.
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(
        sharding, np.asarray(leaf), np.shape(leaf)), tree)


def process_slice(batch_size: int) -> slice:
    """This process's rows of a global batch."""
    local = batch_size // jax.process_count()
    return slice(jax.process_index() * local, (jax.process_index() + 1) * local)


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Makes global arrays, sharded over the batch axis, from each process's rows of them (NumPy, [b, ...])."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXIS))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), tree)
