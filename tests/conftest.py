"""One strict session: eight CPU devices, checked annotations, no implicit rank promotion, nothing from the network."""

import atexit
import gc
import itertools
import os
import re
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the suite's time is compilation; without optimisation a gradient takes 0.6 s instead of 4.2 s, and in
# one piece (not 32, for as many threads) a third less again.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    # jaxlib 0.12 has no such flag, and ends a process that sets it.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")) else ""),
)
# Compiled programs hold no source locations of their operations, which would take a fiftieth of the suite's time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Compiled programs are shared by all processes of a session: pytest's own and those that tests start. In a folder that
# JAX_COMPILATION_CACHE_DIR names they are kept for the next session.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxdistill-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

gc.set_threshold(50_000, 50, 50)  # also while tests are imported, which takes 9 s in place of 13

pytest.register_assert_rewrite("tiny_run")  # so that failures of its assertions show the values

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # the tower: an int is accepted as a float


def pytest_configure(config: pytest.Config) -> None:
    # transformers' ModernBERT runs torch.compile where it is imported, which torch itself warns of.
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
    # An entry of the compilation cache that another process is writing; the program is compiled instead.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")
    deals_out = config.getoption("dist", "no") != "no" and not config.option.collectonly
    if not deals_out:  # the process that deals out the tests to others runs none
        prepare()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A weekly test is a slow one, too: the fast part has neither. Files with slow tests come first, so that at the end
    no process waits for another one's last long test."""
    for item in items:
        if item.get_closest_marker("weekly"):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def prepare() -> None:
    """What a process that runs tests needs before the first import of the package."""
    import jax
    import transformers  # noqa: F401 - before a command says USE_TORCH=0 to its process, which here is the oracles' too

    install_import_hook("jaxdistill", "conftest.check")
    if os.environ["JAX_PLATFORMS"] == "cpu":
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")

    from jaxdistill import console

    console.PATIENCE = 600.0  # seconds: how busy the machine is must not decide on what a test reads


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from searching all imported modules again and again: a tenth of the suite's time."""
    gc.collect()
    gc.freeze()


_tests = itertools.count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Any:
    # Keeps the collections that a run asks for (run/memory.py) from searching what earlier tests traced. What is frozen
    # is never freed, so all of it is searched once in three hundred tests, which takes a second.
    if next(_tests) % 300 == 0:
        gc.unfreeze()
        gc.collect()
    gc.freeze()
    return (yield from skipped_without_flax_classes())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Any:
    return (yield from skipped_without_flax_classes())


def skipped_without_flax_classes() -> Any:
    """Skips what fails for want of transformers' Flax classes, which version 5 does not have."""
    try:
        return (yield)
    except Exception as error:
        wanted = re.search(r"has no Flax class|import name 'Flax|No module named 'transformers.*flax", str(error))
        if wanted and int(version("transformers").split(".")[0]) >= 5:
            pytest.skip("needs transformers' Flax classes, as of the extra `flax`")
        raise


SHARED = Path(__file__).parents[2] / "shared"  # real models and corpora, beside the checkout where there are any


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Text, tokenizer, teacher and recipe of runs that take seconds."""
    import tiny_run

    return tiny_run.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs real models and corpora in {SHARED.name}/ beside the checkout")
    return SHARED
