"""The MSMT17 builder, on a miniature of the original layout."""

import os
import shutil

import numpy as np
import pytest
from miniatures import write_msmt17

from jlml_jax import datasets, prepare
from jlml_jax.datasets.msmt17 import TEST_IDENTITIES, TRAIN_IDENTITIES, Msmt17
from jlml_jax.errors import UserError
from jlml_jax.train import train_and_evaluate

SPLITS = ("train", "query", "gallery")
IMAGE = "0003/0003_001_12_0303morning_0307_7.jpg"  # a query, person 3 of test


@pytest.fixture
def original(tmp_path, monkeypatch):
    folder = tmp_path / "original" / "MSMT17_V1"
    monkeypatch.setattr(Msmt17, "EXPECTED", write_msmt17(folder))
    return folder


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def arguments(original, data_dir):
    return "msmt17", f"--source={original}", f"--data_dir={data_dir}"


def change(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_published_counts():
    splits = Msmt17.EXPECTED
    assert splits["train"]["images"] == 30_248 + 2_373
    assert sum(split["images"] for split in splits.values()) == 126_441
    assert splits["train"]["identities"] + splits["gallery"]["identities"] == 4_101
    assert [len(TRAIN_IDENTITIES), len(TEST_IDENTITIES)] == [splits[name]["identities"] for name in ("train", "query")]
    assert [*TRAIN_IDENTITIES, *TEST_IDENTITIES] == list(range(1, 4_102))


@pytest.mark.parametrize("above", [False, True])
def test_splits_hold_the_listed_files_and_their_labels(capsys, original, data_dir, above):
    prepare.prepare("msmt17", original.parent if above else original, data_dir)
    out = capsys.readouterr().out
    assert ["train", "cameras", "6", "6"] in [line.split() for line in out.splitlines()]
    assert "left out" not in out and "masked" not in out
    splits = datasets.load("msmt17", SPLITS, data_dir)
    for name, lists, folder, first in (("train", ("train", "val"), "train", 1), ("query", ("query",), "test", 1_042),
                                       ("gallery", ("gallery",), "test", 1_042)):
        split = splits[name]
        lines = sorted(line.split() for one in lists
                       for line in (original / f"list_{one}.txt").read_text().splitlines())
        assert split.names.tolist() == [path.split("/")[1] for path, _ in lines]
        assert list(split.images) == [(original / folder / path).read_bytes() for path, _ in lines]
        assert split.identities.tolist() == [first + int(person) for _, person in lines]
        assert split.cameras.tolist() == [int(path.split("_")[2]) for path, _ in lines]
    assert np.unique(splits["train"].cameras).tolist() == [1, 7, 8, 9, 10, 12]
    assert datasets.metadata("msmt17", data_dir) == {"faces_masked": False}


@pytest.mark.parametrize("above", [False, True])
def test_masked_faces_have_other_folders(capsys, tmp_path, data_dir, monkeypatch, above):
    folder = tmp_path / "MSMT17_V2"
    monkeypatch.setattr(Msmt17, "EXPECTED", write_msmt17(folder, "mask_train_v2", "mask_test_v2"))
    prepare.prepare("msmt17", tmp_path if above else folder, data_dir)
    assert "MSMT17_V2: the faces are masked, and results say so" in capsys.readouterr().out
    assert [len(split) for split in datasets.load("msmt17", SPLITS, data_dir).values()] == [24, 15, 15]
    assert datasets.metadata("msmt17", data_dir) == {"faces_masked": True}


def test_one_version_is_prepared_not_both(refused, original, arguments):
    for folder in ("mask_train_v2", "mask_test_v2"):
        (original / folder).mkdir()
    assert f"{original} has both MSMT17_V1 and MSMT17_V2, whose images differ; give the folder of one" in refused(
        *arguments)
    (original / "mask_test_v2").rmdir()
    (original.parent / "MSMT17_V2").mkdir()
    assert "has both MSMT17_V1 and MSMT17_V2" in refused("msmt17", f"--source={original.parent}", arguments[2])
    assert prepare.main(arguments) == 0


def test_another_layout(refused, original, arguments, data_dir):
    assert "is not a folder; give the unpacked MSMT17_V1" in refused("msmt17", f"--source={original / 'no such'}",
                                                                     arguments[2])
    (original / "list_val.txt").unlink()
    assert (f"{original} lacks list_val.txt; give the unpacked MSMT17_V1, which has train/, test/, list_train.txt, "
            "list_val.txt, list_query.txt, list_gallery.txt\n") in refused(*arguments)
    (original / "train").rename(original / "mask_train_v2")
    (original / "test").rename(original / "bounding_box_test")
    error = refused(*arguments)
    assert "lacks mask_test_v2/, list_val.txt; give the unpacked MSMT17_V2" in error
    assert not data_dir.exists()


def test_a_missing_image(refused, original, arguments, data_dir):
    (original / "test" / IMAGE).unlink()
    (original / "test" / IMAGE).mkdir()  # an image is a file
    missing = f"1 images of the lists are not there and left out: test/{IMAGE}"
    assert f"does not hold the data set as published: {missing}; query has 14 images instead of 15" in refused(
        *arguments)
    assert not Msmt17(data_dir=data_dir).is_prepared()

    assert prepare.main([*arguments, "--incomplete=one was lost"]) == 0
    assert [len(split) for split in datasets.load("msmt17", SPLITS, data_dir).values()] == [24, 14, 15]
    assert datasets.metadata("msmt17", data_dir)["incomplete"].startswith(f"one was lost; {missing}; query has 14")


def test_people_who_are_lost_leave_the_identities_of_others_as_they_are(original, arguments, data_dir):
    for folder in ("train/0001", "test/0000"):
        (original / folder).rename(original / folder.replace("/", "_"))
    assert prepare.main([*arguments, "--incomplete=some were lost"]) == 0
    splits = datasets.load("msmt17", SPLITS, data_dir)
    assert [np.unique(split.identities).tolist() for split in splits.values()] == [
        [1, 3, 4], [1_043, 1_044, 1_045, 1_046], [1_043, 1_044, 1_045, 1_046]]


def test_a_shorter_list(refused, run_command, original, arguments):
    change(original / "list_query.txt", f"{IMAGE} 3\n", "\r\n")
    assert "as published: query has 14 images instead of 15; unpack" in refused(*arguments)
    (original / "train" / ".DS_Store").touch()
    os.mkfifo(original / "test" / "0000" / "pipe")
    status, out, _ = run_command(prepare, *arguments, "--incomplete=a list of ours")
    assert status == 0
    assert f"3 files not of the data set are left out: test/0000/pipe; test/{IMAGE}; train/.DS_Store" in out


@pytest.mark.parametrize("line", [
    IMAGE,  # no person
    f"{IMAGE} 4",  # another than the name says
    f"{IMAGE} -1",
    IMAGE.replace("_12_", "_16_") + " 3",  # a camera that there is not
    IMAGE.replace("_12_", "_00_") + " 3",
    IMAGE.replace("0003/", "0002/") + " 3",
    f"../{IMAGE} 3",
    IMAGE.replace("0003", "3060") + " 3060",  # of people 0 to 3059
    f"{IMAGE}.jpg 3",
    "0003_c1s1_000307_01.jpg 3",
    f"{IMAGE} \u0663",  # a digit, but not one of these
])
def test_lines_that_cannot_be_right(refused, original, arguments, data_dir, line):
    change(original / "list_query.txt", f"{IMAGE} 3", line)
    error = refused(*arguments, "--incomplete=some were lost")
    assert f"1 lines of {original / 'list_query.txt'} are not like '0000/0000_045_12_0303morning_0006_2.jpg 0'" in error
    assert "of people 0 to 3059: " in error and line in error
    assert not data_dir.exists()


def test_a_person_of_train_cannot_be_one_of_the_test(refused, original, arguments):
    (original / "list_val.txt").write_text("1041/1041_000_01_0303morning_0006_2.jpg 1041\n")
    assert "of people 0 to 1040: 1041/1041_000_01_" in refused(*arguments)


def test_an_image_is_listed_once(refused, original, arguments):
    with (original / "list_gallery.txt").open("a") as file:
        file.write(f"{IMAGE} 3\n")
    assert f"the lists in {original} have 1 images more than once: test/{IMAGE}; copy" in refused(*arguments)


def test_a_list_that_is_no_text(refused, original, arguments):
    (original / "list_train.txt").write_bytes(os.urandom(64) + b"\n<html>not found</html>\n" * 3)
    assert "lines of " in refused(*arguments)


def test_undecodable_image(refused, original, arguments, data_dir):
    path = original / "test" / IMAGE
    path.write_bytes(path.read_bytes()[:-100])
    assert f"1 of 54 images in {original} are bad: test/{IMAGE} " in refused(*arguments)
    assert not Msmt17(data_dir=data_dir).is_prepared()


def test_what_is_not_prepared_is_told_with_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match="Ask the authors for MSMT17_V1 .* python -m jlml_jax.prepare msmt17 --source="):
        datasets.load("msmt17", SPLITS, tmp_path)


def test_a_run_is_trained_and_evaluated(arguments, data_dir, market1501_dir, tiny_run, tiny_config, tmp_path):
    shutil.copytree(market1501_dir, data_dir)
    assert prepare.main(arguments) == 0
    tiny_config.data.data_dir, tiny_config.evaluate.datasets = str(data_dir), "market1501"
    tiny_config.data.name = "msmt17"
    rows = train_and_evaluate(tiny_config, tmp_path / "run")
    assert {(row["dataset"], row["protocol"], row["num_queries"], row["num_gallery"]) for row in rows
            if row["dataset"] == "msmt17"} == {("msmt17", "single-query", 15, 15)}
    assert "market1501" in {row["dataset"] for row in rows if row.get("trained_on") == "msmt17"}
    assert train_and_evaluate(tiny_config, tmp_path / "run", "evaluate") == rows

    shutil.copytree(tiny_run, tmp_path / "other")
    tiny_config.data.name, tiny_config.evaluate.datasets = "market1501", "msmt17"
    rows = train_and_evaluate(tiny_config, tmp_path / "other", "evaluate")
    assert "msmt17" in {row["dataset"] for row in rows if row.get("trained_on") == "market1501"}
