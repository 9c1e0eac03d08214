"""The train step as traced, kept beside the programs that XLA keeps: tracing it is a third of a start on a CPU."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export

from jlml_jax import parallel
from jlml_jax.files import write_atomically
from jlml_jax.train_step import TrainState

Step = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]


class KeptStep:
    """A compiled train step, (state, donated; batch; seed) -> (state, metrics), traced once for all processes.

    Its trace lies in a folder under a name that says all that it depends on, its arguments' shapes included. A damaged
    one is made again; where the folder cannot be written, nothing is kept.

    Only on a CPU and in one process: elsewhere the step is used as it is.

    Args:
      step: of `make_train_step`.
      made_of: text that tells the step from every other one, beside its arguments' shapes.
      source: the provenance of the code, `provenance.collect()`.
      folder: a config's `compilation_cache`; empty: nothing is kept.
    """

    def __init__(self, step: Step, made_of: str, source: dict[str, Any], folder: str):
        self._step = step
        self._folder = folder
        self._described = [made_of, source["source_sha256"], source["versions"], source["hardware"]]
        self._traces: dict[tuple[Any, ...], Step] = {}  # by the batch's shapes, in which trials differ

    def __call__(self, state: TrainState, batch: Any, seed: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        if not self._folder or jax.default_backend() != "cpu" or jax.process_count() > 1:
            return self._step(state, batch, seed)
        leaves, structure = jax.tree.flatten(batch)
        shapes = structure, *map(jax.typeof, leaves)
        if shapes not in self._traces:
            self._traces[shapes] = self._traced(state, batch, seed)
        return self._traces[shapes](state, batch, seed)

    def _traced(self, *arguments: Any) -> Step:
        leaves, structure = jax.tree.flatten(arguments)
        described = json.dumps([*self._described, str(structure), [str(jax.typeof(leaf)) for leaf in leaves],
                                {name: str(value) for name, value in jax.config.values.items()
                                 if name != "jax_compilation_cache_dir"}])
        name = f"jlml_jax-step-{hashlib.sha256(described.encode()).hexdigest()}"
        path = Path(os.path.expanduser(self._folder)) / name
        content = _read(path)
        if content is None:
            # Of plain lists and dicts, which need no code to be read again.
            def of_leaves(*leaves):
                state, metrics = self._step.__wrapped__(*jax.tree.unflatten(structure, leaves))
                return jax.tree.leaves(state), metrics

            content = jax.export.export(jax.jit(of_leaves))(*leaves).serialize()
            _write(path, content)
        # What was just traced is read again, too: so both starts run, and XLA keeps, one and the same program.
        exported = jax.export.deserialize(bytearray(content))

        def step(state, batch, seed):
            leaves, metrics = exported.call(*jax.tree.leaves((state, batch, seed)))
            return jax.tree.unflatten(jax.tree.structure(state), leaves), metrics

        return jax.jit(step, donate_argnums=0, compiler_options=parallel.compiler_options())


_DIGEST = hashlib.sha256().digest_size


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(content).digest() + content)
    except OSError:
        pass  # the next start traces again


def _read(path: Path) -> bytes | None:
    """What was written there, whole; None if there is none."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    content = kept[_DIGEST:]
    return content if hashlib.sha256(content).digest() == kept[:_DIGEST] else None
