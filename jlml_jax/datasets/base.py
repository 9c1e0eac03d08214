"""What the builders of all data sets have in common, and what original files hold."""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from jlml_jax.datasets.split import DISTRACTOR, EXAMPLES_AT_ONCE, JUNK, Split, StoredImages, read_examples
from jlml_jax.datasets.stored import full_name, open_split
from jlml_jax.errors import UserError, first_few
from jlml_jax.files import lock


class ArrayRecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of all builders: data that are written whole or not at all, as array_record if nothing else is asked for."""

    DRAWN = False  # rather than read from original files

    def __init__(self, *, file_format: str | tfds.core.FileFormat | None = None, **kwargs):
        super().__init__(file_format=file_format, **kwargs)
        if file_format is None and not self.info.initialized:  # else that of what is prepared already
            # array_record is read by index and without TensorFlow; TFDS's default, TFRecord, is neither.
            self.info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD, override=True)

    def is_prepared(self) -> bool:
        """Whether the data lies whole in `data_path`. TFDS itself looks for dataset_info.json alone."""
        return super().is_prepared() and all(
            file.exists() for split in self.info.splits.values() for file in split.filepaths)

    def build(self, source: Path | None = None) -> None:
        """Writes the data, from the original files in `source` if it is not drawn, in place of what may lie there.

        TFDS writes into a folder `incomplete.*` and renames it at the end. What lay there before comes back if that end
        is not reached; a process that is killed leaves it beside, in a folder `replaced.*`.
        """
        if not sys.stderr.isatty():  # in a log every step of a bar would be a line
            tfds.disable_progress_bar()
        with (self._set_aside(), tempfile.TemporaryDirectory() as download_dir,
              contextlib.redirect_stdout(io.StringIO())):
            self.download_and_prepare(
                download_dir=download_dir,  # TFDS makes it even where nothing is downloaded
                download_config=tfds.download.DownloadConfig(
                    manual_dir=source, download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS))

    @contextlib.contextmanager
    def _set_aside(self) -> Iterator[None]:
        path = Path(self.data_path)
        if not path.exists():
            yield
            return
        aside = path.with_name(f"replaced.{secrets.token_hex(4)}_{path.name}")
        path.rename(aside)
        try:
            yield
        finally:
            if not path.exists():
                aside.rename(path)
            for old in path.parent.glob(f"replaced.*_{path.name}"):  # also what a process left that was killed
                shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While entered, no other process is in it for this data set; the others wait."""
        root = Path(self.data_dir_root)
        root.mkdir(parents=True, exist_ok=True)
        name = full_name(self)
        with lock(root / f".{name.replace('/', '-')}.lock", f"{name} in {root}", None):
            yield


class PersonDatasetBuilder(ArrayRecordBuilder, skip_registration=True):
    """Base of the person data sets: an example is an encoded crop with its identity, camera and file name.

    Identities are 1 and up, 0 is a distractor, -1 is junk (never a person, never counted). Examples keep the order in
    which they are generated, which nothing may rely on: `name` is what identifies an image.
    """

    DESCRIPTION: str
    HOMEPAGE: str | None = None
    CITATION: str | None = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 3)),
                "identity": np.int64,
                "camera": np.int64,
                "name": tfds.features.Text(),
            }),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def is_prepared(self) -> bool:
        """As that of the base; a copy without `metadata.json` would not say that it is incomplete or degraded."""
        return super().is_prepared() and (self.data_path / "metadata.json").exists()

    def load_split(self, split: str) -> Split:
        """Reads a prepared split into memory, sorted by name. Needs TensorFlow for TFRecord alone.

        Raises:
            UserError: the files are damaged, or in a format that needs TensorFlow, which is not installed.
        """
        examples: list[dict[str, Any]]
        if self.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            examples = list(read_examples(open_split(self, split)))
        else:  # as `tfds build --file_format=tfrecord` writes it; as_dataset, in turn, refuses array_record
            try:
                examples = list(tfds.as_numpy(
                    self.as_dataset(split=split, decoders={"image": tfds.decode.SkipDecoding()})))
            except ImportError as error:
                raise UserError(f"{self.data_path} is in the format {self.info.file_format.value}, which needs "
                                "TensorFlow to be read: install it, or remove the folder and prepare it again"
                                ) from error
        examples.sort(key=lambda example: example["name"])
        return Split(
            dataset=full_name(self),
            images=[example["image"] for example in examples],
            identities=np.array([example["identity"] for example in examples], np.int64),
            cameras=np.array([example["camera"] for example in examples], np.int64),
            names=np.array([example["name"].decode() for example in examples]),
        )

    def load_stored_split(self, split: str) -> Split:
        """A prepared split in the order on disk, its images left there, after all were read once. No TensorFlow.

        Raises:
            UserError: the files are damaged, or in a format that is not read by index.
        """
        if self.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise UserError(f"{self.data_path} is in the format {self.info.file_format.value}, which is not read by "
                            "index; remove the folder and prepare it again")
        source = open_split(self, split)
        identities, cameras = np.empty((2, len(source)), np.int64)
        names, digests = [], np.empty((len(source), hashlib.sha256().digest_size), np.uint8)
        for row, example in enumerate(tqdm(read_examples(source), f"reading {self.name} {split}", len(source),
                                           unit=" images", leave=False, disable=None)):
            identities[row], cameras[row] = example["identity"], example["camera"]
            names.append(example["name"].decode())
            digests[row] = np.frombuffer(hashlib.sha256(example["image"]).digest(), np.uint8)
        return Split(full_name(self), StoredImages(source, digests), identities, cameras, np.array(names))


@dataclasses.dataclass(frozen=True)
class Crop:
    """One image of a benchmark's original files, not yet read."""

    name: str
    identity: int
    camera: int
    origin: str  # where it lies among the original files, for messages
    read: Callable[[], bytes]  # gives the encoded image


@dataclasses.dataclass(frozen=True)
class Originals:
    """What the original files of a benchmark hold."""

    splits: dict[str, list[Crop]]
    unexpected: list[str]  # paths, within the source, of files that are left out and do not belong there
    # What else the protocols need, such as official partitions: JSON, kept as the metadata of the data set's TFDS info.
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()  # lines to tell the user
    defects: tuple[str, ...] = ()  # what, besides counts, only a copy known to be incomplete may have; in words


class BenchmarkBuilder(PersonDatasetBuilder, skip_registration=True):
    """Base of the data sets that are built from original files which the user has.

    Where a data set has configurations, EXPECTED and inspect may be the instance's instead of the class's.
    """

    # Published counts: split -> any of images, identities, cameras, distractors, junk; a count left out is 0. None: of
    # what is not published.
    EXPECTED: dict[str, dict[str, int]] | None

    _source: Path | None = None  # the original files; None: TFDS's manual_dir, which must be a folder
    _incomplete = ""  # why, if the originals are known to be that
    _options: Mapping[str, Any] = {}  # of `inspect`

    @classmethod
    def inspect(cls, source: Path) -> Originals:
        """Lists the original files in `source` with their annotation; a UserError if their layout is not the set's."""
        raise NotImplementedError

    def differences(self, originals: Originals) -> list[str]:
        """In what `originals` are not the data set as published: defects and counts, in words."""
        counts = [(split, what, found, self.EXPECTED[split].get(what, 0))
                  for split, crops in originals.splits.items() if self.EXPECTED is not None
                  for what, found in count(crops).items()]
        return [*originals.defects, *(f"{split} has {found:,} {what} instead of {published:,}"
                                      for split, what, found, published in counts if found != published)]

    def build(self, source: Path | None = None, incomplete: str = "", **options: Any) -> None:
        """As that of the base; `incomplete` is said in the metadata of a copy known to be that, or degraded.

        `options` go to `inspect`.
        """
        self._source, self._incomplete, self._options = source, incomplete, options
        super().build(source)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        originals = self.inspect(self._source or Path(dl_manager.manual_dir), **self._options)
        self.info.metadata.clear()  # of what is built over
        self.info.metadata.update(originals.metadata)
        # Differences are recorded unasked too: TFDS's own commands build from whatever they are given.
        if incomplete := "; ".join(filter(None, [self._incomplete, *self.differences(originals)])):
            self.info.metadata["incomplete"] = incomplete
        return {split: self._generate_examples(crops) for split, crops in originals.splits.items()}

    def _generate_examples(self, crops: Sequence[Crop]) -> Iterator[tuple[int, dict[str, Any]]]:
        with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes a frame, and encodes its boxes
            for start in range(0, len(crops), EXAMPLES_AT_ONCE):
                some = crops[start:start + EXAMPLES_AT_ONCE]
                images = pool.map(lambda crop: crop.read(), some)
                for index, (crop, image) in enumerate(zip(some, images, strict=True), start):
                    yield index, {"image": image, "identity": crop.identity, "camera": crop.camera, "name": crop.name}


def count(crops: Iterable[Crop]) -> dict[str, int]:
    """Counts of a split: images, identities (persons alone), cameras, distractors, junk."""
    identities = Counter(crop.identity for crop in crops)
    return {
        "images": identities.total(),
        "identities": sum(identity > 0 for identity in identities),
        "cameras": len({crop.camera for crop in crops}),
        "distractors": identities[DISTRACTOR],
        "junk": identities[JUNK],
    }


def unpacked_root(source: Path, archive: str, members: Sequence[str]) -> Path:
    """The folder that `archive` unpacks to: `source` or the one of that name in it.

    Raises:
        UserError: it lacks any of `members`, of which folders end in a slash.
    """
    root = source / archive if (source / archive).is_dir() else source
    missing = [name for name in members
               if not ((root / name).is_dir() if name.endswith("/") else (root / name).is_file())]
    if missing:
        what = "lacks " + ", ".join(missing) if root.is_dir() else "is not a folder"
        raise UserError(f"{root} {what}; give the unpacked {archive}, which has {', '.join(members)}")
    return root


def drop_unmatched(views: dict[str, list[Crop]]) -> tuple[dict[str, list[Crop]], tuple[str, ...]]:
    """The two `views` without people who are in one alone, whom no protocol can match; and a defect that names them."""
    people = [{crop.identity for crop in crops} for crops in views.values()]
    alone = {identity for identity in people[0] ^ people[1] if identity > DISTRACTOR}
    dropped = [crop.origin for crops in views.values() for crop in crops if crop.identity in alone]
    kept = {view: [crop for crop in crops if crop.identity not in alone] for view, crops in views.items()}
    if not alone:
        return kept, ()
    return kept, (f"{len(alone)} people are in one of {' and '.join(views)} alone and left out: {first_few(dropped)}",)


_KNOWN_STRAYS = {"Thumbs.db"}  # the archives themselves have them


def parse_names(root: Path, folders: Sequence[str], pattern: re.Pattern, suffixes: set[str], example: str,
                remedy: str = "remove or rename them") -> tuple[dict[str, list[tuple[Path, re.Match]]], list[str]]:
    """Lists the images in `folders` of `root`, sorted, with the matches of their names; and files that do not belong.

    Raises:
        UserError: files with one of `suffixes` (in lower case) whose names are not `pattern`, such as `example`; it
            ends with what to do, `remedy`.
    """
    images, strays, unparsable = {}, [], []
    for folder in folders:
        images[folder] = []
        for path in sorted((root / folder).iterdir()):
            match = pattern.fullmatch(path.name)
            # No pipe or folder of such a name; a broken link is told when it is read.
            if match and (os.path.isfile(path) or not os.path.exists(path)):
                images[folder].append((path, match))
            elif not match and path.suffix.lower() in suffixes and not path.name.startswith("."):
                unparsable.append(f"{folder}/{path.name}")
            elif path.name not in _KNOWN_STRAYS:
                strays.append(f"{folder}/{path.name}")
    if unparsable:
        raise UserError(f"{len(unparsable)} image names in {root} are not like {example}: {first_few(unparsable)}; "
                        f"{remedy}")
    return images, strays
