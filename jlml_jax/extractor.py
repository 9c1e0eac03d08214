"""The matching features of a trained run, for images from anywhere."""

import collections
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jlml_jax import camera_statistics, evaluate, parallel
from jlml_jax.camera_statistics import CameraStatistics
from jlml_jax.checkpoints import SavedRun, load_run
from jlml_jax.datasets.images import resize, shows_somebody, upright_rgb
from jlml_jax.errors import UserError, first_few, printable
from jlml_jax.models import build_model, is_identity_layer
from jlml_jax.user_images import LoadedImage, UserImage, load_one, read_batches, tell_clipped

# Fields of config.model that say how it was trained, not what it computes.
_TRAINING_FIELDS = ("cosine_scale", "loss", "norm_momentum")
_MEANS_BLOCK = 4096  # features that are added up at a time

_process = None  # that in which this program has loaded extractors


def load_extractor(workdir: str | Path, *, flip_average: bool | None = None) -> "Extractor":
    """The trained network of the run in `workdir`, on all devices of this process.

    `flip_average` is the run's `evaluate.flip_average` if it is not given. Without the mirror images a call takes half
    the time; its features are other ones, with a fingerprint of their own.

    Raises:
        UserError: there is no run, it has no checkpoint yet, it does not restore, or the process was forked from one
            that has loaded an extractor.
    """
    _refuse_forked()
    run = load_run(workdir)
    if flip_average is not None:
        run.config.evaluate.flip_average = flip_average
    return Extractor(run, parallel.make_mesh(jax.local_devices()))


class Extractor:
    """A function of images, uint8 [B, height, width, 3], to their matching features, float32 [B, dim].

    Any B will do: images go to the device in batches of `evaluate.batch_size`, and those left over in the smallest
    power of two that holds them, on each device. So a few images cost no more than twice their number, and only a
    handful of programs is compiled, whatever B is. The features are normalised as the run's `evaluate.normalize` says;
    L2 distance compares them. Batch normalisation uses the statistics of an image's camera, where the run has any.

    Attributes:
        height, width: the input size of the run, pixels.
        dim: length of a feature: 1,024 unless the run says otherwise.
        batch_size: images a full batch.
        cameras: those that the run has statistics of; none unless `jlml_jax.adapt --by_camera` has made it.
        fingerprint: 16 hex digits that differ where features would: over the weights and the fields of the config that
            change them. Features of two fingerprints must not be compared.
    """

    def __init__(self, run: SavedRun, mesh: Mesh):
        config = run.config
        parallel.keep_programs(config.compilation_cache)
        model = build_model(config, num_identities=0)
        params = {name: leaf for name, leaf in run.variables["params"].items() if not is_identity_layer(name)}
        variables = {"params": params, "batch_stats": run.variables["batch_stats"]}
        self.height, self.width = config.data.height, config.data.width
        self._dims = [config.model[f"{branch}_feature_dim"] for branch in model.active_branches()]
        self.dim = sum(self._dims)
        self.batch_size = -(-config.evaluate.batch_size // mesh.size) * mesh.size
        self.cameras = run.cameras.cameras if run.cameras else ()
        self.fingerprint = _fingerprint(config, variables, run.cameras)
        self._normalize, self._mesh = config.evaluate.normalize, mesh
        self._by_camera = run.cameras and parallel.replicate(
            camera_statistics.table(run.cameras, variables["batch_stats"]), mesh)
        self._variables = parallel.replicate(variables, mesh)
        self._forward = evaluate.make_forward(model, config, mesh)

    def __call__(self, images: np.ndarray, cameras: Sequence[str] | None = None) -> np.ndarray:
        """Features of images, each by its camera; None, or one that is not in `self.cameras`: by the run's statistics.

        Raises:
            ValueError: images of another dtype or shape, or not a camera each, as text.
            UserError: the weights are such that features overflow, or the process was forked from the one that loaded
                them.
        """
        _refuse_forked()
        images = np.asarray(images)
        expected = (self.height, self.width, 3)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images must be uint8 [B, {self.height}, {self.width}, 3], got {images.dtype} "
                             f"{list(images.shape)}")
        _check_cameras(cameras, len(images), "images")
        cameras = [""] * len(images) if cameras is None else cameras
        features = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), self.batch_size):
            rows = images[start:start + self.batch_size]
            stop, size = start + len(rows), self._padded_size(len(rows))
            padded = np.zeros((size, *expected), np.uint8)
            padded[:len(rows)] = rows
            variables = self._variables_of([*cameras[start:stop], *[""] * (size - len(rows))])
            branches = self._forward(variables, parallel.shard_batch(padded, self._mesh))
            branches = {name: np.asarray(values, np.float32)[:len(rows)] for name, values in branches.items()}
            features[start:stop] = evaluate.matching_feature(branches, self._normalize)
        if not np.isfinite(features).all():
            raise UserError("features are not finite; the weights are unusable: train again")
        return features

    def embed_crops(self, crops: Sequence[np.ndarray | Image.Image | str | Path],
                    cameras: Sequence[str] | None = None) -> np.ndarray:
        """Features, float32 [N, dim], of crops of any sizes: resized as in training, as `jlml_jax.extract` has them.

        Args:
            crops: arrays uint8 [h, w, 3], RGB (OpenCV's are BGR: give crop[..., ::-1]), or [h, w], grey; Pillow's
                images; or files of images.
            cameras: as in a call.

        Raises:
            ValueError: a crop is none of these, or there is not a camera for each, as text.
            UserError: a crop does not decode, or is too small to show anybody.
        """
        if isinstance(crops, str | Path | Image.Image):
            raise ValueError("crops must be a sequence of crops, not one; for one give [crop]")
        if isinstance(crops, np.ndarray) and crops.ndim == 3 and crops.shape[2] in (1, 3, 4):  # its rows would be crops
            raise ValueError(f"crops must be a sequence of crops, not one of {list(crops.shape)}; for one give [crop]")
        _check_cameras(cameras, len(crops), "crops")
        features = np.empty((len(crops), self.dim), np.float32)
        for start in range(0, len(crops), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(crops)))
            pixels = np.stack([self._resized(crops[row], f"crop {row}") for row in rows])
            features[start:rows.stop] = self(pixels, None if cameras is None else cameras[start:rows.stop])
        return features

    def mean_features(self, features: np.ndarray, of: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """The mean feature of images of one person, for each of several: float32 [M, dim].

        It is normalised as the features are. A plain mean is shorter the more its images differ, and so nearer to
        everything.

        Args:
            features: [N, dim], as this gives them.
            of: which mean each image belongs to, int [K], 0 to M - 1, none of them without images.
            rows: the images' rows of `features`, int [K]; None: all, in order.

        Raises:
            ValueError: `of` has not a number for each image, or leaves one out.
        """
        of = np.asarray(of)
        counts = np.bincount(of)
        if len(of) != len(features if rows is None else rows) or not counts.all():
            raise ValueError("of must have a number for each image, from 0 on without a gap, as "
                             f"np.unique(names, return_inverse=True)[1] has; got {len(of)}, up to {len(counts) - 1}")
        order = np.argsort(of, kind="stable")
        means = np.zeros((len(counts), self.dim), np.float32)  # of a large gallery it is large: there is no other copy
        for start in range(0, len(order), _MEANS_BLOCK):  # features may be a memory map, larger than the memory
            block = order[start:start + _MEANS_BLOCK]
            numbers, starts = np.unique(of[block], return_index=True)
            means[numbers] += np.add.reduceat(features[block if rows is None else rows[block]], starts,
                                              dtype=np.float64)
        means /= counts[:, None]
        branches = np.split(means, np.cumsum(self._dims)[:-1], axis=1)
        normalised = evaluate.matching_feature(dict(enumerate(branches)), self._normalize)
        for start in range(0, len(means), _MEANS_BLOCK):  # each block in its own place
            means[start:start + _MEANS_BLOCK] = normalised[start:start + _MEANS_BLOCK]
        return means

    def _padded_size(self, count: int) -> int:
        """How many images a batch of `count`, 1 to `self.batch_size`, is filled up to."""
        of_device = -(-count // self._mesh.size)
        return min(self._mesh.size << (of_device - 1).bit_length(), self.batch_size)

    def _resized(self, crop: np.ndarray | Image.Image | str | Path, name: str) -> np.ndarray:
        """uint8 [height, width, 3]."""
        if isinstance(crop, str | Path):
            return load_one(UserImage(Path(crop), str(crop)), self.height, self.width)
        if isinstance(crop, Image.Image):
            image = upright_rgb(crop, name)
        else:
            pixels = np.asarray(crop)
            if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.shape[2:] == (3,)) or not pixels.size:
                raise ValueError(f"{name} must be uint8 [h, w, 3] or [h, w], an image of Pillow's or a file, got "
                                 f"{pixels.dtype} {list(pixels.shape)}")
            image = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
        return np.asarray(resize(shows_somebody(image, name), self.height, self.width))

    def _variables_of(self, cameras: Sequence[str]) -> Any:
        """What the network takes for a batch of these cameras, with statistics [B, channels] if they differ."""
        if not self._by_camera:
            return self._variables
        rows = parallel.replicate(camera_statistics.rows(self.cameras, cameras), self._mesh)
        return self._variables | {"batch_stats": _take(self._by_camera, rows)}


def _refuse_forked() -> None:
    """A UserError in a process that was forked from the one that loaded the first extractor.

    The threads of JAX are not in it, and a call would wait for them for ever.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise UserError("an extractor was loaded before this process was forked, which JAX does not survive; load it "
                        "in each process, after the fork, or start the processes by spawn")


def _check_cameras(cameras: Sequence[str] | None, count: int, what: str) -> None:
    """A ValueError unless there is one for each of `count` images. A number would be none of the run's, unnoticed."""
    if cameras is None:
        return
    if isinstance(cameras, str) or not all(isinstance(camera, str) for camera in cameras):
        raise ValueError(f"cameras must be a sequence of str, as the run was given them, one for each of {what}")
    if len(cameras) != count:
        raise ValueError(f"{len(cameras)} cameras for {count} {what}")


@jax.jit
def _take(tables: Any, rows: jax.Array) -> Any:
    """These rows of each table: one call to the device in place of hundreds."""
    return jax.tree.map(lambda table: table[rows], tables)


def _fingerprint(config: ml_collections.ConfigDict, variables: dict[str, Any], cameras: CameraStatistics | None) -> str:
    model = {name: value for name, value in config.model.items() if name not in _TRAINING_FIELDS}
    data = {name: config.data[name] for name in ("height", "width", "mean", "std")}
    fields = {"model": model, "data": data, "normalize": config.evaluate.normalize,
              "flip_average": config.evaluate.flip_average}
    if cameras:
        fields["cameras"] = cameras.cameras
        variables = {**variables, "camera_batch_stats": cameras.batch_stats}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    leaves = jax.tree_util.tree_leaves_with_path(variables)  # in the order of the sorted paths
    for path, leaf in leaves:
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf)
    return digest.hexdigest()[:16]


def check_fingerprint(what: str, fingerprint: str, extractor: Extractor) -> None:
    """Refuses features that another model has made."""
    if fingerprint != extractor.fingerprint:
        raise UserError(f"{what} was made by another model (fingerprint {fingerprint}) than that of --workdir "
                        f"({extractor.fingerprint}); give its run, or make it anew")


def tell_unknown_cameras(cameras: Iterable[str], extractor: Extractor) -> None:
    """Says on stderr of which images, by the camera of each, a run with statistics by camera has none."""
    if not extractor.cameras:
        return
    unknown = collections.Counter(cameras)
    for camera in extractor.cameras:
        del unknown[camera]
    if unknown:
        print(f"{unknown.total():,} images go by the statistics of all cameras together, as the run has none of "
              + first_few([f"camera {printable(camera)}" if camera else "an unknown camera" for camera in unknown]),
              file=sys.stderr)


def embed(images: Sequence[UserImage], extractor: Extractor, *, keep_going: bool,
          known: Collection[bytes] = frozenset()) -> Iterator[tuple[list[LoadedImage], list[LoadedImage], np.ndarray]]:
    """Reads and embeds images batch by batch, as `read_batches`, with the features [number read, dim].

    Prints at the end how many boxes were cut to their frames.
    """
    tell_unknown_cameras((image.camera for image in images), extractor)
    batches = read_batches(images, extractor.height, extractor.width, extractor.batch_size, "embedding",
                           keep_going=keep_going, known=known)
    clipped = 0
    for read, seen in batches:
        clipped += sum(loaded.clipped for loaded in [*read, *seen])
        pixels = np.array([image.pixels for image in read], np.uint8)
        yield read, seen, extractor(pixels.reshape(len(read), extractor.height, extractor.width, 3),
                                    [loaded.image.camera for loaded in read])
    tell_clipped(clipped)


def embed_all(images: Sequence[UserImage], extractor: Extractor, *, keep_going: bool
              ) -> tuple[list[LoadedImage], np.ndarray]:
    """The images that `embed` has read, without their pixels, and the features of all of them [number read, dim]; both
    in the order of the list."""
    embedded, features = [], np.empty((len(images), extractor.dim), np.float32)  # of many images, there is no copy
    for read, _, rows in embed(images, extractor, keep_going=keep_going):
        features[[loaded.place for loaded in read]] = rows
        embedded += [dataclasses.replace(loaded, pixels=None) for loaded in read]
    embedded.sort(key=lambda loaded: loaded.place)
    if len(embedded) < len(images):
        features = features[[loaded.place for loaded in embedded]]
    return embedded, features
