"""Convolution, batch normalisation and max-pooling, each in the form its backend runs fast.

On GPU and TPU (`native=True`) every layer is the operation the vendor's library implements. XLA's CPU backend has slow
spots that the other form (`native=False`) goes around, with the same parameters and the same results:

- the gradient of `reduce_window` max is a select-and-scatter: a maximum over shifted slices is several times faster;
- a 1x1 convolution is a matrix product over pixels, and strided it needs only the pixels that it keeps;
- a 3x3 convolution whose map is smaller than its window misses the fast path and takes a loop twenty times slower, and
  one of an image's three channels runs at a tenth of the rate of others: a matrix product of patches;
- the gradient by a 3x3 kernel is a convolution by windows as large as the map: one matrix product, see
  `_convolve_3x3_backward`;
- a gradient that is fused into the transposition before a matrix product is computed element by element.

`experiments/results/cpu_train_step.md` has the measurements.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# The statistics of a camera's images are shrunk towards those of all images, as if it had so many more images that have
# these: one or two images are no estimate.
GLOBAL_PSEUDO_COUNT = 2
_FEW_CHANNELS = 4  # at most so many input channels are convolved as patches
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # He et al. 2015: not truncated


class Conv(nn.Module):
    """Square convolution without bias, [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features].

    Padding is symmetric, (kernel_size - 1) / 2 on every side.
    """

    features: int
    kernel_size: int
    stride: int = 1
    native: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, stride = self.kernel_size, self.stride
        kernel = self.param("kernel", he_normal, (size, size, x.shape[-1], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if not self.native and (size == 1 or min(x.shape[1:3]) < size or x.shape[-1] <= _FEW_CHANNELS):
            x = x[:, ::stride, ::stride] if size == 1 else _patches(x, size, stride)
            y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel.reshape(-1, self.features))
            return _unfused_gradient(y).reshape(*x.shape[:-1], self.features)
        if not self.native and (size, stride) == (3, 1):
            return _convolve_3x3(x, kernel)
        return _convolve(x, kernel, stride)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    pad = (len(kernel) - 1) // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=_DIMENSIONS)


@jax.custom_vjp
def _convolve_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_convolve` by 3x3 kernels, whose gradient is one matrix product."""
    return _convolve(x, kernel)


def _convolve_3x3_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kernel's gradient at tap (i, j) is the sum of x[h + i - 1, w + j - 1] * gradient[h, w] over all pixels.

    Three copies of `x`, shifted along the width, times three of the gradient, shifted along the height, are all nine
    taps in one product, for six copies where patches take nine.
    """
    x, kernel = residuals
    gradient = jax.lax.optimization_barrier(gradient)
    (x_gradient,) = jax.linear_transpose(lambda x: _convolve(x, kernel), x)(gradient)
    columns = _side_by_side([_shift(x, 2, j - 1) for j in range(3)])
    rows = _side_by_side([_shift(gradient, 1, 1 - i) for i in range(3)])
    # Of matrices: over three axes XLA would transpose the copies first, which takes longer than all else.
    product = jax.lax.dot_general(columns.reshape(-1, columns.shape[-1]), rows.reshape(-1, rows.shape[-1]),
                                  (((0,), (0,)), ((), ())))
    taps = product.reshape(3, x.shape[-1], 3, gradient.shape[-1])  # j, input, i, output
    return x_gradient, taps.transpose(2, 0, 1, 3)


_convolve_3x3.defvjp(lambda x, kernel: (_convolve(x, kernel), (x, kernel)), _convolve_3x3_backward)


def _shift(x: jax.Array, axis: int, places: int) -> jax.Array:
    """y[i] = x[i + places] along the axis, and 0 where there is no such i."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (-places, places, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), widths)


def _side_by_side(parts: Sequence[jax.Array]) -> jax.Array:
    """The parts, of equal shapes, concatenated in the channels: as a sum, which XLA's CPU backend vectorises."""
    channels, zero = parts[0].shape[-1], jnp.zeros((), parts[0].dtype)
    return sum(jax.lax.pad(part, zero, [(0, 0, 0)] * (part.ndim - 1)
                           + [(k * channels, (len(parts) - 1 - k) * channels, 0)]) for k, part in enumerate(parts))


@jax.custom_vjp
def _unfused_gradient(x: jax.Array) -> jax.Array:
    """The identity, whose gradient is written to memory before anything reads it."""
    return x


_unfused_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def _patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), size * size * C], the window's taps in HWIO order."""
    pad, (height, width) = (size - 1) // 2, x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return _side_by_side([x[:, i:i + height:stride, j:j + width:stride] for i in range(size) for j in range(size)])


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last; statistics of the whole batch on the mesh axis `axis_name`.

    The variance is E[x^2] - E[x]^2, so that one pass over `x` and one all-reduce give both moments. Statistics are
    float32 whatever the compute type. The running variance is the biased one, as in Flax.

    With `cameras`, float32 [B, number of cameras], one-hot, an example is normalised in training by the statistics of
    its camera's examples in the batch (Zhuang et al. 2020), shrunk by `GLOBAL_PSEUDO_COUNT` towards the whole batch's.
    The running statistics stay those of the whole batch.

    At test the statistics, [channels], may also be each example's own: [B, channels] in the place of the running ones.
    """

    axis_name: str | None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, cameras: jax.Array | None = None) -> jax.Array:
        # XLA's CPU backend sums over one axis up to eight times as fast as over three.
        shape, features = x.shape, x.shape[-1]
        x = x.reshape(-1, features)
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (features,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (features,))
        if train:
            moments, by_camera = self._moments(x.astype(jnp.float32), cameras)
            mean, var = _mean_and_variance(moments)
            if not self.is_initializing():
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
            if cameras is not None:
                mean, var = (_exact("bk,kc->bc", cameras, values) for values in _mean_and_variance(by_camera))
        else:
            mean, var = running_mean.value, running_var.value
        multiplier = scale * jax.lax.rsqrt(var + self.epsilon)
        offset = bias - mean * multiplier
        if multiplier.ndim > 1:  # each example's own
            x = x.reshape(len(multiplier), -1, features)
            multiplier, offset = multiplier[:, None], offset[:, None]
        return (x * multiplier + offset).astype(self.dtype).reshape(shape)

    def _moments(self, x: jax.Array, cameras: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """E[x] and E[x^2] of `x` [pixels of all examples, C], [2, C]; by camera, [2, cameras, C], if they are given."""
        on_mesh = self.axis_name is not None and not self.is_initializing()
        if cameras is None:
            moments = jnp.stack([x.mean(0), jnp.square(x).mean(0)])
            return jax.lax.pmean(moments, self.axis_name) if on_mesh else moments, None
        x = x.reshape(len(cameras), -1, x.shape[-1])
        sums = _exact("bk,mbc->mkc", cameras, jnp.stack([x.mean(1), jnp.square(x).mean(1)]))
        counts = cameras.sum(0)
        if on_mesh:
            sums, counts = jax.lax.psum((sums, counts), self.axis_name)
        moments = sums.sum(1) / counts.sum()
        return moments, (sums + GLOBAL_PSEUDO_COUNT * moments[:, None]) / (counts + GLOBAL_PSEUDO_COUNT)[:, None]


# Statistics are not to be rounded, as the default precision of a TPU and of a GPU's tensor cores would.
_exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _mean_and_variance(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From E[x] and E[x^2], [2, ...]."""
    mean, square = moments
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)


def unit_length(x: jax.Array, axis: int) -> jax.Array:
    """`x` divided by its l2 norm along the axis; zeros stay zeros, with gradient 0."""
    return x / jnp.maximum(optax.safe_norm(x, 0.0, axis=axis, keepdims=True), 1e-12)


def max_pool(x: jax.Array, window: tuple[int, int], strides: tuple[int, int],
             padding: tuple[tuple[int, int], tuple[int, int]], *, native: bool) -> jax.Array:
    """Maximum over windows of [B, H, W, C]; `padding` in rows (above, below) and columns (left, right)."""
    if native:
        return nn.max_pool(x, window, strides, padding)
    for axis in (1, 2):
        x = _max_pool_axis(x, axis, window[axis - 1], strides[axis - 1], padding[axis - 1])
    return x


def _max_pool_axis(x: jax.Array, axis: int, window: int, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Maximum over windows along one axis, by contiguous slices of the `stride` interleaved phases of the axis."""
    length = (x.shape[axis] + sum(padding) - window) // stride + 1
    widths = [(0, 0)] * x.ndim
    widths[axis] = (padding[0], padding[1] + -(x.shape[axis] + sum(padding)) % stride)
    x = jnp.pad(x, widths, constant_values=jnp.finfo(x.dtype).min)
    phases = x.reshape(*x.shape[:axis], -1, stride, *x.shape[axis + 1:])
    taps = [jax.lax.slice_in_dim(jax.lax.index_in_dim(phases, tap % stride, axis + 1, keepdims=False),
                                 tap // stride, tap // stride + length, axis=axis) for tap in range(window)]
    return functools.reduce(jnp.maximum, taps)
