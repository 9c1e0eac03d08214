"""The paper's chain of pre-training in miniature, trials, and evaluation on other data sets."""

import json
import sys

import jax
import numpy as np
import pytest
from market1501_miniature import write_market1501
from miniatures import write_cuhk03, write_grid, write_viper
from runs import lines_of
from tiny_imagenet_miniature import write_tiny_imagenet

from experiments import accuracy
from experiments.tables import figures, plan
from jlml_jax import calibrate, datasets, evaluate, models, optim, parallel, protocols, report, train, train_step
from jlml_jax.checkpoints import load_run
from jlml_jax.datasets.cuhk03 import Cuhk03
from jlml_jax.datasets.grid import Grid
from jlml_jax.datasets.market1501 import Market1501
from jlml_jax.datasets.tiny_imagenet import TinyImagenet
from jlml_jax.datasets.viper import Viper
from jlml_jax.errors import UserError
from jlml_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All data sets of the chain, in miniature."""
    originals, data_dir = tmp_path_factory.mktemp("originals"), tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        cuhk03 = write_cuhk03(originals / "cuhk03")
        patch.setattr(Cuhk03, "EXPECTED", property(lambda builder: cuhk03.counts(builder.builder_config.name)))
        for builder, name, write in ((Viper, "viper", write_viper), (Grid, "grid", write_grid),
                                     (Market1501, "market1501", write_market1501),
                                     (TinyImagenet, "tiny_imagenet", write_tiny_imagenet)):
            patch.setattr(builder, "EXPECTED", write(originals / name))
        for name in ("cuhk03/labeled", "grid", "market1501", "tiny_imagenet", "viper"):
            datasets.builder(name, data_dir).build(originals / name.partition("/")[0])
    return data_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def link(tiny_config, data_dir):
    """The config of a link of the chain: two steps."""
    def config(name, init_from="", **fields):
        config = tiny_config.copy_and_resolve_references()
        config.name, config.data.name, config.data.data_dir = name.replace("/", "_"), name, str(data_dir)
        config.init_from, config.train.steps, config.train.batch_size = str(init_from), 2, 4
        config.log_every, config.evaluate.picture = 1, False
        config.model.num_strips, config.model.global_widths, config.model.local_widths = 1, (4,), (4,)
        config.update_from_flattened_dict(fields)
        return config
    return config


@pytest.fixture
def pretrained(link, runs):
    """A run on Tiny-ImageNet; trained by the first test that asks for it, and finished for the others."""
    train_and_evaluate(link("tiny_imagenet"), runs / "imagenet", "train")
    return runs / "imagenet"


@pytest.fixture
def both(link, runs, pretrained):
    """The next link: all people of CUHK03 and Market-1501."""
    train_and_evaluate(link("cuhk03/labeled+market1501", pretrained), runs / "both", "train")
    return runs / "both"


def leaves(variables, identity):
    """Arrays by path, of the identity layers alone or of all others."""
    return {jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
            if models.is_identity_layer(path[0].key) == identity}


def first_state(config, trial):
    """The state before the first step."""
    model = models.build_model(config, len(trial.identities()))
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    return train_step.init_state(config, model, optimizer, parallel.make_mesh(), load_run(config.init_from))


def assert_taken_over(parent, params, batch_stats):
    for part, arrays in (("params", params), ("batch_stats", batch_stats)):
        theirs, ours = leaves(parent.variables[part], identity=False), leaves(arrays, identity=False)
        assert len(ours) >= 18 and theirs.keys() == ours.keys()
        for name, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


def test_pre_training_is_judged_by_its_validation_images(link, pretrained):
    rows = train_and_evaluate(link("tiny_imagenet"), pretrained, "evaluate")
    assert [row["feature"] for row in rows] == ["global", "local"]
    for row in rows:
        assert (row["dataset"], row["protocol"], row["num_images"], row["num_classes"]) == (
            "tiny_imagenet", "classification", 6, 3)
        assert 0 <= row["top1"] <= row["top5"] == 1  # of three classes


def test_weights_arrive_link_by_link(link, runs, pretrained, both, capsys):
    """With a learning rate of 0 a run ends with the weights that it began with."""
    union = link("cuhk03/labeled+market1501", pretrained)
    state = first_state(union, protocols.load(union.data.name, union.data).trial(0))
    assert_taken_over(load_run(pretrained), state.params, state.batch_stats)

    people = load_run(both).label_map["identities"]
    assert {name: len(identities) for name, identities in people.items()} == {"cuhk03/labeled": 120, "market1501": 8}
    assert load_run(both).variables["params"]["global_identity"]["kernel"].shape == (16, 128)
    assert load_run(both).label_map["init_from"] == load_run(pretrained).label_map

    config = link("viper", both, **{"data.trials": "0-1", "optim.learning_rate": 0.0})
    capsys.readouterr()
    rows = train_and_evaluate(config, runs / "viper")
    output = capsys.readouterr().out
    assert f"weights of {both}, step 2, trained on cuhk03/labeled+market1501; the identity layers are new" in output
    for folder in ("trial-00", "trial-01"):
        run = load_run(runs / "viper" / folder)
        theirs, ours = (leaves(variables["params"], identity=False)
                        for variables in (load_run(both).variables, run.variables))
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs.keys() | ours.keys())
        assert run.variables["params"]["global_identity"]["kernel"].shape == (16, 2)
    assert [(row["trial"], row["feature"]) for row in rows] == [
        (trial, feature) for trial in (0, 1, "mean") for feature in ("global", "local", "joint")]
    for row in rows[6:]:
        values = [other["rank1"] for other in rows[:6] if other["feature"] == row["feature"]]
        assert row["rank1"] == pytest.approx(np.mean(values)) and row["rank1_std"] == pytest.approx(
            np.std(values, ddof=1))
    written = json.loads((runs / "viper" / "results.json").read_text())
    assert written["rows"] == rows and written["provenance"]["versions"]

    rows = train_and_evaluate(link("grid", both), runs / "grid")
    assert load_run(runs / "grid" / "trial-00").label_map["init_from"] == load_run(both).label_map
    assert {(row["dataset"], row["num_queries"], row["num_gallery"]) for row in rows} == {("grid", 3, 6)}
    train_and_evaluate(link("market1501", pretrained), runs / "market", "train")
    assert load_run(runs / "market").label_map["init_from"] == load_run(pretrained).label_map


def test_cameras_of_data_sets_trained_on_together_are_each_their_own(link):
    """Both have a camera 1, which is not the same one."""
    data = link("cuhk03/labeled+market1501").data
    trial = protocols.load(data.name, data).trial(0)
    cameras = trial.camera_one_hot()
    assert cameras.shape[0] == len(trial.train) and (cameras.sum(axis=1) == 1).all() and set(cameras.flat) == {0, 1}
    of_market = trial.train.identities > trial.offsets["market1501"]
    pairs = set(zip(of_market.tolist(), trial.train.cameras.tolist(), strict=True))
    assert cameras.shape[1] == len(pairs) > len({camera for _, camera in pairs})
    for group in cameras.T.astype(bool):
        assert len(np.unique(of_market[group])) == len(np.unique(trial.train.cameras[group])) == 1


def test_people_held_out_of_several_data_sets_are_those_of_each(link):
    """Market-1501's are found among those that a run was trained on, whatever they are joined with."""
    market = link("market1501").data
    trained = protocols.label_map(protocols.load("market1501", market).trial(0), None)
    for name in ("cuhk03/labeled+market1501", "market1501+cuhk03/labeled"):
        data = link(name, **{"data.held_out_identities": 30}).data
        trial = protocols.load(name, data).trial(0)
        tested = trial.tested_people()
        assert sum(map(len, tested.values())) == 30
        both = set(tested["market1501"]) & set(trained["identities"]["market1501"])
        assert both
        with pytest.raises(UserError, match=f"^{len(both)} of the 30 test identities .* of market1501.* were trained"):
            protocols.refuse_trained_on(trial, protocols.label_map(trial, trained))
        protocols.refuse_trained_on(trial, protocols.label_map(trial, None))
        with pytest.raises(UserError, match="has the very people that are searched for"):
            protocols.add_distractors([trial], "market1501", data)
        # Each data set has its own cameras, in training and at test.
        cameras = {dataset: set() for dataset in tested}
        for split in (trial.train, trial.query, trial.gallery):
            for identity, camera in zip(split.identities.tolist(), split.cameras.tolist(), strict=True):
                cameras[max((low, dataset) for dataset, low in trial.offsets.items() if low < identity)[1]].add(camera)
        assert not set.intersection(*cameras.values())
        assert trial.camera_one_hot().shape[1] == len(np.unique(trial.train.cameras))


def test_how_joined_sets_are_joined_is_of_no_matter_to_one(link, tmp_path):
    config = link("market1501")
    train_and_evaluate(config, tmp_path / "run", "train")
    config.data.joined_splits = "train"
    assert train_and_evaluate(config, tmp_path / "run", "evaluate")
    config.data.joined_splits = "trian"
    with pytest.raises(UserError, match="data.joined_splits='trian' is unknown; known are all, train"):
        train_and_evaluate(config, tmp_path / "run", "evaluate")


def test_extra_distractors_are_of_no_tested_camera(link):
    data = link("market1501").data
    trial, = protocols.add_distractors([protocols.load("market1501", data).trial(0)], "viper", data)
    distractors = np.char.startswith(trial.gallery.names.astype(str), "cam_")
    assert distractors.any() and set(trial.gallery.cameras[distractors]) == {-1}
    assert -1 not in trial.gallery.cameras[~distractors]


def test_a_further_run_on_the_same_people_keeps_their_identity_layers(link, tmp_path, capsys):
    train_and_evaluate(link("market1501", **{"optim.learning_rate": 0.1}), tmp_path / "first", "train")
    further = {"keep_identity_layers": True, "optim.learning_rate": 0.0, "seed": 1, "data.height": 32}
    train_and_evaluate(link("market1501", tmp_path / "first", **further), tmp_path / "further", "train")
    assert f"weights of {tmp_path / 'first'}, step 2, trained on market1501; the identity layers are kept" in (
        capsys.readouterr().out)
    theirs, ours = (leaves(load_run(tmp_path / name).variables["params"], identity=True)
                    for name in ("first", "further"))
    assert theirs.keys() == ours.keys() and "['global_identity']['kernel']" in ours
    assert all(np.array_equal(leaf, theirs[name]) for name, leaf in ours.items())
    with pytest.raises(UserError, match=r"init_from=.*/first is a run of another network: model.loss \('multi' there"):
        train_and_evaluate(link("market1501", tmp_path / "first", **further, **{"model.loss": "uni"}), tmp_path / "uni")


def test_a_further_run_of_several_trials_goes_on_from_each_in_its_own(link, tmp_path, capsys):
    first, further = tmp_path / "first", tmp_path / "further"
    train_and_evaluate(link("viper", **{"data.trials": "0-1", "optim.learning_rate": 0.1}), first, "train")
    config = link("viper", first, **{"data.trials": "0-1", "optim.learning_rate": 0.0, "keep_identity_layers": True})
    train_and_evaluate(config, further, "train")
    output = capsys.readouterr().out
    for name in ("trial-00", "trial-01"):
        assert f"weights of {first / name}, step 2, trained on viper; the identity layers are kept" in output
        theirs, ours = (leaves(load_run(folder / name).variables["params"], identity=True)
                        for folder in (first, further))
        assert all(np.array_equal(ours[leaf], theirs[leaf]) for leaf in theirs.keys() | ours.keys())
        assert load_run(further / name).label_map["init_from"] == load_run(first / name).label_map
    assert load_run(first / "trial-00").label_map["identities"] != load_run(first / "trial-01").label_map["identities"]

    # The tables' figures of what the weights were before are of the same trial, too.
    config.data.trials = "1"
    train_and_evaluate(config, further, "evaluate")
    table_run = plan.Run("jlml", 0, further, config)
    (_, _, before), (_, _, after) = figures._before_and_after([table_run])
    kernel = load_run(first / "trial-01").variables["params"]["global_head"]["fc"]["kernel"]
    assert np.array_equal(before[0].weights, kernel) and np.array_equal(after[0].weights, kernel)

    config.data.trials = "2"
    with pytest.raises(UserError, match="first/trial-02 is not a run's folder"):
        train_and_evaluate(config, further)
    for dataset in ("grid", "market1501"):
        with pytest.raises(UserError, match="first holds .*trials.*give one of them, such as .*first/trial-00"):
            train_and_evaluate(link(dataset, first), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_does_without_the_one_it_started_from(link, runs, tmp_path, pretrained):
    parent = tmp_path / "parent"
    pretrained.rename(parent)
    try:
        config = link("market1501", parent)
        train_and_evaluate(config, tmp_path / "run", "train")
    finally:
        parent.rename(pretrained)
    before = load_run(tmp_path / "run").label_map
    rows = train_and_evaluate(config, tmp_path / "run")  # finished: the weights are its own
    assert {row["protocol"] for row in rows} == {"single-query", "multi-query"}
    assert load_run(tmp_path / "run").label_map == before


def test_every_trial_is_evaluated_while_it_trains(link, tmp_path, monkeypatch):
    forwards, make_forward = [], evaluate.make_forward
    monkeypatch.setattr(evaluate, "make_forward",
                        lambda *arguments: forwards.append(make_forward(*arguments)) or forwards[-1])
    rows = train_and_evaluate(link("viper", **{"data.trials": "0-1", "evaluate.every": 1}), tmp_path / "run")
    for number, folder in enumerate(("trial-00", "trial-01")):
        lines = [line for line in lines_of(tmp_path / "run" / folder) if "rank1/joint" in line]
        assert [line["step"] for line in lines] == [1, 2]
        row, = (row for row in rows if row["trial"] == number and row["feature"] == "joint")
        assert (lines[1]["rank1/joint"], lines[1]["mean_ap/joint"]) == (row["rank1"], row["mean_ap"])
    assert [forward._cache_size() for forward in forwards] == [1]  # compiled once for all


def test_what_tests_nobody_is_not_evaluated_while_it_trains(link, tmp_path):
    for name, mended in (("cuhk03/labeled+market1501", "every=0, or hold people out with --config.data.held_out_"),
                         ("tiny_imagenet", "every=0$")):
        with pytest.raises(UserError, match="evaluate.every=1 asks .* has no queries and gallery; give .*" + mended):
            train_and_evaluate(link(name, **{"evaluate.every": 1}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    held_out = {"evaluate.every": 1, "data.held_out_identities": 30}
    train_and_evaluate(link("cuhk03/labeled+market1501", **held_out), tmp_path / "run", "train")
    assert [line["step"] for line in lines_of(tmp_path / "run") if "mean_ap/joint" in line] == [1]


def test_trials_are_added_and_resumed_one_by_one(link, tmp_path, capsys):
    config = link("viper")
    first = train_and_evaluate(config, tmp_path / "run")
    assert {row["trial"] for row in first} == {0}
    assert "no pre-trained weights were given" in capsys.readouterr().out
    config.data.trials = "0-1"
    rows = train_and_evaluate(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert f"the run in {tmp_path / 'run' / 'trial-00'} is finished: 2 steps" in output
    assert "mean of 2 trials and standard deviation" in output
    assert rows[:3] == first and {row["trial"] for row in rows} == {0, 1, "mean"}
    config.data.trials = "1"
    assert train_and_evaluate(config, tmp_path / "run", "evaluate") == rows  # those of all trials that are there
    config.optim.learning_rate = 0.5
    with pytest.raises(UserError, match=r"run holds a run with another config: optim.learning_rate"):
        train_and_evaluate(config, tmp_path / "run")
    with pytest.raises(UserError, match="holds several trials; give one of them"):
        load_run(tmp_path / "run")


def test_the_folder_of_a_trial_is_not_that_of_several(link, tmp_path):
    train_and_evaluate(link("viper"), tmp_path / "run")
    trial = tmp_path / "run" / "trial-00"
    before = {path.name: path.read_bytes() for path in trial.iterdir() if path.is_file()}
    for mode in train.MODES:
        with pytest.raises(UserError, match=f"{trial} is the folder of one run, and viper has 10 trials, each in a "
                                            f"folder of its own in --workdir; give another, such as {trial.parent} "):
            train_and_evaluate(link("viper"), trial, mode)
        with pytest.raises(UserError, match="run is the folder of several trials, and market1501 has one; give anoth"):
            train_and_evaluate(link("market1501"), tmp_path / "run", mode)
    assert before == {path.name: path.read_bytes() for path in trial.iterdir() if path.is_file()}
    assert load_run(trial).step == 2


def test_means_are_of_trials_evaluated_alike(link, tmp_path, capsys):
    config = link("viper", **{"data.trials": "0", "evaluate.flip_average": True})
    train_and_evaluate(config, tmp_path / "run")
    config.data.trials, config.evaluate.flip_average = "1-2", False
    rows = train_and_evaluate(config, tmp_path / "run")
    assert {tuple(row["trials"]) for row in rows if row["trial"] == "mean"} == {(1, 2)}
    told = capsys.readouterr().out
    assert "evaluated by another flip_average or multi_query or extra_gallery and not in the means: trial-00" in told
    config.data.trials = "0"
    rows = train_and_evaluate(config, tmp_path / "run", "evaluate")
    assert {tuple(row["trials"]) for row in rows if row["trial"] == "mean"} == {(0, 1, 2)}
    config.evaluate.reranking = True  # in columns of its own: the means are of those that all have
    assert not any("reranked_rank1" in row for row in train_and_evaluate(config, tmp_path / "run", "evaluate")
                   if row["trial"] == "mean")


def test_how_a_trial_was_evaluated_is_not_what_its_config_says_since(link, tmp_path, capsys):
    config = link("viper", **{"data.trials": "0-1"})
    train_and_evaluate(config, tmp_path / "run")
    config.evaluate.flip_average = True
    train_and_evaluate(config, tmp_path / "run", "train")  # writes the config, and evaluates nothing
    config.data.trials = "1"
    rows = train_and_evaluate(config, tmp_path / "run", "evaluate")
    assert not [row for row in rows if row["trial"] == "mean"]
    assert "not in the means: trial-00" in capsys.readouterr().out


def test_means_are_of_trials_trained_alike(link, tmp_path, capsys):
    train_and_evaluate(link("viper", **{"data.trials": "0-2"}), tmp_path / "run")
    path = tmp_path / "run" / "trial-01" / "results.json"
    results = json.loads(path.read_text())
    results["provenance"]["steps"] = 1  # evaluated before it was trained to its end
    path.write_text(json.dumps(results))
    capsys.readouterr()
    rows = train_and_evaluate(link("viper", **{"data.trials": "0"}), tmp_path / "run", "evaluate")
    assert "after fewer steps than the 2 of others and not in the means: trial-01" in capsys.readouterr().out
    assert {tuple(row["trials"]) for row in rows if row["trial"] == "mean"} == {(0, 2)}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["provenance"]["steps"] == 2


def test_the_results_of_trials_tell_who_trained_each(link, tmp_path, monkeypatch):
    def provenance_by(command, trials, mode="train_and_evaluate"):
        monkeypatch.setattr(sys, "argv", ["-", command])
        train_and_evaluate(link("viper", **{"data.trials": trials, "seed": 3}), tmp_path / "run", mode)
        return json.loads((tmp_path / "run" / "results.json").read_text())["provenance"]

    assert "training" not in provenance_by("first", "0")
    found = provenance_by("second", "1")
    of_trials = [json.loads((tmp_path / "run" / f"trial-0{trial}" / "results.json").read_text())["provenance"]
                 for trial in (0, 1)]
    assert (found["seed"], found["steps"]) == (3, 2)
    assert found["wall_time_seconds"] == pytest.approx(sum(one["wall_time_seconds"] for one in of_trials))
    assert found["train_fingerprint"] == [one["train_fingerprint"] for one in of_trials]
    assert [start["command"].split()[-1] for start in found["training"]] == ["first", "second"]
    found = provenance_by("third", "0-1", "evaluate")
    assert found["command"].endswith("third")
    assert [start["command"].split()[-1] for start in found["training"]] == ["first", "second"]


def test_a_set_smaller_than_a_batch_is_evaluated_on_without_training(link, tmp_path, pretrained):
    config = link("viper", pretrained, **{"train.batch_size": 4096})
    with pytest.raises(UserError, match=r"larger than the training set of .* give --config.train.batch_size="):
        train_and_evaluate(config, tmp_path / "run")
    config.train.steps = 0
    assert train_and_evaluate(config, tmp_path / "run")


def test_a_batch_of_groups_is_measured_by_the_groups_images(link, tmp_path, pretrained):
    """Four images of two people make an epoch of eight, in groups of four."""
    config = link("viper", pretrained, **{"train.batch_size": 8, "train.images_per_identity": 4})
    assert train_and_evaluate(config, tmp_path / "run", "train") == []
    assert load_run(tmp_path / "run" / "trial-00").step == 2


def test_the_results_of_trials_on_other_data_are_collected(link, tmp_path, capsys):
    # A data set that is named twice is tested once.
    config = link("viper", **{"data.trials": "0-1", "evaluate.datasets": "grid,market1501,grid"})
    rows = train_and_evaluate(config, tmp_path / "run")
    others = [row for row in rows if row.get("trained_on") == "viper" and row["feature"] == "joint"]
    alone = [row for row in others if row["trained_trial"] != "mean"]
    means = [row for row in others if row["trained_trial"] == "mean"]
    assert {row["trained_trial"] for row in alone} == {0, 1}
    assert [(row["dataset"], row["protocol"], row["trial"], row["trained_trials"]) for row in means] == [
        ("grid", "3/3 single-shot", "mean", [0, 1]), ("market1501", "single-query", 0, [0, 1]),
        ("market1501", "multi-query", 0, [0, 1])]
    for mean in means:  # over the networks, each with the mean of its own tests
        values = [row["rank1"] for row in alone
                  if all(row[field] == mean[field] for field in ("dataset", "protocol", "trial"))]
        assert len(values) == 2
        assert mean["rank1"] == pytest.approx(np.mean(values))
        assert mean["rank1_std"] == pytest.approx(np.std(values, ddof=1))
    output = capsys.readouterr().out
    assert output.count("mean of 2 networks and standard deviation") == 3
    # viper's own mean is of viper's rows alone
    own, = (row for row in rows if row["trial"] == "mean" and row["feature"] == "joint" and "trained_on" not in row)
    assert own["dataset"] == "viper" and own["trials"] == [0, 1]


def test_what_is_compiled_for_one_trial_serves_the_others(link, tmp_path, monkeypatch):
    traced, step = [], train_step.train_step
    monkeypatch.setattr(train_step, "train_step", lambda *args, **named: traced.append(args) or step(*args, **named))
    together = train_and_evaluate(link("viper", **{"data.trials": "0-1"}), tmp_path / "together")
    assert len(traced) == 1
    alone = train_and_evaluate(link("viper", **{"data.trials": "1"}), tmp_path / "alone")
    assert [row for row in together if row["trial"] == 1] == alone
    assert lines_of(tmp_path / "together" / "trial-01") == lines_of(tmp_path / "alone" / "trial-01")


def test_a_run_is_evaluated_on_other_data_sets(link, runs, pretrained):
    config = link("tiny_imagenet", **{"evaluate.datasets": "viper,cuhk03/labeled,market1501"})
    rows = train_and_evaluate(config, pretrained, "evaluate")
    others = [row for row in rows if row["dataset"] != "tiny_imagenet"]
    assert all(row["trained_on"] == "tiny_imagenet" for row in others)
    trials = {name: {row["trial"] for row in others if row["dataset"] == name}
              for name in ("viper", "cuhk03/labeled", "market1501")}
    assert {row["protocol"] for row in others if row["dataset"] == "cuhk03/labeled"} == {"20/100 single-shot"}
    assert trials == {"viper": {*range(10), "mean"}, "cuhk03/labeled": {*range(20), "mean"}, "market1501": {0}}


    config.evaluate.datasets, config.data.cuhk03_protocol = "cuhk03/labeled", "767/700"  # not what was trained on
    rows = train_and_evaluate(config, pretrained, "evaluate")
    assert {(row["protocol"], row["num_queries"]) for row in rows if "trained_on" in row} == {("767/700", 60)}


def test_a_run_is_evaluated_by_the_statistics_of_each_tested_camera(link, tmp_path, capsys):
    config = link("viper", **{"evaluate.datasets": "grid,market1501", "evaluate.norm_statistics": "camera",
                              "train.norm_by_camera": True, "optim.learning_rate": 0.1, "evaluate.picture": True})
    by_camera = train_and_evaluate(config, tmp_path / "run")
    assert "BN by each camera's training images, without labels" in capsys.readouterr().out
    assert {row["norm_statistics"] for row in by_camera} == {"camera"}
    page = report.write_report(tmp_path / "run" / "trial-00").read_text()
    assert "BN by each camera&#39;s training images, without labels" in page
    assert "results.json says" not in page  # its own ranking is by the same statistics
    config.evaluate.norm_statistics = "run"
    by_run = train_and_evaluate(config, tmp_path / "run", "evaluate")
    names = [(row["dataset"], row["protocol"], row["trial"], row["feature"]) for row in by_run]
    assert names == [(row["dataset"], row["protocol"], row["trial"], row["feature"]) for row in by_camera]
    assert not any("norm_statistics" in row for row in by_run)
    assert [row["mean_ap"] for row in by_run] != [row["mean_ap"] for row in by_camera]
    config.evaluate.norm_statistics = "cameras"
    with pytest.raises(UserError, match="norm_statistics='cameras' is unknown; known are run, data, camera"):
        train_and_evaluate(config, tmp_path / "run", "evaluate")


def test_a_run_on_the_training_people_of_several_sets_is_tested_on_each(link, tmp_path, run_command):
    """In the command that trains, by --mode=evaluate and by calibrate; what is told of it says who was trained on."""
    name = "market1501+cuhk03/labeled"
    config = link(name, **{"data.joined_splits": "train", "data.cuhk03_protocol": "767/700",
                           "evaluate.datasets": "market1501,cuhk03/labeled"})
    rows = train_and_evaluate(config, tmp_path / "run")
    assert {(row["dataset"], row["protocol"]) for row in rows} == {
        ("market1501", "single-query"), ("market1501", "multi-query"), ("cuhk03/labeled", "767/700")}
    assert {row["trained_on"] for row in rows} == {f"{name} (train)"}
    assert train_and_evaluate(config, tmp_path / "run", "evaluate") == rows
    label_map = load_run(tmp_path / "run").label_map
    assert label_map["dataset"] == f"{name} (train)"
    assert {one: len(people) for one, people in label_map["identities"].items()} == {"market1501": 4,
                                                                                     "cuhk03/labeled": 60}
    record = accuracy.make_record(tmp_path / "run")
    assert record["dataset"] == f"{name} (train)" and "data.joined_splits" not in record["recipe"]
    assert run_command(calibrate, "--workdir", tmp_path / "run", "--dataset", "market1501")[0] == 0

    with pytest.raises(UserError, match="run with another config: data.cuhk03_protocol .*, data.joined_splits"):
        train_and_evaluate(link(name), tmp_path / "run")
    config.data.joined_splits = "all"
    with pytest.raises(UserError, match="test identities of market1501, trial 0 .* were trained on with market1501.c"):
        train_and_evaluate(config, tmp_path / "all")


def test_people_held_out_of_the_training_people_of_several_sets_leave_their_tests_alone(link, tmp_path):
    name = "market1501+cuhk03/labeled"
    rows = train_and_evaluate(link(name, **{
        "data.joined_splits": "train", "data.cuhk03_protocol": "767/700", "data.held_out_identities": 3,
        "evaluate.datasets": "market1501"}), tmp_path / "run")
    assert {(row["dataset"], row["protocol"], row.get("trained_on")) for row in rows} == {
        (f"{name} (train)", "3 training identities held out", None),
        ("market1501", "single-query", f"{name} (train)"), ("market1501", "multi-query", f"{name} (train)")}


@pytest.mark.parametrize(("tested", "message"), [
    ("market1501", "4 of the 4 test identities of market1501, trial 0 .such as 1., were trained on"),
    ("tiny_imagenet", "evaluate.datasets='tiny_imagenet' has no queries and gallery"),
    ("mars", "unknown data set 'mars'"),
])
def test_tests_that_mean_nothing_are_refused_before_training(link, tmp_path, tested, message):
    config = link("cuhk03/labeled+market1501", **{"evaluate.datasets": tested})
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_people_seen_earlier_in_the_chain_are_refused(link, tmp_path, both):
    with pytest.raises(UserError, match="test identities of market1501.* trained on with cuhk03/labeled.market1501"):
        train_and_evaluate(link("market1501", both), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("fields", "message"), [
    ({"model.depth": 2}, r"is a run of another network: model.depth \(1 there, 2 here\)"),
    ({"init_from": "nowhere"}, "nowhere is not a run's folder"),
    ({"keep_identity_layers": True}, "or in another order: 3 of tiny_imagenet there, 4 of market1501 here"),
    ({"keep_identity_layers": True, "init_from": ""}, "keep_identity_layers=True needs a run to take them from"),
])
def test_a_run_that_cannot_be_started_from_is_refused(link, tmp_path, pretrained, fields, message):
    with pytest.raises(UserError, match=message):
        train_and_evaluate(link("market1501", **{"init_from": str(pretrained)} | fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_set_of_test_images_alone_is_evaluated_on_and_not_trained_on(link, tmp_path, pretrained, monkeypatch):
    config = link("market1501", pretrained)
    whole = protocols.load("market1501", config.data).trial(0)
    trial = protocols.Trial("folder/shop", "single-query", query=whole.query, gallery=whole.gallery)
    monkeypatch.setattr(protocols, "load", lambda name, data: protocols.Protocol(1, lambda number: trial))
    with pytest.raises(UserError, match="folder/shop has no training images; evaluate a run trained on others"):
        train_and_evaluate(config, tmp_path / "run")
    config.train.steps = 0
    rows = train_and_evaluate(config, tmp_path / "run")
    assert [(row["dataset"], row["feature"]) for row in rows] == [
        ("folder/shop", feature) for feature in ("global", "local", "joint")]
    run = load_run(tmp_path / "run")
    assert (run.step, run.label_map["identities"]) == (0, {"folder/shop": []})
    assert_taken_over(load_run(pretrained), run.variables["params"], run.variables["batch_stats"])
    config.evaluate.datasets = "viper"
    rows = train_and_evaluate(config, tmp_path / "run", "evaluate")
    assert {row["trained_on"] for row in rows if row["dataset"] == "viper"} == {"tiny_imagenet"}
    config.evaluate.datasets, config.evaluate.norm_statistics = "", "camera"
    with pytest.raises(UserError, match="norm_statistics=camera is of training images, and folder/shop has none"):
        train_and_evaluate(config, tmp_path / "other")
