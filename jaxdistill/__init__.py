"""Distils large transformer language models into small ones, in JAX.

    import jaxdistill

    run = jaxdistill.distil(config="quickstart:smoke", workdir="runs/first")
    jaxdistill.fill_mask(run.student, "We must work for peace and [MASK].")

docs/python.md shows all of it. The names are imported when they are first used, so that `import jaxdistill`, and with
it every command, starts without JAX.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdistill.api.distil import Loss, Run, distil, evaluate
    from jaxdistill.api.models import LanguageModel, cut, export, fill_mask, generate, load, neighbours
    from jaxdistill.errors import UserError

__version__ = "0.1.0"

# Name -> the file that it stands in.
_SURFACE = {
    **dict.fromkeys(("Loss", "Run", "distil", "evaluate"), "api.distil"),
    **dict.fromkeys(("LanguageModel", "cut", "export", "fill_mask", "generate", "load", "neighbours"), "api.models"),
    "UserError": "errors",
}

__all__ = [
    "LanguageModel",
    "Loss",
    "Run",
    "UserError",
    "cut",
    "distil",
    "evaluate",
    "export",
    "fill_mask",
    "generate",
    "load",
    "neighbours",
]


def __getattr__(name: str) -> Any:
    if name not in _SURFACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_SURFACE[name]}"), name)


class _Package(ModuleType):
    """`evaluate` and `export` are functions here, and folders of the package as well.

    Python binds a folder to its name in the package when it is imported, which would hide the function. Imports of the
    folder, as `from jaxdistill.export.card import model_card`, do not go by that name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _SURFACE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
