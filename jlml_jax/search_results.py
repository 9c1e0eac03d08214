"""What a search has found: as a table on the terminal, a CSV, a picture."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlml_jax import contact_sheet
from jlml_jax.errors import printable
from jlml_jax.files import write_output
from jlml_jax.user_images import UserImage


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """What to search for."""

    images: list[UserImage]  # one; or several of one person, such as those of a track
    digests: list[bytes]  # theirs, as `LoadedImage` has them
    feature: np.ndarray  # float32 [D], of the one or the mean of theirs

    def __str__(self) -> str:
        others = len(self.images) - 1
        return str(self.images[0]) + (f" and {others:,} others" if others else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The images nearest to a query, nearest first."""

    query: Query
    images: list[UserImage]
    distances: np.ndarray  # float64 [k]
    verdicts: list[str]  # k; each empty, where there are none


def show(found: Found, with_verdicts: bool, headed: bool) -> None:
    """Prints a table; `headed`: below the query's name."""
    if headed:
        print(f"\nquery {found.query}")
    width = max(map(len, found.verdicts), default=0)
    print(f"{'rank':>4} {'distance':>10}  " + (f"{'verdict':<{width}}  " if with_verdicts else "")
          + f"{'identity':<10} {'camera':<8} file")
    for rank, (image, distance, verdict) in enumerate(
            zip(found.images, found.distances, found.verdicts, strict=True), 1):
        print(f"{rank:>4} {distance:>10.4f}  " + (f"{verdict:<{width}}  " if with_verdicts else "")
              + f"{printable(image.identity) or '-':<10} {printable(image.camera) or '-':<8} {printable(image.file)}"
              + (f" box {','.join(map(str, image.box))}" if image.box else "")
              + (f" track {printable(image.track)}" if image.track else ""))


def write(path: Path, found: Sequence[Found]) -> None:
    """A CSV with a line for each image or track that was found, by query and rank. A query of several images goes by
    the name of the first."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    box = ("x", "y", "width", "height")
    table.writerow(["query", "query_images", "query_track", *(f"query_{name}" for name in box), "rank", "distance",
                    "verdict", "image", "identity", "camera", "track", *box])
    for one in found:
        query = one.query.images[0]
        cells = [query.file, len(one.query.images), query.track, *(query.box or [""] * 4)]
        for rank, (image, distance, verdict) in enumerate(zip(one.images, one.distances, one.verdicts, strict=True), 1):
            table.writerow([*cells, rank, f"{distance:.6f}", verdict, image.file, image.identity, image.camera,
                            image.track, *(image.box or [""] * 4)])
    write_output(path, text.getvalue())
    print(f"{path}: {sum(len(one.images) for one in found):,} images found, for {len(found):,} queries")


def draw(path: Path, found: Sequence[Found]) -> None:
    """A row for each query: the query and what was found, side by side, with the distances."""
    contact_sheet.draw(path, [[(one.query.images[0], "query"), *zip(one.images, map("{:.4f}".format, one.distances),
                                                                   strict=True)] for one in found])
