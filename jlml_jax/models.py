"""JLML-ResNet39 (paper, Table 1 and Figure 1) as pure Flax Linen modules."""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jlml_jax.errors import UserError
from jlml_jax.layers import BatchNorm, Conv, he_normal, max_pool, unit_length
from jlml_jax.parallel import BATCH_AXIS

BRANCHES = ("global", "local")
_IDENTITY = "_identity"


# Units of one shape are traced and lowered once, of 60 every fourth; XLA inlines the calls.
@functools.partial(nn.jit, static_argnums=(2,))
class ResidualUnit(nn.Module):
    """Bottleneck [1x1, 3x3, 1x1] with a shortcut (He et al. 2016); BN after every conv, ReLU after the sum.

    [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features[1]]. The stride is on the first 1x1 conv, and the
    shortcut is the identity where shapes agree, else a strided 1x1 conv with BN.
    """

    features: tuple[int, int]  # of the first two convs, of the last
    stride: int
    conv: type[nn.Module]
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, cameras: jax.Array | None = None) -> jax.Array:
        inner, outer = self.features
        y = nn.relu(self.norm(name="norm1")(self.conv(inner, 1, self.stride, name="conv1")(x), train, cameras))
        y = nn.relu(self.norm(name="norm2")(self.conv(inner, 3, name="conv2")(y), train, cameras))
        y = self.norm(name="norm3")(self.conv(outer, 1, name="conv3")(y), train, cameras)
        if self.stride != 1 or x.shape[-1] != outer:
            x = self.conv(outer, 1, self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x, train, cameras)
        return nn.relu(x + y)


class Tower(nn.Module):
    """conv2_x to conv5_x and the average pool: [B, H, W, C] -> [B, 2 * widths[-1]], float32.

    Each stage is `depth` residual units of `widths[k]` inner and twice as many outer features; every stage but the
    first halves height and width. What each stage gives is sown into `intermediates`. The stages that `frozen` names,
    such as conv2, are in training what they are at test.
    """

    widths: Sequence[int]
    depth: int
    conv: type[nn.Module]
    norm: type[nn.Module]
    frozen: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, cameras: jax.Array | None = None) -> jax.Array:
        for stage, width in enumerate(self.widths):
            layer = f"conv{stage + 2}"
            for unit in range(self.depth):
                stride = 2 if stage > 0 and unit == 0 else 1
                x = ResidualUnit((width, 2 * width), stride, self.conv, self.norm,
                                 name=f"{layer}_{unit + 1}")(x, train and layer not in self.frozen, cameras)
            self.sow("intermediates", layer, x)
        return x.astype(jnp.float32).mean((1, 2))


class Stem(nn.Module):
    """conv1, the layer that both branches share: 3x3, stride 2, BN, ReLU; [B, H, W, 3] -> [B, H/2, W/2, features]."""

    features: int
    conv: type[nn.Module]
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, cameras: jax.Array | None = None) -> jax.Array:
        return nn.relu(self.norm(name="norm")(self.conv(self.features, 3, 2, name="conv")(images), train, cameras))


class Head(nn.Module):
    """Feature fc (the layer that the sparsity penalties select on), then BN and ReLU if asked: [B, D] -> [B, dim]."""

    dim: int
    norm: type[nn.Module] | None
    relu: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, cameras: jax.Array | None = None) -> jax.Array:
        x = nn.Dense(self.dim, kernel_init=he_normal, name="fc")(x)
        if self.norm is not None:
            x = self.norm(name="norm")(x, train, cameras)
        return nn.relu(x) if self.relu else x


class CosineClassifier(nn.Module):
    """`scale` times the cosine of the feature and each identity's weights: [B, D] -> [B, num_identities]."""

    num_identities: int
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", he_normal, (x.shape[-1], self.num_identities))
        return self.scale * (unit_length(x, axis=1) @ unit_length(kernel, axis=0))


class JLML(nn.Module):
    """The two-branch network: images float32 [B, H, W, 3], already normalised, to features and identity logits.

    Returns `{"features": {branch: [B, feature_dim]}, "logits": {head: [B, num_identities]}}`. The heads are the
    branches (`loss="multi"`, a classifier a branch) or `"joint"` alone (`loss="uni"`, one classifier on the
    concatenation, Table 10). With `num_identities=0` there are no identity layers and `logits` is empty.

    Height must be even and H/2 must divide by `num_strips`; `check_input_size` tells before anything is traced.
    """

    num_identities: int
    branches: str = "both"  # both, global, local (Table 9, trained alone)
    loss: str = "multi"  # multi, uni (Table 10)
    shared_stem: bool = True  # False: a stem a branch (Table 11)
    num_strips: int = 4
    stem_features: int = 32
    global_widths: Sequence[int] = (32, 64, 128, 256)
    local_widths: Sequence[int] = (16, 32, 64, 128)
    depth: int = 3  # residual units a stage
    global_feature_dim: int = 512
    local_feature_dim: int = 512
    feature_norm: bool = False  # BN after the feature fc
    feature_relu: bool = False  # ReLU after it
    cosine_scale: float = 0.0  # 0: linear identity layers; else `CosineClassifier` of that scale
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    frozen_through: str = ""  # one of `layers`: it and those before it are not trained
    dtype: jnp.dtype = jnp.float32
    native: bool = True  # see layers.py: False on CPU
    axis_name: str | None = None  # the mesh axis that BN statistics are taken over

    def active_branches(self) -> tuple[str, ...]:
        return BRANCHES if self.branches == "both" else (self.branches,)

    def layers(self) -> tuple[str, ...]:
        """The layers of Table 1 that can be frozen, from the input on; each is that of all branches."""
        stages = max(len(getattr(self, f"{branch}_widths")) for branch in self.active_branches())
        return "conv1", *(f"conv{stage + 2}" for stage in range(stages)), "feature"

    def frozen_layers(self) -> tuple[str, ...]:
        """Those of `layers` that are not trained: their BN is in training what it is at test."""
        layers = self.layers()
        return layers[:layers.index(self.frozen_through) + 1] if self.frozen_through else ()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, cameras: jax.Array | None = None
                 ) -> dict[str, dict[str, jax.Array]]:
        conv = functools.partial(Conv, native=self.native, dtype=self.dtype)
        norm = functools.partial(BatchNorm, axis_name=self.axis_name, momentum=self.norm_momentum,
                                 epsilon=self.norm_epsilon, dtype=self.dtype)
        feature_norm = functools.partial(norm, dtype=jnp.float32) if self.feature_norm else None
        frozen = self.frozen_layers()

        stems = {}
        for branch in self.active_branches():
            name = "stem" if self.shared_stem else f"{branch}_stem"
            if name not in stems:
                stems[name] = Stem(self.stem_features, conv, norm, name=name)(
                    images, train and "conv1" not in frozen, cameras)

        features = {}
        for branch in self.active_branches():
            x = stems["stem" if self.shared_stem else f"{branch}_stem"]
            if branch == "global":
                x = max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), native=self.native)
                x = Tower(self.global_widths, self.depth, conv, norm, frozen, name="global_tower")(x, train, cameras)
                head = Head(self.global_feature_dim, feature_norm, self.feature_relu, name="global_head")
            else:
                # Towers of identical shape but own weights, each for itself, which XLA runs concurrently: on a CPU a
                # scan over them is 6 times slower, vmap, as grouped convs, 16 (python -m experiments.bench towers).
                pooled = []
                for j, strip in enumerate(jnp.split(x, self.num_strips, axis=1)):
                    # One row padded below keeps the height: the table's "2x2 MP, S-1" whose output is 28x56.
                    strip = max_pool(strip, (2, 2), (1, 2), ((0, 1), (0, 0)), native=self.native)
                    pooled.append(Tower(self.local_widths, self.depth, conv, norm, frozen,
                                        name=f"local_tower_{j}")(strip, train, cameras))
                x = jnp.concatenate(pooled, axis=-1)  # strip-major, which the exclusive penalty relies on
                head = Head(self.local_feature_dim, feature_norm, self.feature_relu, name="local_head")
            features[branch] = head(x, train and "feature" not in frozen, cameras)

        logits = {}
        if self.num_identities:
            inputs = features if self.loss == "multi" else {"joint": jnp.concatenate(list(features.values()), -1)}
            for name, x in inputs.items():
                layer = (functools.partial(CosineClassifier, scale=self.cosine_scale) if self.cosine_scale
                         else functools.partial(nn.Dense, kernel_init=he_normal))
                logits[name] = layer(self.num_identities, name=name + _IDENTITY)(x)
        return {"features": features, "logits": logits}


def build_model(config: ml_collections.ConfigDict, num_identities: int) -> JLML:
    """The network of `config.model`, in the form that suits this backend, frozen as `config.train` says.

    Raises:
        UserError: a field has an unknown value, or the input size does not divide into the strips.
    """
    for field, known in (("branches", ("both", "global", "local")), ("loss", ("multi", "uni"))):
        if config.model[field] not in known:
            raise UserError(f"model.{field}={config.model[field]!r} is unknown; known are {', '.join(known)}")
    if config.model.loss == "uni" and config.model.branches != "both":
        raise UserError("model.loss=uni joins two branches, so it needs model.branches=both")
    check_input_size(config.data.height, config.data.width, config.model.num_strips)
    fields = ml_collections.FrozenConfigDict(config.model)  # a tuple for each list, so that the module is hashable
    model = JLML(num_identities, **fields, frozen_through=config.train.frozen_through,
                 native=jax.default_backend() != "cpu", axis_name=BATCH_AXIS)
    if model.frozen_through not in ("", *model.layers()):
        raise UserError(f"train.frozen_through={model.frozen_through!r} is unknown; known are "
                        f"{', '.join(model.layers())}, and the empty text, which freezes nothing")
    return model


def check_input_size(height: int, width: int, num_strips: int) -> None:
    """Refuses an image size (pixels) that the stem and the strips do not divide evenly."""
    if num_strips < 1:
        raise UserError(f"model.num_strips={num_strips} must be at least 1")
    if height < 4 or width < 4 or height % 2 or width % 2:
        raise UserError(f"data.height={height} and data.width={width} must be even and at least 4")
    if (height // 2) % num_strips:
        nearest = max(1, round(height / (2 * num_strips))) * 2 * num_strips
        raise UserError(f"data.height={height}: half of it does not divide by model.num_strips={num_strips}; "
                        f"the nearest height that does is {nearest}")


def is_identity_layer(name: str) -> bool:
    """Whether the part of the network's parameters of that name depends on who is to be told apart."""
    return name.endswith(_IDENTITY)


def split_frozen(model: JLML, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` in two: of the layers that are trained, and of `model.frozen_layers()`."""
    trained, frozen, layers = {}, {}, model.frozen_layers()
    for path, leaf in flatten_dict(params).items():
        (frozen if _layer_of(path) in layers else trained)[path] = leaf
    return unflatten_dict(trained), unflatten_dict(frozen)


def join_frozen(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The params that `split_frozen` has split."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def _layer_of(path: Sequence[str]) -> str:
    """Which of `JLML.layers` the parameter at that path belongs to; an identity layer's name is its own."""
    if is_identity_layer(path[0]):
        return path[0]
    if path[0].endswith("stem"):
        return "conv1"
    return "feature" if path[0].endswith("_head") else path[1].partition("_")[0]  # of a tower: conv3_2


def init_variables(model: nn.Module, seed: int, height: int, width: int) -> dict[str, Any]:
    """Initial `params` and `batch_stats` as NumPy arrays: He-normal kernels, scales and variances 1, the rest 0.

    The same distribution as `model.init`, drawn on the host from (seed, the parameter's path): XLA takes longer to
    compile 200 random initialisers than to train for an epoch, and this is the same on every backend.
    """

    def draw(path, leaf):
        name = "/".join(key.key for key in path)
        if name.endswith("/kernel"):
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            std = np.sqrt(2.0 / np.prod(leaf.shape[:-1]))
            return std.astype(np.float32) * rng.standard_normal(leaf.shape, np.float32)
        return np.full(leaf.shape, name.endswith(("/scale", "/var")), np.float32)

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model, height, width))


def count_operations(model: nn.Module, height: int, width: int) -> float | None:
    """Floating-point operations of an evaluation forward of one image, as XLA counts them; None where it cannot.

    They are counted for the host's processor: for an accelerator JAX counts only what is compiled, in its own form.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return None
    with jax.default_device(host):
        forward = jax.jit(model.apply).lower(variable_shapes(model, height, width),
                                             jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32))
        return (forward.cost_analysis() or {}).get("flops")


@functools.cache
def variable_shapes(model: nn.Module, height: int, width: int) -> dict[str, Any]:
    """The shapes and types of `params` and `batch_stats`."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, height, width, 3))))
