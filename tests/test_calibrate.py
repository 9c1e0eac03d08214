"""Thresholds for "same person": their rates against counting one by one, the calibrate and compare commands."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jlml_jax import calibrate, calibration, compare, features_file, protocols, search
from jlml_jax.checkpoints import load_run
from jlml_jax.errors import UserError


@pytest.fixture
def workdir(tiny_run, loaded_once, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def random_set(n=150, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    identities = rng.integers(-1, 12, n)
    centres = rng.standard_normal((13, dim))
    features = (centres[identities] + 0.6 * rng.standard_normal((n, dim))).astype(np.float32)
    return features, identities, rng.integers(0, 3, n)


def pairs_one_by_one(features, identities, cameras):
    same, different = [], []
    for i in range(len(features)):
        for j in range(i + 1, len(features)):
            distance = np.linalg.norm(features[i].astype(np.float64) - features[j])
            a, b = identities[i], identities[j]
            if min(a, b) < 0 or a == b == 0:
                continue
            if a != b:
                different.append(distance)
            elif cameras[i] != cameras[j]:
                same.append(distance)
    return np.array(same), np.array(different)


def test_images_that_are_queries_and_gallery_count_once(workdir, monkeypatch):
    """As of people held out, whose queries are in the gallery, too; of another data set nobody is held out."""
    config = json.loads((workdir / "config.json").read_text())
    seen = []
    load = protocols.load

    def held_out(name, data):
        seen.append(data.held_out_identities)
        trial = load(name, data).trial(0)
        query = trial.gallery.select(np.flatnonzero(np.arange(len(trial.gallery)) % 3 == 0))
        return protocols.Protocol(1, lambda number: dataclasses.replace(trial, query=query))

    monkeypatch.setattr(protocols, "load", held_out)
    monkeypatch.setattr(protocols, "refuse_trained_on", lambda *_: None)
    config["data"]["held_out_identities"] = 2
    (workdir / "config.json").write_text(json.dumps(config))
    calibrate.calibrate(workdir)
    trial = held_out(config["data"]["name"], load_run(workdir).config.data).trial(0)
    assert json.loads((workdir / "calibration.json").read_text())["source"]["images"] == len(trial.gallery)
    calibrate.calibrate(workdir, dataset=config["data"]["name"])
    assert seen == [2, 2, 0]


def test_cameras_of_joined_data_sets_have_no_names_in_common(workdir, monkeypatch):
    """Camera 1 of one is not that of the other, by whose statistics a run may have been adapted."""
    seen, load = [], protocols.load
    monkeypatch.setattr(protocols, "refuse_trained_on", lambda *_: None)

    class Spy:
        height, width, batch_size, cameras, fingerprint = 32, 16, 16, ("1", "2"), "0"

        def __call__(self, images, cameras):
            seen.extend(cameras)
            return np.random.default_rng(len(seen)).normal(size=(len(images), 8)).astype(np.float32)

    monkeypatch.setattr(calibrate, "load_extractor", lambda workdir: Spy())
    calibrate.calibrate(workdir)
    assert {"1", "2"} < set(seen)
    seen.clear()
    joined = dataclasses.replace(load("market1501", load_run(workdir).config.data).trial(0),
                                 offsets={"folder/a": 0, "market1501": 2})
    monkeypatch.setattr(protocols, "load", lambda name, data: protocols.Protocol(1, lambda number: joined))
    calibrate.calibrate(workdir)
    assert set(seen) == {""}


def test_rates_are_those_counted_pair_by_pair(monkeypatch):
    monkeypatch.setattr(calibration, "_BLOCK", 37)
    data = random_set()
    same, different = pairs_one_by_one(*data)
    result = calibration.calibrate(calibration.count_pairs(*data))
    assert result["pairs"] == {"same": len(same), "different": len(different)}
    assert 1000 < len(different) < 10_000 + 4
    for entry, rate in zip(result["thresholds"], (1e-2, 1e-3, 1e-4), strict=True):
        assert entry["rate"] == rate
        allowed = int(rate * len(different))
        if not allowed:
            assert entry["threshold"] is None
            continue
        # No coarser than a bin from the largest threshold that would do.
        exact = np.sort(different)[allowed]
        assert exact * (1 - 1 / 1024) <= entry["threshold"] <= exact
        accepted = (different < entry["threshold"]).sum()
        assert entry["different_pairs_accepted"] == accepted <= allowed
        assert entry["false_accept_rate"] == pytest.approx(accepted / len(different))
        assert entry["true_accept_rate"] == pytest.approx((same < entry["threshold"]).mean())
    assert [entry["threshold"] is None for entry in result["thresholds"]] == [False, False, len(different) < 10_000]
    grid = np.linspace(0, different.max(), 20_000)
    gaps = [abs((different < t).mean() - (same >= t).mean()) for t in grid]
    best = grid[int(np.argmin(gaps))]
    expected = ((different < best).mean() + (same >= best).mean()) / 2
    assert result["equal_error"]["rate"] == pytest.approx(expected, abs=0.005)
    for point in result["roc"]:
        assert point["false_accept_rate"] == pytest.approx((different < point["threshold"]).mean())
        assert point["true_accept_rate"] == pytest.approx((same < point["threshold"]).mean())
    assert 50 < len(result["roc"]) <= 200 and result["roc"][-1]["false_accept_rate"] > 0.99


def test_rates_of_known_counts():
    """Same pairs in bins 200 to 299, different ones in 250 to 3149, one in each."""
    same, different = np.zeros((2, 1 << 19), np.int64)
    same[200:300] = different[250:3150] = 1
    counts = calibration.PairCounts(same, different)
    result = calibration.calibrate(counts)
    # 1 % of 2,900, which is 28.999999999999996 to Python, are those in bins 250 to 278.
    assert result["thresholds"][0] == {"rate": 1e-2, "different_pairs_accepted": 29, "false_accept_rate": 0.01,
                                       "threshold": counts.edges()[279], "true_accept_rate": pytest.approx(0.79)}
    # At bin 298 48 of 2,900 are accepted and 2 of 100 rejected, at 299 49 and 1: 0.3 and 0.7 % apart.
    equal = result["equal_error"]
    assert equal["threshold"] == counts.edges()[298]
    assert (equal["false_accept_rate"], equal["true_accept_rate"]) == (pytest.approx(48 / 2900), pytest.approx(0.98))
    assert equal["rate"] == pytest.approx((48 / 2900 + 0.02) / 2)


def test_a_verdict_names_the_strictest_rate_that_accepts():
    verdicts = calibration.Verdicts([(1e-4, 0.5), (1e-3, 0.7), (1e-2, 0.9)])
    assert [verdicts.of(distance) for distance in (0.4, 0.5, 0.7, 0.9)] == [
        *(f"same person at a false accept rate of {rate}" for rate in ("1e-4", "1e-3", "1e-2")),
        "not the same person at 1e-2"]


def test_a_rate_is_measured_from_as_many_pairs_as_it_needs():
    """1e-3 needs a thousand pairs of different people: 1,000 are enough, 999 are not."""
    def thresholds(different):
        counts = calibration.PairCounts(np.zeros(1 << 19, np.int64), np.zeros(1 << 19, np.int64))
        counts.same[1000] = 5
        counts.different[2000:2000 + different] = 1
        return [entry["threshold"] for entry in calibration.calibrate(counts)["thresholds"]]

    assert [value is None for value in thresholds(999)] == [False, True, True]
    assert [value is None for value in thresholds(1000)] == [False, False, True]
    assert thresholds(1000)[1] == calibration.PairCounts(np.zeros(1 << 19), np.zeros(0)).edges()[2001]


@pytest.mark.parametrize(("change", "message"), [
    (lambda f, i, c: (f, i, np.zeros_like(c)), "seen by more cameras than one"),
    (lambda f, i, c: (f, np.ones_like(i), c), "no two of the 150 images show different persons"),
    (lambda f, i, c: (f, np.zeros_like(i), c), "no two of the 150 images show one person"),
])
def test_without_pairs_it_says_what_is_lacking(change, message):
    with pytest.raises(UserError, match=message):
        calibration.count_pairs(*change(*random_set()))


def test_a_labelled_split_and_the_verdicts_that_follow(run_command, workdir, tiny_extractor, tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    for path, seed in ((a, 0), (b, 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 32, 3), np.uint8)
        Image.fromarray(pixels // (1 + seed)).save(path)
    status, out, _ = run_command(compare, a, b, f"--workdir={workdir}")
    assert status == 0 and "no verdict: run python -m jlml_jax.calibrate" in out

    status, out, err = run_command(calibrate, f"--workdir={workdir}")
    assert status == 0, err
    content = json.loads((workdir / "calibration.json").read_text())
    # 4 people in 3 cameras: 3 images each in query (1 a camera) and gallery (2 a camera), 2 distractors, 3 junk images.
    persons, distractors = 4 * 9, 2
    assert content["source"] == {"dataset": "market1501", "images": persons + distractors + 3, "identities": 4}
    assert content["pairs"] == {"same": 4 * 3 * 3 * 3, "different": 6 * 81 + distractors * persons}
    assert content["thresholds"][0]["threshold"] > 0 and content["thresholds"][1]["threshold"] is None
    assert out.count("cannot be measured") == 2 and "equal error rate" in out

    extractor = tiny_extractor
    assert content["fingerprint"] == extractor.fingerprint
    first, second = (extractor(np.asarray(Image.open(path).resize((16, 32), Image.Resampling.BILINEAR))[None])[0]
                     for path in (a, b))
    for threshold, verdict in {1e-6: "not the same person at 1e-2",
                               9.0: "same person at a false accept rate of 1e-2"}.items():
        content["thresholds"][0]["threshold"] = threshold
        (workdir / "calibration.json").write_text(json.dumps(content))
        status, out, _ = run_command(compare, a, b, f"--workdir={workdir}")
        assert status == 0 and out.splitlines() == [f"distance {np.linalg.norm(first - second):.4f}", verdict]
    folder = tmp_path / "gallery"
    folder.mkdir()
    shutil.copy(b, folder)
    status, out, _ = run_command(search, f"--workdir={workdir}", f"--gallery={folder}", f"--query={a}")
    assert status == 0 and "same person at a false accept rate of 1e-2  -" in out and "no verdict" not in out

    content["fingerprint"] = "0123456789abcdef"
    (workdir / "calibration.json").write_text(json.dumps(content))
    status, _, err = run_command(compare, a, b, f"--workdir={workdir}")
    assert status == 2 and "0123456789abcdef" in err and extractor.fingerprint in err
    for damaged in ("{}", "[" * 100_000):
        (workdir / "calibration.json").write_text(damaged)
        assert "is damaged" in run_command(compare, a, b, f"--workdir={workdir}")[2]


def test_people_of_the_training_are_refused(run_command, workdir):
    labels = json.loads((workdir / "label_map.json").read_text())
    labels["identities"]["market1501"] = [1, 3]  # two of the test's
    (workdir / "label_map.json").write_text(json.dumps(labels))
    status, _, err = run_command(calibrate, f"--workdir={workdir}")
    assert status == 2 and "2 of the 4 test identities" in err and not (workdir / "calibration.json").exists()


def test_a_file_of_features(run_command, workdir, tiny_extractor, tmp_path):
    """The same images as numbers and as a file with names give the same figures."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60, 32)).astype(np.float32)
    identities, cameras = rng.integers(-1, 6, 60), rng.integers(0, 3, 60)
    names = np.array(["distractor", "anna", "ben", "cem", "dora", "eve", "junk"])[identities]
    names[np.flatnonzero(identities == -1)[:2]] = ""
    table = features_file.FeaturesFile(features, np.full(60, "f"), names, np.array(["x", "y", "z"])[cameras], None, "/",
                                       tiny_extractor.fingerprint)
    features_file.write(tmp_path / "own.npz", table)
    status, _, err = run_command(calibrate, f"--workdir={workdir}", f"--features={tmp_path / 'own.npz'}")
    assert status == 0, err
    content = json.loads((workdir / "calibration.json").read_text())
    expected = json.loads(json.dumps(calibration.calibrate(calibration.count_pairs(features, identities, cameras))))
    assert {name: content[name] for name in expected} == expected
    assert content["source"] == {"features": "own.npz", "images": 60, "identities": 5}


def test_without_cameras_all_pairs_of_a_person_count(run_command, workdir, tiny_extractor, tmp_path):
    rng = np.random.default_rng(0)
    features, identities = rng.standard_normal((30, 32)).astype(np.float32), rng.integers(1, 6, 30)
    table = features_file.FeaturesFile(features, np.full(30, "f"), identities.astype(str), np.full(30, ""), None, "/",
                                       tiny_extractor.fingerprint)
    features_file.write(tmp_path / "own.npz", table)
    status, out, err = run_command(calibrate, f"--workdir={workdir}", f"--features={tmp_path / 'own.npz'}")
    assert status == 0, err
    pairs = sum(number * (number - 1) // 2 for number in np.bincount(identities))
    assert "cameras are not known" in out and f"{pairs} pairs of the same person, {435 - pairs} of" in out


def test_too_few_pairs_are_told_from_no_calibration(run_command, workdir, tiny_extractor, tmp_path):
    assert "first" in calibration.load_verdicts(workdir, tiny_extractor).why_none
    features = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    table = features_file.FeaturesFile(features, np.full(6, "f"), np.array(["a", "b", "c"] * 2),
                                       np.repeat(["x", "y"], 3), None, "/", tiny_extractor.fingerprint)
    features_file.write(tmp_path / "few.npz", table)
    assert run_command(calibrate, f"--workdir={workdir}", f"--features={tmp_path / 'few.npz'}")[0] == 0
    Image.new("RGB", (16, 32)).save(tmp_path / "a.png")
    _, out, _ = run_command(compare, tmp_path / "a.png", tmp_path / "a.png", f"--workdir={workdir}")
    assert "no verdict: the run was calibrated on too few pairs of different people" in out
