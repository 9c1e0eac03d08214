"""A gallery that lasts: features on disk to which images are added once.

A gallery is a folder of
  features.f32     the features, little-endian float32 [N, D], row after row; only ever appended to, read by memory map
  gallery.sqlite   table `model`: the fingerprint of the model and D; table `images`: for each row of features.f32 the
                   SHA-256 of the image file's bytes (and the box that is cropped), its file, identity, camera and box
  lock             held (flock) by a process while it adds a batch; others wait for it
An image is in the gallery when its row in `images` is committed, which is after its feature is on disk: what a killed
process has appended beyond that is cut off by the next one that adds. The same image again, under whatever name, is
not added again; it takes the name it was listed with last, and the identity and camera if these are given.
"""

import contextlib
import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlml_jax.errors import UserError
from jlml_jax.files import lock
from jlml_jax.user_images import LoadedImage, UserImage

_DATABASE, _FEATURES, _LOCK = "gallery.sqlite", "features.f32", "lock"
_FORMAT = 1  # user_version of the database
_MAX_DIM = 1 << 20
_AT_ONCE = 500  # digests that are looked up by one query: SQLite may take no more than 999 parameters
_TABLES = f"""
BEGIN;
CREATE TABLE model (fingerprint TEXT NOT NULL, dim INTEGER NOT NULL);
CREATE TABLE images (
    row INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, file TEXT NOT NULL, identity TEXT NOT NULL,
    camera TEXT NOT NULL, x INTEGER, y INTEGER, width INTEGER, height INTEGER);
INSERT INTO model VALUES ('{{fingerprint}}', {{dim}});
PRAGMA user_version = {_FORMAT};
COMMIT;
"""


def is_gallery(folder: Path) -> bool:
    """Whether `folder` is a gallery, rather than a folder of images."""
    return (folder / _DATABASE).is_file()


class Gallery:
    """An open gallery folder. To add to it, enter `writing()`.

    Attributes:
        fingerprint: of the model that made the features.
        dim: D.
        features: float32 [N, D], a memory map of all rows that are committed.
    """

    def __init__(self, folder: Path):
        """Opens the gallery in `folder`; a UserError if there is none or it is damaged."""
        self.folder = folder
        # Read-write, even to read: after a kill SQLite has to roll back what was half done.
        name = f"{(folder / _DATABASE).absolute().as_uri()}?mode=rw"
        try:
            self._database = sqlite3.connect(name, uri=True, timeout=60, isolation_level=None)
        except sqlite3.Error as error:
            raise UserError(f"cannot open the gallery {folder} ({error}); give another folder") from error
        if self._query("PRAGMA user_version") != [(_FORMAT,)]:
            raise UserError(f"{folder} is a gallery of another version, or not a whole one; give another folder")
        models = self._query("SELECT fingerprint, dim FROM model")
        if len(models) != 1 or not isinstance(models[0][0], str) or models[0][1] not in range(1, _MAX_DIM):
            raise self._damaged(f"its model is {models[:2]}")
        (self.fingerprint, self.dim), = models
        (count, last), = self._query("SELECT count(*), max(row) FROM images")
        if count and last != count - 1:
            raise self._damaged(f"it has {count:,} rows, the last of them {last}")
        self._map()

    @classmethod
    def create(cls, folder: Path, fingerprint: str, dim: int) -> "Gallery":
        """Makes an empty gallery in `folder`, which must be empty or not there, and opens it.

        Raises:
            UserError: the folder holds something else, or cannot be written.
        """
        part = folder / f"{_DATABASE}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not all(path.name.startswith((_DATABASE, _FEATURES, _LOCK)) for path in folder.iterdir()):
                raise UserError(f"{folder} has files in it but is no gallery; give an empty folder or a new one")
            with lock(folder / _LOCK, str(folder), None):
                if not is_gallery(folder):
                    (folder / _FEATURES).touch()
                    part.unlink(missing_ok=True)
                    with contextlib.closing(sqlite3.connect(part)) as database:
                        database.executescript(_TABLES.format(fingerprint=fingerprint, dim=dim))
                    part.rename(folder / _DATABASE)  # it is whole
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"cannot make a gallery in {folder} ({error}); give --index=FOLDER, one that can "
                            "be written to") from error
        return cls(folder)

    def __len__(self) -> int:
        return len(self.features)

    def close(self) -> None:
        self._database.close()

    @property
    def cameras(self) -> np.ndarray:
        """The cameras, str [N], empty where not known."""
        # Another process may have added more since.
        cameras = [camera for camera, in self._query("SELECT camera FROM images WHERE row < ? ORDER BY row", len(self))]
        if not all(isinstance(camera, str) for camera in cameras):
            raise self._damaged("cameras are not text")
        return np.array(cameras, np.str_)

    def digests(self) -> set[bytes]:
        """Of all images in the gallery."""
        return {digest for digest, in self._query("SELECT digest FROM images")}

    def image(self, row: int) -> UserImage:
        """The image that row `row` is of."""
        (file, identity, camera, *box), = self._query(
            "SELECT file, identity, camera, x, y, width, height FROM images WHERE row = ?", int(row))
        if not all(isinstance(text, str) for text in (file, identity, camera)) or box != [None] * 4 and not all(
                isinstance(number, int) for number in box):
            raise self._damaged(f"row {row} is not an image")
        return UserImage(Path(file), file, identity, camera, None if box[0] is None else tuple(box))

    def cameras_of(self, digests: Collection[bytes]) -> dict[bytes, str]:
        """The cameras of those images, of any digests, that are in the gallery; empty where not known."""
        return self._looked_up("camera", digests)

    def rows_of(self, digests: Collection[bytes]) -> dict[bytes, int]:
        """The rows of those images, of any digests, that are in the gallery."""
        return self._looked_up("row", digests)

    def _looked_up(self, column: str, digests: Collection[bytes]) -> dict[bytes, Any]:
        found, wanted = {}, list(set(digests))
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start:start + _AT_ONCE]
            found |= self._query(f"SELECT digest, {column} FROM images WHERE digest IN ({','.join('?' * len(some))})",
                                 *some)
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While entered, this process alone may `add`; another one is waited for."""
        try:
            held = lock(self.folder / _LOCK, str(self.folder), None)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}); give another --index, or search what "
                            f"is in it by --gallery={self.folder}") from error
        with held:
            self._map()  # the other may have added something since
            yield

    def add(self, new: Sequence[LoadedImage], features: np.ndarray, seen: Sequence[LoadedImage] = ()) -> None:
        """Adds images and their features [len(new), D], and renames those of `seen`, which are there; all or nothing.

        Images twice in `new`, or there already, are added once.

        Raises:
            UserError: there is no room, or the gallery is damaged; what was in it is as it was.
        """
        first, there = {}, self.cameras_of({loaded.digest for loaded in new})
        for index, loaded in enumerate(new):
            if loaded.digest not in there:
                first.setdefault(loaded.digest, index)
        row, database = len(self), self._database
        try:
            if first:
                with open(self.folder / _FEATURES, "r+b") as file:
                    file.truncate(row * self.dim * 4)  # what a killed process left beyond the committed rows
                    file.seek(0, os.SEEK_END)
                    file.write(np.ascontiguousarray(features[list(first.values())], "<f4"))
                    file.flush()
                    os.fsync(file.fileno())
            database.execute("BEGIN IMMEDIATE")
            try:
                for number, index in enumerate(first.values()):
                    image = new[index].image
                    database.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                                     (row + number, new[index].digest, str(image.path.absolute()), image.identity,
                                      image.camera, *(image.box or (None,) * 4)))
                for loaded in [*new, *seen]:
                    image = loaded.image
                    database.execute(
                        "UPDATE images SET file = :file, identity = coalesce(nullif(:identity, ''), identity), "
                        "camera = coalesce(nullif(:camera, ''), camera) WHERE digest = :digest AND NOT "
                        "(file = :file AND :identity IN ('', identity) AND :camera IN ('', camera))",
                        {"file": str(image.path.absolute()), "identity": image.identity, "camera": image.camera,
                         "digest": loaded.digest})
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"cannot add to {self.folder} ({error}); what was in it is as it was: make room and run "
                            "the same command again") from error
        self._map()

    def _query(self, query: str, *parameters: object) -> list[tuple]:
        try:
            return self._database.execute(query, parameters).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, why: object) -> UserError:
        return UserError(f"{self.folder / _DATABASE} is damaged ({why}); make the gallery anew")

    def _map(self) -> None:
        (last,), = self._query("SELECT max(row) FROM images")  # counting would read all of them, with every batch
        count, path = 0 if last is None else last + 1, self.folder / _FEATURES
        if count and (not path.is_file() or path.stat().st_size < count * self.dim * 4):
            raise UserError(f"{path} does not have the {count:,} rows of {_DATABASE}; make the gallery anew")
        try:
            self.features = (np.memmap(path, "<f4", "r", shape=(count, self.dim)) if count
                             else np.empty((0, self.dim), np.float32))
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}); make it readable") from error
