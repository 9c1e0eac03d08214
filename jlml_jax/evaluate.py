"""Features of a split, then metrics: the rows of results.json."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jlml_jax import augment, baselines, device_data, input_pipeline, metrics, parallel, sampling
from jlml_jax.datasets.base import Split
from jlml_jax.errors import UserError
from jlml_jax.protocols import Protocol

REPORTED_RANKS = (1, 5, 10, 20)
CHANCE_DRAWS = 10  # rankings that the chance row averages over

Features = dict[str, np.ndarray]
Forward = Callable[[Any, jax.Array], dict[str, jax.Array]]


def make_forward(model: nn.Module, data: ml_collections.ConfigDict, mesh: Mesh) -> Forward:
    """Compiled (variables, images uint8 [B, H, W, 3] sharded over the mesh) -> features by branch [B, dim]."""

    def forward(variables, images):
        return model.apply(variables, augment.normalise(images, data), train=False)["features"]

    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(parallel.BATCH_AXIS))
    return jax.jit(forward, in_shardings=(replicated, rows), out_shardings=replicated)


def decode_batches(split: Split, batches: Iterator[np.ndarray], data: ml_collections.ConfigDict
                   ) -> Iterator[np.ndarray]:
    """Decoded images uint8 [b, H, W, 3] for index arrays [b], by the decoder that `data.loader` names."""
    decoder = input_pipeline if data.loader == "tf_data" else device_data
    return decoder.decode_batches(split, batches, data.height, data.width)


def extract_features(forward: Forward, variables: Any, split: Split, data: ml_collections.ConfigDict,
                     batch_size: int, mesh: Mesh) -> Features:
    """Features by branch, float32 [N, dim] in the split's order, computed on all devices of the mesh."""
    parallel.check_batch_size(batch_size, mesh, "evaluate.batch_size")
    rows = parallel.process_slice(batch_size)
    batches = [(indices[rows], mask) for indices, mask in sampling.evaluation_batches(len(split), batch_size)]
    images = decode_batches(split, (indices for indices, _ in batches), data)
    outputs, pending = [], None
    bar = tqdm(images, f"features of {len(split):,} images", len(batches), unit=" batches", leave=False, disable=None)
    for (_, mask), batch in zip(batches, bar, strict=True):
        result = forward(variables, parallel.shard_batch(batch, mesh)), mask
        if pending is not None:  # fetched only now, while the next batch is computed
            outputs.append(_unpadded(*pending))
        pending = result
    outputs.append(_unpadded(*pending))
    features = {branch: np.concatenate([output[branch] for output in outputs]) for branch in outputs[0]}
    for branch, values in features.items():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise UserError(f"{branch} features of {len(bad)} images of {split.dataset} are not finite, "
                            f"the first of them {split.names[bad[0]]}; the weights are unusable: train again")
    return features


def _unpadded(features: Mapping[str, jax.Array], mask: np.ndarray) -> Features:
    return {branch: np.asarray(values, np.float32)[mask] for branch, values in features.items()}


def check_normalize(normalize: str) -> None:
    """Refuses a value of `evaluate.normalize` that is not known."""
    if normalize not in ("none", "joint", "per_branch"):
        raise UserError(f"evaluate.normalize={normalize!r} is unknown; known are none, joint, per_branch")


def matching_features(features: Features, normalize: str) -> Features:
    """The features to match by: each branch [N, dim], and `joint`, their concatenation [N, sum of dims].

    `normalize`: none; joint: the matching feature scaled to length 1; per_branch: each branch, before it is joined.
    """
    check_normalize(normalize)
    if normalize == "per_branch":
        features = {branch: _unit(values) for branch, values in features.items()}
    matching = dict(features)
    if len(features) > 1:
        matching["joint"] = np.concatenate(list(features.values()), axis=1)
    if normalize == "joint":
        matching = {name: _unit(values) for name, values in matching.items()}
    return matching


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def evaluate_features(protocol: Protocol, query: Features, gallery: Features, evaluate: ml_collections.ConfigDict
                      ) -> list[dict[str, Any]]:
    """A row of results.json for each branch and for the joint feature."""
    query = matching_features(query, evaluate.normalize)
    gallery = matching_features(gallery, evaluate.normalize)
    rows = []
    for name in query:
        scores = metrics.evaluate_ranking(query[name], gallery[name], *labels_of(protocol),
                                          max_rank=max(evaluate.max_rank, *REPORTED_RANKS))
        rows.append(make_row(protocol, name, evaluate.normalize, scores))
    return rows


def evaluate_baselines(protocol: Protocol, data: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """Rows that any model must beat: chance, and a colour histogram by the metric that suits it best."""
    rng = np.random.default_rng(0)
    shape = (len(protocol.query), len(protocol.gallery))
    draws = [metrics.rank_metrics(rng.random(shape, np.float32), *labels_of(protocol)) for _ in range(CHANCE_DRAWS)]
    mean = metrics.RankingMetrics(
        cmc=np.mean([draw.cmc for draw in draws], axis=0),
        mean_ap=float(np.mean([draw.mean_ap for draw in draws])),
        mean_ap_trapezoid=float(np.mean([draw.mean_ap_trapezoid for draw in draws])),
        mean_inp=float(np.mean([draw.mean_inp for draw in draws])),
        num_valid_queries=draws[0].num_valid_queries,
    )
    query = baselines.color_histogram(protocol.query.decode(data.height, data.width))
    gallery = baselines.color_histogram(protocol.gallery.decode(data.height, data.width))
    histogram = max((metrics.rank_metrics(distances(query, gallery), *labels_of(protocol))
                     for distances in baselines.HISTOGRAM_METRICS.values()), key=lambda scores: scores.cmc[0])
    return [make_row(protocol, "chance", "none", mean), make_row(protocol, "colour histogram", "none", histogram)]


def labels_of(protocol: Protocol) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Query and gallery identities, query and gallery cameras: the order in which `metrics` takes them."""
    return (protocol.query.identities, protocol.gallery.identities, protocol.query.cameras, protocol.gallery.cameras)


def make_row(protocol: Protocol, feature: str, normalize: str, scores: metrics.RankingMetrics) -> dict[str, Any]:
    """One row of results.json; fractions, 0 to 1."""
    ranks = {f"rank{rank}": float(scores.cmc[rank - 1]) for rank in REPORTED_RANKS}
    return {
        "dataset": protocol.query.dataset, "protocol": protocol.name, "trial": 0, "feature": feature,
        "normalize": normalize, **ranks, "mean_ap": scores.mean_ap, "mean_ap_trapezoid": scores.mean_ap_trapezoid,
        "mean_inp": scores.mean_inp, "num_queries": scores.num_valid_queries, "num_gallery": len(protocol.gallery),
    }


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in per cent."""
    columns = [*(f"rank{rank}" for rank in REPORTED_RANKS), "mean_ap", "mean_ap_trapezoid", "mean_inp"]
    titles = [*(f"R{rank}" for rank in REPORTED_RANKS), "mAP", "mAP trap.", "mINP"]
    first = rows[0]
    lines = [f"{first['dataset']}, {first['protocol']}, {first['num_queries']} queries, "
             f"{first['num_gallery']} gallery images; per cent",
             f"{'feature':<20}" + "".join(f"{title:>10}" for title in titles)]
    lines += [f"{row['feature']:<20}" + "".join(f"{100 * row[column]:>10.1f}" for column in columns) for row in rows]
    return "\n".join(lines)
