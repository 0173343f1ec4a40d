"""Trains examples/models/code: masked diffusion of the interpreter's own library. Knows where that lies."""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

from writing import train

STEPS = 900
ABOUT = {
    "data": f"the modules of Python {platform.python_version()}'s standard library, without packages; the last 2 % are"
    " held out",
    "licence": "the library is under the PSF licence; the weights are under the Apache License 2.0",
}
LAST = ("textwrap", "bisect", "heapq", "queue")  # held out, whatever else the interpreter has
LONGEST = 200_000  # bytes; longer modules are tables


def library() -> str:
    """The modules one after the other, those that are held out last."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stat().st_size < LONGEST}
    missing = [name for name in LAST if name not in found]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(missing)}: is it a whole standard library?")
    chosen = [name for name in found if name not in LAST] + list(LAST)
    return "\n\n".join(found[name].read_text(encoding="utf-8") for name in chosen)


def main() -> None:
    train("code", library(), ABOUT, STEPS)


if __name__ == "__main__":
    main()
