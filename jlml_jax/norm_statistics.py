"""What batch normalisation normalises by at test: statistics of images by the tested cameras, without their labels.

A network that was trained by some cameras meets others with the running statistics of the first. Those of a few images
of the new ones in their place are AdaBN (Li et al. 2016), those of each camera's own are camera-based batch
normalisation (Zhuang et al. 2020, "Rethinking the Distribution Gap of Person Re-identification with Camera-based Batch
Normalization"), which `config.train.norm_by_camera` also trains with.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlml_jax import augment, parallel
from jlml_jax.datasets.split import Split
from jlml_jax.errors import UserError
from jlml_jax.evaluate import FeatureCache, Features, Forward, decode_batches, extract_features
from jlml_jax.layers import GLOBAL_PSEUDO_COUNT
from jlml_jax.protocols import Trial

MOST_IMAGES = 1_024  # of a camera or a data set: eight batches

Statistics = Callable[[Any, jax.Array], Any]


def make_statistics(model: nn.Module, config: ml_collections.ConfigDict, mesh: Mesh) -> Statistics:
    """Compiled (variables, images uint8 [B, H, W, 3] sharded over the mesh) -> `batch_stats` of these images alone."""
    # The compiler sums over the mesh. Frozen layers are measured, too: what is frozen is so in training alone.
    model = model.clone(norm_momentum=0.0, axis_name=None, frozen_through="")

    def statistics(variables, images):
        return model.apply(variables, augment.normalise(images, config.data), train=True,
                           mutable=["batch_stats"])[1]["batch_stats"]

    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(parallel.BATCH_AXIS))
    return jax.jit(statistics, in_shardings=(replicated, rows), out_shardings=replicated)


def of_batches(statistics: Statistics, variables: Any, batches: Iterable[np.ndarray], mesh: Mesh) -> Any:
    """`batch_stats` over all batches, uint8 [B, H, W, 3] each: of each process its own rows."""
    moments = [_moments(jax.device_get(statistics(variables, parallel.shard_batch(batch, mesh)))) for batch in batches]
    return _from_moments(jax.tree.map(lambda *values: np.mean(values, 0), *moments))


def of_images(statistics: Statistics, variables: Any, split: Split, data: ml_collections.ConfigDict, batch_size: int,
              mesh: Mesh) -> Any:
    """`batch_stats` over the images of `split`, at most `MOST_IMAGES` at random; their labels are not looked at."""
    batches = full_batches(chosen_images(len(split)), batch_size)[:, parallel.process_slice(batch_size)]
    return of_batches(statistics, variables, decode_batches(split, iter(batches), data), mesh)


def of_camera(own: Any, number: int, of_all: Any) -> Any:
    """A camera's `batch_stats`, from those of its `number` images and those of all cameras' images together.

    They are shrunk by `GLOBAL_PSEUDO_COUNT` towards those of all, as in training: which counts where it has few.
    """
    share = GLOBAL_PSEUDO_COUNT / (number + GLOBAL_PSEUDO_COUNT)
    return _from_moments(jax.tree.map(lambda own, shared: (1 - share) * own + share * shared,
                                      _moments(own), _moments(of_all)))


def chosen_images(number: int) -> np.ndarray:
    """The rows int [at most `MOST_IMAGES`] of `number` images to measure, in random order.

    In the order of a list a batch would be of one camera, or of one person.
    """
    return np.random.RandomState(0).permutation(number)[:MOST_IMAGES]


def full_batches(images: np.ndarray, batch_size: int) -> np.ndarray:
    """Images [N, ...] as batches [batches, batch_size, ...]; the last one is filled up from the first image on."""
    rows = np.resize(np.arange(len(images)), (-(-len(images) // batch_size), batch_size))
    return images[rows]


def refuse_no_images(trial: Trial, config: ml_collections.ConfigDict) -> None:
    """A UserError if `trial` is to be tested by the statistics of training images, or of each camera, and has none."""
    source = config.evaluate.norm_statistics
    if source != "run" and trial.query is not None and not trial.train:
        raise UserError(f"evaluate.norm_statistics={source} is of training images, and {trial.dataset} has none; give "
                        "--config.evaluate.norm_statistics=run")
    if source == "camera" and trial.query is not None and not trial.cameras_known:
        raise UserError(f"evaluate.norm_statistics=camera needs cameras, and those of {trial.dataset} are not known; "
                        "give --config.evaluate.norm_statistics=data, or prepare it with a column camera")


def adapted(statistics: Statistics, variables: dict[str, Any], split: Split, source: str,
            data: ml_collections.ConfigDict, batch_size: int, mesh: Mesh) -> dict[int | None, dict[str, Any]]:
    """The variables to test with: under None those of all images, with `source` "camera" also each camera's own."""
    def measured(images: Split) -> Any:
        return of_images(statistics, variables, images, data, batch_size, mesh)

    of_all = measured(split)
    found = {None: of_all}
    for camera in np.unique(split.cameras).tolist() if source == "camera" else ():
        rows = np.flatnonzero(split.cameras == camera)
        found[camera] = of_camera(measured(split.select(rows)), len(rows), of_all)
    return {camera: parallel.replicate(variables | {"batch_stats": batch_stats}, mesh)
            for camera, batch_stats in found.items()}


def extract_by_camera(extract: Callable[[Any, Split], Features], variables: Mapping[int | None, Any],
                      split: Split) -> Features:
    """Features of all images, each by the variables of its camera, or those under None if it has none."""
    features: Features = {}
    for camera in np.unique(split.cameras).tolist():
        rows = np.flatnonzero(split.cameras == camera)
        for branch, values in extract(variables.get(camera, variables[None]), split.select(rows)).items():
            features.setdefault(branch, np.empty((len(split), values.shape[1]), np.float32))[rows] = values
    return features


def features_of(trial: Trial, forward: Forward, statistics: Statistics, variables: dict[str, Any],
                config: ml_collections.ConfigDict, mesh: Mesh) -> FeatureCache:
    """Features of splits of `trial`, normalised as `config.evaluate.norm_statistics` says.

    Args:
        trial: whose training images the statistics are of, where they are not the run's.
        forward: by `evaluate.make_forward`.
        statistics: by `make_statistics`.
        variables: `params` and `batch_stats`, on the devices of the mesh.
        config: the run's.
        mesh: of `forward` and `statistics`.
    """
    source, batch_size = config.evaluate.norm_statistics, config.evaluate.batch_size

    def extract(variables: Any, split: Split) -> Features:
        return extract_features(forward, variables, split, config.data, batch_size, mesh)

    if source == "run":
        return FeatureCache(functools.partial(extract, variables))
    refuse_no_images(trial, config)
    by_camera = adapted(statistics, variables, trial.train, source, config.data, batch_size, mesh)
    return FeatureCache(functools.partial(extract_by_camera, extract, by_camera), by_camera=source == "camera")


def _is_layer(tree: Any) -> bool:
    return isinstance(tree, Mapping) and tree.keys() == {"mean", "var"}


def _moments(batch_stats: Any) -> Any:
    """(E[x], E[x^2]) of every layer, which can be averaged."""
    return jax.tree.map(lambda layer: (layer["mean"], layer["var"] + np.square(layer["mean"])), batch_stats,
                        is_leaf=_is_layer)


def _from_moments(moments: Any) -> Any:
    return jax.tree.map(lambda layer: {"mean": layer[0], "var": np.maximum(layer[1] - np.square(layer[0]), 0.0)},
                        moments, is_leaf=lambda tree: isinstance(tree, tuple))
