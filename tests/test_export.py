"""Exported files against the run that they come from, loaded as their users load them."""

import json
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from processes import run_program

from jlml_jax import augment, evaluate, export, load_extractor, onnx_graph
from jlml_jax.checkpoints import Checkpoints, claim_workdir, load_run
from jlml_jax.datasets import synthetic_drawing
from jlml_jax.errors import UserError
from jlml_jax.models import build_model, init_variables, is_identity_layer
from jlml_jax.train_step import TrainState


def write_run(workdir, config):
    """A run after 12 steps whose batch statistics, scales and biases are far from the initial ones."""
    parent = {"dataset": "imagenet2012", "fingerprint": "4567", "identities": None, "init_from": None}
    label_map = {"dataset": "market1501", "fingerprint": "0123", "identities": [2, 7, 11], "init_from": parent}
    claim_workdir(workdir, config, label_map)
    rng = np.random.default_rng(0)
    ranges = {"scale": (0.5, 1.5), "bias": (-0.5, 0.5), "mean": (-0.5, 0.5), "var": (0.3, 3.0)}

    def draw(path, leaf):
        name = path[-1].key
        return rng.uniform(*ranges[name], leaf.shape).astype(np.float32) if name in ranges else leaf

    variables = init_variables(build_model(config, 3), 0, config.data.height, config.data.width)
    variables = jax.tree_util.tree_map_with_path(draw, variables)
    checkpoints = Checkpoints(workdir, 1)
    checkpoints.save(12, TrainState(np.int32(12), variables["params"], variables["batch_stats"], {}), {"interval": {}})
    checkpoints.close()


@pytest.fixture
def shallow_config(tiny_config):
    """Two stages instead of four: every kind of layer, half the time to compile."""
    tiny_config.model.global_widths = tiny_config.model.local_widths = (4, 6)
    return tiny_config


@pytest.fixture
def run(tmp_path, shallow_config):
    write_run(tmp_path / "run", shallow_config)
    fingerprint = load_extractor(tmp_path / "run").fingerprint
    (tmp_path / "run" / "calibration.json").write_text(json.dumps(
        {"fingerprint": fingerprint, "thresholds": [{"rate": 1e-3, "threshold": 0.5}]}))
    return tmp_path / "run"


def people(size, count=3):
    """Drawn people cut to `size`, uint8 [count, *size, 3]; not those that the export itself tries."""
    return np.stack([synthetic_drawing.draw_image(5, 50 + i, 1 + i, 0)[40:40 + size[0], 10:10 + size[1]]
                     for i in range(count)])


def features_of(workdir, images):
    saved = load_run(workdir)
    model = build_model(saved.config, 0)
    forward = jax.jit(lambda variables, images: model.apply(variables, augment.normalise(images, saved.config.data)))
    features = {branch: np.asarray(values)
                for branch, values in forward(saved.variables, images)["features"].items()}
    return evaluate.matching_features(features, saved.config.evaluate.normalize)["joint"][:]


def consume(program, folder, blocked):
    """Runs `program` in a process that cannot import the modules in `blocked`."""
    block = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    done = run_program(block + program, cwd=folder)
    assert done.returncode == 0, done.stderr


def assert_near(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape and actual.dtype == np.float32
    assert np.all(np.linalg.norm(actual - expected, axis=1) <= tolerance * np.linalg.norm(expected, axis=1))


# --- as its users load it

def test_onnxruntime_and_numpy_are_all_that_the_onnx_file_needs(run):
    images = people((32, 16))
    np.save(run / "images.npy", images)
    for signature in ("uint8_nhwc", "float32_nchw"):
        export.export_run(run, "onnx", run / f"{signature}.onnx", signature)
    consume("""
import json, numpy as np, onnxruntime
images = np.load("images.npy")
session = onnxruntime.InferenceSession("uint8_nhwc.onnx")
np.save("uint8.npy", session.run(["features"], {"images": images})[0])
session = onnxruntime.InferenceSession("float32_nchw.onnx")
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
images = (images / 255 - about["mean"]) / about["std"]
images = images.transpose(0, 3, 1, 2).astype(np.float32)
np.save("float32.npy", session.run(["features"], {"images": images})[0])
json.dump(about, open("about.json", "w"))
""", run, ("jax", "jlml_jax", "flax", "onnx", "tensorflow"))
    expected = features_of(run, images)
    assert np.linalg.norm(expected[0] - expected[1]) > 1e-3 * np.linalg.norm(expected[0])
    assert_near(np.load(run / "uint8.npy"), expected)
    assert_near(np.load(run / "float32.npy"), expected)
    about = json.loads((run / "about.json").read_text())
    assert about["input"]["shape"] == ["batch", 3, 32, 16] and about["input"]["dtype"] == "float32"
    assert about["output"]["shape"] == ["batch", 32] and about["output"]["normalize"] == "none"
    assert about["trained_on"] == [{"dataset": "market1501", "fingerprint": "0123"},
                                   {"dataset": "imagenet2012", "fingerprint": "4567"}]
    assert about["step"] == 12
    assert about["config"]["model"]["num_strips"] == 2
    assert about["calibration"]["thresholds"] == [{"rate": 1e-3, "threshold": 0.5}]
    assert {"jax", "onnx", "onnxruntime"} <= set(about["provenance"]["versions"])


def test_jax_alone_loads_the_stablehlo_file(run):
    images = people((32, 16))
    np.save(run / "images.npy", images)
    for signature in ("uint8_nhwc", "float32_nchw"):
        export.export_run(run, "stablehlo", run / f"{signature}.zip", signature)
    consume("""
import jax, json, numpy as np, zipfile
images = np.load("images.npy")
archive = zipfile.ZipFile("uint8_nhwc.zip")
exported = jax.export.deserialize(archive.read("exported"))
assert set(exported.platforms) == {"cpu", "cuda", "tpu"}, exported.platforms
np.save("uint8.npy", exported.call(images))
archive = zipfile.ZipFile("float32_nchw.zip")
about = json.loads(archive.read("metadata.json"))
images = ((images / 255 - about["mean"]) / about["std"]).transpose(0, 3, 1, 2).astype(np.float32)
np.save("float32.npy", jax.export.deserialize(archive.read("exported")).call(images))
""", run, ("jlml_jax", "flax", "onnx", "tensorflow"))
    expected = features_of(run, images)
    assert_near(np.load(run / "uint8.npy"), expected)
    assert_near(np.load(run / "float32.npy"), expected)
    about = json.loads(zipfile.ZipFile(run / "uint8_nhwc.zip").read("metadata.json"))
    assert about["input"]["shape"] == ["batch", 32, 16, 3] and about["calibration"] and about["config"]


# --- every network that the config can name

VARIANTS = {
    "global": {"model.branches": "global", "model.feature_norm": True, "evaluate.normalize": "joint"},
    "local": {"model.branches": "local", "model.num_strips": 4, "model.feature_relu": True,
              "evaluate.normalize": "per_branch"},
    "two stems": {"model.shared_stem": False, "model.num_strips": 1, "model.depth": 2, "model.norm_epsilon": 1e-2,
                  "model.global_feature_dim": 5, "evaluate.normalize": "per_branch"},
    "uni": {"model.loss": "uni", "model.feature_norm": True, "model.feature_relu": True, "evaluate.normalize": "joint",
            "data.height": 36, "data.width": 22, "data.std": (0.2, 0.3, 0.25), "model.num_strips": 3,
            "model.local_widths": (4,), "model.global_widths": (4, 4, 6)},
    "flipped": {"evaluate.flip_average": True, "evaluate.normalize": "per_branch"},
}


@pytest.mark.parametrize(("variant", "norms", "passes"), [
    ("global", 1, 1), ("local", 1, 1), ("two stems", 2, 1), ("uni", 1, 1), ("flipped", 2, 2)])
def test_every_variant_agrees_with_its_run(tmp_path, shallow_config, capsys, variant, norms, passes):
    shallow_config.update_from_flattened_dict(VARIANTS[variant])
    write_run(tmp_path / "run", shallow_config)
    export.export_run(tmp_path / "run", "onnx", tmp_path / "jlml.onnx")
    error = float(capsys.readouterr().out.split("people to ")[1].split()[0])
    assert error < 1e-5
    # One convolution or product a kernel, and no trace of batch normalisation.
    graph = onnx.load(tmp_path / "jlml.onnx").graph
    operators = [node.op_type for node in graph.node]
    params = load_run(tmp_path / "run").variables["params"]
    kernels = [leaf.ndim for path, leaf in jax.tree_util.tree_leaves_with_path(params)
               if path[-1].key == "kernel" and not is_identity_layer(path[0].key)]
    assert [operators.count("Conv"), operators.count("Gemm")] == [passes * kernels.count(4), passes * kernels.count(2)]
    assert sum(len(array.dims) == 4 and array.dims[0] > 1 for array in graph.initializer) == kernels.count(4)
    assert operators.count("Sub") == 1  # the mean of the pixels
    assert operators.count("Sqrt") == norms


def test_without_the_mirror_image_the_graph_has_one_pass_and_no_thresholds(tmp_path, shallow_config, capsys):
    shallow_config.evaluate.flip_average = True
    write_run(tmp_path / "run", shallow_config)
    (tmp_path / "run" / "calibration.json").write_text(json.dumps({
        "fingerprint": load_extractor(tmp_path / "run").fingerprint, "thresholds": []}))
    assert export.main([f"--workdir={tmp_path / 'run'}", "--format=onnx", f"--output={tmp_path / 'jlml.onnx'}",
                        "--no_flip"]) == 0
    assert "calibration.json is left out: it is of features with the mirror images'" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "jlml.onnx")
    images = people((32, 16))
    assert_near(session.run(["features"], {"images": images})[0], features_of(tmp_path / "run", images))
    about = session.get_modelmeta().custom_metadata_map
    assert "calibration" not in about and json.loads(about["output"])["flip_average"] is False


def test_features_that_differ_are_not_written(run, tmp_path, monkeypatch):
    wrong = augment.normalise
    monkeypatch.setattr(export, "normalise", lambda images, data: wrong(images, data) * 1.01)
    (tmp_path / "jlml.onnx").write_text("an earlier export")
    with pytest.raises(UserError, match=r"differ from the run's by \d\.\de-0[123] of their norm"):
        export.export_run(run, "onnx", tmp_path / "jlml.onnx")
    assert (tmp_path / "jlml.onnx").read_text() == "an earlier export"
    assert not list(tmp_path.glob("*.part"))


# --- the conversion, beyond what the network asks of it today

KERNEL = np.random.default_rng(0).normal(size=(3, 3, 4, 4))


def conv(x, **options):
    return jax.lax.conv_general_dilated(x, KERNEL.astype(np.float32), (2, 1), ((1, 0), (2, 1)),
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def flat(x):
    return x.sum((1, 2))


@pytest.mark.parametrize("function", [
    lambda x: flat(conv(x, rhs_dilation=(2, 1))),
    lambda x: flat((y := conv(x)) * (3 * y + 1)),  # read as it is, and with a factor and a term
    lambda x: flat(2 - conv(x)),
    lambda x: flat(conv(x) / np.arange(1, 5, dtype=np.float32) - np.arange(4, dtype=np.float32)),
    lambda x: flat(x * np.arange(48, dtype=np.float32).reshape(6, 8, 1)),
    lambda x: flat(jnp.maximum(x, np.arange(-1, 3, dtype=np.float32))),
    lambda x: flat((x.reshape(-1, 4) * np.arange(4, dtype=np.float32) + 1).reshape(x.shape)),
    lambda x: x.sum(3).sum(2),
    lambda x: flat(jnp.concatenate(jnp.split(x, (2, 3), axis=3)[::-1], axis=3)),
    lambda x: flat(jnp.concatenate(jnp.split(x, 2, axis=2)[::-1], axis=2)),
    lambda x: flat(conv(jnp.flip(x, 2))),
    lambda x: flat(conv(jnp.flip(x, (1, 2))) + conv(x)),
    lambda x: flat(jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 3, 1), (1, 1, 2, 1),
                                         ((0, 0), (0, 1), (1, 1), (0, 0)))),
])
def test_conversion_follows_jax(function):
    x = np.random.default_rng(1).normal(size=(2, 6, 8, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(to_onnx(function).SerializeToString())
    np.testing.assert_allclose(session.run(None, {"images": x})[0], function(x), rtol=1e-4, atol=1e-4)


def to_onnx(function):
    batch, = jax.export.symbolic_shape("batch")
    jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, 6, 8, 4), jnp.float32))
    model = onnx_graph.convert(jaxpr, [], nchw=False)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize(("function", "primitive"), [
    (lambda x: flat(jnp.tanh(x)), "tanh"),
    (lambda x: x.sum(1).sum(1), "reduce_sum"),  # what is left would be stored in another order
    (lambda x: x.reshape(-1, 192), "reshape"),
    (lambda x: jnp.concatenate([x.reshape(-1, 4), x.reshape(-1, 4)]), "concatenate"),
    (lambda x: x.reshape(-1, 4).sum(1), "reduce_sum"),
    (lambda x: flat(x.astype(jnp.bfloat16).astype(jnp.float32)), "convert_element_type"),
    (lambda x: jnp.dot(x.sum((1, 2)), x.sum((1, 2)).T), "transpose"),
])
def test_conversion_refuses_what_it_does_not_know(function, primitive):
    with pytest.raises(UserError, match=rf"^{primitive}\(.*--format=stablehlo"):
        to_onnx(function)


# --- bad input

@pytest.fixture
def refused(refused_by, tmp_path):
    """Runs the command, which must end with status 2 and one line, and write nothing; gives the line."""
    def run(*arguments):
        before = sorted(tmp_path.rglob("*"))
        error = refused_by(export, *arguments)
        assert sorted(tmp_path.rglob("*")) == before
        return error
    return run


def test_flags_that_cannot_be_followed(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    workdir, onnx_format, output = "--workdir=" + str(tmp_path / "empty"), "--format=onnx", f"--output={tmp_path}/x"
    assert "--format=tflite is unknown; known are onnx" in refused(workdir, "--format=tflite", output)
    assert "--input=nhwc is unknown" in refused(workdir, onnx_format, output, "--input=nhwc")
    assert f"--output={tmp_path} is a folder" in refused(workdir, onnx_format, f"--output={tmp_path}")
    assert "nowhere is not a folder" in refused(workdir, onnx_format, f"--output={tmp_path}/nowhere/x")
    assert "is not a run's folder" in refused(workdir, onnx_format, output)


def test_runs_that_cannot_be_exported(refused, run, tmp_path, tiny_config, monkeypatch):
    flags = "--format=onnx", f"--output={tmp_path}/x"
    (run / "calibration.json").write_text("{")
    assert "calibration.json is damaged" in refused(f"--workdir={run}", *flags)
    (run / "calibration.json").write_text('{"fingerprint": "0123456789abcdef", "thresholds": []}')
    assert "is of another model (fingerprint 0123456789abcdef)" in refused(f"--workdir={run}", *flags)
    (run / "calibration.json").unlink()
    claim_workdir(tmp_path / "new", tiny_config, load_run(run).label_map).close()
    assert "has no checkpoint yet" in refused(f"--workdir={tmp_path / 'new'}", *flags)
    saved = load_run(run)
    saved.variables["params"]["stem"]["norm"]["scale"][0] = np.nan
    monkeypatch.setattr(export, "load_run", lambda workdir: saved)
    assert "features are not finite" in refused(f"--workdir={run}", *flags)


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_onnx_not_installed(refused, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(f"--workdir={tmp_path}", "--format=onnx", f"--output={tmp_path}/x")
    assert "pip install -e '.[onnx]'" in message


def test_a_folder_that_cannot_be_written(refused, run, tmp_path):
    output = tmp_path / ("x" * 250)  # there is no room in the name to write it aside
    assert "(File name too long)" in refused(f"--workdir={run}", "--format=onnx", f"--output={output}")


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as exit_:
        export.main(["--help"])
    assert exit_.value.code == 0
    assert "python -m jlml_jax.export --workdir=runs/synthetic" in capsys.readouterr().out
