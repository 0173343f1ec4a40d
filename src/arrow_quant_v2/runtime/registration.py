"""Teaches transformers and diffusers our folders as soon as either is imported, before or after us; imports neither.

Both keep their tables of quantization methods in modules that take seconds to import, and neither looks for plugins. So
an import of the module that defines a library's models is noticed, and followed by one of ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# A library's module -> ours, which has a function `register`.
FOLLOWED = {
    "transformers.modeling_utils": "arrow_quant_v2.runtime.hf_transformers",
    "diffusers.models.modeling_utils": "arrow_quant_v2.runtime.hf_diffusers",
}


class Follower(MetaPathFinder):
    """Finds the modules of FOLLOWED as they would be found without it, and makes each register us when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a followed module, None for every other one."""
        if fullname not in FOLLOWED:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, Follower))
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader, FOLLOWED[fullname])
        return spec


def _register_after(loader: Any, ours: str) -> None:
    """Let this loader, which serves one module, call ours when that module has run."""
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        register_now(ours)

    loader.exec_module = execute_and_register


def register_now(ours: str) -> None:
    """Import one of our modules and let it register itself."""
    importlib.import_module(ours).register()


def follow() -> None:
    """Register with the libraries that are imported already, and with the others when they are; may be called again."""
    if not any(isinstance(finder, Follower) for finder in sys.meta_path):
        sys.meta_path.insert(0, Follower())
    for theirs, ours in FOLLOWED.items():
        if theirs in sys.modules:
            register_now(ours)
