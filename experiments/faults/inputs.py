"""Hostile inputs: python -m experiments.faults.inputs --target=csv --count=1000000 [--seed=0] [--coverage]

Mutates good inputs and feeds them to what reads them. It may take an input or refuse it by a UserError; any other
exception, a crash, more than 20 seconds of CPU or 2 GiB for one input is a failure, and the input is kept in
--failures.
With --coverage, atheris chooses the mutations by the lines that they reach (pip install atheris).
"""

import collections
import contextlib
import dataclasses
import io
import json
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PosixPath
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from jlml_jax.arguments import Parser
from jlml_jax.errors import UserError

SECONDS, MEMORY = 20, 2 << 30  # that one input may take
_LONGEST = 4 << 20  # bytes of an input


@dataclasses.dataclass(frozen=True)
class Target:
    """What reads inputs, and what to mutate."""

    read: Callable[[bytes], object]  # may raise UserError alone
    seeds: Sequence[bytes]
    tokens: Sequence[bytes] = ()  # that mean something to it


class _Listing(PosixPath):
    """A folder, and each folder in it, that has one file."""

    file = ""

    def is_dir(self) -> bool:
        return True

    is_file = is_dir

    def iterdir(self) -> Iterator["_Listing"]:
        yield self / self.file


def names(folder: Path) -> Target:
    """File names, by all data sets that read annotation from them."""
    from jlml_jax import user_images
    from jlml_jax.datasets import folder as own
    from jlml_jax.datasets import grid, market1501, viper

    def read(data: bytes) -> None:
        _Listing.file = os.fsdecode(data.replace(b"/", b"").replace(b"\0", b"")[:255]) or "x"
        with mock.patch.object(grid, "_read_partitions", lambda *_: []):
            for builder in (market1501.Market1501, viper.Viper, grid.Grid, own.Folder):
                with contextlib.suppress(UserError):
                    originals = builder.inspect(_Listing("/data"))
                    for crop in (crop for crops in originals.splits.values() for crop in crops):
                        assert crop.identity >= -1 and crop.camera >= 1 - (builder is own.Folder), crop
        user_images._with_market_names([user_images.UserImage(Path(_Listing.file), _Listing.file)], Path())

    return Target(read, [
        b"0002_c1s1_000451_03.jpg", b"-1_c6s3_076243_01.jpg.jpg", b"0000_c2s1_000451_03.JPG", b"001_45.bmp",
        b"0001_1_25004_107_32_106_221.jpeg", b"17_c3.png", b"00017_c003_x.webp", b"Thumbs.db",
    ], [b"-1", b"0", b"_c", b"s1", b".jpg", b".JPG", b".bmp", b".jpeg", b"_", b"\xd9\xa3", b"\xc2\xb2", b"\n", b"\xff",
        b"9" * 30])


def csv(folder: Path) -> Target:
    """CSVs of a user's own crops and of images to embed, beside three images."""
    from PIL import Image

    from jlml_jax.datasets.folder import Folder
    from jlml_jax.user_images import list_images

    (folder / "sub").mkdir()
    for file in ("a.png", "b.png", "sub/c d.png"):
        Image.new("RGB", (8, 16)).save(folder / file)
    (folder / "out").symlink_to("/")
    table = folder / "table.csv"

    def read(data: bytes) -> None:
        table.write_bytes(data)
        with contextlib.suppress(UserError):
            Folder.inspect(table)
        list_images(str(table))

    return Target(read, [
        b"image,identity,camera\na.png,ann,door\nb.png,bob,1\nsub/c d.png,ann,2\n",
        b"\xef\xbb\xbfimage,identity,camera,split\r\na.png,1,1,train\r\nb.png,2,2,query\r\nsub/c d.png,2,3,gallery\r\n",
        b"image,x,y,width,height\na.png,0,0,8,8\na.png,1,2.5,3,4\nb.png,-1,0,1e2,5\n",
        b'image,identity,camera,note\n"a.png",distractor,1,"a ""b"", c"\nb.png,junk,2,"two\nlines"\n',
    ], [b"image", b"identity", b"camera", b"split", b"train", b"query", b"gallery", b"x,y,width,height", b",", b"\n",
        b"\r", b'"', b"a.png", b"../", b"/", b"out/", b"-1", b"0", b"00", b"junk", b"distractor", b"nan", b"inf",
        b"1e400", b"\0", b"\xff\xfe", b"\xe2\x80\xa8", b"\xd9\xa3", b"9" * 5000, b"a" * 300])


def overrides(folder: Path) -> Target:
    """What follows the command: fields of the config, a line each."""
    from absl import flags
    from flax.traverse_util import flatten_dict
    from ml_collections import config_flags

    from configs import synthetic
    from jlml_jax import main

    rng, fields = random.Random(0), flatten_dict(synthetic.get_config().to_dict(), sep=".")
    alone = types.SimpleNamespace(initialize=lambda *_: None, keep_memory=lambda: None)
    values = ["0", "-1", "1e400", "nan", "True", "none", "", "(1,2)", "(", "[1]*9", "None", "'", "9" * 5000, "1,2",
              "\\"]

    def read(data: bytes) -> None:
        config = synthetic.get_config()
        arguments = data.decode("utf-8", "surrogateescape").replace("\0", "").split("\n")
        if any(argument in ("--help", "-help", "-h", "--helpfull") or "flagfile" in argument for argument in arguments):
            return
        known = flags.FlagValues()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(sys, "argv", ["main", *arguments]))
            if rng.random() < 0.99:  # what absl then suggests takes many times longer than all else
                stack.enter_context(mock.patch("absl.flags._helpers.get_flag_suggestions", lambda *_: []))
            stack.enter_context(mock.patch.object(  # the file need not be run each time
                config_flags.config_flags, "_LoadConfigModule",
                lambda *_: types.SimpleNamespace(get_config=lambda: config)))
            patches = {"_CONFIG": config_flags.DEFINE_config_file("config", None, "", flag_values=known)}
            for name, define in {"_WORKDIR": flags.DEFINE_string, "_COORDINATOR": flags.DEFINE_string,
                                 "_NUM_PROCESSES": flags.DEFINE_integer, "_PROCESS_ID": flags.DEFINE_integer,
                                 "_JOIN_TIMEOUT": flags.DEFINE_float}.items():
                patches[name] = define(name[1:].lower(), None, "", flag_values=known)
            patches["_MODE"] = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "", flag_values=known)
            patches["flags"] = types.SimpleNamespace(FLAGS=known, Error=flags.Error)
            patches["parallel"] = alone
            patches["train_and_evaluate"] = lambda config, workdir, mode: config.to_json()
            stack.enter_context(mock.patch.multiple(main, **patches))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            main._command()

    return Target(read, [f"--config.{field}={value}".encode() for field, value in fields.items()] + [
        b"--workdir=x\n--mode=evaluate", b"--config.train.steps\n3", b"--noconfig.augment.flip", b"--config=x.py:1"],
        [f"{field}".encode() for field in fields] + [value.encode() for value in values]
        + [b"--config.", b"--config", b"=", b"\n", b".", b"[0]", b"__class__", b"\xff", b"-", b"--"])


def images(folder: Path) -> Target:
    """Image files."""
    from PIL import ExifTags, Image

    from jlml_jax.datasets import folder as own
    from jlml_jax.datasets.images import open_rgb, resize

    def read(data: bytes) -> None:
        own._upright(data, "x")
        for upright in (False, True):
            resize(open_rgb(data, "x", upright=upright), 32, 16)

    Image.init()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (20, 12, 3), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    seeds = []
    for kind in sorted(Image.SAVE):
        for variant in (image, image.convert("RGBA"), image.convert("P"), image.convert("L"), image.convert("1")):
            encoded = io.BytesIO()
            with contextlib.suppress(Exception):  # not every format has every mode
                variant.save(encoded, kind, exif=exif)
                seeds.append(encoded.getvalue())
    for options in ({"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "jpeg"},
                    {"compression": "packbits"}):
        encoded = io.BytesIO()
        image.save(encoded, "TIFF", **options)
        seeds.append(encoded.getvalue())
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", progressive=True)
    return Target(read, [*seeds, encoded.getvalue()], [
        b"\xff\xd8", b"\xff\xda", b"\xff\xc2", b"IHDR", b"IDAT", b"tRNS", b"zTXt", b"iCCP", b"eXIf", b"acTL", b"RIFF",
        b"ANMF", b"II*\0", b"MM\0*", b"%!PS-Adobe", b"\x01\x12", b"\xff\xff\xff\xff", b"\0\0\0\0"])


def mat(folder: Path) -> Target:
    """MATLAB files of GRID's partitions and of CUHK03's new protocol."""
    import scipy.io

    from jlml_jax.datasets import cuhk03, grid
    from tests.miniatures import write_cuhk03, write_grid

    write_grid(folder / "grid")
    write_cuhk03(folder / "cuhk03")
    seeds = [(folder / "grid" / grid.PARTITIONS).read_bytes(),
             (folder / "cuhk03" / cuhk03.NEW_PROTOCOL.format(config="labeled")).read_bytes()]
    for variables, version in (({"trainIdxAll": np.arange(6.0)}, "4"),
                               (scipy.io.loadmat(io.BytesIO(seeds[0]), variable_names=["trainIdxAll"]), "5")):
        encoded = io.BytesIO()
        variables = {name: value for name, value in variables.items() if not name.startswith("__")}
        scipy.io.savemat(encoded, variables, format=version)
        seeds.append(encoded.getvalue())
    path = folder / "x.mat"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            grid._read_partitions(path, 6)
        cuhk03._read_new_protocol(path, [])

    return Target(read, seeds, [b"MATLAB 5.0 MAT-file", b"\0\1IM", b"trainIdxAll", b"train\0\0\0", b"labels\0\0",
                                *(bytes([code, 0, 0, 0]) for code in range(20))])


def hdf5(folder: Path) -> Target:
    """cuhk-03.mat, all its images read."""
    from jlml_jax.datasets import cuhk03
    from tests.miniatures import write_cuhk03

    write_cuhk03(folder / "cuhk03")
    path = folder / "cuhk03" / cuhk03.FILE
    builder = cuhk03.Cuhk03(config="labeled", data_dir=folder / "data")
    seeds = [path.read_bytes()]

    def read(data: bytes) -> None:
        path.unlink()  # HDF5 knows an open file again
        path.write_bytes(data)
        for crop in builder.inspect(path.parent).splits["crops"]:
            crop.read()

    return Target(read, seeds, [b"\x89HDF\r\n\x1a\n", b"TREE", b"SNOD", b"HEAP", b"GCOL", b"FRHP"])


def gallery(folder: Path) -> Target:
    """The database of a gallery, then its features and a search in them."""
    from jlml_jax.gallery import Gallery
    from jlml_jax.nearest import NearestNeighbours
    from jlml_jax.user_images import LoadedImage, UserImage

    def entry(number: int) -> LoadedImage:
        image = UserImage(Path(f"/x/{number}.png"), f"{number}.png", str(number % 4), str(number % 3),
                          (1, 2, 3, 4) if number % 2 else None)
        return LoadedImage(image, number.to_bytes(32, "big"))

    made = Gallery.create(folder / "g", "f" * 16, 4)
    with made.writing():
        made.add([entry(number) for number in range(20)], np.ones((20, 4), np.float32))
    made.close()
    features = (folder / "g" / "features.f32").read_bytes()
    database = (folder / "g" / "gallery.sqlite").read_bytes()

    def read(data: bytes) -> None:
        shutil.rmtree(folder / "g")
        (folder / "g").mkdir()
        (folder / "g" / "gallery.sqlite").write_bytes(data)
        (folder / "g" / "features.f32").write_bytes(features)
        opened = Gallery(folder / "g")
        with contextlib.closing(opened):
            assert len(opened.cameras) == len(opened)
            opened.rows_of(opened.digests())
            if len(opened):
                rows, _ = NearestNeighbours(opened.features).search(np.zeros(opened.dim, np.float32), 3)
                for row in rows:
                    opened.image(row)
            with opened.writing():
                opened.add([entry(99)], np.ones((1, opened.dim), np.float32), [entry(3)])

    return Target(read, [database], [b"CREATE TABLE", b"images", b"model", b"INTEGER", b"TEXT", b"row", b"\x7f" * 8,
                                     b"ffffffffffffffff", b"\xff"])


def _features_file(folder: Path, suffix: str) -> Target:
    from jlml_jax import calibrate, features_file

    def table(whole: bool) -> features_file.FeaturesFile:
        return features_file.FeaturesFile(
            np.arange(24, dtype=np.float32).reshape(6, 4), np.array([f"{i}.png" for i in range(6)]),
            np.array(["1", "1", "junk", "", "distractor", "2"]), np.array(["1", "2", "", "1", "2", "3"]),
            np.arange(24, dtype=np.int32).reshape(6, 4) if whole else None, "/x", "f" * 16,
            np.array(["7", "", "", "8", "", ""]) if whole else None)

    extractor = mock.Mock(mean_features=lambda features, of: features[:of.max(initial=-1) + 1])
    seeds = []
    path = folder / f"x{suffix}"
    for whole in (False, True):
        features_file.write(path, table(whole))
        seeds.append(path.read_bytes())
    if suffix == ".npz":
        compressed = io.BytesIO()
        with np.load(path) as arrays:
            np.savez_compressed(compressed, **arrays)
        seeds.append(compressed.getvalue())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with mock.patch.object(calibrate, "check_fingerprint", lambda *_: None):
            calibrate._labelled_features(path, extractor)
        opened = features_file.read(path)
        for row in range(min(3, len(opened))):
            opened.image(row)

    return Target(read, seeds, [b"PK\3\4", b"PK\1\2", b"\x93NUMPY", b"'descr': '<f4'", b"(6, 4)", b"'|O'", b"PAR1",
                                b"features", b"fingerprint", b"(-1, 4)", b"(99999999999, 4)", b"<U9999999"])


def npz(folder: Path) -> Target:
    """Features files, as NumPy's archive."""
    return _features_file(folder, ".npz")


def parquet(folder: Path) -> Target:
    """Features files, as Parquet."""
    return _features_file(folder, ".parquet")


def run(folder: Path) -> Target:
    """A run's config.json, label_map.json and calibration.json, parted by lines of three dashes; no checkpoint."""
    from configs import default
    from jlml_jax import calibration, checkpoints

    label_map = {"dataset": "market1501", "trial": 0, "fingerprint": "0" * 64, "init_from": None,
                 "identities": {"market1501": [1, 2, 3]}}
    verdicts = {"fingerprint": "f" * 16, "thresholds": [{"rate": 0.01, "threshold": 1.5}, {"rate": 0.001,
                                                                                           "threshold": None}]}
    files = (checkpoints.CONFIG, checkpoints.LABEL_MAP, calibration.FILE)

    def read(data: bytes) -> None:
        for file, content in zip(files, (data.split(b"\n---\n") + [b"", b""])[:3], strict=True):
            (folder / file).write_bytes(content)
        with contextlib.suppress(UserError):
            calibration.load_verdicts(folder, mock.Mock(fingerprint="f" * 16))
        checkpoints.load_run(folder)

    parts = [default.get_config().to_json().encode(), json.dumps(label_map).encode(), json.dumps(verdicts).encode()]
    return Target(read, [b"\n---\n".join(parts)], [b"{", b"}", b"[", b"]", b'"', b"null", b"NaN", b"1e999", b"-1",
                                                    b"true", b"9" * 5000, b"[" * 2000, b"\n---\n", b"\\ud800", b"\xff"])


TARGETS = {target.__name__: target
           for target in (names, csv, overrides, images, mat, hdf5, gallery, npz, parquet, run)}

_EXTREMES = [value.to_bytes(size, order, signed=True) for size in (1, 2, 4, 8) for order in ("little", "big")
             for value in (0, 1, -1, 1 << (8 * size - 2), -(1 << (8 * size - 1)), (1 << (8 * size - 1)) - 1)]


def mutate(rng: random.Random, target: Target) -> bytes:
    """A seed with one to eight changes."""
    data = bytearray(rng.choice(target.seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + int(rng.expovariate(0.1)) + 1)
        match rng.randrange(9):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * rng.choice((1, 1, 2, 50))
            case 4:
                value = rng.choice(_EXTREMES)
                data[at:at + len(value)] = value
            case 5:
                del data[at:]
            case 6:
                other = rng.choice(target.seeds)
                data[at:] = other[rng.randrange(len(other) + 1):]
            case _ if target.tokens:
                token = rng.choice(target.tokens)
                data[at:at + rng.choice((0, len(token)))] = token
    return bytes(data[:_LONGEST])


def _limited() -> None:
    """Of this process: more memory is a MemoryError, more time its end."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)


def _try(target: Target, data: bytes, current: mmap.mmap) -> str:
    """taken, refused, or the traceback."""
    current[:8 + len(data)] = len(data).to_bytes(8, "little") + data  # that stays when the process does not
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of CPU: the machine may be busy
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        target.read(data)
        return "taken"
    except UserError as error:
        return "refused" if str(error).strip() else "a UserError without a message"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _work(name: str, seed: int, indices: range, deadline: float, current: mmap.mmap,
          results: multiprocessing.SimpleQueue) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        target = TARGETS[name](Path(folder))
        for warm in target.seeds[:20]:
            _try(target, warm, current)
        _limited()
        counts, failures = collections.Counter(), []
        for index in indices:
            data = mutate(random.Random(f"{seed}/{index}"), target)
            outcome = _try(target, data, current)
            counts[outcome if outcome in ("taken", "refused") else "failed"] += 1
            if outcome not in ("taken", "refused"):
                failures.append((index, data, outcome))
            late = time.monotonic() > deadline
            if index % 500 == 499 or index == indices[-1] or failures or late:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                results.put((index, dict(counts), failures, peak))
                counts, failures = collections.Counter(), []
            if late:
                break


def campaign(name: str, count: int, seed: int, keep: Path, minutes: float = float("inf")) -> dict:
    """Tries `count` mutations, for `minutes` at most, in processes that may die: another one then goes on."""
    context = multiprocessing.get_context("fork")
    done, total, peak, reasons = 0, collections.Counter(), 0, collections.Counter()
    started = time.monotonic()
    deadline = started + 60 * minutes

    def failed(index: int, data: bytes, why: str) -> None:
        last = why.strip().splitlines()
        where = [line.strip() for line in last if line.strip().startswith("File")]
        reason = f"{last[-1][:160]} {where[-1] if where else ''}"
        reasons[reason] += 1
        if reasons[reason] == 1:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name}-{index}").write_bytes(data)
            print(f"{name} {index}: {reason}", flush=True)

    while done < count and time.monotonic() < deadline:
        current = mmap.mmap(-1, _LONGEST + 8)
        results = context.SimpleQueue()
        process = context.Process(target=_work, args=(name, seed, range(done, count), deadline, current, results))
        process.start()
        while process.is_alive() or not results.empty():
            if results.empty():
                time.sleep(0.02)
                continue
            index, counts, failures, process_peak = results.get()
            done, peak = index + 1, max(peak, process_peak)
            total.update(counts)
            for failure in failures:
                failed(*failure)
        if process.exitcode:
            size = int.from_bytes(current[:8], "little")
            total["failed"] += 1
            failed(done, current[8:8 + size], f"died: {signal.Signals(-process.exitcode).name}"
                   if process.exitcode < 0 else f"exit status {process.exitcode}")
            done += 500  # those behind the last report are not counted
    return {"target": name, "inputs": sum(total.values()), **total, "reasons": dict(reasons),
            "seconds": round(time.monotonic() - started), "peak_resident_mib": peak // 1024}


def covered(name: str, count: int, seed: int, keep: Path) -> None:
    """Fuzzes by coverage; atheris prints what it does, and exits."""
    import atheris

    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    with atheris.instrument_imports(include=["jlml_jax", "csv", "ml_collections", "absl.flags", "scipy.io", "zipfile"]):
        target = TARGETS[name](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)
    (folder / "tokens").write_text("".join(
        '"{}"\n'.format("".join(f"\\x{byte:02x}" for byte in token[:60])) for token in target.tokens))
    keep.mkdir(parents=True, exist_ok=True)

    def read(data: bytes) -> None:
        with contextlib.suppress(UserError):
            target.read(data)

    atheris.Setup([sys.argv[0], f"-atheris_runs={count}", f"-seed={seed + 1}", "-max_len=4096", f"-timeout={SECONDS}",
                   "-rss_limit_mb=4096", f"-dict={folder / 'tokens'}", f"-artifact_prefix={keep}/{name}-",
                   "-verbosity=1", str(corpus)], read)
    atheris.Fuzz()


def main() -> int:
    parser = Parser("experiments.faults.inputs", __doc__)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which it ends in any case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true", help="by coverage, with atheris")
    parser.add_argument("--failures", type=Path, default=Path("failures"), help="folder for inputs that fail")
    options = parser.parse_args()
    if options.coverage:
        covered(options.target, options.count, options.seed, options.failures)
    result = campaign(options.target, options.count, options.seed, options.failures, options.minutes)
    print(json.dumps(result))
    return 1 if result.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
