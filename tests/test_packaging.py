"""The package as others install it: what it holds, how it runs without the repository, its size and import time."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "jaxdistill", "configs")
LARGEST = 10e6  # bytes of a wheel
LONGEST = 0.5  # seconds of processor time until `import jaxdistill.cli` is done, beside Python's own


def built(folder: Path, what: str) -> Path:
    """The distribution that setuptools builds in a folder of sources, without a network."""
    code = f"from setuptools import build_meta; build_meta.build_{what}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    (file,) = (folder / "dist").iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that is built from the unpacked source distribution, as an installer does."""
    folder = tmp_path_factory.mktemp("package")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    shutil.unpack_archive(built(folder / "source", "sdist"), folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return built(unpacked, "wheel")


@pytest.mark.slow
def test_a_wheel_holds_all_of_the_package_and_the_recipes(wheel):
    def files(folder: Path, name: str) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {f"{name}/{path.relative_to(folder)}" for path in found}

    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files(ROOT / "jaxdistill", "jaxdistill") | files(ROOT / "configs", "jaxdistill/configs")
    assert wheel.stat().st_size < LARGEST


@pytest.mark.slow
def test_an_installed_package_works_without_the_repository(wheel, tmp_path):
    """Recipes by name, with the models and the text that ship: what a run needs before it trains."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)

    def run(*argv: str) -> str:
        code = f"import sys; sys.path.insert(0, {str(site)!r}); from jaxdistill import cli; sys.exit(cli.main())"
        environment = {**os.environ, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(run("recipes", "--json"))
    assert all(Path(one["path"]).is_relative_to(site) for one in found) and len(found) >= 13
    prepared = run("prepare", "--config", "bert_mlm:smoke", f"--config.data.cache_dir={tmp_path / 'cache'}")
    assert Path(prepared.strip()).is_dir()


def test_importing_the_commands_takes_no_time():
    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds("import jaxdistill, jaxdistill.cli") - seconds("pass") for _ in range(2)) < LONGEST


def test_every_extra_is_in_the_table():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = re.search(r"\| extra \|.*?\n\n", (ROOT / "docs" / "install.md").read_text(), re.DOTALL)
    assert table is not None
    assert (
        set(re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table[0].strip().splitlines())))
        == extras.keys()
    )


def test_the_dockerfile_copies_what_the_package_is_built_from():
    """Docker itself is not asked, as the suite needs no builder."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    assert copied == set(SOURCE)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == set(SOURCE)
    assert {line.split()[-1] for line in lines if line.startswith("FROM base AS ")} == {"cpu", "cuda", "tpu"}
