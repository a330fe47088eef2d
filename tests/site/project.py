"""What the tests of the site read of the project."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
URL = CONFIG["repository"]["url"]
CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = ["index", *(page["file"] for part in CONTENTS["parts"] for page in part["chapters"])]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
