"""An exported folder on the Hugging Face hub: checked before anything is written, private unless asked otherwise."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jaxdistill.console import is_live
from jaxdistill.errors import UserError, first_line

_LOGIN = "run `hf auth login`, or set HF_TOKEN to a token that may write"


class Target(NamedTuple):
    """Where a folder goes."""

    name: str  # user/model, or organisation/model
    private: bool


def check_target(target: Target) -> None:
    """Checks the name alone, which needs no network.

    Raises:
      UserError: no repository can have this name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(target.name)
    except HFValidationError as error:
        raise UserError(f"--push {target.name!r} is no name on the hub: {first_line(error)}") from error
    if target.name.count("/") != 1:
        raise UserError(f"--push {target.name!r} must name a user, or an organisation, and a model: user/model")


def check_access(target: Target) -> str:
    """The name of the user whose token is on this machine, asked of the hub, before any long work.

    Raises:
      UserError: there is no token, the hub does not accept it, or it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {target.name}: HF_HUB_OFFLINE is set, so nothing goes to the hub; unset it")
    if not huggingface_hub.get_token():
        raise UserError(f"--push {target.name}: there is no token of the hub on this machine; {_LOGIN}")
    with _explained(target):
        return huggingface_hub.HfApi().whoami()["name"]


def push(folder: Path, target: Target) -> str:
    """Sends all files of a folder in one commit, and returns the address of the repository.

    A repository that there is already stays public or private as it is, and files of other names stay in it.

    Raises:
      UserError: the hub refuses, or cannot be reached. Nothing is seen there then but an empty repository at most.
    """
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not is_live():
        disable_progress_bars()  # they have no end of line, and would stand before an error's
    api = huggingface_hub.HfApi()
    with _explained(target):
        address = api.create_repo(target.name, private=target.private, exist_ok=True)
        api.upload_folder(repo_id=target.name, folder_path=folder, commit_message="Exported by jaxdistill")
    return str(address)


def files_of(folder: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every file that `push` sends."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), os.path.getsize(path)


@contextmanager
def _explained(target: Target) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's own errors, and those of requests or httpx, by the version of its client
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = _LOGIN if status in (401, 403) else "check the name and the network, and try again"
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""  # of an upload, why it failed
        raise UserError(f"--push {target.name}: the hub says: {first_line(error)}{cause}; {hint}") from error
