"""An ONNX graph from a jaxpr: the evaluation forward as JAX traces it, batch normalisation folded into convolutions.

A traced forward has some fifteen primitives, so that converting them is shorter than describing the network a second
time by a walk over its modules; a change of the model is followed or, if it brings another primitive, refused.
Whatever depends on weights alone is computed here, in float64, and rounded to float32 once.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from jax.extend import core
from onnx import TensorProto, helper, numpy_helper

from jlml_jax.errors import UserError

OPSET, IR_VERSION = 17, 8  # of 2022, which every runtime reads

_STORED = (0, 3, 1, 2)  # JAX's maps [B, H, W, C] are stored as ONNX's, [B, C, H, W]; any other rank as it is
_CONV_DIMENSIONS = (_STORED, (3, 2, 0, 1), _STORED)  # NHWC, HWIO, NHWC
_ONNX_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A value in the graph that depends on the images.

    `shape` is in JAX's order. Where a variable of the jaxpr is a matrix and this has four axes, the variable is a view
    of a map as the matrix of its pixels: the form in which BatchNorm computes.
    """

    name: str
    shape: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Affine:
    """A convolution or matrix product with constant weights: a node once anything reads it, but factors and terms.

    These it takes in, and that is how batch normalisation disappears.
    """

    operator: str  # Conv or Gemm
    input: str
    kernel: np.ndarray  # float64, output channels first
    bias: np.ndarray  # float64 [output channels]
    attributes: dict[str, Any]
    scope: str
    shape: tuple[Any, ...]  # as a _Tensor's

    def fold(self, primitive: str, constant: np.ndarray) -> "_Affine":
        """This with add, sub, mul or div by `constant` (a scalar, or one a channel) after it."""
        compute = _ELEMENTWISE[primitive][1]
        kernel, constant = self.kernel, constant.reshape(-1)
        if primitive in ("mul", "div"):
            kernel = compute(kernel, constant.reshape(-1, *[1] * (kernel.ndim - 1)))
        return dataclasses.replace(self, kernel=kernel, bias=compute(self.bias, constant))


_Value = np.ndarray | _Tensor | _Affine  # the first are constants, float64

# What writes them, unless they are for constants alone, and what computes constants.
_ELEMENTWISE: dict[str, tuple[str | None, Callable[..., np.ndarray]]] = {
    "add": ("Add", np.add),
    "sub": ("Sub", np.subtract),
    "mul": ("Mul", np.multiply),
    "div": ("Div", np.divide),
    "max": ("Max", np.maximum),
    "sqrt": ("Sqrt", np.sqrt),
    "rsqrt": (None, lambda x: 1 / np.sqrt(x)),
}


def convert(jaxpr: core.ClosedJaxpr, weights: Sequence[np.ndarray], *, nchw: bool) -> onnx.ModelProto:
    """The model of a `jaxpr` whose arguments are `weights`, then images [B, H, W, C], and whose result is [B, dim].

    B, and nothing else, is symbolic. The model takes `images` [batch, C, H, W] with `nchw`, else [batch, H, W, C], and
    gives `features` [batch, dim].

    Raises:
        UserError: the jaxpr has an operation that is not known here.
    """
    images, (features,) = jaxpr.in_avals[-1], jaxpr.out_avals
    shape = ["batch", *images.shape[1:]]
    graph = _Graph()
    if nchw:
        shape = [shape[axis] for axis in _STORED]
        argument = _Tensor("images", images.shape)
    else:
        argument = graph.add("Transpose", ["images"], images.shape, "input", perm=_STORED)
    constants = [np.asarray(value, np.float64) for value in jaxpr.consts]
    weights = [np.asarray(weight, np.float64) for weight in weights]
    result, = graph.run(jaxpr.jaxpr, constants, [*weights, argument])
    graph.nodes.append(helper.make_node("Identity", [graph.name_of(result)], ["features"], "features"))
    return helper.make_model(
        helper.make_graph(
            graph.nodes, "features",
            [helper.make_tensor_value_info("images", _ONNX_TYPES[images.dtype.name], shape)],
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", *features.shape[1:]])],
            [numpy_helper.from_array(array, name) for name, array in graph.initializers.items()]),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="jlml_jax")


class _Graph:
    """Nodes and initialisers, as the equations of a jaxpr add them."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}
        self._stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}  # names of the initializers, by content
        self._written: dict[_Affine, str] = {}
        self._names = collections.Counter()

    def run(self, jaxpr: core.Jaxpr, constants: Sequence[_Value], arguments: Sequence[_Value], scope: str = ""
            ) -> list[_Value]:
        """Adds what computes the results of `jaxpr`, and gives these. `scope`: the modules that called it."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

        def read(atom) -> _Value:
            return np.asarray(atom.val, np.float64) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars],
                                     scope or str(equation.source_info.name_stack))
            known |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: core.JaxprEqn, values: list[_Value], scope: str) -> list[_Value]:
        primitive, params = equation.primitive.name, equation.params
        if primitive in ("jit", "pjit", "custom_jvp_call"):
            called = params["jaxpr" if "jaxpr" in params else "call_jaxpr"]
            return self.run(called.jaxpr, called.consts, values, scope)
        shapes = [variable.aval.shape for variable in equation.outvars]
        if primitive in _ELEMENTWISE:
            results = self._elementwise(primitive, values, shapes[0], scope)
        elif primitive in _VIEWS:
            results = _VIEWS[primitive](self, values[0], shapes[0], scope, params)
        elif primitive in _PRIMITIVES and all(isinstance(value, np.ndarray) or value.shape == variable.aval.shape
                                              for value, variable in zip(values, equation.invars, strict=True)):
            results = _PRIMITIVES[primitive](self, values, shapes, scope, params)
        else:
            results = None
        if results is None:
            operands = ", ".join(str(variable.aval) for variable in equation.invars)
            raise UserError(f"{primitive}({operands}) in {scope or 'the network'} is not known to the ONNX export; "
                            "use --format=stablehlo, or add it to jlml_jax/onnx_graph.py")
        return results

    # --- what is in the graph

    def add(self, operator: str, inputs: Sequence[str], shape: tuple[Any, ...], scope: str, **attributes) -> _Tensor:
        """A node with one output."""
        name = self._unused(f"{scope}/{operator}")
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return _Tensor(name, shape)

    def constant(self, name: str, array: np.ndarray) -> str:
        """The name of a constant: integers as they are, the rest as float32. Equal ones are stored once."""
        array = array if array.dtype == np.int64 else array.astype(np.float32)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._stored:
            self._stored[key] = self._unused(name)
            self.initializers[self._stored[key]] = array
        return self._stored[key]

    def name_of(self, value: _Tensor | _Affine) -> str:
        """The name of a value, whose node is added if it has none yet."""
        if isinstance(value, _Tensor):
            return value.name
        if value not in self._written:
            inputs = [value.input, self.constant(f"{value.scope}/kernel", value.kernel),
                      self.constant(f"{value.scope}/bias", value.bias)]
            self._written[value] = self.add(value.operator, inputs, value.shape, value.scope, **value.attributes).name
        return self._written[value]

    def _unused(self, name: str) -> str:
        name = name.lstrip("/")  # of the empty scope
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    # --- the primitives; None stands for what they cannot write

    def _elementwise(self, primitive: str, values: list[_Value], shape, scope: str) -> list[_Value] | None:
        operator, compute = _ELEMENTWISE[primitive]
        if all(isinstance(value, np.ndarray) for value in values):
            return [compute(*values)]
        if isinstance(values[0], np.ndarray) and primitive in ("add", "mul", "max"):
            values = values[::-1]
        x, last = values[0], values[-1]
        if isinstance(last, np.ndarray) and _is_by_channel(last):
            if isinstance(x, _Affine) and primitive in ("add", "sub", "mul", "div"):
                return [x.fold(primitive, last)]
            if primitive == "max" and last.size == 1 and last.item() == 0:
                return [self.add("Relu", [self.name_of(x)], x.shape, scope)]
        stored = {value.shape for value in values if not isinstance(value, np.ndarray)}
        is_view = any(len(one) != len(shape) for one in stored)
        if operator is None or (is_view and len(stored) > 1):
            return None
        shape = stored.pop() if is_view else shape
        inputs = []
        for value in values:
            if not isinstance(value, np.ndarray):
                inputs.append(self.name_of(value))
                continue
            if is_view and not _is_by_channel(value):
                return None
            if len(shape) == 4:
                value = value.reshape([1] * (4 - value.ndim) + list(value.shape)).transpose(_STORED)
            inputs.append(self.constant(f"{scope}/{operator}/constant", value))
        return [self.add(operator, inputs, shape, scope)]

    def _convert_element_type(self, x: _Value, shape, scope: str, params) -> list[_Value] | None:
        if params["new_dtype"] != np.float32:
            return None
        # Computed values are float32 already, up to the constants, which stay float64.
        return [self.add("Cast", [x.name], x.shape, scope, to=TensorProto.FLOAT) if isinstance(x, _Tensor) else x]

    def _reshape(self, x: _Value, shape, scope: str, params) -> list[_Value] | None:
        if isinstance(x, np.ndarray):
            return [x.reshape(shape)] if x.size == math.prod(shape) else None
        if len(x.shape) == 4 and shape in (x.shape, (math.prod(x.shape[:-1]), x.shape[-1])):
            return [x]  # to the matrix of its pixels, or back
        return None

    def _broadcast_in_dim(self, x: _Value, shape, scope: str, params) -> list[_Value] | None:
        axes = params["broadcast_dimensions"]
        new = [axis for axis in range(len(shape)) if axis not in axes]
        if isinstance(x, np.ndarray):  # new axes of size 1 are all that NumPy and ONNX need
            return [np.expand_dims(x, new)]
        if len(shape) == 4 or tuple(shape[axis] for axis in axes) != x.shape or any(shape[axis] != 1 for axis in new):
            return None
        return [self.add("Unsqueeze", [self.name_of(x), self.constant(f"{scope}/axes", np.array(new))], shape, scope)]

    def _conv_general_dilated(self, values, shapes, scope: str, params) -> list[_Value] | None:
        x, kernel = values
        numbers = params["dimension_numbers"]
        if isinstance(x, np.ndarray) or not isinstance(kernel, np.ndarray) or params["batch_group_count"] != 1 \
                or (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) != _CONV_DIMENSIONS \
                or set(params["lhs_dilation"]) != {1}:
            return None
        kernel = kernel.transpose(numbers.rhs_spec)
        attributes = {"strides": params["window_strides"], "pads": _pads(params["padding"]),
                      "dilations": params["rhs_dilation"], "kernel_shape": kernel.shape[2:],
                      "group": params["feature_group_count"]}
        return [_Affine("Conv", self.name_of(x), kernel, np.zeros(len(kernel)), attributes, scope, shapes[0])]

    def _dot_general(self, values, shapes, scope: str, params) -> list[_Value] | None:
        x, kernel = values
        if isinstance(x, np.ndarray) or not isinstance(kernel, np.ndarray) or x.shape[1:] != kernel.shape[:1] \
                or params["dimension_numbers"] != (((1,), (0,)), ((), ())):
            return None
        return [_Affine("Gemm", self.name_of(x), kernel.T, np.zeros(kernel.shape[1]), {"transB": 1}, scope, shapes[0])]

    def _reduce_window_max(self, values, shapes, scope: str, params) -> list[_Value] | None:
        window, padding = params["window_dimensions"], params["padding"]
        if isinstance(values[0], np.ndarray) or len(window) != 4 or set(params["base_dilation"]) != {1} \
                or (window[0], window[3], padding[0], padding[3]) != (1, 1, (0, 0), (0, 0)):
            return None
        return [self.add("MaxPool", [self.name_of(values[0])], shapes[0], scope, kernel_shape=window[1:3],
                         strides=params["window_strides"][1:3], pads=_pads(padding[1:3]),
                         dilations=params["window_dilation"][1:3])]

    def _reduce_sum(self, values, shapes, scope: str, params) -> list[_Value] | None:
        x, = values
        if isinstance(x, np.ndarray):
            return None
        kept = [axis for axis in _stored_axes(len(x.shape)) if axis not in params["axes"]]
        if kept != sorted(kept):
            return None
        axes = np.array([_stored_axes(len(x.shape)).index(axis) for axis in params["axes"]])
        return [self.add("ReduceSum", [self.name_of(x), self.constant(f"{scope}/axes", axes)], shapes[0], scope,
                         keepdims=0)]

    def _rev(self, values, shapes, scope: str, params) -> list[_Value] | None:
        x, = values
        if isinstance(x, np.ndarray):
            return None
        axes = [_stored_axes(len(x.shape)).index(axis) for axis in params["dimensions"]]
        ends = np.full(len(axes), np.iinfo(np.int64).min)  # before the first
        inputs = [self.constant(f"{scope}/reversed/{name}", values) for name, values in {
            "starts": np.full(len(axes), -1), "ends": ends, "axes": np.array(axes),
            "steps": np.full(len(axes), -1)}.items()]
        return [self.add("Slice", [self.name_of(x), *inputs], shapes[0], scope)]

    def _concatenate(self, values, shapes, scope: str, params) -> list[_Value] | None:
        if any(isinstance(value, np.ndarray) for value in values):
            return None
        axis = _stored_axes(len(shapes[0])).index(params["dimension"])
        return [self.add("Concat", [self.name_of(value) for value in values], shapes[0], scope, axis=axis)]

    def _split(self, values, shapes, scope: str, params) -> list[_Value] | None:
        x, = values
        if isinstance(x, np.ndarray):
            return None
        name = self._unused(f"{scope}/Split")
        parts = [_Tensor(f"{name}/{k}", shape) for k, shape in enumerate(shapes)]
        sizes = self.constant(f"{name}/sizes", np.array(params["sizes"]))
        self.nodes.append(helper.make_node("Split", [self.name_of(x), sizes], [part.name for part in parts], name,
                                           axis=_stored_axes(len(x.shape)).index(params["axis"])))
        return parts


# What takes constants, and maps seen as matrices.
_VIEWS = {
    "convert_element_type": _Graph._convert_element_type,
    "reshape": _Graph._reshape,
    "broadcast_in_dim": _Graph._broadcast_in_dim,
}
_PRIMITIVES = {
    "conv_general_dilated": _Graph._conv_general_dilated,
    "dot_general": _Graph._dot_general,
    "reduce_window_max": _Graph._reduce_window_max,
    "reduce_sum": _Graph._reduce_sum,
    "rev": _Graph._rev,
    "concatenate": _Graph._concatenate,
    "split": _Graph._split,
}


def _is_by_channel(constant: np.ndarray) -> bool:
    return math.prod(constant.shape[:-1]) == 1  # also of a scalar


def _stored_axes(rank: int) -> tuple[int, ...]:
    return _STORED if rank == 4 else tuple(range(rank))


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    """ONNX's order: what lies before, for all axes, and then what lies after."""
    return [pair[end] for end in (0, 1) for pair in padding]
