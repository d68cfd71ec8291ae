"""How a recipe becomes a Config: `configs/x.py:variant` is run, and `--config.KEY=VALUE` flags are applied.

The recipes of the package are also found by name, as `bert_mlm` or `bert_mlm:smoke`, wherever the package is installed.
"""

import contextlib
import difflib
import inspect
import os
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxdistill.config import TEXT_OR_TEXTS, Config, NoVariantError, base, check, flat
from jaxdistill.errors import UserError
from jaxdistill.files import named_path
from jaxdistill.knobs import checked


def read(path: str, overrides: Sequence[str]) -> Config:
    """Reads `configs/x.py` or `configs/x.py:variant`, or a recipe by its name, and applies `--config.key=value` flags.

    Raises:
      UserError: no such recipe, an unknown key (with the nearest one), a value of the wrong type, or a broken rule.
    """
    return validated(_values_of(path, overrides))


def with_settings(config: Any, settings: Mapping[str, Any], *, own_losses: bool = False) -> Config:
    """For Python programs: a recipe, or a config, with other values by dotted key, as {"train.steps": 100}.

    Args:
      config: a recipe as `read` takes it, a Config, or what a recipe returns; None = the defaults.
      own_losses: as for `config.check`.

    Raises:
      UserError: as `read`.
    """
    if isinstance(config, str | os.PathLike):
        values = _values_of(str(config), ())
    elif isinstance(config, Config):
        values = config.model_dump()
    else:
        values = _complete("config", base() if config is None else config)
    for key, value in settings.items():
        if key not in _keys():
            raise UserError(_unknown(key))
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return validated(values, own_losses=own_losses)


def _values_of(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a recipe with `--config.KEY=VALUE` overrides, as yet unchecked."""
    file, colon, variant = path.partition(":")
    file = str(_found(file, flag="--config: "))
    recipe = _run(f"{file}{colon}{variant}")
    if not isinstance(recipe, ConfigDict):
        raise UserError(f"{file}: get_config returned {type(recipe).__name__}; it must return a config")
    return _complete(file, _override(recipe, overrides))


def _complete(name: str, recipe: Any) -> dict[str, Any]:
    """The values of a ConfigDict that must have all keys of a Config, and no others."""
    if not isinstance(recipe, ConfigDict):
        raise UserError(
            f"{name} is of type {type(recipe).__name__}; it must be a recipe's path, or what get_config returns"
        )
    values = recipe.to_dict()
    known, given = _keys(), dict(flat(values)).keys()
    if missing := known - given:
        raise UserError(f"{name}: no value for {min(missing)!r}; start from jaxdistill.config.base()")
    if unknown := given - known:
        raise UserError(f"{name}: {_unknown(min(unknown))}")
    return values


def recorded(values: dict[str, Any], overrides: Sequence[str]) -> Config:
    """The config that stands in a run folder, with `--config.key=value` overrides.

    Raises:
      UserError: as `read`.
    """
    config: Any = base()  # a ConfigDict
    for key, value in flat(values):
        if key not in _keys():
            raise UserError(f"config.json is of another version of jaxdistill: {_unknown(key)}")
        if value is not None:
            # JSON has lists where the config has tuples.
            fixed = tuple(value) if isinstance(value, list | tuple) else value
            config.update_from_flattened_dict({key: fixed})
    return validated(_override(config, overrides).to_dict())


def validated(values: dict[str, Any], *, own_losses: bool = False) -> Config:
    """The Config with these values, all rules checked.

    Args:
      own_losses: as for `config.check`.

    Raises:
      UserError: the first broken rule.
    """
    config = checked(Config, values)
    check(config, own_losses=own_losses)
    return config


class Recipe(NamedTuple):
    """A recipe of the package, for a list of them."""

    name: str
    variants: tuple[str, ...]
    path: Path
    explanation: str  # the whole docstring


def recipes() -> list[Recipe]:
    """The recipes of the package, by name."""
    return [_described(path) for path in sorted(_folder().glob("*.py"))]


def recipe_named(name: str) -> Recipe:
    """A recipe of the package, or of a file; a variant after a colon is that of the recipe.

    Raises:
      UserError: there is none of this name, or the file is none.
    """
    file, _, variant = name.partition(":")
    found = _described(_found(file))
    if variant and variant not in found.variants:
        raise NoVariantError(variant, found.variants or ("none",))
    return found


def _described(path: Path) -> Recipe:
    with _mistakes_of(str(path)):
        names = runpy.run_path(str(path))
        variants = _variants(_get_config(names))
    return Recipe(path.stem, variants, path, inspect.cleandoc(names["__doc__"] or "no explanation"))


def _variants(get_config: Any) -> tuple[str, ...]:
    try:
        get_config("?")
    except NoVariantError as error:
        return error.names
    except Exception:  # a recipe without variants, or one that refuses them in a way of its own, names none
        return ()
    return ()


def _found(name: str, *, flag: str = "") -> Path:
    """The file of a recipe that a user names: a path, or the name of a recipe of the package."""
    if (path := named_path(name)).is_file():
        return path
    of_package = {path.stem: path for path in _folder().glob("*.py")}
    if name in of_package:
        return of_package[name]
    near = difflib.get_close_matches(Path(name).stem, of_package, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"{flag}there is no file {name!r}, and no recipe of this name; {hint}`jaxdistill recipes` lists those of the "
        "package"
    )


def _folder() -> Path:
    """The folder of recipes: in the package where that is installed, and beside it in a checkout."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def _run(path: str) -> Any:
    """The result of get_config in `file.py`, or in `file.py:variant`."""
    file, *variant = path.split(":", 1)
    if variant == [""]:
        raise UserError(f"--config {path} ends with a colon; name a variant after it, or leave it out")
    with _mistakes_of(file):
        return _get_config(runpy.run_path(file))(*variant)


def _get_config(names: Mapping[str, Any]) -> Any:
    if "get_config" not in names:
        raise UserError("there is no function get_config")
    return names["get_config"]


@contextlib.contextmanager
def _mistakes_of(file: str) -> Iterator[None]:
    """A recipe is the user's program: what it raises is reported with its line."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{file}: {e}") from e
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        where = f"{file} line {lines[-1]}" if lines else file
        raise UserError(f"{where}: {type(e).__name__}: {_one_line(e)}") from e


def _override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    for item in overrides:
        if not item.startswith("--config.") or "=" not in item:
            raise UserError(f"unknown argument {item!r}; config values are given as --config.KEY=VALUE")
        key = item.removeprefix("--config.").split("=")[0]
        if key not in _keys():
            raise UserError(_unknown(key))
    argv = ["jaxdistill", *map(_quoted, overrides)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return values.config
    except flags.Error as e:
        raise UserError(_one_line(e)) from e


def _quoted(item: str) -> str:
    """An override, with quotation marks where a text or a tuple may stand: 2024 is the name of a folder there."""
    key, _, value = item.partition("=")
    is_text = key.removeprefix("--config.") in TEXT_OR_TEXTS and not value.startswith(("(", "[", "'", '"'))
    return f"{key}={value!r}" if is_text else item


def _keys() -> set[str]:
    return {key for key, _ in flat(Config().model_dump())}


def _unknown(key: str) -> str:
    known = sorted(_keys())
    tail = key.split(".")[-1]
    near = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.split(".")[-1] == tail]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown config key {key!r}{hint}"


def _one_line(error: BaseException) -> str:
    # ConfigDict raises with the repr of its message, and lists all other keys in it.
    text = re.sub(r"^'(.*)'$", r"\1", str(error), flags=re.DOTALL).replace("\\n", " ").replace("\\'", "'")
    return " ".join(re.sub(r'Other fields present: "{.*}"', "", text).split())
