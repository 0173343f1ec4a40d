"""Trains examples/models/text: masked diffusion of the King James Bible. Knows where that text is."""

from __future__ import annotations

import os
import re
import subprocess

from fetch import from_debian
from writing import train

STEPS = 1500
ABOUT = {
    "data": "the King James Bible, from Debian's package bible-kjv-text 4.38; its last 2 % are held out",
    "licence": "the text is in the public domain; the weights are under the Apache License 2.0",
}
VERSE = re.compile(r"^\w+\d+:\d+ ", re.MULTILINE)  # "Ge1:1 " before each verse


def bible() -> str:
    """The text, a verse a line, as the program of Debian's package prints it."""
    folder = from_debian("bible-kjv=4.38", "bible-kjv-text=4.38")
    command = [folder / "usr/bin/bible", "-p", folder / "usr/lib", "-l4000", "-f", "gen1:1-rev22:21"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PAGER": "cat"})
    if done.returncode or "In the beginning" not in done.stdout:
        raise SystemExit(f"{command[0]} did not print the text ({done.returncode}): {done.stderr.strip()[:200]}")
    return VERSE.sub("", done.stdout)


def main() -> None:
    train("text", bible(), ABOUT, STEPS)


if __name__ == "__main__":
    main()
