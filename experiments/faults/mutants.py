"""Mutation testing: python -m experiments.faults.mutants --module=losses [--json=FILE]

Makes every mutant of a module that cosmic-ray knows (pip install cosmic-ray), one change each, or --count of them drawn
at random, or with --again those alone that survived in an earlier --json, and runs the module's tests on it in a forked
process; the files stay as they are. Prints the mutants that no test kills.
"""

import contextlib
import difflib
import importlib.util
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The forked processes inherit what is imported.
import jax.numpy  # noqa: F401
import optax  # noqa: F401
import pytest
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from jlml_jax.arguments import Parser

# The module, and the tests that are meant to notice a change of it.
TESTS = {"losses": "test_losses.py", "metrics": "test_metrics.py", "distances": "test_distances.py"}
TIMEOUT = 120  # seconds of a process; a mutant that takes longer is killed, as one that fails
# Bitwise operators, shifts, remainders and powers fail at once on floats: of each arithmetic operator the other
# arithmetic ones are tried. Operators on variables want to be told which.
_LEFT_OUT = re.compile("core/(ReplaceBinaryOperator_.*_(BitAnd|BitOr|BitXor|LShift|RShift|Mod|Pow)|Variable.*)")


def mutants(source: str) -> list[tuple[str, str]]:
    """Operator and mutated source, each different source once."""
    found = {}
    for name in sorted(operator_names()):
        if _LEFT_OUT.fullmatch(name):
            continue
        make, occurrence = get_operator(name), 0
        while (code := mutate_code(source, make(), occurrence)) is not None:
            occurrence += 1
            found.setdefault(code, name.removeprefix("core/"))
    return [(name, code) for code, name in found.items() if code != source]


def passes(module: str, code: str) -> bool:
    """Whether the module's tests pass with `code` in its place."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    signal.alarm(TIMEOUT)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    status = 1
    with contextlib.suppress(BaseException):
        package = importlib.import_module("jlml_jax")
        spec = importlib.util.find_spec(f"jlml_jax.{module}")
        mutated = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = mutated
        setattr(package, module, mutated)
        exec(compile(code, spec.origin, "exec"), mutated.__dict__)
        status = pytest.main(["-q", "-x", "--noconftest", "-p", "no:cacheprovider", f"tests/{TESTS[module]}"])
    os._exit(int(status))


def _describe(mutant: tuple[str, str], source: str) -> dict[str, Any]:
    operator, code = mutant
    diff = [line for line in difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm="")
            if not line.startswith(("---", "+++"))]
    return {"operator": operator, "diff": diff}


def main() -> None:
    parser = Parser("experiments.faults.mutants", __doc__)
    parser.add_argument("--module", choices=TESTS, required=True)
    parser.add_argument("--count", type=int, help="how many to try (default: all)")
    parser.add_argument("--again", type=Path, help="figures of an earlier campaign, whose survivors are tried again")
    parser.add_argument("--json", type=Path, help="where to write the figures and the survivors")
    options = parser.parse_args()
    source = Path(f"jlml_jax/{options.module}.py").read_text()
    if not passes(options.module, source):
        sys.exit("the tests fail without any mutation")
    found = mutants(source)
    tried = random.Random(0).sample(found, min(options.count or len(found), len(found)))
    if options.again:
        known = json.loads(options.again.read_text())["survivors"]
        tried = [mutant for mutant in tried if _describe(mutant, source) in known]
    survivors, started = [], time.monotonic()
    for number, mutant in enumerate(tried, 1):
        if passes(options.module, mutant[1]):
            survivors.append(survivor := _describe(mutant, source))
            print(f"survived, number {number}: {survivor['operator']}", *survivor["diff"], sep="\n  ", flush=True)
    result = {"module": options.module, "mutants": len(found), "tried": len(tried),
              "killed": len(tried) - len(survivors), "seconds": round(time.monotonic() - started),
              "survivors": survivors}
    print(f"{options.module}: {result['killed']} of {len(tried)} mutants killed, in {result['seconds']} s")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
