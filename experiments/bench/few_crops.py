"""The features of a few crops, as a tracker asks for them with every frame, beside a full batch and ONNX Runtime."""

import functools
import tempfile
from collections.abc import Sequence

import numpy as np

from experiments.bench.timing import ratio_of, time_in_turn
from jlml_jax import load_extractor
from jlml_jax.export import export_run
from jlml_jax.unpack import unpack

COUNTS = (1, 2, 5, 10, 20, 50)


def bench_few_crops(repeats: int) -> dict:
    """Milliseconds of the included run's `embed_crops` and of its exported graph in ONNX Runtime, by number of crops.

    The crops are of the run's input size. `full_batch_over`: how many times as long a full batch takes;
    `onnxruntime_over`: how many times as long ONNX Runtime takes for as many; `no_flip_over`: how many times as long
    ours takes for as many without their mirror images.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpack(f"{folder}/run")
        export_run(f"{folder}/run", "onnx", f"{folder}/run.onnx")  # first of all it checks that onnxruntime is there
        extractor, no_flip = load_extractor(f"{folder}/run"), load_extractor(f"{folder}/run", flip_average=False)
        import onnxruntime

        session = onnxruntime.InferenceSession(f"{folder}/run.onnx", providers=["CPUExecutionProvider"])
    shape = extractor.batch_size, extractor.height, extractor.width, 3
    crops = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    counts = *COUNTS, len(crops)
    ours = {count: functools.partial(extractor.embed_crops, crops[:count]) for count in counts}
    onnx = {f"onnx {count}": functools.partial(session.run, None, {"images": crops[:count]}) for count in counts}
    alone = {f"no flip {count}": functools.partial(no_flip.embed_crops, crops[:count]) for count in counts}
    seconds = time_in_turn(ours | onnx | alone, repeats)
    return {
        "height": extractor.height, "width": extractor.width, "batch_size": len(crops), "repeats": repeats,
        "milliseconds": {str(count): _milliseconds(seconds[count]) for count in counts},
        "onnxruntime_milliseconds": {str(count): _milliseconds(seconds[f"onnx {count}"]) for count in counts},
        "no_flip_milliseconds": {str(count): _milliseconds(seconds[f"no flip {count}"]) for count in counts},
        "full_batch_over": {str(count): ratio_of(seconds[len(crops)], seconds[count]) for count in COUNTS},
        "onnxruntime_over": {str(count): ratio_of(seconds[f"onnx {count}"], seconds[count]) for count in counts},
        "no_flip_over": {str(count): ratio_of(seconds[f"no flip {count}"], seconds[count]) for count in counts},
    }


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": 1e3 * float(np.median(seconds)), "minimum": 1e3 * min(seconds), "maximum": 1e3 * max(seconds)}
