"""What users write of their images: CSVs, boxes, and names like Market-1501's."""

import csv
import functools
import io
import itertools
import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from jlml_jax.datasets.images import Box
from jlml_jax.datasets.split import DISTRACTOR, JUNK
from jlml_jax.errors import UserError, first_few, printable
from jlml_jax.files import cached_realpath

BOX_COLUMNS = ("x", "y", "width", "height")
NOBODY = {"distractor": DISTRACTOR, "junk": JUNK}  # words in the place of an identity
_MISSING = ("nan", "None", "<NA>")  # as pandas and NumPy write a missing cell as text

# 0002_c1s1_000451_03.jpg or 17_c3.png: identity, camera, anything.
NAME = re.compile(r"(?P<identity>-1|[0-9]+)_c(?P<camera>[0-9]+).*(?i:\.jpe?g|\.png|\.bmp|\.webp)")
EXAMPLE = "0002_c1s1_000451_03.jpg"

# What a CSV of images may not have as an identity, and what instead.
JUNK_ADVICE = f"write junk for identity {JUNK}, and distractor where {DISTRACTOR} is nobody"


def refuse(source: Path, offenders: Sequence[str], what: str, remedy: str) -> None:
    """A UserError if there are any `offenders`, which are `what`."""
    if offenders:
        raise UserError(f"{source}: {len(offenders):,} {what}: {first_few(offenders)}; {remedy}")


def clipped_note(number: int) -> str:
    """A line to tell the user."""
    return f"{number:,} boxes cross the edge of their frame and are cut to it"


def box_of(cells: Mapping[str, str]) -> Box | None:
    """The box in a line of a CSV, rounded to pixels; None if it has none.

    Raises:
        ValueError: it cannot be one; the message says why.
    """
    if "x" not in cells:
        return None
    shown = printable(cells["image"])
    try:
        numbers = [float(cells[column]) for column in BOX_COLUMNS]
    except ValueError as error:
        raise ValueError(f"the box of {shown} is not four numbers") from error
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"the box of {shown} is not finite")
    x, y, width, height = map(round, numbers)
    if width < 1 or height < 1:
        raise ValueError(f"the box of {shown} is {width} x {height} pixels, which is nothing")
    return x, y, width, height


def read_table(path: Path, needed: Sequence[str], known: Sequence[str] = ()
               ) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """The number of each line of a CSV that is not empty, after the first, and its cells by column; notes.

    The columns of a box are known, too: if any line has cells x, all have those of `BOX_COLUMNS`.

    Raises:
        UserError: it is no such file, or it lacks a `needed` column, or one of a box, or has one that is read twice.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it has NUL characters")
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; give a CSV file or a folder of images") from error
    except ValueError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}); save it as a CSV file in UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; mend the quotation marks") from error
    if not lines:
        raise UserError(f"{path} is empty; its first line must name the columns {', '.join(needed)}")
    (_, header), *lines = lines
    if missing := [column for column in needed if column not in header]:
        first = ",".join(f'"{cell}"' if "," in cell else cell for cell in header)  # all in one cell, as Excel quotes it
        raise UserError(f"{path} has no column {' and no column '.join(missing)}: its first line is "
                        f"{first[:80]!r}, but must name {', '.join(needed)}, each a cell, with commas between them")
    if "x" in header or "y" in header:  # width and height alone are an image's
        known = (*known, *BOX_COLUMNS)
        if missing := [column for column in BOX_COLUMNS if column not in header]:
            raise UserError(f"{path} lacks {', '.join(missing)} of a box; its columns are {', '.join(BOX_COLUMNS)}, or "
                            "none of these")
    if twice := [column for column in (*needed, *known) if header.count(column) > 1]:
        raise UserError(f"{path} has two columns {twice[0]}; remove one")
    if not lines:
        raise UserError(f"{path} lists no images; add a line for each")
    refuse(path, [f"line {number} ({len(cells)})" for number, cells in lines if len(cells) != len(header)],
           f"lines have not {len(header)} cells, as the first has", "quote cells with a comma in them")
    unread = [printable(title) for title in header if title and title not in (*needed, *known)]
    return ([(number, dict(zip(header, cells, strict=True))) for number, cells in lines],
            [f"columns that are not read: {', '.join(unread)}"] if unread else [])


def make_path_within(root: str) -> Callable[[str], str]:
    """A function of a path that a CSV in the folder `root` (as os.path.realpath has it) names: the path, relative to
    the folder, without `.` and `..`. What many lines name, such as a frame of many boxes, is looked up once.

    It raises a ValueError if the path is absolute or leads out of the folder; the message says which.
    """
    realpath = cached_realpath()

    @functools.cache
    def path_within(file: str) -> str:
        normal = os.path.normpath(file)
        if os.path.isabs(file):
            raise ValueError("is an absolute path, and must start from the folder of the CSV")
        # The text first: what lies outside is not even looked at.
        if normal == os.pardir or normal.startswith(os.pardir + os.sep):
            raise ValueError("leaves the folder of the CSV")
        if not Path(realpath(os.path.join(root, normal))).is_relative_to(root):
            raise ValueError("leaves the folder of the CSV by a symbolic link")
        return Path(normal).as_posix()

    return path_within


def identity_of(match: re.Match) -> str:
    """The identity in a name that is like NAME: a number as text, or a word of NOBODY."""
    words = {str(number): word for word, number in NOBODY.items()}
    number = str(int(match["identity"]))
    return words.get(number, number)


def is_unicode(text: str) -> bool:
    """Whether a file name is valid UTF-8, which Linux does not ask for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_number(name: str) -> int | None:
    """The number that a name is; also as pandas writes it where cells of the column are missing, 12.0."""
    match = re.fullmatch(r"(-?[0-9]{1,18})(\.0+)?", name)
    return int(match[1]) if match else None


def notes_on_identities(names: Iterable[str]) -> list[str]:
    """Of those that look like nobody, and are not among NOBODY."""
    return [f"identity {name} is taken for a person; where it is nobody, write distractor"
            for name in sorted(set(names)) if whole_number(name) == DISTRACTOR or name in _MISSING]


def in_order(names: set[str], source: Path, what: str) -> list[str]:
    """Sorted, in the order of numbers if all are; a UserError if a name or a number is written in two ways."""
    same = defaultdict(list)  # an é may be one character, or an e and an accent
    for name in sorted(names):
        same[unicodedata.normalize("NFC", name)].append(name)
    refuse(source, [" and ".join(map(ascii, written)) for written in same.values() if len(written) > 1],
           f"{what} are written in two ways", "write them in one")
    numbers = {name: whole_number(name) for name in names}
    if None in numbers.values():
        return sorted(names)
    ordered = sorted(names, key=lambda name: (numbers[name], name))
    refuse(source, [f"{one} and {other}" for one, other in itertools.pairwise(ordered)
                    if numbers[one] == numbers[other]],
           f"{what} are written in two ways", "write them in one")
    return ordered
