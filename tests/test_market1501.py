"""The Market-1501 builder, on a miniature of the original layout."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from market1501_miniature import write_market1501

from jlml_jax import datasets
from jlml_jax.datasets.market1501 import FOLDERS, ROOT, Market1501
from jlml_jax.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / ROOT
    return folder, write_market1501(folder)


@pytest.fixture(scope="module")
def built(original, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    Market1501(data_dir=data_dir).build(original[0])
    return data_dir


def test_published_counts():
    assert sum(split["images"] for split in Market1501.EXPECTED.values()) == 12_936 + 3_368 + 19_732 + 25_259
    gallery = Market1501.EXPECTED["gallery"]
    assert gallery["images"] - gallery["junk"] - gallery["distractors"] == 13_115  # boxes of the 750 people
    assert Market1501.EXPECTED["multi_query"]["identities"] == 1_501


def test_splits_hold_the_original_files_and_their_labels(original, built):
    folder, counts = original
    splits = datasets.load("market1501", tuple(FOLDERS), built)
    for name, split in splits.items():
        files = sorted(path for path in (folder / FOLDERS[name]).iterdir() if path.name != "Thumbs.db")
        assert len(split) == counts[name]["images"]
        assert split.names.tolist() == [path.name for path in files]
        assert list(split.images) == [path.read_bytes() for path in files]
        assert split.identities.dtype == split.cameras.dtype == np.int64
        assert split.identities.tolist() == [int(path.name.split("_")[0]) for path in files]
        assert split.cameras.tolist() == [int(path.name.split("_c")[1][0]) for path in files]
        assert split.decode(128, 64).shape == (len(split), 128, 64, 3)


def test_traps(original, built):
    _, counts = original
    gallery = datasets.load("market1501", ("gallery",), built)["gallery"]
    assert np.sum(gallery.identities == -1) == counts["gallery"]["junk"] == 3
    assert np.sum(gallery.identities == 0) == counts["gallery"]["distractors"] == 2
    twice = [name for name in gallery.names if name.endswith(".jpg.jpg")]
    assert len(twice) == 1 * 3 * 2 + 2  # one person from 3 cameras, one junk image, one distractor
    assert "Thumbs.db" not in gallery.names


def test_miniature_is_drawn_from_its_seed_and_as_large_as_asked(original, tmp_path):
    write_market1501(tmp_path / "same")
    counts = write_market1501(tmp_path / "other", num_train_identities=2, num_test_identities=3, images_per_camera=1,
                              cameras=4, seed=1)
    name = "bounding_box_train/0002_c1s1_000200_01.jpg"
    assert (tmp_path / "same" / name).read_bytes() == (original[0] / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (original[0] / name).read_bytes()
    assert counts["train"] == {"images": 8, "identities": 2, "cameras": 4}
    originals = Market1501.inspect(tmp_path / "other")
    assert {split: len(crops) for split, crops in originals.splits.items()} == {
        split: count["images"] for split, count in counts.items()}


def test_the_folder_above_is_taken_too(original):
    folder, counts = original
    assert len(Market1501.inspect(folder.parent).splits["train"]) == counts["train"]["images"]
    assert len(Market1501.inspect(folder).splits["train"]) == counts["train"]["images"]


def test_stray_files_are_reported_and_left_out(tmp_path):
    counts = write_market1501(tmp_path)
    for name in (".DS_Store", "._0001_c1s1_000100_00.jpg", "notes.txt"):
        (tmp_path / "query" / name).touch()
    originals = Market1501.inspect(tmp_path)
    assert len(originals.splits["query"]) == counts["query"]["images"]
    assert originals.unexpected == ["query/.DS_Store", "query/._0001_c1s1_000100_00.jpg", "query/notes.txt"]


@pytest.mark.parametrize("name", ["0002_c7s1_000451_03.jpg", "2_c1s1_000451_03.jpg", "-2_c1s1_000451_03.jpg",
                                  "0002_c1s1_000451_03 (1).jpg", "0002_c1s1_000451.jpg", "portrait.JPEG"])
def test_unparsable_names_are_refused(tmp_path, name):
    write_market1501(tmp_path)
    (tmp_path / "bounding_box_test" / name).touch()
    with pytest.raises(UserError, match=r"1 image names .*bounding_box_test/.*remove or rename") as error:
        Market1501.inspect(tmp_path)
    assert name in str(error.value)


def test_only_the_first_unparsable_names_are_listed(tmp_path):
    write_market1501(tmp_path)
    for number in range(5):
        (tmp_path / "query" / f"crop{number}.jpg").touch()
    with pytest.raises(UserError, match=r"5 image names .*: query/crop0.jpg, .*crop1.jpg, .*crop2.jpg, \.\.\.;"):
        Market1501.inspect(tmp_path)


def test_an_incomplete_folder_is_not_prepared(original, tmp_path):
    version = tmp_path / "market1501" / "1.0.0"
    version.mkdir(parents=True)  # TFDS would take this one for built already
    Market1501(data_dir=tmp_path).build(original[0])
    assert Market1501(data_dir=tmp_path).is_prepared()

    (version / "market1501-gallery.array_record-00000-of-00001").unlink()  # and this one for prepared
    assert tfds.core.DatasetBuilder.is_prepared(Market1501(data_dir=tmp_path))
    assert not Market1501(data_dir=tmp_path).is_prepared()
    with pytest.raises(UserError, match="is not prepared in"):
        datasets.load("market1501", ("query",), tmp_path)
    Market1501(data_dir=tmp_path).build(original[0])
    assert len(datasets.load("market1501", ("gallery",), tmp_path)["gallery"]) == original[1]["gallery"]["images"]
