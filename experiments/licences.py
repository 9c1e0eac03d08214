"""The licences of all dependencies: python -m experiments.licences > experiments/results/licences.md

Of every package in constraints.txt, from the metadata of the environment that this runs in.
"""

import re
from importlib import metadata
from pathlib import Path


def licence(package: str) -> str:
    """As the package says: an SPDX expression, else its classifiers, else the first line of its field License."""
    about = metadata.metadata(package)
    if expression := about.get("License-Expression"):
        return expression
    classifiers = [name.split(" :: ")[-1] for name in about.get_all("Classifier", []) if name.startswith("License ::")]
    named = [name for name in classifiers if name != "OSI Approved"]
    text = (about.get("License") or "").strip().splitlines()
    return "; ".join(named) or (text[0][:80] if text else "not said")


def main() -> None:
    packages = re.findall("^([^#=]+)==(.+)$", Path("constraints.txt").read_text(), re.MULTILINE)
    print("# Licences of the dependencies\n\nWritten by `python -m experiments.licences`: what each package of "
          "constraints.txt says of itself. Those for the tests\nare among them; jlml_jax itself is Apache-2.0, the "
          "weights in it, learned from Market-1501, are for research only.\n")
    print("| package | version | licence |\n|---|---|---|")
    for package, version in packages:
        print(f"| {package} | {version} | {licence(package)} |")


if __name__ == "__main__":
    main()
