"""What the tests of the site read of the project."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest
import reading
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
URL = CONFIG["repository"]["url"]
CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = ["index", *(page["file"] for part in CONTENTS["parts"] for page in part["chapters"])]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CHROMIUM = next(filter(None, map(shutil.which, reading.BROWSERS)), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium: make browser installs it"
)


def named(requirements: list[str]) -> list[str]:
    """The packages that requirements name."""
    return [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
