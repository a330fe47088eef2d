"""Set the address of the repository in every place that names it, and show what was changed.

    make address URL=https://github.com/OWNER/NAME

The old one is `repository.url` in `_config.yml`. Outputs don't depend on it, so no chapter becomes
stale. Needs Python alone.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMING_IT = ["*.md", "*.toml", "*.cff", ".github/**/*.yml", "book/*.md", "book/*.ipynb"]
ADDRESS = re.compile(r"https://github\.com/([A-Za-z0-9]+(-[A-Za-z0-9]+)*/[A-Za-z0-9._-]+)")


def set_address(root: Path, url: str) -> dict[Path, int]:
    """Put a new address in place of the old one; return the changed files and in how many places.

    Every file is written beside the old one before the first is replaced. `_config.yml` comes last:
    until then a call that was cut short can be made again.

    Raises:
        ValueError: an address that GitHub would not give, or none in `_config.yml`.
    """
    new = ADDRESS.fullmatch(url)
    if not new or url.endswith(".git"):
        raise ValueError(
            f"{url!r} can't be the address of the repository: it must be "
            "https://github.com/OWNER/NAME, without a slash or .git at its end; OWNER has letters, "
            "digits and single hyphens, NAME also . and _"
        )
    config = root / "_config.yml"
    old = re.search(r"(?m)^  url: https://github\.com/(\S+)$", config.read_text(encoding="utf-8"))
    if not old:
        raise ValueError(f"{config.name} has no line '  url: https://github.com/OWNER/NAME'")
    # Colab's addresses have it too: https://colab.research.google.com/github/OWNER/NAME/blob/...
    named = re.compile(rf"\b(github|github\.com)/{re.escape(old[1])}(?![\w-])")
    files = [path for pattern in NAMING_IT for path in sorted(root.glob(pattern))]
    texts, places = {}, {}
    for path in [*files, config]:
        before = path.read_bytes().decode()
        text, count = named.subn(rf"\1/{new[1]}", before)
        if text != before:
            texts[path], places[path] = text, count
    beside = {path: path.with_name(f".{path.name}.tmp") for path in texts}
    try:
        for path, temporary in beside.items():
            temporary.write_bytes(texts[path].encode())
        for path, temporary in beside.items():
            os.replace(temporary, path)
    finally:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)
    return places


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("error: give one address: make address URL=https://github.com/OWNER/NAME")
    try:
        places = set_address(ROOT, sys.argv[1])
    except ValueError as error:
        sys.exit(f"error: {error}")
    for path, count in places.items():
        print(f"{path.relative_to(ROOT)}: {count} place{'s' * (count > 1)}")
    print(f"{len(places)} files changed; git diff shows how.")


if __name__ == "__main__":
    main()
