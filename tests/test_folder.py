"""A user's own crops, from CSVs and from folders."""

import csv
import io
import os
import shutil
import struct
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageOps
from processes import WITHOUT_TENSORFLOW, run_program
from splits import drawing

from configs import default
from jlml_jax import datasets, evaluate, input_pipeline, prepare, protocols, result_rows
from jlml_jax.datasets import folder
from jlml_jax.datasets.folder import Folder
from jlml_jax.datasets.images import decode_image
from jlml_jax.errors import UserError
from jlml_jax.train import train_and_evaluate
from jlml_jax.user_images import list_images, load_one

HEADER = "image,identity,camera,split"


def crop(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 6, 3), np.uint8))


@pytest.fixture
def shop(tmp_path):
    """The folder of the user's files."""
    (tmp_path / "shop").mkdir()
    return tmp_path / "shop"


@pytest.fixture
def write(shop):
    """Writes a CSV of `lines`, whose first cells are images to write too; gives its path."""
    def run(*lines, header=HEADER, images=True):
        path = shop / "people.csv"
        path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        for row in csv.DictReader(path.open(encoding="utf-8")) if images else ():
            (shop / row["image"]).parent.mkdir(parents=True, exist_ok=True)
            crop().save(shop / row["image"])
        return path
    return run


@pytest.fixture
def prepared(tmp_path, capsys):
    """Prepares folder/shop from a source and gives its splits; the output is left in `.out`."""
    def run(source):
        prepare.prepare("folder/shop", source, tmp_path / "data", overwrite=True)
        run.out = capsys.readouterr().out
        return datasets.load("folder/shop", tuple(Folder("shop", data_dir=tmp_path / "data").info.splits),
                             tmp_path / "data")
    return run


@pytest.fixture
def refusal(refused, tmp_path):
    """The line with which preparing from a source is refused, when nothing may have been written."""
    def run(source):
        error = refused("folder/shop", f"--source={source}", f"--data_dir={tmp_path / 'data'}")
        assert not (tmp_path / "data" / "folder").exists()
        return error
    return run


def inspect(source):
    """Splits as {name: (identity, camera)}, metadata, notes."""
    originals = Folder.inspect(source)
    splits = {split: {crop.name: (crop.identity, crop.camera) for crop in crops}
              for split, crops in originals.splits.items()}
    return splits, originals.metadata, originals.notes


# --- the name

def test_sets_of_different_names_live_beside_each_other(write, tmp_path, capsys):
    for name, identity in (("shop", "Ann"), ("my-shop_2", "Bob")):
        source = write(f"a.png,{identity},door,train", f"b.png,{identity},till,train")
        prepare.prepare(f"folder/{name}", source, tmp_path / "data")
    assert capsys.readouterr().out.splitlines()[-1] == "folder/my-shop_2 is prepared: train 2"
    assert {path.name for path in (tmp_path / "data" / "folder").iterdir()} == {"shop", "my-shop_2"}
    assert (tmp_path / "data" / "folder" / "shop" / "1.0.0" / "dataset_info.json").is_file()
    for name, identity in (("shop", "Ann"), ("my-shop_2", "Bob")):
        builder = datasets.builder(f"folder/{name}", tmp_path / "data")
        assert builder.info.metadata == {"identities": [identity], "cameras": ["door", "till"]}
        assert datasets.load(f"folder/{name}", ("train",), tmp_path / "data")["train"].dataset == f"folder/{name}"


@pytest.mark.parametrize("name", ["folder", "folder/", "folder/my shop", "folder/a/b", "folder/..", "folder/a\n"])
def test_names_that_are_none(refused, name):
    assert "needs a name of letters, digits, - and _, such as folder/shop" in refused(name, "--source=.")


def test_the_name_in_messages(refused, capsys, tmp_path):
    assert "folder/NAME" in refused("folders/shop")
    error = refused("folder/shop", f"--data_dir={tmp_path}")
    assert "folder/shop needs --source=FOLDER. Give a CSV file with the columns image" in error
    assert "0002_c1s1_000451_03.jpg" in error
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    assert "folder/shop --source=people.csv" in capsys.readouterr().out
    with pytest.raises(prepare.UserError, match=r"folder/shop is not prepared .*prepare folder/shop --source="):
        datasets.load("folder/shop", ("train",), tmp_path)
    for name in ("mall", "station"):
        (tmp_path / "folder" / name / "1.0.0").mkdir(parents=True)
        (tmp_path / "folder" / name / "1.0.0" / "dataset_info.json").touch()
    with pytest.raises(prepare.UserError, match=r"not prepared .*\. There are folder/mall, folder/station: give one"):
        datasets.load("folder/shop", ("train",), tmp_path)


def test_a_builder_is_made_of_tfds_configurations_too(tmp_path):
    builder = Folder(config=tfds.core.BuilderConfig(name="shop"), data_dir=tmp_path)
    assert builder.data_path == datasets.builder("folder/shop", tmp_path).data_path


# --- CSVs

def test_identities_and_cameras_are_numbered_in_sorted_order(write, prepared, tmp_path):
    splits = prepared(write(
        "in/1.png,Zoe,till,train", "in/2.png,Ann,door,train", "./3.png,Ömer,door,query", "4.png,Ömer,till,gallery",
        "5.png,distractor,lift,gallery", "6.png,junk,till,gallery"))
    assert {split: len(images) for split, images in splits.items()} == {"train": 2, "query": 1, "gallery": 3}
    assert splits["train"].names.tolist() == ["in/1.png", "in/2.png"]
    assert splits["train"].identities.tolist() == [2, 1]
    assert splits["train"].cameras.tolist() == [3, 1]
    assert splits["query"].names.tolist() == ["3.png"]
    assert splits["gallery"].identities.tolist() == [3, 0, -1]
    assert splits["gallery"].cameras.tolist() == [3, 2, 3]
    metadata = datasets.builder("folder/shop", tmp_path / "data").info.metadata
    assert metadata == {"identities": ["Ann", "Zoe", "Ömer"], "cameras": ["door", "lift", "till"]}


def test_numbers_are_sorted_as_numbers_if_all_are(write):
    lines = "a.png,10,9,train", "b.png,9,10,train", "c.png,100,7,train"
    splits, metadata, _ = inspect(write(*lines))
    assert metadata == {"identities": ["9", "10", "100"], "cameras": ["7", "9", "10"]}
    assert splits == {"train": {"a.png": (2, 2), "b.png": (1, 3), "c.png": (3, 1)}}
    _, metadata, _ = inspect(write(*lines, "d.png,9b,x,train"))
    assert metadata == {"identities": ["10", "100", "9", "9b"], "cameras": ["10", "7", "9", "x"]}
    _, metadata, _ = inspect(write(*lines, "d.png,distractor,7,gallery"))
    assert metadata["identities"] == ["9", "10", "100"]


def test_what_spreadsheets_write(shop, prepared):
    for name in ("a,b.png", "c.png"):
        crop().save(shop / name)
    path = shop / "people.csv"
    text = ('camera, split ,note,image,identity\r\n1,train,"two\r\nlines","a,b.png", x y\r\n\r\n'
            '2, train,,c.png,Zoë\r\n,,,,\r\n')
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        train = prepared(path)["train"]
        assert (train.names.tolist(), train.identities.tolist()) == (["a,b.png", "c.png"], [2, 1])
        assert "columns that are not read: note" in prepared.out.splitlines()


def test_found_counts_are_printed_alone(write, prepared):
    prepared(write("a.png,1,1,query", "b.png,1,2,gallery", "c.png,distractor,2,gallery", "d.png,junk,2,gallery"))
    rows = [line.split() for line in prepared.out.splitlines()]
    assert rows[0] == ["split", "count", "found"]
    assert ["query", "images", "1"] in rows
    assert ["gallery", "identities", "1"] in rows
    assert ["gallery", "distractors", "1"] in rows
    assert ["gallery", "junk", "1"] in rows
    assert not any(row[0] == "train" or row[:2] == ["query", "junk"] for row in rows)


def test_splits_without_images_are_left_out(write, prepared, tmp_path):
    data_dir = tmp_path / "data"
    assert list(prepared(write("a.png,1,1,train", "b.png,1,2,train"))) == ["train"]
    assert [*datasets.load("folder/shop", ("train", "query", "gallery"), data_dir)] == ["train"]
    # Built over: nothing of the former is left.
    splits = prepared(write("a.png,1,1,query", "b.png,2,2,gallery", "c.png,1,2,gallery"))
    assert [*splits] == [*Folder("shop", data_dir=data_dir).info.splits] == ["query", "gallery"]
    assert splits["gallery"].names.tolist() == ["b.png", "c.png"]
    assert not datasets.load("folder/shop", ("train",), data_dir)


def test_files_that_are_no_csv(shop, refusal):
    path = shop / "people.csv"
    assert f"there is no {path}; give a CSV file or a folder of images" in refusal(path)
    for content, told in (
        ("", "is empty; its first line must name the columns image, identity"),
        (" \n,,\n", "is empty"),
        (HEADER + "\n", "lists no images"),
        ("a.png,1,1\n", "has no column image and no column identity: its first line is 'a.png,1,1', but must name"),
        ('"image,identity,camera"\n"a.png,1,1"\n', """its first line is '"image,identity,camera"', but must name """),
        ("image;identity;camera\na;1;1\n", "its first line is 'image;identity;camera', but must name image, identity, "
                                           "each a cell, with commas between them"),
        ("image,id,camera\na,1,1\n", "has no column identity: its"),
        ("image,identity,camera,image\na,1,1,b\n", "has two columns image"),
        ('image,identity,camera\n"a.png,1,1\nb.png,1,1\n', "people.csv, line 3: unexpected end of data; mend the quot"),
    ):
        path.write_text(content)
        assert told in refusal(path)
    for content in (b"image,identity,camera\n\xe9.png,1,1\n", "image,identity,camera\n".encode("utf-16"),
                    "image,identity,camera\n".encode("utf-16-le"), b"PK\x03\x04\x14\0\xff\xfe"):
        path.write_bytes(content)
        assert "is not text in UTF-8 (" in refusal(path)


def test_lines_that_lack_cells_or_have_too_many(write, refusal):
    error = refusal(write("a.png,1,1,train", "b.png,,1,train", ",1, ,train", "c.png,1,1,", "d.png,1,1,train,,,",
                          images=False))
    assert "people.csv: 1 lines have not 4 cells, as the first has: line 6 (7); quote" in error
    error = refusal(write("a.png,1,1,train", "b.png,,1,train", ",1, ,train", "c.png,1,1,", "d.png,,,", images=False))
    assert "people.csv: 4 lines lack a cell: line 3 (identity), line 4 (image, camera), line 5 (split), ...; " in error


def test_unknown_words(write, refusal):
    error = refusal(write("a.png,1,1,test", "b.png,1,1,Train", "c.png,1,1,train", images=False))
    assert "2 lines have an unknown split: line 2 (test), line 3 (Train); known are train, query, gallery" in error
    error = refusal(write("a.png,-1,1,gallery", "b.png,0,1,gallery", images=False))
    assert "1 lines have the identity -1: line 2; write junk for identity -1, and distractor where 0 is nobody" in error


def test_identity_0_may_be_a_person(write):
    splits, _, notes = inspect(write("a.png,0,1,train", "b.png,1,2,train"))
    assert splits == {"train": {"a.png": (1, 1), "b.png": (2, 2)}}
    assert notes == ("identity 0 is taken for a person; where it is nobody, write distractor",)


def test_of_a_set_of_distractors_there_is_nothing_to_tell(write):
    splits, _, notes = inspect(write("a.png,distractor,0", "b.png,distractor,0", header="image,identity,camera"))
    assert splits == {"gallery": {"a.png": (0, 1), "b.png": (0, 1)}} and notes == ()


def test_numbers_written_in_two_ways(write, refusal):
    error = refusal(write("a.png,02,1,train", "b.png,2,1,query", "c.png,3,2,query"))
    assert "1 identities are written in two ways: 02 and 2; write" in error
    error = refusal(write("a.png,1,01,train", "b.png,2,1,train", "c.png,2,10,train"))
    assert "1 cameras are written in two ways: 01 and 1;" in error


def test_numbers_as_pandas_writes_them(write, refusal):
    """Where cells of their column were missing."""
    error = refusal(write("a.png,12.0,1,train", "b.png,12,1,query", "c.png,3,2,query"))
    assert "1 identities are written in two ways: 12 and 12.0; write" in error
    assert "1 lines have the identity -1: line 2; write junk" in refusal(write("a.png,-1.0,1,gallery"))
    splits, _, notes = inspect(write("a.png,0.0,1,train", "b.png,10.0,2,train", "c.png,9.0,2,train"))
    assert splits == {"train": {"a.png": (1, 1), "b.png": (3, 2), "c.png": (2, 2)}}
    assert notes == ("identity 0.0 is taken for a person; where it is nobody, write distractor",)


@pytest.mark.parametrize("missing", ["nan", "None", "<NA>"])
def test_a_missing_identity_written_as_text_is_told(write, missing):
    _, _, notes = inspect(write(f"a.png,{missing},1,train", "b.png,ann,2,train"))
    assert notes == (f"identity {missing} is taken for a person; where it is nobody, write distractor",)


def test_a_name_written_in_two_ways(write, refusal):
    """As one character, and as a letter and its accent."""
    error = refusal(write("a.png,Ren\u00e9,1,train", "b.png,Rene\u0301,2,train", "c.png,Ann,1,train"))
    assert r"1 identities are written in two ways: 'Rene\u0301' and 'Ren\xe9'; write" in error


def test_paths_that_lead_out(write, refusal, shop):
    crop().save(shop.parent / "a.png")
    error = refusal(write("../a.png,1,1,train", "b.png,1,1,train", f"{shop / 'b.png'},1,1,train",
                          "in/../../a.png,2,1,train", images=False))
    assert "3 images do not lie within its folder: ../a.png (line 2) leaves the folder of the CSV" in error
    assert f"{shop / 'b.png'} (line 4) is an absolute path, and must start from the folder of the CSV, in/" in error


def test_a_path_that_comes_back_into_the_folder(write, refusal, shop):
    splits, _, _ = inspect(write("in/../a.png,1,1,train", "./b.png,1,2,train"))
    assert splits == {"train": {"a.png": (1, 1), "b.png": (1, 2)}}
    assert "a.png (lines 2, 3)" in refusal(write("in/../a.png,1,1,train", "a.png,1,2,train"))


def test_images_that_are_not_there(write, refusal, shop):
    (shop / "in").mkdir()
    crop().save(shop / "b.png")
    error = refusal(write("a.png,1,1,train", "b.png,1,1,train", "in,1,1,train", "in\\b.png,1,1,train",
                          "b.png/c,1,1,train", f"{'b' * 300}.png,1,1,train", images=False))
    assert f"5 images are not in {shop}: a.png, in, in\\b.png, ...; paths start from the CSV's folder" in error


def test_links(write, refusal, shop, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    crop().save(tmp_path / "elsewhere" / "b.png")
    (shop / "in").symlink_to(tmp_path / "elsewhere")
    (shop / "c.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    crop().save(shop / "a.png")
    path = write("a.png,1,1,train", "in/b.png,1,1,train", "c.png,1,1,train", images=False)
    left = "leaves the folder of the CSV by a symbolic link"
    assert (f"2 images do not lie within its folder: in/b.png (line 3) {left}, c.png (line 4) {left}; put the CSV into"
            ) in refusal(path)
    # Within the folder, and to the folder itself, links are as good as files.
    shutil.rmtree(tmp_path / "elsewhere")
    for link, target in (("in", "real"), ("c.png", "a.png")):
        (shop / link).unlink()
        (shop / link).symlink_to(shop / target)
    (shop / "real").mkdir()
    crop().save(shop / "real" / "b.png")
    (tmp_path / "link").symlink_to(shop)
    path = write("a.png,1,1,train", "in/b.png,1,1,train", images=False)
    splits, _, _ = inspect(tmp_path / "link" / path.name)
    assert list(splits["train"]) == ["a.png", "in/b.png"]
    # But one file is one image.
    path = write("a.png,1,1,train", "c.png,2,1,train", "in/b.png,1,1,train", "real/b.png,1,1,train", images=False)
    error = refusal(path)
    assert "2 images are listed more than once: a.png (lines 2, 3), real/b.png (lines 4, 5); remove" in error


def test_images_listed_twice(write, refusal):
    error = refusal(write("a.png,1,1,train", "b.png,1,1,train", "./a.png,1,1,train", "a.png,1,2,query"))
    assert "1 images are listed more than once: a.png (lines 2, 4, 5); remove" in error


def test_test_identities_among_the_training_ones(write, refusal):
    error = refusal(write("a.png,1,1,train", "b.png,1,2,gallery", "c.png,2,1,train", "d.png,2,1,query",
                          "e.png,3,1,query", "f.png,3,2,gallery"))
    assert "2 identities are both in train and in query or gallery: 1, 2; the result would mean nothing" in error


def test_nobody_trains_or_is_asked_for(write, refusal):
    error = refusal(write("a.png,junk,1,train", "b.png,distractor,2,query", "c.png,junk,2,gallery", "d.png,1,2,train"))
    assert "2 images of train or query are distractors or junk: a.png, b.png; they can be in the gallery" in error


def test_notes_on_given_splits(write):
    lines = "a.png,1,1,query", "b.png,1,1,gallery", "c.png,2,1,query"
    _, _, notes = inspect(write(*lines))
    assert notes == (
        "2 of 2 queries have no image of their identity from another camera in the gallery: a.png, c.png",
        "nobody is seen by two cameras, but a match must come from another camera than the query's: good for training "
        "alone")
    _, _, notes = inspect(write(*lines, "d.png,2,2,gallery"))
    assert notes == ("1 of 2 queries have no image of their identity from another camera in the gallery: a.png",)
    assert inspect(write(*lines[2:], "d.png,2,2,gallery"))[2] == ()
    _, _, notes = inspect(write("a.png,1,1,train", "b.png,1,2,train", "c.png,2,1,gallery", "d.png,2,2,gallery"))
    assert notes == ("there are no queries, so that the people of the gallery are not searched for: good for training "
                     "alone",)


# --- splits that are drawn

def drawn(write, counts, *more):
    """Draws splits of identities with {camera: number of images}; gives them with their notes."""
    lines = [f"{identity}_{camera}_{index}.png,{identity},{camera}" for identity, cameras in counts.items()
             for camera, number in cameras.items() for index in range(number)]
    return inspect(write(*lines, *more, header="image,identity,camera"))


def of_identity(images):
    """The cameras of the images of each identity."""
    cameras = defaultdict(list)
    for identity, camera in images.values():
        cameras[identity].append(camera)
    return cameras


def test_half_of_the_identities_train(write):
    for number in (2, 7, 10):
        splits, _, notes = drawn(write, {identity: {1: 2, 2: 2} for identity in range(1, number + 1)})
        train, test = set(of_identity(splits["train"])), set(of_identity(splits["gallery"]))
        assert len(train) == number - number // 2
        assert train | test == set(range(1, number + 1))
        assert not train & test
        assert notes == (f"splits are drawn: {len(train)} of {number} identities for training, "
                         f"{len(test)} for the test",)
    assert train != set(range(1, 6))  # not simply the first


def test_one_query_a_camera(write):
    splits, _, _ = drawn(write, dict.fromkeys(range(1, 13), {1: 3, 2: 2, 3: 1}))
    queries, gallery = of_identity(splits["query"]), of_identity(splits["gallery"])
    assert len(queries) == 6
    for identity, cameras in queries.items():
        assert sorted(cameras) == [1, 2, 3]
        assert sorted(gallery[identity]) == [1, 1, 2]
    chosen = {name.split("_")[2] for name in splits["query"] if name.split("_")[1] == "1"}
    assert len(chosen) > 1  # not always the first


@pytest.mark.parametrize("cameras", [
    {1: 1, 2: 1}, {1: 1, 2: 1, 3: 1}, {1: 1, 2: 5}, {1: 4, 2: 1, 3: 1}, {1: 2, 2: 2, 3: 1}, {1: 2, 2: 3}])
def test_every_query_has_a_match_from_another_camera(write, cameras):
    splits, _, notes = drawn(write, dict.fromkeys(range(1, 41), cameras))
    queries, gallery = of_identity(splits["query"]), of_identity(splits["gallery"])
    assert len(gallery) == 20
    lacking = sum(number > 1 for number in cameras.values()) < 2  # then one camera, whichever, does not ask
    for identity in gallery:
        assert len(queries[identity]) == len(cameras) - lacking
        assert all(set(gallery[identity]) - {camera} for camera in queries[identity])
        assert Counter(queries[identity] + gallery[identity]) == cameras
    if lacking:
        assert set.intersection(*map(set, queries.values())) == set()
    assert len(notes) == 1


def test_identities_of_one_camera_are_gallery_alone(write):
    splits, _, notes = drawn(write, {identity: {identity % 2 + 1: 2} if identity < 4 else {1: 2, 2: 2}
                                     for identity in range(8)})
    alone = {identity for identity, cameras in of_identity(splits["gallery"]).items() if len(set(cameras)) == 1}
    assert alone
    assert not alone & set(of_identity(splits["query"]))
    assert notes[-1].startswith(f"{len(alone)} of the 4 test identities are seen by one camera alone: they are in the")


@pytest.mark.parametrize("second", [1, 2])
def test_nobody_of_two_cameras_is_for_training(write, prepared, tmp_path, second):
    path = write("a.png,1,1", "b.png,1,1", f"c.png,2,{second}", "d.png,distractor,2", header="image,identity,camera")
    splits = prepared(path)
    assert [*splits] == ["train", "gallery"]
    assert splits["train"].names.tolist() == ["a.png", "b.png", "c.png"]
    assert splits["gallery"].names.tolist() == ["d.png"]
    assert "no test is drawn, as it would have no queries: 2 identities, all for training" in prepared.out
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *lines[::-1]]))
    assert prepared(path)["train"].fingerprint() == splits["train"].fingerprint()
    assert datasets.names("folder/shop", tmp_path / "data").camera(-1) == "another"
    assert datasets.names("folder/shop+viper", tmp_path / "data") == datasets.Names()
    assert "nobody is seen by two cameras, but a match must come from another camera" in prepared.out
    # What prepare calls good for training can be trained on.
    config = default.get_config()
    config.data.data_dir = str(tmp_path / "data")
    trial = protocols.load("folder/shop", config.data).trial(0)
    assert (len(trial.train), trial.query, trial.gallery) == (3, None, None)


def test_a_test_without_queries_is_not_drawn(write):
    """Of six people one is seen by two cameras, whom the draw may make train."""
    tested = 0
    for pair in range(6):
        splits, _, notes = drawn(write, {identity: {1: 1, 2: 1} if identity == pair else {1 + identity % 2: 2}
                                         for identity in range(6)})
        assert sum(map(len, splits.values())) == 12
        told = any("no test is drawn" in note for note in notes)
        assert ("query" in splits) == ("gallery" in splits) == (not told)
        tested += not told
    assert 0 < tested < 6


def test_nobody_is_drawn_into_the_gallery(write):
    nobody = [f"{word}{index}.png,{word},{index % 2}" for word in ("junk", "distractor") for index in range(5)]
    splits, _, _ = drawn(write, {identity: {1: 2, 2: 2} for identity in range(6)}, *nobody)
    assert Counter(identity for identity, _ in splits["gallery"].values() if identity < 1) == {0: 5, -1: 5}
    assert all(identity > 0 for split in ("train", "query") for identity, _ in splits[split].values())


UNKNOWN = ("cameras are not known, so that every image counts as a camera of its own: neighbouring frames of one video "
           "make results look better than they are")


@pytest.mark.parametrize("header, end", [("image,identity", ""), ("image,identity,camera", ",")])
def test_without_cameras_one_image_of_each_is_a_query(write, header, end):
    lines = [f"{identity}_{index}.png,{identity}{end}" for identity in "abcdefghijkl"
             for index in range(1 if identity in "abcdef" else 3)]
    splits, metadata, notes = inspect(write(*lines, "n.png,distractor" + end, header=header))
    assert metadata == {"identities": [*"abcdefghijkl"], "cameras": []}
    queries, gallery = of_identity(splits["query"]), of_identity(splits["gallery"])
    alone = 6 - len(queries)
    assert 0 < alone < 5 and {*queries} < {*gallery}
    assert notes == (UNKNOWN, "splits are drawn: 6 of 12 identities for training, 6 for the test",
                     f"{alone} of the 6 test identities have one image alone: they are in the gallery, and no queries")
    assert {(len(cameras), len(gallery[identity])) for identity, cameras in queries.items()} == {(1, 2)}
    assert len({name[2] for name in splits["query"]}) > 1  # not always the first
    cameras = [camera for images in splits.values() for _, camera in images.values()]
    assert sorted(cameras) == list(range(1, 6 + 18 + 1 + 1))  # one each


def test_without_cameras_and_without_a_match(write, refusal):
    splits, _, notes = inspect(write("a.png,1", "b.png,2", header="image,identity"))
    assert list(splits) == ["train"]
    assert notes[2] == "nobody has two images: good for training alone"
    _, _, notes = inspect(write("a.png,1,query", "b.png,2,query", "c.png,1,gallery", header="image,identity,split"))
    assert notes == (UNKNOWN, "1 of 2 queries have no image of their identity in the gallery: b.png")
    error = refusal(write("a.png,1,door", "b.png,2,", header="image,identity,camera"))
    assert "1 lines lack a cell: line 3 (camera);" in error


def test_a_set_without_cameras_says_so(write, prepared, tmp_path):
    prepared(write(*(f"{identity}_{index}.png,{identity}" for identity in "abcdefgh" for index in range(3)),
                   header="image,identity"))
    assert prepared.out.splitlines()[0] == UNKNOWN
    assert datasets.names("folder/shop", tmp_path / "data").camera(3) == ""
    config = default.get_config()
    config.data.data_dir = str(tmp_path / "data")
    trial = protocols.load("folder/shop", config.data).trial(0)
    assert (trial.protocol, trial.cameras_known) == ("single-query, cameras unknown", False)
    assert (len(trial.train), len(trial.query), len(trial.gallery)) == (12, 4, 8)
    row, = evaluate.evaluate_trials(
        [trial], lambda split: {"global": split.identities[:, None].astype(np.float32)}, config.evaluate)
    assert (row["protocol"], row["num_queries"], row["num_gallery"], row["rank1"]) == (trial.protocol, 4, 8, 1)
    assert "folder/shop, single-query, cameras unknown, 4 queries" in result_rows.format_rows([row])

    # People held out: each image is searched for among their others.
    config.data.held_out_identities = 2
    held_out = protocols.load("folder/shop", config.data).trial(0)
    config.data.held_out_identities = 9
    with pytest.raises(UserError, match="of the 4 training identities of folder/shop, 4 have several images, and one"):
        protocols.load("folder/shop", config.data).trial(0)
    assert held_out.protocol == "2 training identities held out, cameras unknown"
    assert (len(held_out.query), len(held_out.gallery), held_out.cameras_known) == (6, 6, False)
    prepare.prepare("folder/known", write("a.png,ann,door,train", "b.png,ann,till,train"), tmp_path / "data")
    for name, number in (("folder/known+folder/shop", 26), ("folder/known", 2)):
        config.data.held_out_identities = 0
        trial = protocols.load(name, config.data).trial(0)
        assert trial.cameras_known == (number == 2) and set(trial.camera_numbers()) == set(range(number))


def test_what_needs_cameras_is_refused_without(write, prepared, tiny_config, tmp_path):
    prepared(write(*(f"{identity}_{index}.png,{identity}" for identity in range(8) for index in range(3)),
                   header="image,identity"))
    tiny_config.data.name, tiny_config.data.data_dir = "folder/shop", str(tmp_path / "data")
    for field, told in (("train.norm_by_camera", "train.norm_by_camera=True needs cameras, and those of folder/shop"),
                        ("evaluate.norm_statistics", "evaluate.norm_statistics=camera needs cameras, and those of f")):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict({field: True if "train" in field else "camera"})
        with pytest.raises(UserError, match=told):
            train_and_evaluate(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_draw_is_of_the_annotation_alone(write):
    lines = [f"{identity}_{camera}_{index}.png,{identity},{camera}," for identity in "abcdefgh" for camera in (1, 2)
             for index in range(3)]
    splits, _, _ = inspect(write(*lines))  # a column split that is empty throughout
    np.random.default_rng(1).shuffle(lines)
    assert inspect(write(*lines))[0] == splits
    assert inspect(write(*[line[:-1] for line in lines], header="image,identity,camera"))[0] == splits


# --- boxes of full frames

BOXES = "image,identity,camera,x,y,width,height,split"


def turned_frame():
    """A photograph that a viewer turns, to 40 x 60 pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(drawing(40, 60)), "JPEG", exif=exif)


def test_training_sees_of_a_box_what_extract_embeds(shop, prepared):
    (shop / "in").mkdir()
    (shop / "in" / "turned.jpg").write_bytes(turned_frame())
    clear = Image.fromarray(drawing(50, 50, 1)).convert("RGBA")
    clear.putalpha(Image.fromarray(drawing(50, 50, 2)).convert("L"))
    clear.save(shop / "clear.png")
    Image.fromarray(drawing(30, 30, 3)).convert("CMYK").save(shop / "cmyk.jpg")
    path = shop / "people.csv"
    path.write_text(BOXES + """
in/turned.jpg,ann,1,10,5.4,20,45.6,train
cmyk.jpg,ann,2,0,0,30,30,train
in/turned.jpg,bob,1,0,0,9,60,train
clear.png,ann,2,7.5,8.5,16,33,train
./in/turned.jpg,bob,1,31,0,9,4,train
""")
    train = prepared(path)["train"]
    images = {f"{image.file} box {','.join(map(str, image.box))}": image for image in list_images(str(path)).images}
    assert train.names.tolist() == sorted(images) == [
        "clear.png box 8,8,16,33", "cmyk.jpg box 0,0,30,30", "in/turned.jpg box 0,0,9,60",
        "in/turned.jpg box 10,5,20,46", "in/turned.jpg box 31,0,9,4"]
    assert train.identities.tolist() == [1, 1, 2, 1, 2]
    for height, width in ((32, 16), (8, 8)):
        expected = [load_one(images[name], height, width) for name in train.names]
        np.testing.assert_array_equal(train.decode(height, width), expected)
    for name, image in zip(train.names, train.images, strict=True):
        assert image.startswith(b"\x89PNG")
        assert decode_image(image, name).shape[1::-1] == images[name].box[2:]


def test_the_boxes_of_a_frame_decode_it_once(shop, monkeypatch):
    decoded = []
    original = folder.open_rgb
    monkeypatch.setattr(folder, "open_rgb", lambda data, name, **options: decoded.append(name)
                        or original(data, name, **options))
    for name in "ab":
        Image.fromarray(drawing(40, 60)).save(shop / f"{name}.png")
    path = shop / "people.csv"
    # As they are drawn they would be by person.
    path.write_text("\n".join([BOXES, *(f"{name}.png,{x},1,{x},0,10,10,train" for x in range(5) for name in "ab")]))
    crops, = Folder.inspect(path).splits.values()
    assert [crop.origin for crop in crops] == [f"{name}.png (line {line})" for name in "ab"
                                               for line in range(2 + (name == "b"), 12, 2)]
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda crop: crop.read(), crops))) == 5
    assert decoded == ["a.png (line 2)", "b.png (line 3)"]


def test_a_list_that_was_changed_since_is_told(write, prepared, tmp_path, capsys):
    path = write("a.png,ann,1,train", "b.png,bob,1,train")
    prepared(path)
    for changed in (False, True):
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + changed * 10**11))
        prepare.prepare("folder/shop", path, tmp_path / "data")
        out = capsys.readouterr().out
        assert "is prepared already in" in out and (f"{path} was changed after that" in out) == changed


def test_boxes_are_encoded_in_threads_and_written_in_order(shop, tmp_path, monkeypatch):
    path = shop / "people.csv"
    Image.fromarray(drawing(40, 60)).save(shop / "f.png")
    path.write_text("\n".join([BOXES, *(f"f.png,ann,1,{x},0,10,10,train" for x in range(4))]))
    crops, = Folder.inspect(path).splits.values()
    expected = [crop.read() for crop in crops]
    together, encode_png = threading.Barrier(2, timeout=30), folder.encode_png

    def in_twos(pixels):
        together.wait()  # one thread alone would wait for another in vain
        return encode_png(pixels)

    monkeypatch.setattr(folder, "encode_png", in_twos)
    dataset = Folder("shop", data_dir=tmp_path / "data")
    dataset.build(path)
    written = dataset.load_stored_split("train")  # in the order on disk
    assert written.names.tolist() == [crop.name for crop in crops]
    assert written.read(np.arange(4)) == expected


def test_boxes_are_drawn_into_splits_as_crops_are(shop):
    Image.fromarray(drawing(40, 60)).save(shop / "f.png")
    lines = [f"f.png,{identity},{camera},{10 * identity + camera},{index},8,9" for identity in range(4)
             for camera in (1, 2) for index in range(2)]
    path = shop / "people.csv"
    path.write_text("\n".join([BOXES.removesuffix(",split"), *lines]))
    splits, _, _ = inspect(path)
    assert {split: len(images) for split, images in splits.items()} == {"train": 8, "query": 4, "gallery": 4}
    path.write_text("\n".join([BOXES.removesuffix(",split"), *lines[::-1]]))
    assert inspect(path)[0] == splits


def test_a_box_may_be_listed_once(shop, refusal):
    Image.fromarray(drawing(40, 60)).save(shop / "f.png")
    (shop / "g.png").symlink_to("f.png")
    path = shop / "people.csv"
    path.write_text(f"{BOXES}\nf.png,1,1,0,0,9,9,train\nf.png,1,1,0,0,9,8,train\ng.png,2,1,0.2,0,9,9,train\n")
    error = refusal(path)
    assert "1 images are listed more than once: f.png box 0,0,9,9 (lines 2, 4); remove the lines too many" in error


def test_boxes_that_cannot_be(shop, refusal, prepared):
    Image.fromarray(drawing(40, 60)).save(shop / "f.png")
    path = shop / "people.csv"
    for box, told in {
        "0,0,,9": "1 lines lack a cell: line 3 (width); fill",
        "0,0,x,9": "1 lines have a bad box: line 3: the box of f.png is not four numbers; mend",
        "0,0,9,-9": "line 3: the box of f.png is 9 x -9 pixels, which is nothing",
        "0,nan,9,9": "line 3: the box of f.png is not finite",
        "0,31,9,10": "1 of 2 images in people.csv are bad: f.png (line 3): the box 0, 31, 9, 10 is not within the "
                     "frame of 60 x 40 pixels (--clip_boxes cuts it to the frame); they must be mended or removed",
        "0,0,3,9": "f.png (line 3) has 3 x 9 pixels, which shows nobody",
    }.items():
        path.write_text(f"{BOXES}\nf.png,1,1,0,0,60,40,train\nf.png,1,1,{box},train\n")
        assert told in refusal(path).replace(f"{shop}/", "")
    path.write_text("image,identity,camera,y,split,height\nf.png,1,1,2,train,2\n")
    assert "people.csv lacks x, width of a box; its columns are x, y, width, height, or none" in refusal(path)
    path.write_text("image,identity,camera,width,split,height\nf.png,1,1,60,train,40\n")  # of the image itself
    assert prepared(path)["train"].names.tolist() == ["f.png"]
    assert "columns that are not read: width, height" in prepared.out.splitlines()


def test_a_crop_too_small_to_show_anybody_is_refused(write, shop, refusal):
    """As by extract, search and adapt."""
    path = write("a.png,1,1,train", "b.png,1,2,train")
    Image.new("RGB", (3, 5)).save(shop / "b.png")
    assert "1 of 2 images in people.csv are bad: b.png has 3 x 5 pixels" in refusal(path).replace(f"{shop}/", "")


def test_boxes_beyond_their_frame_are_cut_if_asked_for(shop, refusal, tmp_path, run_command):
    (shop / "f.jpg").write_bytes(turned_frame())
    path = shop / "people.csv"
    lines = ["f.jpg,1,1,-5,0,20,40,train", "f.jpg,2,1,50,30,20,40,train", "f.jpg,2,1,1,1,9,9,train"]
    path.write_text("\n".join([BOXES, *lines]))
    assert "2 of 3 images in" in (told := refusal(path))
    assert "f.jpg (line 2): the box -5, 0, 20, 40 is not within the frame of 40 x 60 pixels (--clip_boxes cuts" in told
    # The second is wholly outside.
    command = prepare, "folder/shop", f"--source={path}", f"--data_dir={tmp_path / 'data'}", "--clip_boxes"
    status, out, error = run_command(*command)
    assert status == 2 and "1 of 3 images in" in error
    assert "f.jpg (line 3): the box 50, 30, 20, 40 is not within the frame of 40 x 60 pixels; they" in error
    assert "1 boxes cross the edge of their frame and are cut to it" in out.splitlines()
    # Cut, two may be one; and one may be nothing much.
    path.write_text("\n".join([BOXES, lines[0], "f.jpg,2,1,0,0,15,40,train"]))
    status, _, error = run_command(*command)
    assert status == 2 and "listed more than once: f.jpg box 0,0,15,40 (lines 2, 3)" in error
    path.write_text("\n".join([BOXES, lines[0], "f.jpg,2,1,38,0,15,40,train"]))
    assert "f.jpg (line 3) has 2 x 40 pixels, which shows nobody" in run_command(*command)[2]

    path.write_text("\n".join([BOXES, *lines[::2]]))
    status, out, _ = run_command(*command)
    assert status == 0 and out.count("cut to it") == 1
    train = datasets.load("folder/shop", ("train",), tmp_path / "data")["train"]
    images = sorted(list_images(str(path), clip_boxes=True).images, key=lambda image: image.row)
    assert train.names.tolist() == ["f.jpg box 0,0,15,40", "f.jpg box 1,1,9,9"]
    np.testing.assert_array_equal(train.decode(32, 16), [load_one(image, 32, 16) for image in images])


def test_only_boxes_are_cut(refused, write, tmp_path, prepared):
    assert "viper has no boxes to clip: leave out --clip_boxes" in refused("viper", "--source=.", "--clip_boxes")
    path = write("a.png,1,1,train")
    prepare.prepare("folder/crops", path, tmp_path / "data", clip_boxes=True)
    stored = datasets.load("folder/crops", ("train",), tmp_path / "data")["train"]
    assert stored.images == prepared(path)["train"].images


# --- folders

def fill(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        crop().save(folder / name)


@pytest.mark.parametrize("train, gallery", [("train", "gallery"), ("bounding_box_train", "bounding_box_test")])
def test_folders_for_splits(shop, prepared, tmp_path, train, gallery):
    fill(shop / train, "0010_c3s1_000451_03.jpg", "0002_c1_x.PNG", "2_c2.jpeg", "0002_c01_y.webp")
    fill(shop / "query", "11_c1_anything.bmp")
    fill(shop / gallery, "0011_c3s2_1.jpg.jpg", "0000_c1_a.jpg", "0_c1_b.jpg", "-1_c2s1_c.jpg")
    (shop / gallery / "Thumbs.db").touch()
    (shop / gallery / "notes.txt").touch()
    (shop / "gt_bbox").mkdir()
    splits = prepared(shop)
    assert "2 files not of the data set are left out: " in prepared.out
    assert f"{gallery}/notes.txt; gt_bbox" in prepared.out
    assert dict(zip(splits["train"].names, splits["train"].identities, strict=True)) == {
        f"{train}/0002_c01_y.webp": 1, f"{train}/0002_c1_x.PNG": 1, f"{train}/0010_c3s1_000451_03.jpg": 2,
        f"{train}/2_c2.jpeg": 1}
    assert splits["train"].cameras.tolist() == [1, 1, 3, 2]
    assert splits["query"].identities.tolist() == [3]
    assert splits["gallery"].identities.tolist() == [-1, 0, 3, 0]
    assert datasets.builder("folder/shop", tmp_path / "data").info.metadata == {
        "identities": ["2", "10", "11"], "cameras": ["1", "2", "3"]}


def test_a_flat_folder_is_drawn(shop):
    fill(shop, *(f"{identity:04d}_c{camera}_{index}.png" for identity in range(1, 5) for camera in (1, 2)
                 for index in range(2)), "0000_c1.png")
    splits, metadata, _ = inspect(shop)
    assert {split: len(images) for split, images in splits.items()} == {"train": 8, "query": 4, "gallery": 5}
    assert splits["gallery"]["0000_c1.png"] == (0, 1)
    assert metadata == {"identities": ["1", "2", "3", "4"], "cameras": ["1", "2"]}


def test_a_folder_may_have_some_of_the_splits(shop):
    fill(shop / "train", "1_c1.png", "1_c2.png")
    (shop / "query").mkdir()
    assert list(inspect(shop)[0]) == ["train"]


def test_a_name_that_is_no_text(shop, refusal):
    crop().save(shop / "0001_c1.png")
    (shop / "0001_c1.png").rename(Path(os.fsdecode(os.fsencode(shop) + b"/0001_c1_\xff.png")))
    assert r"1 names are not valid UTF-8: '0001_c1_\udcff.png'; rename them" in refusal(shop)


def test_a_broken_link_is_not_passed_over(shop, refusal):
    crop().save(shop / "0001_c1.png")
    (shop / "0002_c1.png").symlink_to("gone.png")
    assert "1 of 2 images" in refusal(shop)


def test_a_pipe_is_no_image(shop):
    crop().save(shop / "0001_c1.png")
    os.mkfifo(shop / "0002_c1.png")
    originals = Folder.inspect(shop)
    assert [crop.name for crop in originals.splits["train"]] == ["0001_c1.png"]
    assert originals.unexpected == ["./0002_c1.png"]


def test_wrong_folders(shop, refusal):
    assert "has no images named like 0002_c1s1_000451_03.jpg, neither in itself nor in folders train" in refusal(shop)
    fill(shop, "1_c1.png", "1.png", "c1_x.png", "-2_c1.png", "1_cx.PNG")
    error = refusal(shop)
    assert "4 image names in" in error
    assert "are not like 0002_c1s1_000451_03.jpg: ./-2_c1.png, ./1.png, ./1_cx.PNG, ...; " in error
    assert "remove or rename them, or list the images in a CSV" in error
    fill(shop / "train", "1_c1.png")
    (shop / "bounding_box_train").mkdir()
    assert "has both train and bounding_box_train; remove or rename one" in refusal(shop)
    (shop / "bounding_box_train").rmdir()
    fill(shop / "gallery", "0001_c1.png")
    assert "1 identities are both in train and in query or gallery: 1;" in refusal(shop)
    fill(shop / "query", "-1_c1.png")
    assert "1 images of train or query are distractors or junk: query/-1_c1.png;" in refusal(shop)


# --- images

def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stored(shop, content, name="a.png"):
    """What a folder keeps of an image file."""
    (shop / name).write_bytes(content)
    (shop / "people.csv").write_text(f"image,identity,camera,split\n{name},1,1,train\n")
    crop, = Folder.inspect(shop / "people.csv").splits["train"]
    return crop.read()


@pytest.mark.parametrize("mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("L", "PNG"),
                                        ("RGB", "MPO")])
def test_jpeg_and_png_are_kept_as_they_are(shop, mode, kind):
    options = {"save_all": True, "append_images": [crop(1)]} if kind == "MPO" else {}
    content = encoded(crop().convert(mode), kind, **options)
    assert stored(shop, content, "misnamed.bmp") == content


@pytest.mark.parametrize("mode, kind", [("RGB", "BMP"), ("RGB", "WEBP"), ("P", "GIF"), ("CMYK", "JPEG"),
                                        ("RGB", "TIFF"), ("L", "PPM")])
def test_other_formats_become_png_of_the_same_pixels(shop, mode, kind):
    content = encoded(crop().convert(mode), kind)
    image = stored(shop, content, "misnamed.jpg")
    assert image.startswith(b"\x89PNG")
    np.testing.assert_array_equal(decode_image(image, "a"), decode_image(content, "a"))


def test_what_is_transparent_becomes_grey(shop):
    image = crop().convert("RGBA")
    image.putalpha(0)
    assert (decode_image(stored(shop, encoded(image, "PNG")), "a") == 128).all()


def test_a_damaged_file_that_pillow_stumbles_over_is_named():
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "DDS")
    damaged = bytearray(encoded.getvalue())
    struct.pack_into("<I", damaged, 80, 1 << 30)  # flags of its pixels, such as there are none
    with pytest.raises(NotImplementedError):
        Image.open(io.BytesIO(damaged))
    assert folder._upright(bytes(damaged), "a.dds") == damaged
    with pytest.raises(UserError, match=r"a\.dds"):
        decode_image(bytes(damaged), "a.dds")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_photographs_are_stored_upright(shop, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(crop(), kind, exif=exif, **options)
    image = stored(shop, content)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)).convert("RGB")) if kind != "TIFF" else (
        Image.open(io.BytesIO(content)).convert("RGB"))  # Pillow's TIFF reader has done it
    assert upright.size == ((12, 6) if 5 <= orientation <= 8 else (6, 12))
    np.testing.assert_array_equal(decode_image(image, "a"), np.asarray(upright))
    if kind in ("JPEG", "PNG"):
        assert (image == content) == (orientation in (0, 1, 9))
    assert image.startswith((b"\xff\xd8\xff", b"\x89PNG"))


@pytest.mark.parametrize("exif", [b"nonsense and more of it", b"II*\0", struct.pack("<2sHI", b"II", 42, 1 << 31)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_turn_nothing(shop, kind, exif):
    content = encoded(crop(), kind, exif=b"Exif\0\0" + exif)
    image = stored(shop, content)
    if kind == "WEBP":
        assert image.startswith(b"\x89PNG")
        np.testing.assert_array_equal(decode_image(image, "a"), decode_image(content, "a"))
    else:
        assert image == content


def test_both_loaders_read_what_is_stored(write, shop, prepared):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write("a,1,1,train", "b,1,1,train", "c,1,1,train", "d,1,1,train", images=False)
    for name, content in (("a", encoded(crop(), "JPEG", exif=exif)), ("b", encoded(crop(1).convert("CMYK"), "JPEG")),
                          ("c", encoded(crop(2), "WEBP")), ("d", encoded(crop(3).convert("L"), "PNG"))):
        (shop / name).write_bytes(content)
    train = prepared(path)["train"]
    batch, = input_pipeline.decode_batches(train, iter([np.arange(4)]), 12, 6)
    np.testing.assert_allclose(batch.astype(int), train.decode(12, 6), atol=1)


def test_images_that_do_not_decode(write, refusal, shop):
    path = write("a.png,1,1,train", "b.png,1,1,train", "c.png,1,1,train", "d.bmp,1,1,train")
    (shop / "a.png").write_bytes((shop / "a.png").read_bytes()[:100])
    (shop / "b.png").write_bytes(b"")
    (shop / "d.bmp").write_bytes((shop / "d.bmp").read_bytes()[:100])
    error = refusal(path)
    assert f"3 of 4 images in {path} are bad: a.png does not decode" in error
    assert "b.png is not an image" in error
    assert "d.bmp does not decode" in error
    Image.fromarray(np.full((8, 4), 4000, np.uint16)).save(shop / "a.png")
    assert "a.png has more than 8 bits a channel" in refusal(path)


def test_builds_and_reads_without_tensorflow(write, tmp_path):
    path = write("a.png,1,1,train", "b.bmp,1,2,train")
    result = run_program(WITHOUT_TENSORFLOW + f"""
from jlml_jax import datasets, prepare
status = prepare.main(["folder/shop", "--source={path}", "--data_dir={tmp_path}"])
assert "tensorflow" not in sys.modules
print(len(datasets.load("folder/shop", ("train",), "{tmp_path}")["train"]))
sys.exit(status)
""")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "2"
