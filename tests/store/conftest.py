"""Lets the store's tests share `stored_examples`, which pytest's importlib mode does not put on the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
