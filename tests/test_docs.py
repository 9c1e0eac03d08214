"""The pages: links and anchors lead somewhere, and what they name of configs and commands exists."""

import re
import subprocess
from pathlib import Path

import pytest

from configs import default
from jlml_jax.config_fields import refuse_unknown_field

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True,
                                                check=True).stdout.split()]
TORCHREID = {  # its own fields, in the column of that page
    "data.root", "data.split_id", "data.transforms", "model.load_weights", "model.resume", "train.lr",
    "train.lr_scheduler", "train.max_epoch", "train.fixbase_epoch"}
GUIDES = [page for page in PAGES if page.parent.name != "results"]


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """GitHub's: of each heading, in lower case, without punctuation, with - for spaces, numbered where repeated."""
    seen, found = {}, set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        seen[anchor] = seen.get(anchor, -1) + 1
        found.add(anchor + (f"-{seen[anchor]}" if seen[anchor] else ""))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match("[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or anchor and anchor not in anchors(target):
            broken.append(link)
    assert not broken


def test_config_fields_that_are_named_exist():
    config = default.get_config()
    sections = {name for name in config if hasattr(config[name], "keys")}
    for page in GUIDES:
        text = page.read_text()
        named = set(re.findall(r"--config\.([a-z_0-9.]+[a-z_0-9])", text))
        named |= {name for name in re.findall(r"`([a-z]+\.[a-z_0-9]+)(?:=[^`]*)?`", text)
                  if name.partition(".")[0] in sections and not name.endswith((".py", ".json"))}
        for name in named - (TORCHREID if page.name == "from_torchreid.md" else set()):
            refuse_unknown_field([f"--config.{name}=1"])


def test_options_of_commands_that_are_named_exist():
    shared = (ROOT / "jlml_jax" / "user_images.py").read_text()
    seen = set()
    for page in GUIDES:
        text = re.sub(r"\\\n\s*", " ", page.read_text())
        for command, arguments in re.findall(r"python -m jlml_jax\.(\w+)([^\n`#]*)", text):
            source = (ROOT / "jlml_jax" / f"{command}.py").read_text()
            seen.add(command)
            for option in re.findall(r"--(\w+)", arguments):
                if option == "config" or option == "help":
                    continue
                assert f'"--{option}"' in source + shared or f'("{option}"' in source, (page.name, command, option)
    assert {"main", "prepare", "search", "extract", "adapt", "calibrate", "compare", "group", "report", "export",
            "pack", "unpack"} <= seen
