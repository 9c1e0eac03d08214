"""Each protocol on miniatures: who is train, query and gallery, what is refused, and results against brute force."""

import csv
import dataclasses
import hashlib
import json
import math
import re
import shutil
import statistics
import zlib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io
from market1501_miniature import write_market1501
from miniatures import VIPER_PREFIXES, Cuhk03Miniature, write_cuhk03, write_grid, write_msmt17, write_viper
from PIL import Image
from reference_ranking import assert_equal, score, score_single_shot, squared_distances
from splits import split_of

from configs import default
from jlml_jax import evaluate, metrics, prepare, protocols, result_rows
from jlml_jax.datasets.cuhk03 import Cuhk03
from jlml_jax.datasets.grid import PARTITIONS, Grid
from jlml_jax.datasets.market1501 import Market1501
from jlml_jax.datasets.msmt17 import Msmt17
from jlml_jax.datasets.split import Split, StoredImages
from jlml_jax.datasets.viper import Viper
from jlml_jax.errors import UserError

# A user's own crops: image, identity, camera, split.
SHOPS = {
    "train_only": ["a.png,ann,1,train", "b.png,ann,2,train", "c.png,bob,1,train"],
    "test_only": ["a.png,ann,1,query", "b.png,bob,2,query", "c.png,ann,2,gallery", "d.png,bob,1,gallery",
                  "e.png,bob,2,gallery", "f.png,distractor,1,gallery", "g.png,junk,1,gallery"],
    "queries_only": ["a.png,ann,1,query", "b.png,ann,2,query"],
    "gallery_only": ["a.png,ann,1,gallery", "b.png,ann,2,gallery"],
    "one_camera": ["a.png,ann,7,query", "b.png,bob,7,query", "c.png,ann,7,gallery", "d.png,bob,7,gallery"],
    "strangers": ["a.png,distractor,1,gallery", "b.png,distractor,2,gallery", "c.png,junk,1,gallery",
                  "d.png,zoe,3,train"],
    "all_unmatched": ["a.png,ann,1,query", "b.png,bob,2,query", "c.png,ann,1,gallery", "d.png,zoe,2,gallery"],
    "trained_by_one_camera": ["a.png,ann,1,query", "b.png,ann,1,gallery", "c.png,bob,1,train", "d.png,bob,1,train"],
    "nobody_at_all": ["a.png,distractor,1,gallery", "b.png,junk,1,gallery"],
    "unmatched": ["a.png,ann,1,query", "b.png,bob,1,query", "c.png,ann,2,gallery", "d.png,bob,1,gallery"],
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Miniatures, prepared as if they were the data sets as published, and the files that they are from."""

    data_dir: Path
    market1501: Path
    msmt17: Path
    grid: Path
    cuhk03: Cuhk03Miniature


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir, sources = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("sources")
    expected = {Market1501: write_market1501(sources / "market1501"), Viper: write_viper(sources / "viper"),
                Grid: write_grid(sources / "grid"), Msmt17: write_msmt17(sources / "msmt17")}
    # A camera does not ask for person 1, another has no further image of person 3, and one has four of person 5.
    gone = ["query/0001_c3s1_000100_00.jpg", "gt_bbox/0003_c1s1_000300_00.jpg", "gt_bbox/0003_c1s1_000301_00.jpg"]
    for name in gone:
        (sources / "market1501" / name).unlink()
    for frame in (502, 503):
        Image.fromarray(np.full((4, 2, 3), frame % 256, np.uint8)).save(
            sources / "market1501" / "gt_bbox" / f"0005_c2s1_{frame:06d}_00.jpg")
    expected[Market1501]["query"]["images"] -= 1
    cuhk03 = write_cuhk03(sources / "cuhk03")
    with ExitStack() as patches:
        for builder, counts in expected.items():
            patches.enter_context(mock.patch.object(builder, "EXPECTED", counts))
        patches.enter_context(mock.patch.object(
            Cuhk03, "EXPECTED", property(lambda builder: cuhk03.counts(builder.builder_config.name))))
        for name in ("market1501", "msmt17", "viper", "grid", "cuhk03/detected", "cuhk03/labeled"):
            prepare.prepare(name, sources / name.partition("/")[0], data_dir)
    for name, rows in SHOPS.items():
        folder = sources / name
        folder.mkdir()
        (folder / "people.csv").write_text("\n".join(["image,identity,camera,split", *rows]) + "\n")
        for row in csv.reader(rows):
            Image.fromarray(np.full((8, 4, 3), ord(row[0][0]), np.uint8)).save(folder / row[0])
        prepare.prepare(f"folder/{name}", folder / "people.csv", data_dir)
    return Prepared(data_dir, sources / "market1501", sources / "msmt17", sources / "grid", cuhk03)


@pytest.fixture
def config(prepared):
    config = default.get_config()
    config.data.data_dir = str(prepared.data_dir)
    return config


def trials_of(name, config):
    protocol = protocols.load(name, config.data)
    return [protocol.trial(number) for number in range(protocol.num_trials)]


def names(split):
    unique = set(split.names.tolist())
    assert len(unique) == len(split)
    return unique


# --- extra distractors

@pytest.mark.parametrize("name", ["market1501", "cuhk03/labeled"])
def test_extra_distractors_join_the_gallery_and_stay_on_disk(config, name):
    trial = protocols.load(name, config.data).trial(0)
    larger, = protocols.add_distractors([trial], "folder/strangers", config.data)
    assert isinstance(larger.gallery.images, StoredImages)
    assert larger.protocol == f"{trial.protocol}, 4 extra distractors"
    size = len(trial.gallery)
    assert larger.gallery.identities[:size].tolist() == trial.gallery.identities.tolist()
    assert larger.gallery.identities[size:].tolist() == [0] * 4
    assert sorted(larger.gallery.names[size:]) == [f"{letter}.png" for letter in "abcd"]
    assert list(larger.gallery.images)[:size] == list(trial.gallery.images)
    order = np.array([size + 1, 2, size + 3, 2, 0])  # in any order, from both parts at once
    for index, image, pixels in zip(order, larger.gallery.read(order), larger.gallery.select(order).decode(4, 2),
                                    strict=True):
        assert image == larger.gallery.images[index]
        if index >= size:
            assert (pixels == ord(larger.gallery.names[index][0])).all()
    assert len(set(larger.gallery.keys())) == len(set(trial.gallery.images)) + 4
    assert larger.train is trial.train and larger.query is trial.query

    config.evaluate.multi_query = "mean"
    rows = evaluate.evaluate_trials([larger], evaluate.FeatureCache(features_of), config.evaluate)
    assert_rows(rows, [larger], config)
    assert {row["protocol"].rpartition(", ")[2] for row in rows} == {"4 extra distractors"}


def test_no_extra_distractors(config):
    trials = trials_of("market1501", config)
    assert protocols.add_distractors(trials, "", config.data) == trials
    train_only = trials_of("folder/train_only", config)
    assert protocols.add_distractors(train_only, "folder/strangers", config.data) == train_only


def test_the_people_searched_for_are_no_distractors(config):
    with pytest.raises(UserError, match="evaluate.extra_gallery='cuhk03/detected' has the very people"):
        protocols.add_distractors([protocols.load("cuhk03/labeled", config.data).trial(0)], "cuhk03/detected",
                                  config.data)
    with pytest.raises(UserError, match="folder/nobody is not prepared"):
        protocols.add_distractors(trials_of("market1501", config), "folder/nobody", config.data)


# --- who is train, query and gallery

def test_market1501(prepared, config):
    trial, = trials_of("market1501", config)
    files = {folder: {path.name for path in (prepared.market1501 / folder).glob("*.jpg")}
             for folder in ("bounding_box_train", "query", "bounding_box_test", "gt_bbox")}
    assert names(trial.train) == files["bounding_box_train"]
    assert names(trial.query) == files["query"]
    assert names(trial.gallery) == files["bounding_box_test"]  # junk and distractors too: metrics tells them apart
    asked = {name.split("s")[0] for name in files["query"]}  # 0001_c1
    assert names(trial.multi_query) == {name for name in files["gt_bbox"] if name.split("s")[0] in asked}
    assert len(trial.multi_query) == 11 * 2 - 2 + 2
    assert (trial.protocol, trial.single_gallery_shot, trial.incomplete) == ("single-query", False, "")
    assert trial.identities().tolist() == [2, 4, 6, 8]
    assert trial.people() == {"market1501": [2, 4, 6, 8]}
    assert trial.labels().tolist() == [int(name[:4]) // 2 - 1 for name in trial.train.names]


def test_msmt17(prepared, config):
    """The people of the test go by the numbers of those of train in the original, and are others."""
    trial, = trials_of("msmt17", config)
    listed = {name: set(re.findall(r"/(\S+)", (prepared.msmt17 / f"list_{name}.txt").read_text()))
              for name in ("train", "val", "query", "gallery")}
    assert names(trial.train) == listed["train"] | listed["val"]
    assert (names(trial.query), names(trial.gallery)) == (listed["query"], listed["gallery"])
    assert (trial.protocol, trial.single_gallery_shot, trial.incomplete) == ("single-query", False, "")
    assert trial.multi_query is None
    assert trial.people() == {"msmt17": [1, 2, 3, 4]}
    assert trial.tested_people() == {"msmt17": [1042, 1043, 1044, 1045, 1046]}
    assert trial.labels().tolist() == [int(name[:4]) for name in trial.train.names]
    protocols.refuse_trained_on(trial, protocols.label_map(trial, None))

    everybody, = trials_of("msmt17+viper", config)
    assert everybody.people()["msmt17"] == [*range(1, 5), *range(1042, 1047)]
    assert len(everybody.train) == 24 + 15 + 15 + 10 and len(everybody.identities()) == 9 + 5
    with pytest.raises(UserError, match=r"5 of the 5 test identities of msmt17, trial 0 \(such as 1042\), were"):
        protocols.refuse_trained_on(trial, protocols.label_map(everybody, None))
    config.data.joined_splits = "train"
    training, = trials_of("msmt17+market1501", config)
    assert training.people() == {"msmt17": [1, 2, 3, 4], "market1501": [2, 4, 6, 8]}
    protocols.refuse_trained_on(trial, protocols.label_map(training, None))


def test_msmt17_with_masked_faces_says_so(config, tmp_path):
    """Its results are not those of the other version."""
    write_msmt17(tmp_path / "source", "mask_train_v2", "mask_test_v2")
    config.data.data_dir = str(tmp_path / "data")
    prepare.prepare("msmt17", tmp_path / "source", config.data.data_dir, incomplete="a miniature")
    trial, = trials_of("msmt17", config)
    told = "MSMT17_V2, whose faces are masked; a miniature"
    assert trial.incomplete.startswith(told)
    assert all(row["incomplete"].startswith(told)
               for row in evaluate.evaluate_trials([trial], features_of, config.evaluate))
    write_viper(tmp_path / "viper")
    prepare.prepare("viper", tmp_path / "viper", config.data.data_dir, incomplete="a miniature")
    joined, = trials_of("msmt17+viper", config)
    assert joined.incomplete.startswith(f"msmt17: {told}")
    config.data.held_out_identities = 2
    held_out, = trials_of("msmt17", config)
    assert held_out.incomplete.startswith(told)


def test_viper(config):
    everyone = {prefix + 1 for prefix in VIPER_PREFIXES}
    trials = trials_of("viper", config)
    assert [trial.number for trial in trials] == list(range(10))
    for trial in trials:
        train, test = set(trial.train.identities.tolist()), set(trial.query.identities.tolist())
        assert (len(train), len(test)) == (2, 3) and train | test == everyone
        assert trial.protocol == "2/3 single-shot" and not trial.single_gallery_shot

        def files(people, *cameras):
            return sorted(f"{camera}/{person - 1:03d}" for person in people for camera in cameras)

        for split, wanted in ((trial.train, files(train, "cam_a", "cam_b")), (trial.query, files(test, "cam_a")),
                              (trial.gallery, files(test, "cam_b"))):
            assert sorted(name.rpartition("_")[0] for name in split.names) == wanted  # cam_a/001_45.bmp
    assert len({tuple(trial.identities()) for trial in trials}) > 1


def made_up_viper(number, order=1):
    """As many people as the real VIPeR has, of other numbers."""
    identities = np.sort(np.random.RandomState(99).permutation(900)[:number] + 1)[::order]

    def load(name, splits, data_dir):
        return {split: Split(name, [f"{split} {identity}".encode() for identity in identities], identities,
                             np.full(number, camera), np.array([f"{split}/{identity}" for identity in identities]))
                for camera, split in enumerate(splits, 1)}
    return mock.patch.multiple(protocols.datasets, load=load, metadata=lambda name, data_dir: {})


def draw_of(trials):
    return hashlib.sha256(json.dumps([[trial.identities().tolist(), sorted(trial.query.identities.tolist())]
                                      for trial in trials]).encode()).hexdigest()


def test_the_ten_halves_of_632_people_are_the_same_for_good():
    config = default.get_config()
    draws = []
    for seed, order in ((0, 1), (1, -1)):  # whatever the run's seed, NumPy's state, and the order of images
        config.seed = seed
        np.random.seed(seed)
        with made_up_viper(632, order):
            trials = trials_of("viper", config)
        draws.append(draw_of(trials))
    assert [(len(trial.train), len(trial.query), len(trial.gallery)) for trial in trials] == [(632, 316, 316)] * 10
    assert len({tuple(trial.identities()) for trial in trials}) == 10
    assert draws == ["8eca58a72a4dd23ff407689c5013f130399d385cbd3f6d8654633239f5e33a2e"] * 2
    with made_up_viper(5):
        assert trials_of("viper", config)[3].protocol == "2/3 single-shot"


def test_grid(prepared, config):
    # MATLAB's cell array, read apart from the builder.
    cells = scipy.io.loadmat(prepared.grid / PARTITIONS)["trainIdxAll"][0]
    files = {folder: {path.name for path in (prepared.grid / folder).glob("*.jpeg")} for folder in ("probe", "gallery")}
    trials = trials_of("grid", config)
    assert len(trials) == len(cells) == 10
    for trial, cell in zip(trials, cells, strict=True):
        train, test = ({f"{int(identity):04d}" for identity in cell[part][0, 0].ravel()} for part in ("train", "test"))
        assert names(trial.train) == {name for name in files["probe"] | files["gallery"] if name[:4] in train}
        assert names(trial.query) == {name for name in files["probe"] if name[:4] in test}
        assert names(trial.gallery) == {name for name in files["gallery"] if name[:4] in test | {"0000"}}
        assert Counter(trial.gallery.identities.tolist())[0] == 3
        assert trial.protocol == "3/3 single-shot" and not trial.single_gallery_shot


@pytest.mark.parametrize("boxes", ["labeled", "detected"])
@pytest.mark.parametrize("train_identities, pairs", [(1_367, "12345"), (1_260, "123")])
def test_cuhk03_single_shot(prepared, config, boxes, train_identities, pairs):
    config.data.cuhk03_train_identities = train_identities
    trials = trials_of(f"cuhk03/{boxes}", config)
    assert len(trials) == len(prepared.cuhk03.testsets) == 20
    images = prepared.cuhk03.images[boxes]
    for trial, testset in zip(trials, prepared.cuhk03.testsets, strict=True):
        tested = {name for name, image in images.items() if image.identity in testset}
        # 1_001_2_06.png: camera pair, person, view, column
        assert names(trial.query) == {name for name in tested if name.split("_")[2] == "1"}
        assert names(trial.gallery) == {name for name in tested if name.split("_")[2] == "2"}
        assert names(trial.train) == {name for name in images if name not in tested and name[0] in pairs}
        assert sorted(set(trial.query.identities.tolist())) == testset
        assert sorted(set(trial.gallery.identities.tolist())) == testset
        assert trial.protocol == f"{len(trial.identities())}/100 single-shot" and trial.single_gallery_shot
    people = {len(trial.identities()) for trial in trials}
    assert people == {20} if pairs == "12345" else min(people) < 20


@pytest.mark.parametrize("boxes", ["labeled", "detected"])
def test_cuhk03_767_700(prepared, config, boxes):
    config.data.cuhk03_protocol = "767/700"
    trial, = trials_of(f"cuhk03/{boxes}", config)
    for part, listed in prepared.cuhk03.new_protocol[boxes].items():
        assert names(getattr(trial, part)) == set(listed)
    assert trial.protocol == "767/700" and not trial.single_gallery_shot


def test_a_union_has_all_people(prepared, config):
    trial, = trials_of("cuhk03/labeled+market1501", config)
    market1501 = {path.name for folder in ("bounding_box_train", "query", "bounding_box_test")
                  for path in (prepared.market1501 / folder).glob("*.jpg") if not path.name.startswith(("-1", "0000"))}
    assert names(trial.train) == set(prepared.cuhk03.images["labeled"]) | market1501
    assert trial.query is trial.gallery is trial.multi_query is trial.validation is None
    assert (trial.dataset, trial.protocol) == ("cuhk03/labeled+market1501", "all identities")

    people = trial.people()
    assert people == {"cuhk03/labeled": list(range(1, 121)), "market1501": list(range(1, 9))}
    classes = [("cuhk03", person) for person in people["cuhk03/labeled"]] + [
        ("market1501", person) for person in people["market1501"]]
    labels = trial.labels()
    assert sorted(set(labels.tolist())) == list(range(128))
    for name, label in zip(trial.train.names, labels.tolist(), strict=True):
        image = prepared.cuhk03.images["labeled"].get(name)
        assert classes[label] == (("cuhk03", image.identity) if image else ("market1501", int(name[:4])))
    label_map = protocols.label_map(trial, None)
    assert label_map["dataset"] == trial.dataset and label_map["identities"] == people
    assert label_map["init_from"] is None and label_map == json.loads(json.dumps(label_map))


def test_a_union_of_sets_in_two_views(config):
    trial, = trials_of("viper+grid", config)
    assert trial.people() == {"viper": [prefix + 1 for prefix in VIPER_PREFIXES], "grid": [1, 2, 3, 4, 5, 6]}
    assert Counter(trial.labels().tolist()) == dict.fromkeys(range(11), 2)


def test_a_union_may_have_the_training_people_alone(prepared, config):
    """Each set can then be tested on, where a union of everybody cannot."""
    config.data.joined_splits, config.data.cuhk03_protocol = "train", "767/700"
    parts = ["folder/train_only", "cuhk03/labeled", "market1501"]
    trial, = trials_of("+".join(parts), config)
    alone = [trials_of(part, config)[0] for part in parts]
    assert names(trial.train) == set().union(*(names(one.train) for one in alone))
    assert len(trial.train) == sum(len(one.train) for one in alone)
    assert trial.people() == alone[0].people() | alone[1].people() | alone[2].people()
    assert sorted(set(trial.labels().tolist())) == list(range(sum(len(one.identities()) for one in alone)))
    assert trial.query is trial.gallery is trial.multi_query is None
    assert (trial.dataset, trial.protocol) == ("folder/train_only+cuhk03/labeled+market1501 (train)",
                                               "training identities")
    trained = json.loads(json.dumps(protocols.label_map(trial, None)))
    for one in alone:
        protocols.refuse_trained_on(one, trained)
    config.data.joined_splits = "all"
    everybody, = trials_of("+".join(parts), config)
    for one in alone[1:]:
        with pytest.raises(UserError, match="market1501: the result .*, such as one by data.joined_splits=train"):
            protocols.refuse_trained_on(one, protocols.label_map(everybody, None))


def test_identity_layers_are_those_of_the_same_people_in_the_same_order(config):
    one, same, other = (protocols.label_map(trials_of(name, config)[0], None)
                        for name in ("viper+grid", "viper+grid", "grid+viper"))
    protocols.refuse_other_people(json.loads(json.dumps(one)), same)
    with pytest.raises(UserError, match="or in another order: 11 of viper.grid there, 11 of grid.viper here"):
        protocols.refuse_other_people(one, other)


def test_own_data_may_be_for_training_or_for_the_test_alone(config):
    trial, = trials_of("folder/train_only", config)
    assert trial.query is trial.gallery is None
    assert trial.people() == {"folder/train_only": ["ann", "bob"]} and trial.labels().tolist() == [0, 0, 1]
    trial, = trials_of("folder/test_only", config)
    assert trial.train is None and trial.multi_query is None
    assert names(trial.query) == {"a.png", "b.png"}
    assert trial.gallery.identities.tolist() == [1, 2, 2, 0, -1]


# --- which trials

@pytest.mark.parametrize("chosen, numbers", [("3", [3]), ("0", [0]), ("0-4", [0, 1, 2, 3, 4]), ("7-9", [7, 8, 9]),
                                             ("2-2", [2]), ("all", list(range(10))), ("1,2", [1, 2]),
                                             ("7,0-2,1", [0, 1, 2, 7])])
def test_trials_are_chosen(chosen, numbers):
    assert protocols.Protocol(10, None).numbers(chosen) == numbers


@pytest.mark.parametrize("chosen", ["5-2", "x", "-1", "10", "20", "", "0-99", "0-10", "1,", ",1", "1,10", "1-", "-",
                                    "1-2-3", "3 ", "ALL", "1.0", "0-99999999999"])
def test_trials_that_there_are_not_are_refused(chosen):
    with pytest.raises(UserError, match=rf"data\.trials={re.escape(repr(chosen))} .*0 to 9; .* all"):
        protocols.Protocol(10, None).numbers(chosen)


# --- what is refused

def refusal(name, config, *parts):
    """The one line that refuses a data set's protocol, which has `parts` in it."""
    with pytest.raises(UserError) as error:
        trials_of(name, config)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_unknown_choices_of_cuhk03_are_refused(config):
    refusal("cuhk03", config, "data.name='cuhk03'", "cuhk03/labeled or cuhk03/detected")
    config.data.cuhk03_protocol = "767-700"
    refusal("cuhk03/labeled", config, "data.cuhk03_protocol='767-700'", "single-shot, 767/700")
    config.data.cuhk03_protocol, config.data.cuhk03_train_identities = "single-shot", 1_160
    refusal("cuhk03/labeled", config, "data.cuhk03_train_identities=1160", "1367", "1260")


def test_a_missing_list_of_cuhk03_is_named(config):
    config.data.cuhk03_protocol = "767/700"
    with mock.patch.object(protocols.datasets, "metadata", lambda *_: {"testsets": [], "new_protocol": None}):
        refusal("cuhk03/labeled", config, "cuhk03/labeled was prepared without the lists of the 767/700 protocol",
                "--overwrite")


@pytest.mark.parametrize("name, repeated", [("cuhk03/labeled+cuhk03/detected", "cuhk03"),
                                            ("viper+grid+viper", "viper")])
def test_a_union_with_the_same_people_twice_is_refused(config, name, repeated):
    refusal(name, config, f"data.name='{name}' has the people of {repeated} more than once")


@pytest.mark.parametrize(("name", "message"), [
    ("market1501+viper", "joined_splits=train: viper has 10 trials, each with other training people; leave it out of"),
    ("grid+market1501", "joined_splits=train: grid has 10 trials"),
    ("market1501+cuhk03/labeled", "20 trials, each with other training people; give data.cuhk03_protocol=767/700, or"),
    ("market1501+folder/test_only", "folder/test_only has no people to train on; leave it out"),
    ("+market1501", "unknown data set ''"),
])
def test_sets_without_training_people_of_their_own_are_not_joined_by_them(config, name, message):
    config.data.joined_splits = "train"
    refusal(name, config, message)
    config.data.joined_splits = "test"
    refusal(name, config, "data.joined_splits='test' is unknown; known are all, train")


@pytest.mark.parametrize("name", ["+", "+viper"])
def test_a_union_with_nothing_beside_a_plus_is_refused(config, name):
    refusal(name, config, "unknown data set ''")


@pytest.mark.parametrize("name", ["market1501", "msmt17", "viper", "grid", "cuhk03/detected", "viper+grid"])
def test_training_identities_may_take_the_place_of_the_test(config, name):
    published = protocols.load(name, config.data).trial(0)
    config.data.held_out_identities = 1
    trial = protocols.load(name, config.data).trial(0)
    held_out = np.setdiff1d(published.identities(), trial.identities())
    assert len(held_out) == 1 and trial.protocol == "1 training identities held out"
    assert names(trial.train) | names(trial.gallery) == names(published.train)
    assert len(trial.train) + len(trial.gallery) == len(published.train)
    assert set(trial.gallery.identities) == set(trial.query.identities) == set(held_out)
    from_cameras = list(zip(trial.query.identities, trial.query.cameras, strict=True))
    assert len(set(from_cameras)) == len(from_cameras)
    assert set(from_cameras) == set(zip(trial.gallery.identities, trial.gallery.cameras, strict=True))
    assert names(trial.query) <= names(trial.gallery)
    again = protocols.load(name, config.data).trial(0)
    assert names(again.query) == names(trial.query)
    protocols.refuse_trained_on(trial, protocols.label_map(trial, None))
    np.testing.assert_array_equal(trial.labels(), np.searchsorted(trial.identities(), trial.train.identities))


def test_held_out_identities_of_trials_differ_and_other_data_sets_keep_their_test(config):
    config.data.held_out_identities = 1
    held_out = [set(protocols.load("viper", config.data).trial(number).query.identities) for number in range(4)]
    assert len(set(map(frozenset, held_out))) > 1
    assert protocols.tests("market1501", config.data)[0].protocol == "single-query"


def test_who_is_held_out_is_random_and_depends_on_the_trial():
    train = split_of([b""] * 16, np.repeat(np.arange(1, 9), 2), np.tile([1, 2], 8))
    times = Counter()
    for number in range(200):
        held_out = protocols._hold_out(protocols.Trial("market1501", "", number, train=train), 2)
        times.update(np.unique(held_out.query.identities).tolist())
    assert sorted(times) == [*range(1, 9)] and min(times.values()) > 30 and max(times.values()) < 70  # 50 in the mean


@pytest.mark.parametrize("name, number", [("viper", -1), ("viper", 2), ("folder/train_only", 2),
                                          ("folder/test_only", 1)])
def test_identities_that_cannot_be_held_out_are_refused(config, name, number):
    """VIPeR's half has two people, of whom one must be left; of folder/train_only's one is seen by one camera alone."""
    config.data.held_out_identities = number
    with pytest.raises(UserError, match=r"data\.held_out_identities=0|data\.held_out_identities=-?\d+: of the \d+ "):
        protocols.load(name, config.data).trial(0)


@pytest.mark.parametrize("name", ["cuhk03/labeled+market1501", "folder/train_only"])
def test_a_set_without_queries_is_not_evaluated_on(config, name):
    with pytest.raises(UserError, match=rf"evaluate\.datasets='{re.escape(name)}' has no queries"):
        protocols.tests(name, config.data)
    assert len(protocols.tests("viper", config.data)) == 10


def test_a_set_that_is_not_prepared_is_named(config, tmp_path):
    config.data.data_dir = str(tmp_path)
    refusal("viper+grid", config, "viper is not prepared in", "jlml_jax.prepare viper")


@pytest.mark.parametrize("name, missing", [("queries_only", "no gallery"),
                                           ("gallery_only", "a gallery but no queries")])
def test_half_a_test_is_refused(config, name, missing):
    refusal(f"folder/{name}", config, f"folder/{name} has {missing}")


def test_queries_without_a_match_are_refused_with_the_cause(config):
    refusal("folder/one_camera", config, "2 of 2 queries of folder/one_camera, trial 0, ",
            "(all images are from one camera): a.png, b.png; mend the original files and prepare folder/one_camera")
    refusal("folder/all_unmatched", config, "2 of 2 queries", "from another camera in the gallery: a.png, b.png")


def test_queries_without_a_match_of_ones_own_are_not_counted(config):
    """As prepare has said of them; without any that has one there is no test."""
    trial, = trials_of("folder/unmatched", config)
    row, = (row for row in evaluate.evaluate_trials([trial], features_of, config.evaluate) if row["feature"] == "joint")
    assert len(trial.query) == 2 and row["num_queries"] == 1
    trial, = trials_of("folder/trained_by_one_camera", config)
    assert trial.query is trial.gallery is None and len(trial.train) == 2


def test_people_of_ones_own_are_told_apart_by_name(tmp_path):
    """Prepared anew with others, the same person has another number, and the same number is another person."""
    config = default.get_config()

    def trial(data_dir, *rows):
        folder = tmp_path / data_dir
        folder.mkdir(exist_ok=True)
        (folder / "people.csv").write_text("\n".join(["image,identity,camera,split", *rows]) + "\n")
        for row in rows:
            Image.fromarray(np.full((8, 4, 3), ord(row[0]), np.uint8)).save(folder / row.split(",")[0])
        prepare.prepare("folder/shop", folder / "people.csv", folder, overwrite=True)
        config.data.data_dir = str(folder)
        return trials_of("folder/shop", config)[0]

    bob = "a.png,bob,1,query", "b.png,bob,2,gallery"
    before = json.loads(json.dumps(protocols.label_map(trial("here", "a.png,ann,1,train", "b.png,eve,1,train"), None)))
    protocols.refuse_trained_on(trial("here", *bob, "c.png,eve,1,train"), before)  # bob is 1, as ann was
    with pytest.raises(UserError, match=r"1 of the 1 test identities of folder/shop, trial 0 \(such as eve\), were"):
        protocols.refuse_trained_on(trial("here", *(row.replace("bob", "eve") for row in bob)), before)
    protocols.refuse_other_people(before, protocols.label_map(trial("there", "c.png,ann,1,train", "d.png,eve,2,train"),
                                                              None))
    with pytest.raises(UserError, match="init_from was trained on other people"):
        protocols.refuse_other_people(before, protocols.label_map(
            trial("there", "c.png,ann,1,train", "d.png,zoe,2,train"), None))


def test_a_run_from_before_people_had_names_goes_by_their_numbers(config):
    trial, = trials_of("folder/test_only", config)
    before = {"dataset": "folder/test_only", "fingerprint": "", "identities": {"folder/test_only": [2, 9]},
              "init_from": None}
    with pytest.raises(UserError, match=r"1 of the 2 test identities of folder/test_only, trial 0 \(such as bob\)"):
        protocols.refuse_trained_on(trial, before | {"identities": {"viper": [1]}, "init_from": before})
    trained, = trials_of("folder/train_only", config)
    now = protocols.label_map(trained, None)
    before = json.loads(json.dumps(now)) | {"identities": {"folder/train_only": [1, 2]}}
    protocols.refuse_other_people(protocols.with_names(before, trained.names), now)


def test_a_union_with_nobody_in_it_is_refused(config):
    refusal("viper+folder/nobody_at_all", config, "folder/nobody_at_all has no people to train on; leave it out")


def test_an_incomplete_copy_may_lack_matches(config, tmp_path):
    """What it lacks is told by the number of queries that count, and in every row."""
    counts = write_market1501(tmp_path / "source")
    for path in (tmp_path / "source" / "bounding_box_test").glob("0001_c[23]*"):
        path.unlink()
    counts["gallery"]["images"] -= 4
    config.data.data_dir = str(tmp_path / "as_published")
    with mock.patch.object(Market1501, "EXPECTED", counts):
        prepare.prepare("market1501", tmp_path / "source", config.data.data_dir)
    refusal("market1501", config, "1 of 12 queries of market1501, trial 0, have no image", "0001_c1s1_000100_00.jpg")

    config.data.data_dir = str(tmp_path / "incomplete")
    prepare.prepare("market1501", tmp_path / "source", config.data.data_dir, incomplete="some are lost")
    trial, = trials_of("market1501", config)
    assert trial.incomplete.startswith("some are lost; ")
    rows = evaluate.evaluate_trials([trial], features_of, config.evaluate)
    assert_rows(rows, [trial], config)
    assert {(row["num_queries"], row["incomplete"]) for row in rows} == {(11, trial.incomplete)}

    for path in (tmp_path / "source" / "gt_bbox").iterdir():
        path.unlink()
    train = next((tmp_path / "source" / "bounding_box_train").glob("*.jpg"))
    shutil.copy(train, tmp_path / "source" / "gt_bbox")  # of nobody who is searched for
    config.data.data_dir = str(tmp_path / "no_further_images")
    prepare.prepare("market1501", tmp_path / "source", config.data.data_dir, incomplete="one of gt_bbox")
    trial, = trials_of("market1501", config)
    assert {row["protocol"] for row in evaluate.evaluate_trials([trial], features_of, config.evaluate)} == {
        "single-query"}

    for path in (tmp_path / "source" / "bounding_box_test").glob("*_c[23]*"):
        path.unlink()
    for path in (tmp_path / "source" / "query").glob("*_c[23]*"):
        path.unlink()
    config.data.data_dir = str(tmp_path / "one_camera")
    prepare.prepare("market1501", tmp_path / "source", config.data.data_dir, incomplete="one camera")
    refusal("market1501", config, "4 of 4 queries", "all images are from one camera")


def test_a_test_on_people_who_were_trained_on_is_refused(config):
    viper, market1501 = trials_of("viper", config), trials_of("market1501", config)[0]
    shop, = trials_of("folder/train_only", config)

    def refuse(trial, trained):
        with pytest.raises(UserError) as error:
            protocols.refuse_trained_on(trial, trained)
        return str(error.value)

    # another trial of the same run's protocol
    other = next(trial for trial in viper if set(trial.identities()) != set(viper[0].identities()))
    both = sorted(set(other.query.identities.tolist()) & set(viper[0].identities().tolist()))
    trained = protocols.label_map(viper[0], None)
    protocols.refuse_trained_on(viper[0], trained)
    assert f"{len(both)} of the 3 test identities of viper, trial {other.number} (such as {both[0]})" in refuse(
        other, trained)

    # the run that the weights come from, and the one that these come from
    union = protocols.label_map(trials_of("viper+grid", config)[0], None)
    between = protocols.label_map(market1501, union)
    last = protocols.label_map(shop, between)
    for trained in (union, between, last, json.loads(json.dumps(last))):
        message = refuse(viper[0], trained)
        assert "3 of the 3 test identities of viper, trial 0 " in message and "trained on with viper+grid:" in message
    protocols.refuse_trained_on(market1501, last)  # its people 2, 4, 6 and 8 were trained on; 1, 3, 5 and 7 were not

    # the same numbers of another set are other people; CUHK03's two annotations are of the same ones
    labeled, detected = (trials_of(f"cuhk03/{boxes}", config) for boxes in ("labeled", "detected"))
    protocols.refuse_trained_on(market1501, protocols.label_map(labeled[0], None))
    protocols.refuse_trained_on(detected[0], protocols.label_map(labeled[0], None))
    assert "test identities of cuhk03/detected, trial 1 " in refuse(detected[1], protocols.label_map(labeled[0], None))
    protocols.refuse_trained_on(trials_of("viper+grid", config)[0], union)  # no test, nothing to refuse


@pytest.mark.parametrize("train, test, told", [
    ([1, 2, 3], [3, 4, 5], "1 test identities of grid, such as 3, are training identities too"),
    ([0, 1, 2], [3, 4, 5], "the train split of grid has junk or distractors in it"),
    ([1, 2, 3], [], "the query split of grid is empty")])
def test_partitions_that_cannot_be_are_refused(config, train, test, told):
    partitions = [{"train": train, "test": test}]
    with mock.patch.object(protocols.datasets, "metadata", lambda *_: {"partitions": partitions}):
        refusal("grid", config, told)


# --- results

def features_of(split):
    """By hand, from the images' names: small integers, so that many distances are equal."""
    values = np.array([np.random.default_rng(zlib.crc32(name.encode())).integers(0, 3, 6) for name in split.names],
                      np.float32)
    return {"global": values[:, :2], "local": values[:, 2:]}


def expected_rows(trials, extract, config):
    """(trial, protocol, feature, what `score` gives, the distances) by plain loops."""
    rows = []
    for trial in trials:
        matching = {}
        for part in ("query", "gallery", "multi_query"):
            if (split := getattr(trial, part)) is not None:
                matching[part] = matching_by_loops(extract(split), config.normalize)
        labels = [values.tolist() for values in evaluate.labels_of(trial)]
        queries = {trial.protocol: matching["query"]}
        if trial.multi_query is not None and config.multi_query:
            queries[trial.protocol.replace("single", "multi")] = {
                feature: pool_by_loops(trial, vectors, matching["multi_query"][feature], config.multi_query)
                for feature, vectors in matching["query"].items()}
        for protocol, query in queries.items():
            for feature, vectors in query.items():
                distances = squared_distances(vectors, matching["gallery"][feature])
                scored = (score_single_shot if trial.single_gallery_shot else score)(distances, *labels, 50)
                rows.append((trial.number, protocol, feature, scored, distances))
    return rows


def matching_by_loops(features, normalize):
    def unit(vector):
        return [value / math.hypot(*vector) for value in vector]

    left, right = ([list(map(float, vector)) for vector in features[branch]] for branch in ("global", "local"))
    if normalize == "per_branch":
        left, right = list(map(unit, left)), list(map(unit, right))
    joint = [[*one, *other] for one, other in zip(left, right, strict=True)]
    if normalize == "joint":
        left, right, joint = list(map(unit, left)), list(map(unit, right)), list(map(unit, joint))
    return {"global": left, "local": right, "joint": joint}


def pool_by_loops(trial, own, further, pooling):
    pooled = []
    for q in range(len(trial.query)):
        same = [further[m] for m in range(len(trial.multi_query))
                if trial.multi_query.identities[m] == trial.query.identities[q]
                and trial.multi_query.cameras[m] == trial.query.cameras[q]]
        combine = {"mean": statistics.fmean, "max": max}[pooling]
        pooled.append([combine(values) for values in zip(*same, strict=True)] if same else own[q])
    return pooled


def assert_rows(rows, trials, config, extract=features_of):
    """That the trials' rows, to 1e-6, and `rank_metrics` of their distances, to 1e-9, are those of plain loops."""
    expected = expected_rows(trials, extract, config.evaluate)
    assert [(row["trial"], row["protocol"], row["feature"]) for row in rows] == [wanted[:3] for wanted in expected]
    for row, (number, _, _, scored, distances) in zip(rows, expected, strict=True):
        trial = next(trial for trial in trials if trial.number == number)
        cmc, *means, valid = scored
        np.testing.assert_allclose([row[f"rank{rank}"] for rank in (1, 5, 10, 20)], cmc[[0, 4, 9, 19]], rtol=0,
                                   atol=1e-6)
        np.testing.assert_allclose([row[field] for field in ("mean_ap", "mean_ap_trapezoid", "mean_inp")], means,
                                   rtol=0, atol=1e-6)
        assert row["num_queries"] == len(valid)
        assert_equal(metrics.rank_metrics(distances, *evaluate.labels_of(trial),
                                          single_gallery_shot=trial.single_gallery_shot), scored)


@pytest.mark.parametrize("name, chosen", [
    ("market1501", "all"), ("msmt17", "all"), ("viper", "all"), ("grid", "all"), ("cuhk03/labeled", "0"),
    ("cuhk03/detected", "18-19"), ("folder/test_only", "all")])
def test_results_equal_brute_force(config, name, chosen):
    protocol = protocols.load(name, config.data)
    trials = [protocol.trial(number) for number in protocol.numbers(chosen)]
    rows = evaluate.evaluate_trials(trials, evaluate.FeatureCache(features_of), config.evaluate)
    means = [row for row in rows if row["trial"] == "mean"]
    rows = [row for row in rows if row["trial"] != "mean"]
    assert_rows(rows, trials, config)
    assert {row["dataset"] for row in rows} == {name}
    assert {row["num_gallery"] for row in rows} == {
        "market1501": {29}, "msmt17": {15}, "viper": {3}, "grid": {6}, "cuhk03/labeled": {100},
        "cuhk03/detected": {100}, "folder/test_only": {5}}[name]
    assert min(row["mean_ap"] for row in rows) > 0 and any(row["rank1"] < 1 for row in rows)
    assert_means(means, rows)


def assert_means(means, rows):
    groups = {}
    for row in rows:
        groups.setdefault((row["protocol"], row["feature"]), []).append(row)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    assert [(row["protocol"], row["feature"]) for row in means] == list(groups)
    for mean, group in zip(means, groups.values(), strict=True):
        assert mean["trials"] == [row["trial"] for row in group]
        for field in result_rows.SCORES:
            values = [row[field] for row in group]
            assert mean[field] == pytest.approx(statistics.mean(values), abs=1e-12)
            assert mean[f"{field}_std"] == pytest.approx(statistics.stdev(values), abs=1e-12)
        for field in ("num_queries", "num_gallery"):
            assert mean[field] == statistics.mean(row[field] for row in group)


def test_cuhk03_767_700_equals_brute_force(config):
    config.data.cuhk03_protocol = "767/700"
    trials = trials_of("cuhk03/detected", config)
    rows = evaluate.evaluate_trials(trials, features_of, config.evaluate)
    assert_rows(rows, trials, config)
    assert {row["num_gallery"] for row in rows} == {len(trials[0].gallery)}


def test_joined_sets_keep_their_people_and_cameras_apart():
    train = split_of([b""] * 5, [1, 10, 10, 11, 14], [1, 2, 1, 1, 2])
    trial = protocols.Trial("a+b", "all identities", train=train, offsets={"a": 0, "b": 10}, names={"b": "wxyz"})
    assert trial.people() == {"a": [1, 10], "b": ["w", "z"]}
    assert trial.labels().tolist() == [0, 1, 1, 2, 3]
    assert trial.camera_numbers().tolist() == [0, 1, 0, 2, 3]
    np.testing.assert_array_equal(trial.camera_one_hot(), np.eye(4)[[0, 1, 0, 2, 3]])


@pytest.mark.parametrize("pooling", ["mean", "max", ""])
def test_multi_query_equals_brute_force(config, pooling):
    config.evaluate.multi_query = pooling
    trials = trials_of("market1501", config)
    rows = evaluate.evaluate_trials(trials, features_of, config.evaluate)
    assert_rows(rows, trials, config)
    assert {row["protocol"] for row in rows} == {"single-query", *(["multi-query"] if pooling else [])}


def test_the_two_poolings_and_one_image_alone_differ(config):
    trial, = trials_of("market1501", config)
    query, further = features_of(trial.query)["local"], features_of(trial.multi_query)["local"]
    pooled = {pooling: evaluate.pool_queries(trial, query, further, pooling) for pooling in evaluate.POOLING}
    assert (pooled["mean"] != pooled["max"]).any() and (pooled["mean"] != query).any()
    alone = trial.query.names.tolist().index("0003_c1s1_000300_00.jpg")  # gt_bbox has nothing of it
    for values in pooled.values():
        np.testing.assert_array_equal(values[alone], query[alone])


@pytest.mark.parametrize("normalize", evaluate.NORMALIZE)
def test_normalised_features_equal_brute_force(config, normalize):
    config.evaluate.normalize = normalize

    def extract(split):
        values = np.array([np.random.default_rng(zlib.crc32(name.encode())).normal(size=5) for name in split.names])
        return {"global": values[:, :2], "local": 3 * values[:, 2:]}

    trials = trials_of("market1501", config)
    assert_rows(evaluate.evaluate_trials(trials, extract, config.evaluate), trials, config, extract)


def test_the_mean_of_one_trial_is_none(config, recwarn):
    trial, = trials_of("market1501", config)
    rows = evaluate.evaluate_trials([trial], features_of, config.evaluate)
    assert result_rows.mean_rows(rows) == []
    assert not recwarn.list  # NumPy's, of a standard deviation with no degree of freedom


def test_baselines_are_ranked_as_the_protocol_has_it(config):
    config.data.height, config.data.width = 8, 4
    trial = protocols.load("cuhk03/detected", config.data).trial(0)
    assert len(trial.gallery) > 100
    chance, histogram = evaluate.evaluate_baselines(trial, config.data)
    assert chance["num_gallery"] == histogram["num_gallery"] == 100
    for row in (chance, histogram):  # one true match a query, where all images would make several
        assert row["mean_ap"] == pytest.approx(row["mean_inp"], abs=1e-12)
    assert chance["mean_ap"] == pytest.approx(sum(1 / rank for rank in range(1, 101)) / 100, abs=0.01)


def test_each_image_is_extracted_once(config):
    seen = Counter()

    def extract(split):
        seen.update(split.names.tolist())
        return features_of(split)

    cache = evaluate.FeatureCache(extract)
    trials = trials_of("viper", config)
    rows = evaluate.evaluate_trials(trials, cache, config.evaluate)
    assert rows == evaluate.evaluate_trials(trials, features_of, config.evaluate)
    everyone = {name for trial in trials for split in (trial.query, trial.gallery) for name in split.names}
    assert seen == dict.fromkeys(everyone, 1) and len(everyone) == 10
    # in any order, one image twice in a split, all of them known or none
    split = trials[0].train.select(np.array([3, 0, 3, 1]))
    for _ in range(2):
        for branch, values in cache(split).items():
            np.testing.assert_array_equal(values, features_of(split)[branch])
    assert max(seen.values()) == 1


def test_an_image_by_two_cameras_has_the_features_of_each(config):
    split = trials_of("viper", config)[0].query.select(np.array([0, 0]))
    split = dataclasses.replace(split, cameras=np.array([1, 2]))
    cache = evaluate.FeatureCache(lambda split: {"global": np.float32(split.cameras)[:, None]}, by_camera=True)
    assert cache(split)["global"][:].ravel().tolist() == [1, 2]
