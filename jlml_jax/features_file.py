"""Features of a user's images in one file, .npz or .parquet, with what is known of each image.

`.npz` (NumPy, read with allow_pickle=False) has the arrays
  features     float32 [N, D]
  files        str [N], relative to `root`
  identities   str [N], empty where not known
  cameras      str [N], empty where not known
  boxes        int32 [N, 4]: x, y, width, height in pixels of the frame; only if the images are boxes of frames
  tracks       str [N], empty where of none; only if there are any: a tracker's name, unique within a camera
  root         str, the folder that the files are in
  fingerprint  str, of the model (`extractor.Extractor.fingerprint`)
`.parquet` has a row an image with the columns file, identity, camera (null where not known), x, y, width, height (if
there are boxes), track (if there are any) and features (a list of D float32); root and fingerprint are metadata of its
schema.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jlml_jax import files
from jlml_jax.errors import UserError
from jlml_jax.files import cached_realpath
from jlml_jax.user_images import Box, UserImage

SUFFIXES = (".npz", ".parquet")


@dataclasses.dataclass(frozen=True, eq=False)
class FeaturesFile:
    """What such a file holds."""

    features: np.ndarray  # float32 [N, D]
    files: np.ndarray  # str [N]
    identities: np.ndarray  # str [N]
    cameras: np.ndarray  # str [N]
    boxes: np.ndarray | None  # int32 [N, 4]
    root: str
    fingerprint: str
    tracks: np.ndarray | None = None  # str [N]

    def __len__(self) -> int:
        return len(self.features)

    def rows_of(self, images: Sequence[UserImage]) -> np.ndarray:
        """The rows of these images, int64 [M], by their files, whatever links lead to them, and boxes."""
        wanted = {(os.path.realpath(image.path), image.box) for image in images}
        return np.array([row for place in wanted for row in self._rows_by_place.get(place, ())], np.int64)

    @functools.cached_property
    def _rows_by_place(self) -> dict[tuple[str, Box | None], list[int]]:
        places, realpath = {}, cached_realpath()
        for row, file in enumerate(self.files.tolist()):
            box = None if self.boxes is None else tuple(self.boxes[row].tolist())
            places.setdefault((realpath(os.path.join(self.root, file)), box), []).append(row)
        return places

    def image(self, row: int) -> UserImage:
        """The image that row `row` is of."""
        file = str(self.files[row])
        box = None if self.boxes is None else tuple(self.boxes[row].tolist())
        return UserImage(Path(self.root, file), file, str(self.identities[row]), str(self.cameras[row]), box,
                         track="" if self.tracks is None else str(self.tracks[row]))


def is_features_file(path: Path) -> bool:
    """Whether `path` is, by its name, such a file and not images."""
    return path.suffix in SUFFIXES and not path.is_dir()


def check_output(path: Path) -> None:
    """A UserError if features cannot be written to `path`: told before they are computed, not after."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is neither {' nor '.join(SUFFIXES)}; give a name that ends so")
    if path.suffix == ".parquet":
        _pyarrow()
    files.check_output(path)


def write(path: Path, table: FeaturesFile) -> None:
    """Writes all of the file or nothing, in place of one that may be there.

    Raises:
        UserError: the file cannot be written, or pyarrow, which Parquet needs, is not installed.
    """
    def write_npz(file: BinaryIO) -> None:
        fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
        np.savez(file, **{name: np.asarray(value) for name, value in fields.items() if value is not None})

    def write_parquet(file: BinaryIO) -> None:
        pa, parquet = _pyarrow()

        def text(values: np.ndarray) -> "pa.Array":
            return pa.array([value or None for value in values.tolist()], pa.string())

        columns = {"file": text(table.files), "identity": text(table.identities), "camera": text(table.cameras)}
        if table.boxes is not None:
            columns |= {name: pa.array(table.boxes[:, i]) for i, name in enumerate(("x", "y", "width", "height"))}
        if table.tracks is not None:
            columns["track"] = text(table.tracks)
        columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(table.features.ravel()),
                                                                table.features.shape[1])
        metadata = {"root": table.root, "fingerprint": table.fingerprint}
        parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), file, write_page_checksum=True)

    files.write_output(path, write_npz if path.suffix == ".npz" else write_parquet)


def read(path: Path) -> FeaturesFile:
    """Reads what `write` has written.

    Raises:
        UserError: it is no such file, or damaged.
    """
    try:
        table = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
        n = len(table.features)
        if table.features.ndim != 2 or table.features.dtype != np.float32 or not table.features.shape[1]:
            raise ValueError(f"its features are {table.features.dtype} {list(table.features.shape)}")
        texts = (table.files, table.identities, table.cameras, *([] if table.tracks is None else [table.tracks]))
        if any(column.shape != (n,) for column in texts):
            raise ValueError("its columns are not of one length")
        if table.boxes is not None and (table.boxes.shape != (n, 4) or table.boxes.dtype.kind != "i"):
            raise ValueError("its boxes are not four integers each")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); give a file that extract has made") from error
    except Exception as error:  # zipfile and zlib raise whatever the bytes lead them to
        raise UserError(f"{path} is not a whole file of features ({' '.join(map(str, error.args))}); make it again "
                        "with python -m jlml_jax.extract") from error
    bad = np.flatnonzero(~np.isfinite(table.features).all(axis=1))
    if len(bad):
        raise UserError(f"{path} has features that are not finite in {len(bad)} rows, the first of them {bad[0]}; make "
                        "it again with python -m jlml_jax.extract")
    return table


def _read_npz(path: Path) -> FeaturesFile:
    with np.load(path, allow_pickle=False) as arrays:
        names = ("files", "identities", "cameras", "root", "fingerprint", *["tracks"] * ("tracks" in arrays))
        text = {name: arrays[name] for name in names}
        for name, values in text.items():
            if values.dtype.kind != "U":
                raise ValueError(f"{name} is {values.dtype}, not text")
        text |= {name: str(text[name]) for name in ("root", "fingerprint")}
        return FeaturesFile(arrays["features"], boxes=arrays.get("boxes"), **text)


def _read_parquet(path: Path) -> FeaturesFile:
    _, parquet = _pyarrow()
    table = parquet.read_table(path, page_checksum_verification=True)
    metadata = table.schema.metadata or {}

    def text(name: str) -> np.ndarray:
        return np.array([value or "" for value in table[name].to_pylist()], np.str_)

    lists = table["features"].combine_chunks()
    features = lists.flatten().to_numpy().reshape(len(table), -1) if len(table) else np.empty((0, 1), np.float32)
    boxes = None
    if "x" in table.column_names:
        boxes = np.stack([table[name].to_numpy() for name in ("x", "y", "width", "height")], 1)
    return FeaturesFile(features, text("file"), text("identity"), text("camera"), boxes,
                        metadata[b"root"].decode(), metadata[b"fingerprint"].decode(),
                        text("track") if "track" in table.column_names else None)


def _pyarrow():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: run pip install pyarrow, or give a .npz file") from error
    return pyarrow, parquet
