"""Handing a run on: what goes into the file and what comes out, and files that are none."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from configs import finetune
from jlml_jax import calibrate, load_extractor, pack, result_rows, unpack
from jlml_jax.calibration import load_verdicts
from jlml_jax.checkpoints import load_run
from jlml_jax.datasets import synthetic_drawing
from jlml_jax.distances import l2_distances
from jlml_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def packed(tiny_run, tmp_path_factory):
    """The file of `tiny_run`; to be read only."""
    file = tmp_path_factory.mktemp("packed") / "tiny.zip"
    pack.pack(tiny_run, file)
    return file


@pytest.fixture(scope="module")
def unpacked(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked") / "theirs"
    unpack.unpack(folder, packed)
    return folder


def rewritten(packed, file, change):
    """A copy of the archive whose members, {name: bytes}, `change` has changed."""
    with zipfile.ZipFile(packed) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def test_weights_are_the_runs_to_half_precision(tiny_run, unpacked):
    before, after = load_run(tiny_run), load_run(unpacked)
    assert after.step == before.step == 12
    assert before.config.data.data_dir and not after.config.data.data_dir  # that of another machine
    before.config.data.data_dir = ""
    assert after.config == before.config and after.label_map == before.label_map
    ours, theirs = (flatten_dict(one.variables, sep=".") for one in (before, after))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert theirs[name].dtype == np.float32
        np.testing.assert_array_equal(theirs[name], array.astype(np.float16) if array.ndim > 1 else array)
    assert any((theirs[name] != array).any() for name, array in ours.items())


def test_features_are_the_runs(unpacked, tiny_extractor):
    extractor = load_extractor(unpacked)
    crops = synthetic_drawing.draw_crops(3, extractor.height, extractor.width)
    ours, theirs = tiny_extractor(crops), extractor(crops)
    distances = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(ours, axis=1)
    assert 0 < distances.max() < 2e-3
    assert extractor.fingerprint != tiny_extractor.fingerprint


def test_the_folder_is_that_of_a_finished_run(unpacked, market1501_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unpacked, folder)
    config = load_run(folder).config
    config.data.data_dir, config.evaluate.picture = str(market1501_dir), False
    rows = train_and_evaluate(config, folder)
    assert "is finished: 12 steps" in capsys.readouterr().out
    assert rows[-1]["feature"] == "joint"
    config.init_from, config.optim.schedule, config.train.steps = str(folder), "cosine", 0
    assert train_and_evaluate(config, tmp_path / "untrained") == rows  # no step: evaluated as it is
    config.train.steps = config.log_every = config.checkpoint_every = 2
    train_and_evaluate(config, tmp_path / "further", "train")
    assert load_run(tmp_path / "further").label_map["init_from"] == load_run(folder).label_map


def test_packing_again_changes_nothing(packed, unpacked, tmp_path):
    pack.pack(unpacked, tmp_path / "again.zip")
    with zipfile.ZipFile(packed) as before, zipfile.ZipFile(tmp_path / "again.zip") as after:
        assert before.namelist() == after.namelist()
        for name in before.namelist():
            assert before.read(name) == after.read(name)


def test_thresholds_go_along_where_they_are_of_these_weights(tiny_run, unpacked, tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    shutil.copytree(tiny_run, ours)
    shutil.copytree(unpacked, theirs)
    shutil.copy(ours / "config.json", theirs)  # which says where the images are
    for folder, kept in ((ours, False), (theirs, True)):
        calibrate.calibrate(folder)
        (folder / "results.json").write_text('{"rows": [], "provenance": {}}')
        capsys.readouterr()
        pack.pack(folder, tmp_path / "file.zip")
        assert ("calibration.json is left out" in capsys.readouterr().out) is not kept
        unpack.unpack(tmp_path / f"{folder.name} again", tmp_path / "file.zip")
        files = {path.name for path in (tmp_path / f"{folder.name} again").iterdir()}
        assert files == {"checkpoints", "config.json", "label_map.json", "results.json", "training.json"} | (
            {"calibration.json"} if kept else set())


def test_results_of_other_steps_stay_behind(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "run")
    results = {"rows": [], "provenance": {"steps": 4}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    pack.pack(tmp_path / "run", tmp_path / "file.zip")
    assert "results.json is left out, as it is of step 4, not 12" in capsys.readouterr().out
    assert "results.json" not in zipfile.ZipFile(tmp_path / "file.zip").namelist()


def test_results_by_other_settings_stay_behind(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "run")
    settings = result_rows.settings_of(load_run(tiny_run).config.evaluate)
    for told, kept in ((settings, True), (settings | {"flip_average": True}, False)):
        results = {"rows": [], "provenance": {"steps": 12, "evaluated_by": told}}
        (tmp_path / "run" / "results.json").write_text(json.dumps(results))
        pack.pack(tmp_path / "run", tmp_path / "file.zip")
        assert ("results.json" in zipfile.ZipFile(tmp_path / "file.zip").namelist()) == kept
    assert "left out, as it is by another flip_average or" in capsys.readouterr().out


def test_a_run_that_has_not_ended_is_refused(tiny_run, tmp_path, refused_by):
    shutil.copytree(tiny_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["train"]["steps"] = 13
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert "at step 12 of 13" in refused_by(pack, f"--workdir={tmp_path / 'run'}",
                                            f"--output={tmp_path / 'file.zip'}")
    assert not (tmp_path / "file.zip").exists()


@pytest.mark.parametrize("factor, told", [
    (1e7, "features are not finite"), (1e-7, "do not fit into float16: features would differ by ")])
def test_weights_that_half_precision_cannot_hold_are_refused(tiny_run, tmp_path, monkeypatch, refused_by, factor, told):
    run = load_run(tiny_run)
    for array in run.variables["params"]["global_head"]["fc"].values():
        array *= np.float32(factor)
    monkeypatch.setattr(pack, "load_finished_run", lambda workdir: run)
    with np.errstate(over="ignore"):
        assert told in refused_by(pack, f"--workdir={tiny_run}", f"--output={tmp_path / 'file.zip'}")
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written(tiny_run, tmp_path, refused_by):
    assert "nowhere is not a folder that can be written to" in refused_by(
        pack, f"--workdir={tiny_run}", f"--output={tmp_path / 'nowhere' / 'file.zip'}")


def test_a_full_disk_is_not_called_a_damaged_file(packed, tmp_path, monkeypatch, refused_by):
    def write_bytes(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    error = refused_by(unpack, f"--workdir={tmp_path / 'run'}", f"--file={packed}")
    assert "No space left on device" in error and "damaged" not in error


def test_a_folder_that_is_there_is_refused(packed, tmp_path, refused_by):
    (tmp_path / "run").mkdir()
    assert "is there already" in refused_by(unpack, f"--workdir={tmp_path / 'run'}", f"--file={packed}")


def _drop_config(members):
    del members["config.json"]


def _damaged_config(members):
    members["config.json"] = members["config.json"][:-9]


def _other_format(members):
    members["about.json"] = b'{"format": 2, "step": 12}'


def _other_shape(members):
    kernel, bias = (next(name for name in members if name.endswith(end)) for end in ("kernel.npy", "bias.npy"))
    members[kernel] = members[bias]


def _lost_weight(members):
    del members[next(name for name in members if name.startswith("weights/"))]


def _weight_within_a_weight(members):
    name = next(name for name in members if name.startswith("weights/"))
    members[name.replace(".npy", ".more.npy")] = members[name]


def _pickle(members):
    members[next(name for name in members if name.startswith("weights/"))] = b"\x80\x04N."


@pytest.mark.parametrize("change, told", [
    (_drop_config, "config.json"), (_damaged_config, "file.zip is damaged"), (_other_format, "format 2"),
    (_other_shape, "another network"), (_lost_weight, "another network"),
    (_weight_within_a_weight, "no packed run"), (_pickle, "no packed run"), (dict.clear, "no packed run"),
], ids=lambda value: getattr(value, "__name__", None))
def test_an_archive_that_is_none(packed, tmp_path, refused_by, change, told):
    file = rewritten(packed, tmp_path / "file.zip", change)
    assert told in refused_by(unpack, f"--workdir={tmp_path / 'run'}", f"--file={file}")
    assert [path.name for path in tmp_path.iterdir()] == ["file.zip"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no archive", "missing"])
def test_a_damaged_file(packed, tmp_path, refused_by, damage):
    file = tmp_path / "file.zip"
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 16
    contents = {"truncated": content[:len(content) // 2], "flipped": content, "no archive": b"?" * 99}
    if damage in contents:
        file.write_bytes(contents[damage])
    told = "No such file or directory" if damage == "missing" else "damaged or no packed run"
    assert told in refused_by(unpack, f"--workdir={tmp_path / 'run'}", f"--file={file}")
    assert not (tmp_path / "run").exists() and len(list(tmp_path.iterdir())) == (damage != "missing")


def test_the_run_that_comes_along(tmp_path):
    """Trained on real people, it knows drawn ones, too: 7 of 40 others before the right one, where chance has 19.5."""
    assert unpack.main([f"--workdir={tmp_path / 'run'}"]) == 0
    run = load_run(tmp_path / "run")
    assert run.step == run.config.train.steps and run.label_map["dataset"] == "market1501"
    further = finetune.get_config()
    further.model.norm_momentum = run.config.model.norm_momentum  # is the training's, the rest is the network
    assert run.config.model == further.model
    assert (run.config.data.height, run.config.data.width) == (further.data.height, further.data.width)
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    joint = next(row for row in rows if row["dataset"] == "market1501" and row["feature"] == "joint")
    assert joint["rank1"] > 0.7
    extractor = load_extractor(tmp_path / "run")
    assert load_verdicts(tmp_path / "run", extractor)  # of these very weights
    size = (extractor.width, extractor.height)
    queries, gallery = (extractor(np.stack([
        np.asarray(Image.fromarray(synthetic_drawing.draw_image(0, person, camera, 0)).resize(size))
        for person in range(1, 41)])) for camera in (1, 2))
    distances = l2_distances(queries, gallery)
    assert (distances < np.diag(distances)[:, None]).sum(1).mean() < 12  # by chance 19.5, with a deviation of 1.8


def test_a_folder_that_cannot_be_made_is_told(packed, tmp_path, refused_by, monkeypatch):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file" / "run", tmp_path / ("x" * 300), "/", "."):
        assert "give another --workdir" in refused_by(unpack, f"--workdir={workdir}", f"--file={packed}")
    assert "Is a directory" in refused_by(unpack, f"--workdir={tmp_path / 'run'}", f"--file={tmp_path}")
    written = unpack.write_checkpoint

    def meanwhile(*arguments):
        written(*arguments)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "another's").touch()

    monkeypatch.setattr(unpack, "write_checkpoint", meanwhile)
    assert "cannot make" in refused_by(unpack, f"--workdir={tmp_path / 'run'}", f"--file={packed}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_home_may_be_written_as_shells_leave_it(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    unpack.unpack("~/runs/theirs", packed)
    assert load_run("~/runs/theirs").workdir == tmp_path / "runs" / "theirs"
    assert not (tmp_path / "~").exists()
