"""Features of a split, then metrics: the rows of results.json."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jlml_jax import augment, baselines, device_data, input_pipeline, metrics, parallel, sampling
from jlml_jax.datasets.split import Split
from jlml_jax.distances import LazyRows, Products, numpy_products
from jlml_jax.errors import UserError
from jlml_jax.protocols import Trial
from jlml_jax.reranking import Reranking
from jlml_jax.result_rows import REPORTED_RANKS, RERANKED, make_row, mean_rows, note_of, scores_of

CHANCE_DRAWS = 10  # rankings that the chance row averages over

Features = dict[str, np.ndarray | LazyRows]  # by branch, [N, dim]
Forward = Callable[[Any, jax.Array], dict[str, jax.Array]]


def make_forward(model: nn.Module, config: ml_collections.ConfigDict, mesh: Mesh, output: str = "features") -> Forward:
    """Compiled (variables, images uint8 [B, H, W, 3] sharded over the mesh) -> features by branch [B, dim].

    With `config.evaluate.flip_average` they are the mean of the image's and its mirror image's. With `output` "logits"
    instead those of the identity layers, by head [B, classes].
    """

    def forward(variables, images):
        def outputs(images):
            return model.apply(variables, augment.normalise(images, config.data), train=False)[output]

        if not config.evaluate.flip_average:
            return outputs(images)
        both = jax.lax.map(outputs, jnp.stack([images, jnp.flip(images, 2)]))  # which compiles the network once
        return jax.tree.map(lambda values: values.mean(0), both)

    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(parallel.BATCH_AXIS))
    return jax.jit(forward, in_shardings=(replicated, rows), out_shardings=replicated)


def decode_batches(split: Split, batches: Iterator[np.ndarray], data: ml_collections.ConfigDict
                   ) -> Iterator[np.ndarray]:
    """Decoded images uint8 [b, H, W, 3] for index arrays [b], by the decoder that `data.loader` names."""
    decoder = input_pipeline if data.loader == "tf_data" else device_data
    return decoder.decode_batches(split, batches, data.height, data.width)


def extract_features(forward: Forward, variables: Any, split: Split, data: ml_collections.ConfigDict,
                     batch_size: int, mesh: Mesh) -> Features:
    """Features by branch, float32 [N, dim] in the split's order, computed on all devices of the mesh.

    Raises:
        UserError: the batch size does not divide over the mesh, or features are not finite.
    """
    parallel.check_batch_size(batch_size, mesh, "evaluate.batch_size")
    rows = parallel.process_slice(batch_size)
    batches = [(indices[rows], mask) for indices, mask in sampling.evaluation_batches(len(split), batch_size)]
    images = decode_batches(split, (indices for indices, _ in batches), data)
    features: Features = {}  # of the size that they will have: joined at the end, they would need twice the memory
    pending = None

    def put(start: int, mask: np.ndarray, outputs: Mapping[str, jax.Array]) -> None:
        for branch, values in outputs.items():
            if branch not in features:
                features[branch] = np.empty((len(split), values.shape[1]), np.float32)
            features[branch][start:start + batch_size] = np.asarray(values, np.float32)[mask]

    bar = tqdm(images, f"features of {len(split):,} images", len(batches), unit=" batches", leave=False,
               disable=jax.process_index() > 0 or None)
    for number, ((_, mask), batch) in enumerate(zip(batches, bar, strict=True)):
        result = number * batch_size, mask, forward(variables, parallel.shard_batch(batch, mesh))
        if pending is not None:  # fetched only now, while the next batch is computed
            put(*pending)
        pending = result
    put(*pending)
    for branch, values in features.items():
        # Of finite float32 the sum in float64 is finite, and there is no second array of that size.
        bad = np.flatnonzero(~np.isfinite(values.sum(axis=1, dtype=np.float64)))
        if len(bad):
            raise UserError(f"{branch} features of {len(bad)} images of {split.dataset} are not finite, "
                            f"the first of them {split.names[bad[0]]}; the weights are unusable: train again")
    return features


NORMALIZE = ("none", "joint", "per_branch")
NORM_STATISTICS = ("run", "data", "camera")


def check_fields(evaluate: ml_collections.ConfigDict) -> None:
    """Refuses values of `config.evaluate` that are not known."""
    _check_known("normalize", evaluate.normalize, NORMALIZE)
    _check_known("norm_statistics", evaluate.norm_statistics, NORM_STATISTICS)
    _check_known("multi_query", evaluate.multi_query, ("", *POOLING))


def _check_known(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"evaluate.{field}={value!r} is unknown; known are "
                        + ", ".join(choice or "'' (none)" for choice in known))


def matching_features(features: Features, normalize: str) -> dict[str, "MatchingFeatures"]:
    """The features to match by: each branch [N, dim], and `joint`, their concatenation [N, sum of dims].

    `normalize`: none; joint: the matching feature scaled to length 1; per_branch: each branch, before it is joined.
    """
    _check_known("normalize", normalize, NORMALIZE)
    chosen = {branch: [values] for branch, values in features.items()}
    if len(features) > 1:
        chosen["joint"] = list(features.values())
    return {name: MatchingFeatures(branches, normalize) for name, branches in chosen.items()}


def matching_feature(features: Features, normalize: str) -> "MatchingFeatures":
    """The feature that a run matches by, [N, dim]: `joint`, or that of its only branch."""
    return list(matching_features(features, normalize).values())[-1]


class MatchingFeatures(LazyRows):
    """Branches side by side, joined and normalised when they are read: a large gallery lies in memory once."""

    def __init__(self, branches: Sequence[np.ndarray | LazyRows], normalize: str):
        self._branches, self._normalize = branches, normalize
        self.shape = (len(branches[0]), sum(values.shape[1] for values in branches))
        self.dtype = np.result_type(*(values.dtype for values in branches))

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        branches = [values[rows] for values in self._branches]
        if self._normalize == "per_branch":
            branches = map(_unit, branches)
        joined = np.concatenate(list(branches), axis=1)
        return _unit(joined) if self._normalize == "joint" else joined


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


class _ChosenRows(LazyRows):
    """Rows of an array, copied when they are read."""

    def __init__(self, values: np.ndarray | LazyRows, rows: np.ndarray):
        self._values, self._rows = values, rows
        self.shape, self.dtype = (len(rows), values.shape[1]), values.dtype

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self._values[self._rows[rows]]


class FeatureCache:
    """Features of splits by `extract`, computed once for each image however many splits have it.

    With `by_camera` they depend on an image's camera, too.
    """

    def __init__(self, extract: Callable[[Split], Features], by_camera: bool = False):
        self._extract, self._by_camera = extract, by_camera
        self._places: dict[Any, tuple[int, int]] = {}  # by image: the number of an extraction, a row of its features
        self._extracted: list[Features] = []

    def __call__(self, split: Split) -> Features:
        images = list(zip(split.keys(), split.cameras.tolist(), strict=True) if self._by_camera else split.keys())
        missing = {image: index for index, image in enumerate(images) if image not in self._places}
        if missing:
            self._places |= {image: (len(self._extracted), row) for row, image in enumerate(missing)}
            self._extracted.append(self._extract(split.select(np.array(list(missing.values())))))
        numbers, rows = np.array([self._places[image] for image in images]).T
        if (numbers == numbers[0]).all():
            return {branch: _ChosenRows(values, rows) for branch, values in self._extracted[numbers[0]].items()}
        return {branch: np.concatenate([self._extracted[number][branch][[row]]
                                        for number, row in zip(numbers, rows, strict=True)])
                for branch in self._extracted[0]}


def sharded_products(mesh: Mesh) -> Products:
    """Products with the gallery's rows sharded over this process's devices of the mesh, each computing its part.

    Every process ranks for itself; nothing travels between them.
    """
    local = Mesh(np.array(mesh.local_devices), ("gallery",))
    by_row, by_column = (NamedSharding(local, PartitionSpec(*axes)) for axes in (("gallery",), (None, "gallery")))
    # The default precision of a TPU, and of the tensor cores of a GPU, would change the order of near images.
    multiply = jax.jit(lambda query, gallery: jnp.matmul(query, gallery.T, precision=jax.lax.Precision.HIGHEST),
                       out_shardings=by_column)

    def products(gallery: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        placed = jax.device_put(np.pad(gallery, ((0, -len(gallery) % local.size), (0, 0))), by_row)
        return lambda query: np.array(multiply(query, placed))[:, :len(gallery)]

    return products


def products_on(mesh: Mesh) -> Products:
    """What multiplies fastest where the mesh is: its devices, unless they are the host's own processor."""
    return numpy_products if mesh.local_devices[0].platform == "cpu" else sharded_products(mesh)


def evaluate_trials(trials: Iterable[Trial], extract: Callable[[Split], Features],
                    evaluate: ml_collections.ConfigDict, products: Products = numpy_products) -> list[dict[str, Any]]:
    """The rows of each trial, and those of their mean if there are several; `products` as `metrics` takes them."""
    trials, rows = list(trials), []
    for trial in trials:
        query, gallery = (matching_features(extract(split), evaluate.normalize)
                          for split in (trial.query, trial.gallery))
        rows += _rank(trial, trial.protocol, query, gallery, evaluate, products)
        if trial.multi_query is not None and evaluate.multi_query:
            further = matching_features(extract(trial.multi_query), evaluate.normalize)
            pooled = {name: pool_queries(trial, query[name][:], further[name][:], evaluate.multi_query)
                      for name in query}
            rows += _rank(trial, trial.protocol.replace("single-query", "multi-query"), pooled, gallery, evaluate,
                          products)
    return rows + (mean_rows(rows) if len(trials) > 1 else [])


def _rank(trial: Trial, protocol: str, query: Features, gallery: Features, evaluate: ml_collections.ConfigDict,
          products: Products) -> list[dict[str, Any]]:
    rows = []
    for name in query:
        max_rank = max(evaluate.max_rank, *REPORTED_RANKS)
        row = make_row(trial, protocol, name, evaluate.normalize, metrics.evaluate_ranking(
            query[name], gallery[name], *labels_of(trial), max_rank=max_rank,
            single_gallery_shot=trial.single_gallery_shot, products=products))
        if evaluate.reranking and not trial.single_gallery_shot:  # each draw of the gallery would need its own
            reranked = Reranking(query[name], gallery[name], products)
            row |= {RERANKED + score: value for score, value in scores_of(metrics.rank_blocks(
                reranked.distances, *labels_of(trial), max_rank=max_rank)).items()}
        if evaluate.norm_statistics != "run":
            row["norm_statistics"] = evaluate.norm_statistics
        rows.append(row)
    return rows


POOLING = {"mean": np.mean, "max": np.max}


def pool_queries(trial: Trial, query: np.ndarray, further: np.ndarray, pooling: str) -> np.ndarray:
    """Multi-query: in place of each query's feature, those of its identity's images by its camera, pooled.

    Args:
      query: [Q, D]; kept where the trial has no further image of a query's identity and camera.
      further: [M, D], of `trial.multi_query`.
      pooling: mean or max, by dimension. Zheng et al. (2015) tried both for their bag of words and had the better
        results with max; for learned features the mean is the common choice, and the default.
    """
    images = trial.multi_query
    rows = {}
    for row, key in enumerate(zip(images.identities.tolist(), images.cameras.tolist(), strict=True)):
        rows.setdefault(key, []).append(row)
    keys = zip(trial.query.identities.tolist(), trial.query.cameras.tolist(), strict=True)
    return np.stack([POOLING[pooling](further[rows[key]], axis=0) if key in rows else own
                     for key, own in zip(keys, query, strict=True)])


def evaluate_validation(trial: Trial, logits: Features) -> list[dict[str, Any]]:
    """A row of classification accuracy for each head; `logits` [N, classes] of the validation images."""
    labels = trial.labels_of(trial.validation)
    rows = []
    for head, values in logits.items():
        true = values[np.arange(len(labels)), labels]
        rank = (values >= true[:, None]).sum(axis=1)  # of equal logits the wrong class comes first
        rows.append({"dataset": trial.dataset, "protocol": trial.protocol, "trial": trial.number, "feature": head,
                     "top1": float(np.mean(rank <= 1)), "top5": float(np.mean(rank <= 5)), "num_images": len(labels),
                     "num_classes": values.shape[1]} | note_of(trial))
    return rows


def evaluate_baselines(trial: Trial, data: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """Rows that any model must beat: chance, and a colour histogram by the metric that suits it best."""
    def rank(distances: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> metrics.RankingMetrics:
        return metrics.rank_blocks(distances, *labels_of(trial), single_gallery_shot=trial.single_gallery_shot)

    draws = [rank(functools.partial(baselines.random_distances, draw, len(trial.gallery)))
             for draw in range(CHANCE_DRAWS)]
    mean = metrics.RankingMetrics(
        cmc=np.mean([draw.cmc for draw in draws], axis=0),
        mean_ap=float(np.mean([draw.mean_ap for draw in draws])),
        mean_ap_trapezoid=float(np.mean([draw.mean_ap_trapezoid for draw in draws])),
        mean_inp=float(np.mean([draw.mean_inp for draw in draws])),
        num_valid_queries=draws[0].num_valid_queries,
    )
    query, gallery = (_color_histograms(split, data) for split in (trial.query, trial.gallery))
    histogram = max((rank(lambda rows, columns, metric=metric: metric(query[rows], gallery[columns]))
                     for metric in baselines.HISTOGRAM_METRICS.values()), key=lambda scores: scores.cmc[0])
    return [make_row(trial, trial.protocol, feature, "none", scores)
            for feature, scores in (("chance", mean), ("colour histogram", histogram))]


def _color_histograms(split: Split, data: ml_collections.ConfigDict) -> np.ndarray:
    """Of all images, float32 [N, 432]; decoded a few hundred at a time."""
    return np.concatenate([baselines.color_histogram(split.select(rows).decode(data.height, data.width))
                           for rows in np.array_split(np.arange(len(split)), -(-len(split) // 256))])


def labels_of(trial: Trial) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Query and gallery identities, query and gallery cameras: the order in which `metrics` takes them."""
    return trial.query.identities, trial.gallery.identities, trial.query.cameras, trial.gallery.cameras
