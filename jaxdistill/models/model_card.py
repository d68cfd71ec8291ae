"""What the card of a model says of it: its licence, and the models of the hub that it was made from."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.files import named_path

# The fields of a licence; the last two say more where the first one is `other`.
_LICENCE = ("license", "license_name", "license_link")


class CardFacts(NamedTuple):
    """Facts of a card's head; empty where there is no card, or where it does not say."""

    licence: dict[str, str]  # by the names of the hub
    base_models: tuple[str, ...]  # names on the hub


def card_facts(name: str, *, revision: str = "") -> CardFacts:
    """The facts in README.md of a model folder, or of a model of the hub."""
    path = named_path(name) / "README.md" if named_path(name).is_dir() else _from_hub(name, revision)
    fields = _head(path) if path is not None and path.is_file() else {}
    licence = {field: fields[field] for field in _LICENCE if isinstance(fields.get(field), str)}
    bases = fields.get("base_model")
    listed = bases if isinstance(bases, list) else [bases]
    return CardFacts(licence, tuple(base for base in listed if isinstance(base, str) and is_hub_name(base)))


def is_hub_name(name: str) -> bool:
    """Whether this can be the name of a model on the hub, and is no folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists()


def _from_hub(name: str, revision: str) -> Path | None:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, "README.md", revision=revision or None, etag_timeout=5))
    except Exception:  # of many types: no card, no network, a name that is none; a card is not needed to go on
        return None


def _head(path: Path) -> dict[str, Any]:
    """The YAML between the lines `---` at the top of a card; {} where it is none."""
    from huggingface_hub.repocard import metadata_load

    try:
        fields = metadata_load(path)
    except Exception:  # whatever stands there was written by anybody
        return {}
    return fields if isinstance(fields, dict) else {}
