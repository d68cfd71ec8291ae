"""Imports go one way, and the entry points start at once. Read from the source; nothing is imported here."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import jaxdistill

PACKAGE = Path(jaxdistill.__file__).parent
# A module imports from the rows below its own, or from its own part. A part is a room, or a file of the top level.
LAYERS = (
    ("cli",),
    ("train",),
    ("api", "commands"),
    ("cost",),
    ("jobs",),
    ("run",),
    ("reference", "recipe"),
    ("config",),
    ("evaluate", "export", "report"),
    ("sampling",),
    ("step",),
    ("losses",),
    ("models",),
    ("data",),
    ("processes",),
    ("knobs", "files", "console", "network", "arguments", "cluster"),
    ("errors",),
)
ROW = {part: row for row, parts in enumerate(LAYERS) for part in parts}
# The files that ask what only transformers' Flax classes need, which can be dropped with these classes.
ASK_FOR_FLAX_CLASSES = {"models/model.py", "models/intercept.py", "sampling/generate.py"}
SEE_THE_CONFIG = {"train", "cli", "api", "commands", "cost", "jobs", "run", "recipe", "reference", "config"}
HEAVY = (
    "jax",
    "jaxlib",
    "flax",
    "transformers",
    "torch",
    "datasets",
    "tokenizers",
    "numpy",
    "ml_collections",
    "pydantic",
)
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def part_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imports(module: Path) -> set[str]:
    """Dotted names of all modules that `module` imports, inside functions and for typing too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(module: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


def test_every_module_has_a_row() -> None:
    assert {part_of(module) for module in MODULES} - {"__init__"} <= ROW.keys()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down(module: Path) -> None:
    if part_of(module) == "__init__":
        return
    for name in imports(module):
        package, *rest = name.split(".")
        if package == "jaxdistill" and rest != ["__version__"]:
            other = rest[0]
            assert other == part_of(module) or ROW[other] > ROW[part_of(module)], f"imports {name}"


def test_no_file_imports_itself_in_a_circle() -> None:
    """Inside a room too: in the order of imports every file comes after the files that it imports."""
    graph = {name_of(module): files_of(module) for module in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) == graph.keys()


def name_of(module: Path) -> str:
    return ".".join(("jaxdistill", *module.with_suffix("").parts)).removesuffix(".__init__")


NAMES = {name_of(module) for module in MODULES}


def files_of(module: Path) -> set[str]:
    """The files of the package that `module` imports; a name in a file is an import of that file."""
    found = {name if name in NAMES else name.rpartition(".")[0] for name in imports(module)}
    return (found & NAMES) - {"jaxdistill"}


def test_the_packages_own_init_imports_what_is_asked_for() -> None:
    """Names of the surface are imported from the rooms when they are used, so that every command starts at once."""
    at_once = {"importlib", "sys", "types.ModuleType", "typing.TYPE_CHECKING", "typing.Any"}
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    rest = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = {f"{getattr(node, 'module', None) or ''}.{alias.name}".lstrip(".") for node in rest for alias in node.names}
    assert found == at_once


def test_data_never_imports_jax() -> None:
    for module in MODULES:
        if part_of(module) == "data":
            assert not roots(module) & {"jax", "jaxlib", "flax", "optax", "orbax"}, module


def test_the_config_dict_is_seen_by_few() -> None:
    for module in MODULES:
        if part_of(module) not in SEE_THE_CONFIG:
            for name in imports(module):
                assert not name.startswith(("ml_collections", "jaxdistill.config")), f"{module} imports {name}"


def test_flax_classes_are_asked_for_in_few_places() -> None:
    asking = {str(m) for m in MODULES if any(name.startswith("jaxdistill.models.flax.") for name in imports(m))}
    assert {name for name in asking if not name.startswith("models/flax/")} == ASK_FOR_FLAX_CLASSES


def test_torch_is_for_pickles_alone() -> None:
    assert [str(m) for m in MODULES if "torch" in roots(m)] in ([], ["models/weights.py"])


@pytest.mark.parametrize("module", ["jaxdistill.cli", "jaxdistill.train"])
def test_entry_points_import_nothing_of_weight(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
