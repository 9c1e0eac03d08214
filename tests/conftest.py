import functools
import os
import resource
import tempfile

from fast_compilation import XLA_FLAGS

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit all this
    # Before JAX is imported: four devices, as the parity tests need.
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), XLA_FLAGS, "--xla_force_host_platform_device_count=4"])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # The tests compile the same few programs many times, some of them in processes of their own.
    _CACHE = tempfile.TemporaryDirectory(prefix="jlml_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import numpy as np
import pytest
from market1501_miniature import write_market1501
from splits import SIZES, drawing, encode, plain, split_of, split_of_pixels

from configs import default
from jlml_jax import calibrate, compare, extract, group, load_extractor, prepare, search
from jlml_jax.datasets.market1501 import Market1501
from jlml_jax.protocols import Trial
from jlml_jax.train import train_and_evaluate


@pytest.fixture(scope="session")
def market1501_dir(tmp_path_factory):
    """A TFDS data folder with a miniature Market-1501: 4 training and 4 test identities, 3 cameras."""
    source, data_dir = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Market1501, "EXPECTED", write_market1501(source))
        Market1501(data_dir=data_dir).build(source)
    return data_dir


@pytest.fixture
def run_command(capsys):
    """Runs a command, given as its module, in this process; gives its exit status, stdout and stderr."""
    def run(command, *arguments):
        status = command.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()
    return run


@pytest.fixture
def refused_by(run_command):
    """Runs a command that must end with status 2; gives the one line that it told."""
    def run(command, *arguments):
        status, _, error = run_command(command, *arguments)
        assert status == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error
    return run


@pytest.fixture
def refused(refused_by):
    """`refused_by` of the command that prepares data sets."""
    return functools.partial(refused_by, prepare)


def make_tiny_config(data_dir):
    config = default.get_config()
    config.name = "tiny"
    config.data.name, config.data.data_dir = "market1501", str(data_dir)
    config.data.height, config.data.width = 32, 16
    config.model.num_strips, config.model.depth, config.model.stem_features = 2, 1, 4
    config.model.global_widths = config.model.local_widths = (4, 8)  # every stage more costs seconds of compilation
    config.model.global_feature_dim = config.model.local_feature_dim = 16
    config.train.steps, config.train.batch_size = 12, 8
    config.evaluate.batch_size = 16
    config.log_every, config.checkpoint_every = 4, 6
    config.compilation_cache = ""  # that of all tests
    return config


@pytest.fixture
def tiny_config(market1501_dir):
    """A run of seconds: the whole network in small, on the miniature Market-1501."""
    return make_tiny_config(market1501_dir)


@pytest.fixture
def smooth_config(tiny_config):
    """Learns slowly, so that rounding does not grow over the steps compared."""
    tiny_config.optim.learning_rate = 1e-3
    tiny_config.augment.crop_padding = 2
    return tiny_config


@pytest.fixture(scope="session")
def tiny_run(market1501_dir, tmp_path_factory):
    """The folder of a trained run, to be read only: that of `tiny_config`, whose features are of 16 + 16."""
    config = make_tiny_config(market1501_dir)
    config.evaluate.normalize = "per_branch"
    folder = tmp_path_factory.mktemp("tiny_run") / "run"
    train_and_evaluate(config, folder, "train")
    return folder


@pytest.fixture(scope="session")
def tiny_extractor(tiny_run):
    return load_extractor(tiny_run)


@pytest.fixture(scope="session")
def extractor(tiny_extractor):
    """That of `loaded_once`; a module whose commands go by another run has a fixture of this name of its own."""
    return tiny_extractor


@pytest.fixture
def loaded_once(monkeypatch, extractor):
    """The commands take the network as it is loaded already, rather than compile it anew each time."""
    for command in (calibrate, compare, extract, group, search):
        monkeypatch.setattr(command, "load_extractor", lambda workdir: extractor)


@pytest.fixture(scope="session")
def trial():
    """Ten persons, a colour each: 20 queries from cameras 1 and 2; 30 gallery images, 5 distractors, 4 junk."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (13, 3))

    def split(identities, cameras):
        noisy = plain(*colors[np.maximum(identities, 0)]) + rng.normal(0, 8, (len(identities), 32, 16, 3))
        return split_of_pixels(np.clip(noisy, 0, 255).astype(np.uint8), identities, cameras)

    persons = np.arange(1, 11)
    gallery = np.concatenate([np.tile(persons, 3), np.zeros(5), -np.ones(4)]).astype(int)
    return Trial("test", "single-query", train=split(np.array([11, 12]), [1, 2]),
                 query=split(np.tile(persons, 2), np.repeat([1, 2], 10)),
                 gallery=split(gallery, [*np.repeat([1, 2, 3], 10), *[3] * 9]))


@pytest.fixture(scope="session")
def jpegs():
    """A split of drawings of several sizes; not to be changed."""
    return split_of([encode(drawing(*size, seed), "JPEG", quality=90) for seed, size in enumerate(SIZES)])


@pytest.fixture
def small_files():
    """As a disk that is full, or a quota: no file may have more than a kilobyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
