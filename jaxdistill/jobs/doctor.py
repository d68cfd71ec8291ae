"""What of this machine and this installation a run can use, and what stands in its way."""

import importlib.metadata as metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill import __version__
from jaxdistill.config import Config
from jaxdistill.errors import first_line
from jaxdistill.files import named_path
from jaxdistill.models.host_memory import memory_allowed
from jaxdistill.network import is_hub_silent

ROOM = 5e9  # bytes on the disk of a cache, below which a user is told


class Finding(NamedTuple):
    """What one look found."""

    what: str
    found: str
    verdict: Literal["ok", "note", "fix"] = "ok"  # note: works, and could be better; fix: something will fail
    advice: str = ""


Look = Callable[[], Iterator[Finding]]


def examine() -> Iterator[Finding]:
    """All findings, each as soon as it is made; a look that fails is a finding itself."""
    for name, look in LOOKS.items():
        try:
            yield from look()
        except Exception as error:  # whatever a driver or a library raises is what the user came to hear of
            yield Finding(name, f"{type(error).__name__}: {first_line(error)}", "fix", "a run will meet the same error")


def _program() -> Iterator[Finding]:
    yield Finding("jaxdistill", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    libraries = ("jax", "jaxlib", "flax", "transformers", "numpy")
    yield Finding("libraries", ", ".join(f"{name} {metadata.version(name)}" for name in libraries))


def _requirements() -> Iterator[Finding]:
    """Packages whose versions do not go together, as pip allows where they are installed one after the other."""
    from packaging.requirements import Requirement

    extras = [extra for extra, module in _EXTRAS.items() if importlib.util.find_spec(module)]
    wrong = False
    for line in metadata.requires("jaxdistill") or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            continue
        found = _version(requirement.name)
        if found and not requirement.specifier.contains(found, prereleases=True):
            wrong = True
            fix = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Finding("versions", f"{requirement.name} {found}, and it must be {requirement.specifier}", "fix", fix)
    for first, second, bad, why in _BAD_PAIRS:
        versions = _version(first), _version(second)
        if all(versions) and bad(*versions):
            wrong = True
            yield Finding("versions", f"{first} {versions[0]} beside {second} {versions[1]}", "fix", why)
    if not wrong:
        yield Finding("versions", "go together")
    for extra, module in _EXTRAS.items():
        if not importlib.util.find_spec(module):
            yield Finding(
                f"extra {extra}", "not installed", "ok", f"pip install 'jaxdistill[{extra}]' where it is needed"
            )


# Extra -> the module that shows that it is installed.
_EXTRAS = {
    "tfds": "tensorflow_datasets",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "trackio": "trackio",
    "rouge": "rouge_score",
    "sentencepiece": "sentencepiece",
    "report": "matplotlib",
}


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


# (package, package, which versions of them, what happens); each was seen to fail.
_BAD_PAIRS: tuple[tuple[str, str, Callable[[str, str], bool], str], ...] = (
    (
        "jax",
        "jaxlib",
        lambda jax, jaxlib: _minor(jax) != _minor(jaxlib),
        "they are released together: pip install -U jax jaxlib",
    ),
    (
        "jaxlib",
        "jax-cuda12-plugin",
        lambda jaxlib, plugin: _minor(jaxlib) != _minor(plugin),
        "JAX passes the plugin over and computes on the CPU: pip install -U 'jax[cuda12]'",
    ),
    (
        "transformers",
        "huggingface-hub",
        lambda transformers, hub: transformers.startswith("4.") and not hub.startswith("0."),
        "transformers 4 cannot be imported beside it: pip install 'huggingface-hub<1'",
    ),
    (
        "sentence-transformers",
        "transformers",
        lambda sentences, transformers: int(sentences.split(".")[0]) >= 6 and transformers.startswith("4."),
        "sentence-transformers 6 needs transformers 5; jaxdistill runs beside both, without the extra `flax`",
    ),
)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _devices() -> Iterator[Finding]:
    devices = jax.local_devices()
    first = devices[0]
    sizes = [stats.get("bytes_limit", 0) for device in devices if (stats := device.memory_stats())]
    memory = f"{sum(sizes) / 1e9:.1f} GB" if sizes else f"{memory_allowed() / 1e9:.1f} GB of the machine's memory"
    yield Finding("devices", f"{len(devices)} x {first.device_kind} ({first.platform}), {memory}")
    if first.platform == "cpu":
        yield Finding("processor", f"{os.cpu_count()} cores")
        if any(Path("/dev").glob("nvidia[0-9]*")):
            fix = "pip install 'jaxdistill[cuda]', and look at nvidia-smi for the driver"
            yield Finding("devices", "there is an NVIDIA GPU, and JAX does not see it", "fix", fix)
        if any(Path("/dev").glob("accel[0-9]*")):
            fix = "pip install 'jaxdistill[tpu]'; another process may hold the chips"
            yield Finding("devices", "there is a TPU, and JAX does not see it", "fix", fix)
    if libtpu := _version("libtpu"):
        yield Finding("libtpu", f"{libtpu}: `jaxdistill plan --topology v5e:2x4` can compile for slices")
    else:
        yield Finding("libtpu", "not installed", "ok", "`jaxdistill plan --topology` needs the extra `tpu`")


def _arithmetic() -> Iterator[Finding]:
    """A product of matrices in both data types, on a device: whether they are usable, and not how fast."""
    x = jax.random.normal(jax.random.key(0), (256, 256), jnp.bfloat16)
    exact = jax.jit(lambda a: a.astype(jnp.float32) @ a.astype(jnp.float32))(x)
    half = jax.jit(lambda a: (a @ a).astype(jnp.float32))(x)
    off = float(jnp.abs(half - exact).max() / jnp.abs(exact).max())
    fine = off < 0.01  # two roundings to 8 bits
    advice = "" if fine else "keep config.student.dtype and config.teacher.dtype at float32"
    yield Finding("bfloat16", f"a product is off by {off:.2%} of its largest value", "ok" if fine else "fix", advice)


def _attention() -> Iterator[Finding]:
    if jax.local_devices()[0].platform != "gpu":
        yield Finding("cudnn", "there is no NVIDIA GPU here", "ok", "attention=cudnn is for NVIDIA GPUs")
        return
    x = jnp.ones((1, 64, 2, 64), jnp.bfloat16)
    try:
        jax.block_until_ready(jax.nn.dot_product_attention(x, x, x, implementation="cudnn"))
    except Exception as error:  # whatever cuDNN or its absence raises says why
        yield Finding("cudnn", first_line(error), "note", "leave config.*.attention at its default")
        return
    yield Finding("cudnn", "attention=cudnn works, in bfloat16")


def _caches() -> Iterator[Finding]:
    compiled = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not compiled:
        advice = "export JAX_COMPILATION_CACHE_DIR=FOLDER, and a second start compiles nothing"
        yield Finding("compiled programs", "are not kept", "note", advice)
    from huggingface_hub import constants

    folders = {"compiled programs": compiled, "prepared text": Config().data.cache_dir, "hub": constants.HF_HUB_CACHE}
    for what, name in folders.items():
        if name:
            yield _cache(what, named_path(name))


def _cache(what: str, folder: Path) -> Finding:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free
    found = f"{folder}: {size / 1e9:.1f} GB, {free / 1e9:.0f} GB free"
    if not os.access(there, os.W_OK):
        return Finding(what, found, "fix", f"{there} may not be written; name another folder")
    if free < ROOM:
        return Finding(what, found, "note", "the disk is nearly full")
    return Finding(what, found)


def _network() -> Iterator[Finding]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "offline mode (HF_HUB_OFFLINE): models and data sets come from the cache alone")
    elif is_hub_silent():
        yield Finding("hub", "does not answer", "note", "name local folders, or models that are in the cache")
    else:
        yield Finding("hub", "answers")


def _huge_pages() -> Iterator[Finding]:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.is_file():
        return
    chosen = path.read_text().partition("[")[2].partition("]")[0]
    if jax.local_devices()[0].platform == "tpu" and chosen != "always":
        advice = f"as root: echo always > {path}; copies between the host and a TPU are then faster"
        yield Finding("huge pages", chosen, "note", advice)
    else:
        yield Finding("huge pages", chosen)


def _terminal() -> Iterator[Finding]:
    yield Finding("terminal", "a bar shows how a run goes" if sys.stderr.isatty() else "none: a run prints lines")


LOOKS: dict[str, Look] = {
    "program": _program,
    "versions": _requirements,
    "devices": _devices,
    "bfloat16": _arithmetic,
    "cudnn": _attention,
    "caches": _caches,
    "hub": _network,
    "huge pages": _huge_pages,
    "terminal": _terminal,
}
