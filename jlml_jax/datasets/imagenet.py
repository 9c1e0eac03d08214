"""ImageNet-2012 (Russakovsky et al., IJCV 2015), for pre-training: TFDS's own builder, its images left on disk."""

import contextlib
import hashlib
import importlib.util
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from jlml_jax.datasets.base import ArrayRecordBuilder
from jlml_jax.datasets.split import Split, StoredImages, read_examples
from jlml_jax.datasets.stored import open_split
from jlml_jax.errors import UserError

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}

_NAMES = {"train": re.compile(r"n\d{8}_\d+\.JPEG"), "validation": re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")}


class Imagenet2012(ArrayRecordBuilder, tfds.builder_cls("imagenet2012"), skip_registration=True):
    """TFDS's `imagenet2012` with splits train and validation, which are checked while they are built.

    Data that TFDS itself prepared as array_record, in the same folder, are taken too. Building needs TensorFlow,
    reading does not. An identity is a class, 1 to 1,000: TFDS's label, the rank among the sorted WordNet ids, plus 1.
    """

    EXPECTED = {"train": 1_281_167, "validation": 50_000}  # published numbers of images

    def is_prepared(self) -> bool:
        """Whether both splits lie whole in `data_path`; TFDS builds those whose archives it finds."""
        return super().is_prepared() and ARCHIVES.keys() <= self.info.splits.keys()

    def check_archives(self, source: Path) -> int:
        """The size in bytes of the archives in `source`; a UserError if one is not there, or TensorFlow is not."""
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError("TFDS builds imagenet2012 with TensorFlow, which is not installed: pip install "
                            "tensorflow-cpu (what is built is read without)")
        missing = [name for name in ARCHIVES.values() if not (source / name).is_file()]
        if missing:
            raise UserError(f"{source} has no {' and no '.join(missing)}; give the folder with "
                            f"{' and '.join(ARCHIVES.values())}, from https://image-net.org/download-images")
        return sum((source / name).stat().st_size for name in ARCHIVES.values())

    def build(self, source: Path | None = None) -> None:
        """Writes the data from the archives in `source`, and beside them the annotation that `load_split` reads."""
        import tensorflow as tf

        try:
            super().build(source)
        except (tf.errors.OpError, RuntimeError) as error:  # TFDS may wrap TensorFlow's, such as that of a full disk
            if not isinstance(error.__cause__ or error, tf.errors.OpError):
                raise
            raise OSError(str(error)) from error
        for split in ARCHIVES:
            self._annotation(split)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        folder = Path(dl_manager.manual_dir)
        with _damage_told(folder / ARCHIVES["validation"]):
            generators = {str(generator.name): generator for generator in super()._split_generators(dl_manager)}
        return {split: self._checked_examples(split, folder / archive, generators[split].gen_kwargs)
                for split, archive in ARCHIVES.items()}

    def _checked_examples(self, split: str, archive: Path, arguments: dict[str, Any]) -> Iterator:
        count = 0
        with _damage_told(archive):
            for name, example in self._generate_examples(**arguments):
                # TFDS labels validation images by their rank among all names: one that does not belong moves the rest.
                if not _NAMES[split].fullmatch(name):
                    raise UserError(f"{archive} has {name}, which is no image of the original; download or copy it "
                                    "again")
                yield name, example | {"image": example["image"].read()}
                count += 1
        if count != self.EXPECTED[split]:
            raise UserError(f"{archive} has {count:,} images instead of {self.EXPECTED[split]:,}; download or copy it "
                            "again")

    def load_split(self, split: str) -> Split:
        """A prepared split in the order on disk, the images left there. Needs no TensorFlow."""
        if self.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise UserError(f"{self.data_path} is in the format {self.info.file_format.value}, which is not read by "
                            "index; remove it, or prepare imagenet2012 in another --data_dir")
        annotation = self._annotation(split)
        return Split(
            dataset=self.name,
            images=StoredImages(open_split(self, split), annotation["digests"]),
            identities=annotation["labels"].astype(np.int64) + 1,
            cameras=np.ones(len(annotation["labels"]), np.int64),
            names=annotation["names"].astype(str),
        )

    def _annotation(self, split: str) -> dict[str, np.ndarray]:
        """labels int16 [N], names bytes [N] and digests, the images' SHA-256, uint8 [N, 32], in the order on disk.

        TFDS keeps them within the examples, so that all data must be read for them. That is done once, and the outcome
        kept in the data's folder, which goes when the data are built anew.
        """
        path = self.data_path / f"annotation-{split}.npz"
        info = self.info.splits[split]
        version = json.dumps([str(self.version), info.num_bytes, info.shard_lengths])
        with contextlib.suppress(Exception), np.load(path) as kept:  # which damaged bytes may lead to anything
            if kept["version"] == version:
                return {name: kept[name] for name in ("labels", "names", "digests")}
        try:  # before the minutes that reading takes; in a folder of its own, as other processes may do the same
            folder = tempfile.TemporaryDirectory(dir=self.data_path, prefix="annotation-")
        except OSError as error:
            raise UserError(f"cannot write {path}, which is read from all data once ({error}); make {self.data_path} "
                            "writable for the first run") from error
        with folder:
            annotation = self._read_annotation(split)
            part = Path(folder.name) / path.name
            np.savez(part, version=version, **annotation)
            part.replace(path)
        return annotation

    def _read_annotation(self, split: str) -> dict[str, np.ndarray]:
        source = open_split(self, split)
        labels, names = np.empty(len(source), np.int16), []
        digests = np.empty((len(source), hashlib.sha256().digest_size), np.uint8)
        for row, example in enumerate(tqdm(read_examples(source), f"reading the labels of {split}", len(source),
                                           unit=" images", leave=False, disable=None)):
            labels[row] = example["label"]
            names.append(example["file_name"])
            digests[row] = np.frombuffer(hashlib.sha256(example["image"]).digest(), np.uint8)
        return {"labels": labels, "names": np.array(names), "digests": digests}


@contextlib.contextmanager
def _damage_told(archive: Path) -> Iterator[None]:
    import tensorflow as tf

    try:
        yield
    # KeyError: no label for a name. OutOfRangeError: the end of the file, where TFDS reads it by TensorFlow.
    except (tarfile.TarError, KeyError, tf.errors.OutOfRangeError) as error:
        raise UserError(f"{archive} is damaged or not the original ({error}); download or copy it again") from error
