"""Runs with statistics by camera: made by adapt, and what every command makes of them."""

import dataclasses
import json
import shutil
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from jlml_jax import (
    adapt,
    calibrate,
    camera_statistics,
    compare,
    evaluate,
    export,
    extract,
    features_file,
    load_extractor,
    norm_statistics,
    pack,
    parallel,
    prepare,
    search,
    unpack,
)
from jlml_jax.calibration import load_verdicts
from jlml_jax.checkpoints import load_run
from jlml_jax.errors import UserError
from jlml_jax.extractor import Extractor
from jlml_jax.models import build_model

pytestmark = pytest.mark.usefixtures("loaded_once")

SIZES = {"hall": 16, "gate": 16}


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """The same people by two cameras, the second of which sees all at half the contrast, and brighter."""
    folder = tmp_path_factory.mktemp("crops")
    pixels = np.random.default_rng(0).integers(0, 60, (SIZES["hall"], 32, 16, 3)).astype(np.uint8) * 2
    lines = ["image,identity,camera"]
    for camera, count in SIZES.items():
        for i in range(count):
            Image.fromarray(pixels[i] if camera == "hall" else pixels[i] // 2 + 100).save(folder / f"{camera}{i}.png")
            lines.append(f"{camera}{i}.png,{i},{camera}")
    (folder / "crops.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def no_shared_examples():
    """So that the statistics of the same pictures in another light undo the light in whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm_statistics, "GLOBAL_PSEUDO_COUNT", 0)
        yield


@pytest.fixture(scope="module")
def workdir(crops, tiny_run, tmp_path_factory, no_shared_examples):
    folder = tmp_path_factory.mktemp("by_camera") / "run"
    adapt.adapt(tiny_run, str(crops / "crops.csv"), folder, by_camera=True)
    return folder


@pytest.fixture(scope="module")
def extractor(workdir):
    return load_extractor(workdir)


def pixels_of(crops, camera):
    return np.stack([np.asarray(Image.open(crops / f"{camera}{i}.png")) for i in range(SIZES[camera])])


def test_a_cameras_features_are_those_by_the_statistics_of_its_images(crops, workdir, tiny_run, extractor):
    """As evaluation computes them, from the run before."""
    run = load_run(tiny_run)
    mesh, size = parallel.make_mesh(), run.config.evaluate.batch_size
    model = build_model(run.config, 0)
    statistics = norm_statistics.make_statistics(model, run.config, mesh)
    forward = evaluate.make_forward(model, run.config, mesh)

    def of_images(images):
        order = norm_statistics.chosen_images(len(images))
        return norm_statistics.of_batches(statistics, run.variables,
                                          norm_statistics.full_batches(images[order], size), mesh)

    every = np.concatenate([pixels_of(crops, camera) for camera in SIZES])
    of_all = of_images(every)
    assert extractor.cameras == ("gate", "hall")
    features = {}
    for camera in SIZES:
        images = pixels_of(crops, camera)[:8]
        own = norm_statistics.of_camera(of_images(pixels_of(crops, camera)), SIZES[camera], of_all)
        branches = forward(run.variables | {"batch_stats": own}, parallel.shard_batch(images, mesh))
        matching = evaluate.matching_features({name: np.asarray(values) for name, values in branches.items()},
                                              "per_branch")
        features[camera] = extractor(images, [camera] * 8)
        np.testing.assert_allclose(features[camera], list(matching.values())[-1][:], rtol=1e-3, atol=1e-4)
    as_one = {camera: extractor(pixels_of(crops, camera)[:8]) for camera in SIZES}

    def apart(by_camera):
        same = np.linalg.norm(by_camera["hall"] - by_camera["gate"], axis=1).mean()
        return same / np.linalg.norm(by_camera["hall"][:, None] - by_camera["gate"], axis=2).mean()

    assert apart(features) < 0.85 * apart(as_one)  # the same pictures in another light


def test_a_mixed_batch_is_what_each_image_is_alone(crops, extractor, workdir, tiny_run):
    images = np.concatenate([pixels_of(crops, camera)[:10] for camera in SIZES])  # more than one batch
    cameras = ["hall"] * 10 + ["gate"] * 9 + ["attic"]
    features = extractor(images, cameras)
    for row in (0, 9, 10, 15, 18, 19):
        alone = extractor(images[[row]], [cameras[row]])
        np.testing.assert_allclose(features[[row]], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features[19:], extractor(images[19:]), rtol=1e-4, atol=1e-5)
    assert np.abs(features[:19] - extractor(images[:19])).max() > 1e-2
    run = load_run(workdir)
    plain = Extractor(dataclasses.replace(run, cameras=None), parallel.make_mesh())
    np.testing.assert_allclose(extractor(images), plain(images, cameras), rtol=1e-4, atol=1e-5)
    assert len({extractor.fingerprint, plain.fingerprint, load_extractor(tiny_run).fingerprint}) == 3
    with pytest.raises(ValueError, match="3 cameras for 20 images"):
        extractor(images, ["hall"] * 3)


def test_extract_goes_by_the_cameras_of_the_list(crops, extractor, workdir, tmp_path, capsys):
    lines = (crops / "crops.csv").read_text().splitlines()
    lines[2] = lines[2].replace(",hall", ",attic")
    lines[3] = lines[3].replace(",hall", ",")
    (crops / "more.csv").write_text("\n".join(lines))
    output = tmp_path / "features.npz"
    extract.extract(str(workdir), str(crops / "more.csv"), str(output))
    told = "2 images go by the statistics of all cameras together, as the run has none of "
    assert told + "camera attic, an unknown camera" in capsys.readouterr().err
    table = features_file.read(output)
    images = np.concatenate([pixels_of(crops, camera) for camera in SIZES])
    np.testing.assert_allclose(table.features, extractor(images, table.cameras.tolist()), rtol=1e-4, atol=1e-5)
    extract.extract(str(workdir), str(crops / "crops.csv"), str(output))
    assert not capsys.readouterr().err
    assert calibrate.main(["--workdir", str(workdir), "--features", str(output)]) == 0
    assert load_verdicts(workdir, extractor)
    (workdir / "calibration.json").unlink()


def test_search_takes_the_querys_camera_and_keeps_an_image_to_its_own(crops, workdir, tmp_path, capsys):
    def run(*arguments):
        return search.main([f"--workdir={workdir}", f"--index={tmp_path / 'index'}", "--exclude_own_camera",
                            f"--query={crops / 'gate3.png'}", *arguments])

    listing = f"--gallery={crops / 'crops.csv'}"
    assert run(listing) == 2 and "give --query_camera=CAMERA" in capsys.readouterr().err
    assert run(listing, "--query_camera=gate", "--top_k=1") == 0
    found = capsys.readouterr().out
    assert "hall3.png" in found.splitlines()[-2]
    lines = (crops / "crops.csv").read_text().splitlines()
    (crops / "other.csv").write_text("\n".join([lines[0], lines[1].replace(",hall", ",gate")]))
    assert run(f"--gallery={crops / 'other.csv'}", "--query_camera=gate") == 2
    error = capsys.readouterr().err
    assert "hall0.png" in error and "is of camera gate now" in error and "of hall, by whose statistics" in error
    (crops / "other.csv").write_text("\n".join([lines[0], lines[1].replace(",hall", ",")]))
    assert run(f"--gallery={crops / 'other.csv'}", "--query_camera=gate") == 0  # not told again: it stays the hall's


def test_compare_takes_cameras(crops, extractor, workdir, capsys):
    images = [str(crops / f"{camera}3.png") for camera in ("hall", "gate")]
    distances = []
    for arguments in ([], ["--cameras", "hall", "gate"]):
        assert compare.main([*images, f"--workdir={workdir}", *arguments]) == 0
        out, error = capsys.readouterr()
        distances.append(float(out.split()[1]))
        assert ("2 images go by the statistics of all" in error) == (not arguments)
    features = [extractor(pixels_of(crops, camera)[[3]], [camera])[0] for camera in ("hall", "gate")]
    assert distances[1] == pytest.approx(np.linalg.norm(features[0] - features[1]), abs=1e-3)
    assert distances[1] < distances[0]


def test_a_graph_is_of_one_camera(crops, extractor, workdir, tmp_path, refused_by):
    output = tmp_path / "gate.zip"
    assert export.main([f"--workdir={workdir}", "--format=stablehlo", f"--output={output}", "--camera=gate"]) == 0
    with zipfile.ZipFile(output) as archive:
        call = jax.export.deserialize(bytearray(archive.read("exported"))).call
        assert json.loads(archive.read("metadata.json"))["camera"] == "gate"
    images = pixels_of(crops, "gate")[:3]
    np.testing.assert_allclose(call(images), extractor(images, ["gate"] * 3), rtol=1e-3, atol=1e-4)
    error = refused_by(export, f"--workdir={workdir}", "--format=stablehlo", f"--output={output}", "--camera=attic")
    assert "has no statistics of camera attic; it has them of gate, hall" in error


def test_a_run_without_them_has_a_graph_of_no_camera(tiny_run, tmp_path, refused_by):
    assert "adapt --by_camera" in refused_by(export, f"--workdir={tiny_run}", "--format=stablehlo",
                                             f"--output={tmp_path / 'x.zip'}", "--camera=gate")


def test_packing_keeps_them(workdir, tmp_path):
    pack.pack(workdir, tmp_path / "run.zip")
    unpack.unpack(tmp_path / "run", tmp_path / "run.zip")
    ours, theirs = load_run(workdir).cameras, load_run(tmp_path / "run").cameras
    assert ours.cameras == theirs.cameras
    jax.tree.map(np.testing.assert_array_equal, ours.batch_stats, theirs.batch_stats)


def test_adapted_again_without_cameras_it_has_none(crops, workdir, tmp_path):
    adapt.adapt(str(workdir), str(crops / "crops.csv"), tmp_path / "run")
    assert load_run(tmp_path / "run").cameras is None


def test_images_that_tell_no_camera_are_refused(crops, tiny_run, tmp_path, refused_by):
    error = refused_by(adapt, "--workdir", tiny_run, "--images", crops, "--output", tmp_path / "run", "--by_camera")
    assert "32 images tell no camera: gate0.png" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["cut", "another", "twice", "infinite", "short", "compressed", "alone"])
def test_a_damaged_file_is_told(workdir, tmp_path, change):
    batch_stats = load_run(workdir).variables["batch_stats"]
    path = shutil.copy(workdir / camera_statistics.FILE, tmp_path / camera_statistics.FILE)
    arrays = dict(np.load(path))
    if change == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif change == "another":
        del arrays["stem.norm.mean"]
    elif change == "twice":
        arrays["cameras"] = np.array(["gate", "gate"])
    elif change == "infinite":
        arrays["stem.norm.var"][0, 0] = np.inf
    elif change == "compressed":  # the method of the first member, in its header and in the archive's directory
        content = bytearray(path.read_bytes())
        content[8] = content[content.index(b"PK\x01\x02") + 10] = 77
        path.write_bytes(content)
    elif change == "alone":
        with open(path, "wb") as file:
            np.save(file, arrays["stem.norm.var"])
    else:
        arrays["stem.norm.var"] = arrays["stem.norm.var"][:1]
    if change not in ("cut", "compressed", "alone"):
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=r"camera_statistics.npz is damaged \(.*adapt --by_camera"):
        camera_statistics.read(path, batch_stats)
    assert camera_statistics.read(tmp_path / "none.npz", batch_stats) is None


def test_calibration_goes_by_the_cameras_as_the_user_named_them(crops, workdir, extractor, tmp_path, capsys):
    """A data set numbers its cameras: gate is its camera 1, hall its camera 2."""
    labelled = tmp_path / "shop"
    shutil.copytree(crops, labelled)
    lines = (labelled / "crops.csv").read_text().splitlines()
    (labelled / "crops.csv").write_text("\n".join(
        [lines[0] + ",split", *(line + (",query" if line.startswith("gate") else ",gallery") for line in lines[1:])]))
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["data_dir"] = str(tmp_path / "data")
    (run / "config.json").write_text(json.dumps(config))
    prepare.prepare("folder/shop", labelled / "crops.csv", tmp_path / "data")
    capsys.readouterr()
    assert calibrate.main([f"--workdir={run}", "--dataset=folder/shop"]) == 0
    assert not capsys.readouterr().err  # no camera is unknown
    by_dataset = json.loads((run / "calibration.json").read_text())
    extract.extract(str(run), str(crops / "crops.csv"), str(tmp_path / "features.npz"))
    assert calibrate.main([f"--workdir={run}", f"--features={tmp_path / 'features.npz'}"]) == 0
    by_features = json.loads((run / "calibration.json").read_text())
    assert by_dataset["equal_error"] == pytest.approx(by_features["equal_error"], abs=1e-3)


def test_a_graph_has_the_thresholds_of_its_own_features_alone(crops, workdir, tmp_path, capsys):
    run, output = tmp_path / "run", tmp_path / "graph.zip"
    shutil.copytree(workdir, run)
    extract.extract(str(run), str(crops / "crops.csv"), str(tmp_path / "features.npz"))
    assert calibrate.main([f"--workdir={run}", f"--features={tmp_path / 'features.npz'}"]) == 0
    for arguments, told in ([], True), (["--camera=gate"], False):
        capsys.readouterr()
        assert export.main([f"--workdir={run}", "--format=stablehlo", f"--output={output}", *arguments]) == 0
        assert ("calibration.json is left out: it is of features by each camera's" in capsys.readouterr().out) == told
        with zipfile.ZipFile(output) as archive:
            assert ("calibration" in json.loads(archive.read("metadata.json"))) != told


@pytest.mark.parametrize("most_images", [1024, 24])  # all at once, or a sample that the bad one is not in
def test_a_camera_of_bad_images_alone_is_left_out_and_they_are_told_once(
        crops, tiny_run, tmp_path, run_command, monkeypatch, most_images):
    monkeypatch.setattr(norm_statistics, "MOST_IMAGES", most_images)
    folder = tmp_path / "crops"
    shutil.copytree(crops, folder)
    (folder / "bad.png").write_text("no picture")
    with (folder / "crops.csv").open("a") as file:
        file.write("\nbad.png,1,attic\n")
    output = tmp_path / "run"
    status, told, error = run_command(adapt, "--workdir", tiny_run, "--images", folder / "crops.csv",
                                      "--output", output, "--by_camera", "--keep_going")
    assert status == 0, error
    assert error.count("skipped: bad.png") == 1 and "camera attic is left out: none of its images can be read" in error
    assert load_run(output).cameras.cameras == ("gate", "hall") and "attic" not in told
