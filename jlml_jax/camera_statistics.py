"""Batch normalisation's statistics by camera, beside a run's weights: one file, `camera_statistics.npz`.

It is NumPy's format and has `cameras`, str [K], and under the dotted path of every statistic in `batch_stats` (such as
`stem.norm.mean`) float32 [K, channels]. An image of a camera that is not among them is normalised by the run's own
statistics.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from jlml_jax.errors import UserError

FILE = "camera_statistics.npz"
_CAMERAS = "cameras"


@dataclasses.dataclass(frozen=True, eq=False)
class CameraStatistics:
    """What batch normalisation normalises each camera's images by."""

    cameras: tuple[str, ...]
    batch_stats: Any  # NumPy arrays [K, channels]

    def of(self, camera: str) -> Any:
        """The `batch_stats` of one of the cameras."""
        return jax.tree.map(lambda values: values[self.cameras.index(camera)], self.batch_stats)


def stack(batch_stats: Mapping[str, Any]) -> CameraStatistics:
    """From the `batch_stats` of each camera."""
    return CameraStatistics(tuple(batch_stats), jax.tree.map(lambda *rows: np.stack(rows), *batch_stats.values()))


def to_bytes(statistics: CameraStatistics) -> bytes:
    """The content of the file."""
    content = io.BytesIO()
    np.savez(content, **{_CAMERAS: np.array(statistics.cameras, np.str_)},
             **traverse_util.flatten_dict(statistics.batch_stats, sep="."))
    return content.getvalue()


def read(path: Path, batch_stats: Any) -> CameraStatistics | None:
    """The file `path` of a run whose own statistics are `batch_stats`; None if there is none.

    Raises:
        UserError: it is damaged, or another network's.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
        cameras = found.pop(_CAMERAS)
        expected = {name: (len(cameras), *values.shape)
                    for name, values in traverse_util.flatten_dict(batch_stats, sep=".").items()}
        if cameras.ndim != 1 or cameras.dtype.kind != "U" or len(set(cameras.tolist())) != len(cameras):
            raise ValueError("its cameras are not names")
        if {name: (*values.shape,) for name, values in found.items()} != expected or not all(
                values.dtype == np.float32 and np.isfinite(values).all() for values in found.values()):
            raise ValueError("it is another network's")
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile and NumPy raise whatever the bytes lead them to
        raise UserError(f"{path} is damaged ({error}); make the run anew with python -m jlml_jax.adapt --by_camera, or "
                        "delete the file") from error
    return CameraStatistics(tuple(cameras.tolist()), traverse_util.unflatten_dict(found, sep="."))


def table(statistics: CameraStatistics, batch_stats: Any) -> Any:
    """A row of statistics for each camera, and as the last one the run's own: [K + 1, channels]."""
    return jax.tree.map(lambda rows, last: np.concatenate([rows, last[None]]), statistics.batch_stats, batch_stats)


def rows(known: Sequence[str], cameras: Sequence[str]) -> np.ndarray:
    """Which row of `table` each of `cameras` takes, int32 [N]."""
    places = {camera: row for row, camera in enumerate(known)}
    return np.array([places.get(camera, len(known)) for camera in cameras], np.int32)
