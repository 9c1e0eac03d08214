"""What a computation must take at least on this device: its operations and bytes, at the rates measured here."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from experiments.bench.timing import time_in_turn

_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one convolution or matrix product."""

    flops: int  # a multiplication and an addition count as two
    bytes: int  # of its operands and its result, each moved once


def count_work(function: Callable[..., Any], *arguments: Any) -> list[Work]:
    """Every convolution and matrix product of `function`, gradients' ones too.

    All else is taken to be fused into these, and to cost nothing: what it would be at best.
    """
    return [_work(equation) for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr, _COUNTED)]


_COUNTED = ("conv_general_dilated", "dot_general")


def equations(jaxpr: jax.extend.core.Jaxpr, primitives: Collection[str]) -> Iterator[Any]:
    """Those of the primitives, by name; the ones of a function as often as it is called."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in primitives:
            yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)  # of a closed one
                if hasattr(inner, "eqns"):
                    yield from equations(inner, primitives)


def _work(equation: Any) -> Work:
    left, right, result = (variable.aval for variable in (*equation.invars, *equation.outvars))
    moved = sum(value.size * value.dtype.itemsize for value in (left, right, result))
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return Work(2 * result.size * math.prod(left.shape[axis] for axis in contracted), moved)
    numbers = equation.params["dimension_numbers"]
    taps = right.size // right.shape[numbers.rhs_spec[0]]  # input channels x window
    # A gradient's input that is spread out with zeros between its pixels: those need not be multiplied.
    return Work(2 * result.size * taps // math.prod(equation.params["lhs_dilation"]), moved)


def device_rates(dtype: str) -> dict[str, float]:
    """Measured: operations a second of a large matrix product in `dtype`, bytes read and written a second of a copy."""
    # Long enough that a GPU's start of either is nothing; random, as a GPU multiplies ones faster than other numbers.
    size, copied_bytes = (2_048, 256 << 20) if jax.default_backend() == "cpu" else (16_384, 4 << 30)
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    array = jnp.zeros(copied_bytes // 4, jnp.float32)
    multiply, copy = jax.jit(jnp.dot), jax.jit(lambda x: x + 1)
    seconds = time_in_turn({"multiply": lambda: multiply(matrix, matrix).block_until_ready(),
                            "copy": lambda: copy(array).block_until_ready()}, _REPEATS)
    return {"flops_per_second": 2 * size**3 / min(seconds["multiply"]),
            "bytes_per_second": 2 * array.nbytes / min(seconds["copy"])}


def floor_of(work: list[Work], dtype: str, measured_seconds: float) -> dict[str, Any]:
    """The least seconds for `work`, each piece bound by its operations or by its bytes, and the share of it reached."""
    rates = device_rates(dtype)
    operations = np.array([piece.flops for piece in work]) / rates["flops_per_second"]
    memory = np.array([piece.bytes for piece in work]) / rates["bytes_per_second"]
    seconds = float(np.maximum(operations, memory).sum())
    return {"flops": sum(piece.flops for piece in work), "bytes": sum(piece.bytes for piece in work), **rates,
            "seconds": seconds, "bound_by_memory": float((memory > operations).mean()),
            "reached": seconds / measured_seconds}
