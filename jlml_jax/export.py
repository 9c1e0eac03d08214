"""Exports a run for use without jlml_jax: crops in, matching features out, as ONNX or as StableHLO.

The weights, the normalisation of the pixels and that of the features are inside. Before the file is written, its
features of drawn people are compared with the run's own. Crops are resized outside, as in training, by Pillow's
BILINEAR: a batch has one size in any case, and ONNX's antialiased Resize is not the same filter (in onnxruntime 1.32
up to 8 of 255 levels away where it shrinks).
"""

import dataclasses
import io
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import export as jax_export
from jax.sharding import Mesh

from jlml_jax import calibration, parallel, provenance
from jlml_jax.arguments import Parser
from jlml_jax.augment import normalise
from jlml_jax.checkpoints import SavedRun, load_run
from jlml_jax.datasets import synthetic_drawing
from jlml_jax.errors import UserError, exit_status, first_few, printable
from jlml_jax.extractor import Extractor
from jlml_jax.files import check_output, user_path, write_output
from jlml_jax.models import build_model

FORMATS = ("onnx", "stablehlo")
INPUTS = {
    "uint8_nhwc": "RGB crops as they are decoded, 0 to 255; the graph subtracts the mean and divides by std",
    "float32_nchw": "RGB crops, (pixel / 255 - mean) / std by channel; the graph does not normalise them again",
}
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # of the features, relative to their norm
BATCH_SIZES = (1, 5)  # that are tried

_EXAMPLE = """example:
  python -m jlml_jax.export --workdir=runs/synthetic --format=onnx --output=jlml.onnx
"""

Embed = Callable[[np.ndarray], np.ndarray]  # images as the exported graph takes them -> features float32 [B, dim]


def export_run(workdir: str | Path, file_format: str, output: str | Path, signature: str = "uint8_nhwc",
               camera: str | None = None, no_flip: bool = False) -> None:
    """Writes the run in `workdir` to the file `output`, and prints what it takes and gives.

    Both formats map `images`, of any batch size and of the run's height and width, to `features` float32 [batch, dim]:
    the feature to match by, normalised as `config.evaluate.normalize` says.

    Args:
        workdir: folder of a trained run.
        file_format: "onnx" (metadata: `metadata_props`, each value JSON), or "stablehlo" (a zip archive of `exported`,
            for `jax.export.deserialize`, and `metadata.json`), for the platforms cpu, cuda and tpu.
        output: the file; an existing one is replaced.
        signature: "uint8_nhwc", images uint8 [batch, height, width, 3], or "float32_nchw", images float32
            [batch, 3, height, width], already normalised.
        camera: whose statistics batch normalisation uses, in a run that has them by camera; None: the run's own.
        no_flip: features are of the image alone, whatever the run's `evaluate.flip_average` is.

    Raises:
        UserError: the run does not load or has no statistics of `camera`, its thresholds are of another model, `output`
            cannot be written, onnx is not installed, or the exported features differ from the run's by more than 1e-4
            of their norm. Nothing is written then.
    """
    output = user_path(output)
    if file_format not in FORMATS:
        raise UserError(f"--format={file_format} is unknown; known are {', '.join(FORMATS)}")
    if signature not in INPUTS:
        raise UserError(f"--input={signature} is unknown; known are {', '.join(INPUTS)}")
    check_output(output)
    build = _onnx_builder() if file_format == "onnx" else _build_stablehlo

    run, mesh = load_run(workdir), parallel.make_mesh(jax.local_devices()[:1])
    no_flip = no_flip and run.config.evaluate.flip_average
    thresholds = _thresholds_of(run, mesh, camera, no_flip)
    if no_flip:
        run.config.evaluate.flip_average = False
    if camera is not None:
        known = run.cameras.cameras if run.cameras else ()
        if camera not in known:
            raise UserError(f"{workdir} has no statistics of camera {printable(camera)}; it has them of "
                            + (first_few([printable(name) for name in known]) or "no camera (make them with "
                               "python -m jlml_jax.adapt --by_camera)"))
        run = dataclasses.replace(run, variables=run.variables | {"batch_stats": run.cameras.of(camera)})
    # By default GPUs and TPUs multiply with 10 bits of mantissa or fewer, which misses the tolerance by itself.
    with jax.default_matmul_precision("highest"):
        images = synthetic_drawing.draw_crops(max(BATCH_SIZES), run.config.data.height, run.config.data.width)
        expected = Extractor(dataclasses.replace(run, cameras=None), mesh)(images)
        metadata = _describe(run, signature, expected.shape[1]) | ({} if camera is None else {"camera": camera})
        if thresholds is not None:
            metadata["calibration"] = thresholds
        content, embed = build(run, signature, metadata)
    error = _max_relative_error(embed, _as_input(images, signature, run.config.data), expected)
    if not error <= TOLERANCE:  # also where it is NaN
        raise UserError(f"the features that the {file_format} graph of {workdir} gives differ from the run's by "
                        f"{error:.1e} of their norm, {TOLERANCE:.0e} is allowed; {output} is not written")
    write_output(output, content)
    takes, gives = metadata["input"], metadata["output"]
    print(f"wrote {output}, {len(content) / 1e6:.1f} MB, from step {run.step} of {workdir}\n"
          f"takes {takes['name']}: {takes['dtype']} {takes['shape']}: {takes['values']}\n"
          f"mean {metadata['mean']}, std {metadata['std']} of pixel / 255\n"
          f"gives {gives['name']}: {gives['dtype']} {gives['shape']}, normalize {gives['normalize']}\n"
          f"agrees with the run on {max(BATCH_SIZES)} drawn people to {error:.1e} of the features' norm")


def _thresholds_of(run: SavedRun, mesh: Mesh, camera: str | None, no_flip: bool) -> dict[str, Any] | None:
    """The run's calibration, if it is of such features as the graph will give; with `no_flip` it is not."""
    found = calibration.load(run.workdir, Extractor(run, mesh))
    if found is not None and run.cameras and camera is None:
        print(f"{calibration.FILE} is left out: it is of features by each camera's statistics, and the graph uses "
              "those of all cameras together; --camera makes one that uses a camera's")
        return None
    if found is not None and no_flip:
        print(f"{calibration.FILE} is left out: it is of features with the mirror images'")
        return None
    return found


def _embed(run: SavedRun, variables: Any, images: jax.Array) -> jax.Array:
    """What is exported: images [B, H, W, 3], uint8 or normalised float32, to the matching feature [B, dim]."""
    if images.dtype == jnp.uint8:
        images = normalise(images, run.config.data)
    model = build_model(run.config, 0).clone(native=True)
    # As evaluate's, but for ONNX without a loop, and without NumPy; the comparison before writing holds them together.
    features = list(model.apply(variables, images)["features"].values())
    if run.config.evaluate.flip_average:
        mirrored = model.apply(variables, jnp.flip(images, 2))["features"].values()
        features = [(ours + theirs) * 0.5 for ours, theirs in zip(features, mirrored, strict=True)]
    if run.config.evaluate.normalize == "per_branch":
        features = [_unit(values) for values in features]
    joint = jnp.concatenate(features, axis=1)
    return _unit(joint) if run.config.evaluate.normalize == "joint" else joint


def _unit(features: jax.Array) -> jax.Array:
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _symbolic_images(run: SavedRun, signature: str) -> jax.ShapeDtypeStruct:
    """[batch, H, W, 3], whatever the signature's layout."""
    batch, = jax_export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, run.config.data.height, run.config.data.width, 3),
                                signature.partition("_")[0])


def _onnx_builder() -> Callable[[SavedRun, str, dict[str, Any]], tuple[bytes, Embed]]:
    """Imports what ONNX needs, which is an extra, before anything is loaded or traced."""
    try:
        import onnx
        import onnxruntime

        from jlml_jax import onnx_graph
    except ImportError as error:
        raise UserError(f"--format=onnx needs onnx and onnxruntime ({error}); pip install -e '.[onnx]'") from error

    def build(run, signature, metadata):
        variables = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), run.variables)
        jaxpr = jax.make_jaxpr(lambda variables, images: _embed(run, variables, images))(
            variables, _symbolic_images(run, signature))
        model = onnx_graph.convert(jaxpr, jax.tree.leaves(run.variables), nchw=signature == "float32_nchw")
        metadata["provenance"]["versions"] |= {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
        onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
        onnx.checker.check_model(model, full_check=True)
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return content, lambda images: session.run(["features"], {"images": images})[0]

    return build


def _build_stablehlo(run: SavedRun, signature: str, metadata: dict[str, Any]) -> tuple[bytes, Embed]:
    images = _symbolic_images(run, signature)
    nchw = signature == "float32_nchw"

    def features(images):
        return _embed(run, run.variables, images.transpose(0, 2, 3, 1) if nchw else images)

    if nchw:
        batch, height, width, channels = images.shape
        images = jax.ShapeDtypeStruct((batch, channels, height, width), images.dtype)
    exported = jax_export.export(jax.jit(features), platforms=PLATFORMS)(images).serialize()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("exported", exported)
        file.writestr("metadata.json", json.dumps(metadata, indent=1))
    call = jax.jit(jax_export.deserialize(exported).call)
    return archive.getvalue(), lambda images: np.asarray(call(images))


def _describe(run: SavedRun, signature: str, dim: int) -> dict[str, Any]:
    """The metadata, JSON: what goes in and comes out, and where it comes from."""
    data = run.config.data
    shape = (["batch", data.height, data.width, 3] if signature == "uint8_nhwc" else
             ["batch", 3, data.height, data.width])
    return {
        "input": {"name": "images", "dtype": signature.partition("_")[0], "shape": shape, "values": INPUTS[signature],
                  "resize": "before, if need be: antialiased triangle filter (Pillow's BILINEAR), no letterbox"},
        "output": {"name": "features", "dtype": "float32", "shape": ["batch", dim], "distance": "L2",
                   "normalize": run.config.evaluate.normalize, "flip_average": run.config.evaluate.flip_average},
        "mean": list(data.mean),
        "std": list(data.std),
        "trained_on": _trained_on(run.label_map),
        "step": run.step,
        "config": json.loads(run.config.to_json()),
        "provenance": provenance.collect(),
    }


def _trained_on(label_map: dict[str, Any] | None) -> list[dict[str, str]]:
    """The data sets that the weights come from, the last first."""
    if label_map is None:
        return []
    return [{key: label_map[key] for key in ("dataset", "fingerprint")}, *_trained_on(label_map["init_from"])]


def _as_input(images: np.ndarray, signature: str, data: ml_collections.ConfigDict) -> np.ndarray:
    """Crops uint8 [B, H, W, 3] as a user of the exported graph gives them to it."""
    if signature == "uint8_nhwc":
        return images
    images = (images / 255 - np.array(data.mean)) / np.array(data.std)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)


def _max_relative_error(embed: Embed, images: np.ndarray, expected: np.ndarray) -> float:
    """The largest distance between `embed`'s features and those expected, relative to the latter's norm."""
    errors = []
    for size in BATCH_SIZES:
        distances = np.linalg.norm(embed(images[:size]) - expected[:size], axis=1)
        errors.append(np.max(distances / np.maximum(np.linalg.norm(expected[:size], axis=1), 1e-12)))
    return float(np.max(errors))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("jlml_jax.export", __doc__, _EXAMPLE)
    parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--format", required=True, metavar="|".join(FORMATS),
                        help="stablehlo: a zip archive, for jax.export.deserialize on " + ", ".join(PLATFORMS))
    parser.add_argument("--output", required=True, metavar="FILE", help="what to write, or to replace")
    parser.add_argument("--input", default="uint8_nhwc", metavar="|".join(INPUTS),
                        help="what the graph takes. " + ". ".join(f"{name}: {text}" for name, text in INPUTS.items()))
    parser.add_argument("--camera", metavar="NAME",
                        help="whose statistics to use, in a run that jlml_jax.adapt --by_camera has made")
    parser.add_argument("--no_flip", action="store_true",
                        help="leave out the mirror image, where the run averages with its feature: half the time")
    options = parser.parse_args(arguments)
    return exit_status(lambda: export_run(options.workdir, options.format, options.output, options.input,
                                          options.camera, options.no_flip))


if __name__ == "__main__":
    sys.exit(main())
