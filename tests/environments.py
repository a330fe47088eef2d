"""Fresh virtual environments that share the large packages of this one instead of installing them.

    python tests/environments.py .venv-oldest torch pip

makes an environment that has nothing but the named packages and what they need. They are links into
the environment that runs this; pip sees them as installed, leaves them alone, and installs beside
and before them.
"""

import sys
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def closure(names: list[str]) -> set[str]:
    """The named distributions and all that they need here, extras apart."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        needs = map(Requirement, distribution(name).requires or [])
        waiting += [r.name for r in needs if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def create(folder: Path, share: list[str]) -> Path:
    """Make an environment that shares these distributions; return its Python.

    Raises:
        importlib.metadata.PackageNotFoundError: one that is not installed here.
    """
    folder = folder.absolute()
    venv.create(folder, clear=True, symlinks=True)
    shared = folder / "shared"
    shared.mkdir()
    for name in closure(share):
        own = distribution(name)
        for top in {file.parts[0] for file in own.files or []} - {"..", "__pycache__"}:
            link = shared / top
            if not link.exists():
                link.symlink_to(Path(own.locate_file(top)).resolve())
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (site / "shared.pth").write_text(f"{shared}\n")
    return folder / "bin" / "python"


if __name__ == "__main__":
    create(Path(sys.argv[1]), sys.argv[2:])
