import ctypes
import importlib.util

import jax
import numpy as np
import pytest
from processes import run_program

from jlml_jax import parallel, sampling
from jlml_jax.errors import UserError


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_processes_share_out_the_global_batch(monkeypatch, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    rows = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        rows.append(np.arange(8)[parallel.process_slice(8)])
    assert len({len(part) for part in rows}) == 1
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(8))


def test_batches_lie_in_order_on_the_devices():
    mesh = parallel.make_mesh()
    batch = np.arange(24).reshape(8, 3)
    sharded = parallel.shard_batch(batch, mesh)
    np.testing.assert_array_equal(sharded, batch)
    shards = sorted(sharded.addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.data.shape for shard in shards] == [(2, 3)] * 4
    assert [shard.device for shard in shards] == list(mesh.devices)


def test_replicas_are_whole_on_every_device():
    replicated = parallel.replicate({"weights": np.arange(6.0)}, parallel.make_mesh())["weights"]
    assert [shard.data.shape for shard in replicated.addressable_shards] == [(6,)] * 4


@pytest.mark.parametrize("batch_size", [0, 2, 6])
def test_a_batch_that_the_devices_do_not_divide_is_refused(batch_size):
    with pytest.raises(UserError, match=rf"train.batch_size={batch_size} does not divide over 4 devices"):
        parallel.check_batch_size(batch_size, parallel.make_mesh(), "train.batch_size")
    parallel.check_batch_size(8, parallel.make_mesh(), "train.batch_size")


def test_devices_lie_by_process_whatever_their_order():
    """Or a process's rows would not be those that its devices hold."""
    devices = jax.devices()
    assert list(parallel.make_mesh([devices[index] for index in (2, 0, 3, 1)]).devices) == devices


def test_what_is_started_alone_agrees_with_itself():
    assert parallel.all_of({"a": 1}) == [{"a": 1}]
    assert parallel.first_then_others(lambda: 3) == 3
    parallel.refuse_differing({"a": 1})
    with pytest.raises(UserError, match="^no such file$"):
        parallel.together(lambda: (_ for _ in ()).throw(UserError("no such file")))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_part_of_a_batch_holds_the_same_rows_on_any_number_of_devices(parts):
    batch = np.arange(16)
    for devices in (1, 2, 4):
        by_device = sampling.device_rows(batch, devices, parts)
        assert by_device.shape == (devices, 16 // devices)
        of_parts = by_device.reshape(devices, parts, -1).swapaxes(0, 1).reshape(parts, -1)
        np.testing.assert_array_equal(of_parts, batch.reshape(parts, -1))


# In a process of its own, as it is the process's allocator that changes. 32 MiB are 8,192 pages.
_PAGE_FAULTS = """
import resource
import jax
import jax.numpy as jnp
from jlml_jax import parallel
parallel._ACCELERATORS = ()  # whatever is installed here
keep and parallel.keep_memory()
step = jax.jit(lambda x: jnp.sin(x).reshape(2, -1))
x = jax.block_until_ready(jnp.zeros(2**23))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(20)))  # the first few may still take memory for themselves
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc can be told to keep memory")
def test_what_a_step_frees_is_kept():
    again = {keep: int(run_program(f"keep = {keep}" + _PAGE_FAULTS, XLA_FLAGS="").stdout) for keep in (False, True)}
    assert again[True] < 100 < 8_000 < again[False]


def test_beside_an_accelerator_the_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was asked"))
    parallel.keep_memory()
