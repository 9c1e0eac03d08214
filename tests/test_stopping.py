"""Signals to a command, in processes of their own."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT, child_environment, run_program

COMMAND = """
import gc, sys, threading, time
from jlml_jax.errors import exit_status
from jlml_jax.stopping import StopRequest

def ready():
    print("ready", flush=True)

def works():
    ready()
    time.sleep(60)

def pauses():
    ready()
    time.sleep(0.5)

def cleans_up():
    try:
        works()
    finally:
        print("cleaning up", flush=True)
        time.sleep(60)

def trains():
    with StopRequest() as stop:
        ready()
        while not stop.requested:
            time.sleep(0.01)
        print("cleaning up", flush=True)
        time.sleep(0.5 if "saves" in sys.argv else 60)
    raise SystemExit(128 + stop.requested)

def is_done():
    # Python waits for such a thread on its way out.
    threading.Thread(target=lambda: (time.sleep(0.5), ready(), time.sleep(60))).start()

def collects_garbage():
    import jax
    from jaxlib import xla_client
    called_by_jax, xla_client._xla.collect_garbage = xla_client._xla.collect_garbage, pauses
    gc.collect()
    xla_client._xla.collect_garbage = called_by_jax
    time.sleep(60)

def finalises():
    class Finalised:
        def __del__(self):
            pauses()

    Finalised()
    time.sleep(60)

sys.exit(exit_status({"is done": is_done, "works": works, "cleans up": cleans_up, "trains": trains,
                      "collects garbage": collects_garbage, "finalises": finalises}[sys.argv[1]]))
"""


@contextlib.contextmanager
def sigint_heeded():
    """What runs the tests in the background may have it ignored, which children would inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def start():
    running = []

    def start(*arguments, program=("-c", COMMAND), path=str(ROOT)):
        with sigint_heeded():
            process = subprocess.Popen([sys.executable, *program, *arguments], stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True, env=child_environment(PYTHONPATH=path))
        running.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["works", "collects garbage", "finalises"])  # Python ignores what these two raise
def test_a_signal_ends_a_command_with_its_status_and_one_line(start, command, number):
    process = start(command)
    process.send_signal(number)
    assert process.communicate(timeout=20)[1] == f"stopped by {number.name}\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_training_is_left_to_the_loop(start, number):
    process = start("trains", "saves")
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("cleaning up\n", "")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["cleans up", "trains"])
def test_a_second_signal_ends_a_command_at_once(start, command, second):
    process = start(command)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning up\n"
    sent = time.monotonic()
    process.send_signal(second)
    assert process.wait(timeout=20) == -second
    assert time.monotonic() - sent < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_when_all_is_done_ends_the_process_without_a_word(start, number):
    process = start("is done")
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == -number


def test_a_signal_that_is_ignored_stays_so():
    """As under nohup, or in the background of a shell without job control."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + COMMAND.replace("60", "0.5")
    process = subprocess.Popen([sys.executable, "-c", code, "works"], stdout=subprocess.PIPE, text=True,
                               env=child_environment())
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.mark.parametrize("command", ["jlml_jax.search", "jlml_jax.main", "experiments.tables"])
def test_a_signal_while_a_command_imports_ends_the_process_without_a_word(start, command, tmp_path):
    """The first module of another package that it imports is made to wait for the signal."""
    for module in ("argparse", "absl"):
        (tmp_path / f"{module}.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = start(program=("-m", command), path=f"{tmp_path}:{ROOT}")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_importing_the_package_leaves_signals_alone():
    code = "import signal, jlml_jax; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    with sigint_heeded():
        done = run_program(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", ["KILL", "TERM", "INT"])
def test_commands_that_are_disturbed_end_as_if_nobody_had(number):
    subprocess.run([sys.executable, "-m", "experiments.faults.kill", "--count=6", f"--signal={number}"], check=True,
                   env=child_environment(), timeout=1800)


@pytest.mark.parametrize(("what", "status", "told"), [("print('found')", 141, ""),
                                                      ("os.write(broken, b'x')", 1, "BrokenPipeError")])
def test_a_command_ends_quietly_when_nobody_reads_its_output(what, status, told):
    """As `| head` does; another broken pipe is a bug, and is told."""
    program = f"""
import os, sys
from jlml_jax.errors import exit_status
reading, broken = os.pipe()
os.close(reading)
sys.stdin.readline()
sys.exit(exit_status(lambda: {what}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=child_environment(PYTHONPATH=str(ROOT)))
    if not told:
        process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    error = process.stderr.read()
    assert process.wait(60) == status
    assert told in error if told else not error
