"""The CUHK03 builder, on a miniature of the original layout."""

import shutil

import h5py
import numpy as np
import pytest
import scipy.io
from miniatures import CUHK03_PEOPLE, write_cuhk03

from jlml_jax import datasets, prepare
from jlml_jax.datasets.cuhk03 import FILE, ROOT, Cuhk03

LIST = "cuhk03_new_protocol_config_detected.mat"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / ROOT
    return folder, write_cuhk03(folder)


@pytest.fixture
def miniature(written, monkeypatch):
    monkeypatch.setattr(Cuhk03, "EXPECTED", property(
        lambda builder: written[1].counts(builder.builder_config.name)))
    return written[1]


@pytest.fixture
def original(written, miniature, tmp_path):
    """A copy to change."""
    return shutil.copytree(written[0], tmp_path / ROOT)


@pytest.fixture
def arguments(original, tmp_path):
    return "cuhk03/detected", f"--source={original}", f"--data_dir={tmp_path / 'data'}"


@pytest.fixture
def change(original):
    def run(function):
        with h5py.File(original / FILE, "r+") as file:
            function(file)
    return run


def test_published_counts():
    counts = {name: datasets.builder(name).EXPECTED["crops"] for name in datasets.NAMES if name.startswith("cuhk03")}
    assert counts == {"cuhk03/labeled": {"images": 14_096, "identities": 1_467, "cameras": 10},
                      "cuhk03/detected": {"images": 14_097, "identities": 1_467, "cameras": 10}}


def test_both_configurations_hold_their_images_labels_and_lists(capsys, written, miniature, tmp_path):
    folder, _ = written
    for config, source in (("detected", folder), ("labeled", folder.parent)):
        prepare.prepare(f"cuhk03/{config}", source, tmp_path)
        out = capsys.readouterr().out
        assert "left out" not in out
        images = miniature.images[config]
        assert ["crops", "images", str(len(images)), str(len(images))] in [line.split() for line in out.splitlines()]
        split = datasets.load(f"cuhk03/{config}", ("crops",), tmp_path)["crops"]
        assert split.dataset == f"cuhk03/{config}"
        assert split.names.tolist() == sorted(images)
        assert split.identities.tolist() == [images[name].identity for name in sorted(images)]
        assert split.cameras.tolist() == [images[name].camera for name in sorted(images)]
        for index, name in enumerate(split.names):
            pixels = images[name].pixels
            assert split.images[index].startswith(b"\x89PNG")
            np.testing.assert_array_equal(split.select([index]).decode(*pixels.shape[:2])[0], pixels)
        assert datasets.metadata(f"cuhk03/{config}", tmp_path) == {
            "testsets": miniature.testsets, "new_protocol": miniature.new_protocol[config]}


def test_identities_and_cameras_of_known_names(written, miniature):
    crops = {crop.name: crop for crop in Cuhk03(config="detected").inspect(written[0]).splits["crops"]}
    assert len(crops) == 5 * 10 + 2 * (sum(CUHK03_PEOPLE) - 5)
    known = {"1_001_1_01.png": (1, 1), "1_001_1_05.png": (1, 1), "1_001_2_06.png": (1, 2), "1_090_1_01.png": (90, 1),
             "2_001_2_10.png": (91, 4), "5_002_1_03.png": (120, 9), "5_002_2_08.png": (120, 10)}
    assert {name: (crops[name].identity, crops[name].camera) for name in known} == known
    assert "5_002_1_01.png" not in crops  # an empty cell


def test_images_are_read_when_they_are_needed(change, original, arguments, refused):
    def spoil(file):
        reference = file[file["detected"][0, 3]][2, 0]
        file[reference].id.write_direct_chunk((0, 0, 0), b"not what gzip wrote")
    change(spoil)
    crops = Cuhk03(config="detected").inspect(original).splits["crops"]
    assert crops[0].read().startswith(b"\x89PNG")
    error = refused(*arguments)
    assert f"1 of {len(crops)} images" in error
    assert "detected{4}{1,3} of cuhk-03.mat is damaged" in error


def test_without_the_new_lists(capsys, original, tmp_path):
    (original / LIST).unlink()
    prepare.prepare("cuhk03/detected", original, tmp_path / "data")
    assert f"no {LIST} beside cuhk-03.mat: the 767/700 protocol is left out" in capsys.readouterr().out
    metadata = datasets.metadata("cuhk03/detected", tmp_path / "data")
    assert metadata["new_protocol"] is None
    assert len(metadata["testsets"]) == 20


def test_null_references_are_empty_cells_too(change, original, miniature):
    def clear(file):
        cells = file[file["labeled"][0, 1]]
        array = cells[:]
        array[9, 0] = h5py.Reference()
        cells[...] = array
    change(clear)
    crops = Cuhk03(config="labeled").inspect(original).splits["crops"]
    assert len(crops) == len(miniature.images["labeled"])


def test_a_person_without_images_keeps_the_number(change, original):
    def clear(file):
        cells = file[file["detected"][0, 0]]
        array = cells[:]
        array[:, 1] = file["#refs#/x0"].ref
        cells[...] = array
    change(clear)
    (original / LIST).unlink()
    identities = {crop.identity for crop in Cuhk03(config="detected").inspect(original).splits["crops"]}
    assert identities == set(range(1, 121)) - {2}


def test_no_labelled_boxes(change, refused, original, arguments):
    def empty(file):
        for reference in file["labeled"][0]:
            file[reference][...] = np.full(file[reference].shape, file["#refs#/x0"].ref, h5py.ref_dtype)
    change(empty)
    assert "has no labelled boxes" in refused("cuhk03/labeled", *arguments[1:])
    assert prepare.main(list(arguments)) == 0


def test_missing_and_truncated_files(refused, original, arguments):
    assert "unknown data set 'cuhk03'; known are cuhk03/detected, cuhk03/labeled" in refused("cuhk03", *arguments[1:])
    assert "needs --source=FOLDER" in refused("cuhk03/detected", arguments[2])
    path = original / FILE
    whole = path.read_bytes()
    for size in (0, 400, 3000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert f"{path} does not open as an HDF5 file" in refused(*arguments)
    path.unlink()
    assert "lacks cuhk-03.mat; give the unpacked cuhk03_release" in refused(*arguments)
    assert "is not a folder" in refused(arguments[0], f"--source={original / 'no such'}", arguments[2])


def test_missing_parts(change, refused, arguments):
    change(lambda file: file.move("testsets", "testset"))
    assert "cuhk-03.mat has no testsets;" in refused(*arguments)
    change(lambda file: file.move("detected", "detection"))
    assert "cuhk-03.mat has no detected and no testsets;" in refused(*arguments)


def test_another_layout(change, refused, arguments):
    def drop_a_pair(file):
        pairs = file["detected"][:, :4]
        del file["detected"]
        file["detected"] = pairs
    change(drop_a_pair)
    assert "not laid out as published" in refused(*arguments)


@pytest.mark.parametrize("value", [0, 91, 2.5, "twice"])
def test_wrong_test_sets(change, refused, arguments, value):
    def spoil(file):
        people = file[file["testsets"][0, 6]]
        people[:, 3] = people[:, 4] if value == "twice" else (1, value)
    change(spoil)
    assert "test set 7 of" in refused(*arguments)


def test_too_few_test_sets(change, refused, arguments):
    def drop(file):
        testsets = file["testsets"][:, :19]
        del file["testsets"]
        file["testsets"] = testsets
    change(drop)
    assert "has 19 test sets instead of 20" in refused(*arguments)


def test_missing_images(change, refused, original, miniature, arguments, tmp_path):
    def clear(file):
        cells = file[file["detected"][0, 0]]
        array = cells[:]
        array[8, 0] = array[2, 1] = file["#refs#/x0"].ref  # 1_001_2_09.png, 1_002_1_03.png
        cells[...] = array
    change(clear)
    differences = ("1 people are in one of view 1 and view 2 alone and left out: detected{1}{2,8} of cuhk-03.mat; "
                   f"{LIST} and cuhk-03.mat differ in 3 images: 1_001_2_09.png, 1_002_1_03.png, 1_002_2_08.png; "
                   "crops has 277 images instead of 280")
    assert f"does not hold the data set as published: {differences}; ...;" in refused(*arguments)

    assert prepare.main([*arguments, "--incomplete=some were lost"]) == 0
    split = datasets.load(arguments[0], ("crops",), tmp_path / "data")["crops"]
    lost = {"1_001_2_09.png", "1_002_1_03.png", "1_002_2_08.png"}
    assert split.names.tolist() == sorted(set(miniature.images["detected"]) - lost)
    assert datasets.metadata(arguments[0], tmp_path / "data") == {
        "testsets": miniature.testsets,
        "new_protocol": {part: [name for name in names if name not in lost]
                         for part, names in miniature.new_protocol["detected"].items()},
        "incomplete": f"some were lost; {differences}; crops has 119 identities instead of 120"}


def test_what_an_incomplete_copy_cannot_do_without(change, refused, arguments):
    change(lambda file: file.move("testsets", "testset"))
    assert "cuhk-03.mat has no testsets;" in refused(*arguments, "--incomplete=some were lost")


def test_wrong_lists(refused, original, arguments):
    path = original / LIST
    columns = {name: value for name, value in scipy.io.loadmat(path).items() if not name.startswith("__")}

    def refusal(**changes):
        scipy.io.savemat(path, columns | changes)
        return refused(*arguments)

    assert "does not part its 280 images" in refusal(query_idx=columns["query_idx"] - 1)  # as if 0-based
    assert "does not part its 280 images" in refusal(query_idx=columns["query_idx"][1:])
    assert "tests on training identities" in refusal(train_idx=columns["query_idx"], query_idx=columns["train_idx"])
    assert "have different people in 280 images (1_001_1_01.png, " in refusal(labels=columns["labels"] + 1)
    twice = columns["filelist"].copy()
    twice[1] = twice[0]
    assert "does not part its 280 images" in refusal(filelist=twice)
    assert "not laid out as published" in refusal(labels=columns["labels"][1:])
    del columns["gallery_idx"]
    assert "has no gallery_idx" in refusal()
    path.write_bytes(path.read_bytes()[:3000])
    assert str(path) in refused(*arguments)


def test_a_cell_that_is_no_image(change, refused, arguments):
    def replace(file):
        file["#refs#/noise"] = np.zeros((3, 4, 5))
        cells = file[file["detected"][0, 0]]
        array = cells[:]
        array[0, 0] = file["#refs#/noise"].ref
        cells[...] = array
    change(replace)
    assert "detected{1}{1,1} of cuhk-03.mat is not an image: float64 [5, 4, 3]" in refused(*arguments)
