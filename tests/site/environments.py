"""Fresh virtual environments, and fresh copies of the project.

The environments share the large packages of this one instead of installing them:

    python tests/site/environments.py .venv-oldest torch pip

makes an environment that has nothing but the named packages and what they need. They are links into
the environment that runs this; pip sees them as installed, leaves them alone, and installs beside
and before them.
"""

import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def closure(names: list[str]) -> set[str]:
    """The named distributions and all that they need here."""
    found: set[tuple[str, str]] = set()  # a name and one of its extras, or ""
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        for extra in {"", *wanted.extras}:
            if (wanted.name, extra) in found:
                continue
            found.add((wanted.name, extra))
            needs = map(Requirement, distribution(wanted.name).requires or [])
            waiting += [r for r in needs if not r.marker or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


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


def copy_project(folder: Path) -> Path | None:
    """Copy the working tree without what git ignores; None where it is no git repository."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        return None
    for name in run.stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


if __name__ == "__main__":
    create(Path(sys.argv[1]), sys.argv[2:])
