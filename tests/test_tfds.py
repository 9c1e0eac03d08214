"""TFDS's own ways with the builders: its test case, on miniatures, its command `tfds build`, and its two formats."""

import tempfile
from pathlib import Path
from unittest import mock

import pytest
import tensorflow_datasets as tfds
from market1501_miniature import write_market1501
from miniatures import write_cuhk03, write_grid, write_msmt17, write_viper
from processes import ROOT, run_program
from tiny_imagenet_miniature import write_tiny_imagenet

from jlml_jax import datasets
from jlml_jax.datasets import cuhk03, synthetic_pedestrians
from jlml_jax.datasets.cuhk03 import Cuhk03
from jlml_jax.datasets.grid import Grid
from jlml_jax.datasets.market1501 import Market1501
from jlml_jax.datasets.msmt17 import Msmt17
from jlml_jax.datasets.tiny_imagenet import TinyImagenet
from jlml_jax.datasets.viper import Viper


class OnMiniature:
    """What the test cases have in common: a miniature in EXAMPLE_DIR, and TFRecord, as they read by as_dataset."""

    @classmethod
    def setUpClass(cls):
        cls.EXAMPLE_DIR = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.draw(Path(cls.EXAMPLE_DIR))
        super().setUpClass()

    def _make_builder(self, config=None):
        return self.DATASET_CLASS(data_dir=self.tmp_dir, config=config, version=self.VERSION, file_format="tfrecord")


class Market1501Test(OnMiniature, tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = Market1501
    SPLITS = {"train": 24, "query": 12, "gallery": 29, "multi_query": 48}

    @classmethod
    def draw(cls, folder):
        write_market1501(folder)


class ViperTest(OnMiniature, tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = Viper
    SPLITS = {"cam_a": 5, "cam_b": 5}

    @classmethod
    def draw(cls, folder):
        write_viper(folder)


class GridTest(OnMiniature, tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = Grid
    SPLITS = {"probe": 6, "gallery": 9}

    @classmethod
    def draw(cls, folder):
        cls.enterClassContext(mock.patch.object(Grid, "EXPECTED", write_grid(folder)))


class Cuhk03DetectedTest(OnMiniature, tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = Cuhk03
    BUILDER_CONFIG_NAMES_TO_TEST = ["detected"]
    SPLITS = {"crops": 280}

    @classmethod
    def draw(cls, folder):
        write_cuhk03(folder / cuhk03.ROOT)


class Cuhk03LabeledTest(Cuhk03DetectedTest):
    BUILDER_CONFIG_NAMES_TO_TEST = ["labeled"]
    SPLITS = {"crops": 275}


class Msmt17Test(OnMiniature, tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = Msmt17
    SPLITS = {"train": 24, "query": 15, "gallery": 15}

    @classmethod
    def draw(cls, folder):
        write_msmt17(folder)


class TinyImagenetTest(OnMiniature, tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = TinyImagenet
    SPLITS = {"train": 12, "validation": 6}

    @classmethod
    def draw(cls, folder):
        write_tiny_imagenet(folder)


class SyntheticPedestriansTest(OnMiniature, tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = synthetic_pedestrians.SyntheticPedestrians
    SPLITS = {"train": 24, "query": 4, "gallery": 12}

    @classmethod
    def draw(cls, folder):
        for name, identities in (("TRAIN_IDENTITIES", range(1, 3)), ("TEST_IDENTITIES", range(3, 5))):
            cls.enterClassContext(mock.patch.object(synthetic_pedestrians, name, identities))


def test_both_formats_have_the_same_examples(tmp_path):
    write_market1501(tmp_path / "source", images_per_camera=1)
    splits = ("train", "query", "gallery", "multi_query")
    fingerprints = {}
    for file_format in (None, "array_record", "tfrecord"):
        data_dir = tmp_path / str(file_format)
        Market1501(data_dir=data_dir, file_format=file_format).build(tmp_path / "source")
        fingerprints[file_format] = {
            name: split.fingerprint() for name, split in datasets.load("market1501", splits, data_dir).items()}
    assert fingerprints[None] == fingerprints["array_record"] == fingerprints["tfrecord"]
    assert len(set(fingerprints["tfrecord"].values())) == len(splits)
    assert list((tmp_path / "None").rglob("*.array_record-*"))
    assert list((tmp_path / "tfrecord").rglob("*.tfrecord-*"))
    assert not list((tmp_path / "tfrecord").rglob("*.array_record-*"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder in which `tfds build` has built VIPeR, from the path of its module, and CUHK03, by its name."""
    folder = tmp_path_factory.mktemp("tfds_build")
    write_viper(folder / "viper")
    write_cuhk03(folder / "cuhk03")
    # The main module of `tfds` imports apache-beam and mlcroissant for its other commands; that of `build` does not.
    program = f"""
from tensorflow_datasets.scripts.cli import build, cli_utils
parse = cli_utils.make_flags_parser(build.Args, "tfds build")
for arguments in (["jlml_jax/datasets/viper.py", "--manual_dir={folder / 'viper'}"],
                  ["cuhk03", "--imports=jlml_jax.datasets.cuhk03", "--manual_dir={folder / 'cuhk03'}"]):
    parse(["tfds build", *arguments, "--data_dir={folder}"]).execute()
"""
    result = run_program(program, cwd=ROOT)  # where the module's path is right
    assert result.returncode == 0, result.stderr
    return folder


def test_tfds_build(built):
    splits = datasets.load("viper", ("cam_a", "cam_b"), built)
    assert [len(split) for split in splits.values()] == [5, 5]
    for config, number in (("labeled", 275), ("detected", 280)):
        assert len(datasets.load(f"cuhk03/{config}", ("crops",), built)["crops"]) == number
        assert len(datasets.metadata(f"cuhk03/{config}", built)["testsets"]) == 20


def test_tfds_build_records_what_is_not_as_published(built):
    assert datasets.metadata("viper", built) == {
        "incomplete": "; ".join(f"{camera} has 5 {what} instead of 632" for camera in ("cam_a", "cam_b")
                                for what in ("images", "identities"))}
