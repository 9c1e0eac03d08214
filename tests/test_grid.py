"""The GRID builder, on a miniature of the original layout."""

import numpy as np
import pytest
import scipy.io
from miniatures import write_grid, write_grid_partitions

from jlml_jax import datasets, prepare
from jlml_jax.datasets.grid import FOLDERS, PARTITIONS, ROOT, Grid

ORDERS = [np.roll(np.arange(1, 7), shift) for shift in range(10)]


@pytest.fixture
def original(tmp_path, monkeypatch):
    folder = tmp_path / "original" / ROOT
    monkeypatch.setattr(Grid, "EXPECTED", write_grid(folder))
    return folder


@pytest.fixture
def arguments(original, tmp_path):
    return "grid", f"--source={original}", f"--data_dir={tmp_path / 'data'}"


def partitions(data_dir):
    return datasets.metadata("grid", data_dir)["partitions"]


def test_published_counts():
    gallery = Grid.EXPECTED["gallery"]
    assert gallery["images"] == gallery["identities"] + gallery["distractors"] == 250 + 775
    assert Grid.EXPECTED["probe"]["images"] == Grid.EXPECTED["probe"]["identities"] == 250


@pytest.mark.parametrize("above", [False, True])
def test_splits_hold_the_original_files_and_their_labels(capsys, original, tmp_path, above):
    prepare.prepare("grid", original.parent if above else original, tmp_path / "data")
    out = capsys.readouterr().out
    assert ["gallery", "distractors", "3", "3"] in [line.split() for line in out.splitlines()]
    assert "left out" not in out
    splits = datasets.load("grid", FOLDERS, tmp_path / "data")
    for folder, split in splits.items():
        files = sorted((original / folder).glob("*.jpeg"))
        assert split.names.tolist() == [path.name for path in files]
        assert list(split.images) == [path.read_bytes() for path in files]
    assert splits["probe"].identities.tolist() == [1, 2, 3, 4, 5, 6]
    assert splits["probe"].cameras.tolist() == [1, 2, 1, 2, 1, 2]
    assert splits["gallery"].identities.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert splits["gallery"].cameras.tolist() == [2, 2, 2, 5, 6, 5, 6, 5, 6]


def test_partitions_last(original, tmp_path):
    write_grid_partitions(original, ORDERS)
    prepare.prepare("grid", original, tmp_path)
    expected = [{"train": sorted(order[:3].tolist()), "test": sorted(order[3:].tolist())} for order in ORDERS]
    assert partitions(tmp_path) == expected

    write_grid_partitions(original, ORDERS[::-1])
    prepare.prepare("grid", original, tmp_path, overwrite=True)
    assert partitions(tmp_path) == expected[::-1]


def test_a_struct_array_of_columns_is_read_too(original, tmp_path):
    array = np.zeros((1, 10), [("train", object), ("test", object)])
    for number, order in enumerate(ORDERS):
        array[0, number] = order[:3, None].astype(np.uint16), order[3:, None].astype(np.uint16)
    scipy.io.savemat(original / PARTITIONS, {"trainIdxAll": array})
    prepare.prepare("grid", original, tmp_path)
    assert [partition["train"] for partition in partitions(tmp_path)] == [sorted(order[:3]) for order in ORDERS]


def test_missing_files(refused, original, arguments):
    assert "is not a folder" in refused("grid", f"--source={original / 'no such'}", arguments[2])
    (original / PARTITIONS).unlink()
    assert f"lacks {PARTITIONS}; give the unpacked underground_reid" in refused(*arguments)
    (original / "probe").rename(original / "query")
    assert f"lacks probe/, {PARTITIONS};" in refused(*arguments)


def test_another_archive(refused, original, arguments):
    for path in original.glob("gallery/0000_*"):  # as where the distractors are an archive of their own
        path.unlink()
    error = refused(*arguments)
    assert "gallery has 6 images instead of 9; gallery has 2 cameras instead of 3; gallery has 0 distractors" in error


def test_damaged_partitions(refused, original, arguments):
    path = original / PARTITIONS
    whole = path.read_bytes()
    for size in (0, 100, 200, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:size])
        assert str(path) in refused(*arguments)
    path.write_bytes(b"<html>not found</html>" * 50)
    assert "does not read as a MATLAB file" in refused(*arguments)


def test_partitions_that_crash_their_reader(refused, original, arguments):
    """SciPy's ends by a segmentation fault if a cell array is said to be one of doubles."""
    path = original / PARTITIONS
    scipy.io.savemat(path, {"trainIdxAll": np.array([{"train": [1.0, 2.0]}, {"train": [3.0]}], object)})
    damaged = bytearray(path.read_bytes())
    assert damaged[144] == 1  # mxCELL_CLASS
    damaged[144] = 6  # mxDOUBLE_CLASS
    path.write_bytes(damaged)
    assert "does not read as a MATLAB file" in refused(*arguments)


def test_wrong_partitions(refused, original, arguments):
    write_grid_partitions(original, ORDERS, "trainIdx")
    assert "has no trainIdxAll" in refused(*arguments)
    write_grid_partitions(original, ORDERS[:9])
    assert "has 9 partitions instead of 10" in refused(*arguments)
    for wrong in ([1, 2, 3, 4, 5], [1, 2, 3, 3, 4, 5], [0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 7]):
        write_grid_partitions(original, [*ORDERS[:9], np.array(wrong)])
        assert "partition 10 of" in refused(*arguments)
    write_grid_partitions(original, [*ORDERS[:9], np.array([1.5, 2, 3, 4, 5, 6])])
    assert "does not hold structs" in refused(*arguments)
    scipy.io.savemat(original / PARTITIONS, {"trainIdxAll": np.ones((10, 125))})
    assert "does not hold structs" in refused(*arguments)


def test_unparsable_names(refused, original, arguments):
    for name in ("1_1_25004_107_32_106_221.jpeg", "0001_9_25004_107_32_106_221.jpeg", "0001_1_25004_107_32_106.jpeg",
                 "portrait.JPG"):
        (original / "gallery" / name).touch()
    error = refused(*arguments)
    assert "4 image names in" in error
    assert "gallery/0001_1_25004_107_32_106.jpeg, gallery/0001_9_25004_107_32_106_221.jpeg, " in error


def test_wrong_counts(refused, original, arguments, tmp_path):
    next((original / "gallery").glob("0000_*")).unlink()
    next((original / "probe").glob("0004_*")).unlink()
    alone = ("1 people are in one of probe and gallery alone and left out: "
             "gallery/0004_6_904_9_107_32_160.jpeg; probe has 5 images instead of 6; ")
    assert f"does not hold the data set as published: {alone}" in refused(*arguments)

    assert prepare.main([*arguments, "--incomplete=some were lost"]) == 0
    splits = datasets.load("grid", FOLDERS, tmp_path / "data")
    assert [split.identities.tolist() for split in splits.values()] == [[1, 2, 3, 5, 6], [0, 0, 1, 2, 3, 5, 6]]
    metadata = datasets.metadata("grid", tmp_path / "data")
    assert metadata["incomplete"].startswith(f"some were lost; {alone}")
    assert all(sorted(part["train"] + part["test"]) == [1, 2, 3, 4, 5, 6] for part in metadata["partitions"])


def test_undecodable_image(refused, original, arguments, tmp_path):
    path = next((original / "probe").glob("0004_*"))
    path.write_bytes(path.read_bytes()[:-500])
    assert f"1 of 15 images in {original} are bad: probe/{path.name} " in refused(*arguments)
    assert not Grid(data_dir=tmp_path / "data").is_prepared()
