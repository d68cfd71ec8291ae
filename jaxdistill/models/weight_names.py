"""Which tensor of a file is which of the model, where wrappers, older classes and tied weights say another name."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.models import torch_names
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.model import Model
from jaxdistill.models.stored import Stored

Tensor = np.ndarray | Stored  # floats are float32
Tensors = dict[str, Tensor]  # by torch name

# What torch.compile, DataParallel, FSDP and activation checkpointing put into names, before any module and not only at
# the beginning.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}  # of layer norms
_SHOWN = 3  # names in an error


def with_wanted_names(source: Path, tensors: Mapping[str, Tensor], *, model: Model, wanted: set[str]) -> Tensors:
    """The tensors under the names that the model wants; those that it has no place for keep theirs.

    Raises:
      UserError: two tensors that differ are one by their names.
    """
    names = _without_prefixes([_unwrapped(old) for old in tensors], model=model, wanted=wanted)
    result: Tensors = {}
    for name, array in zip(names, tensors.values(), strict=True):
        if name in result and not np.array_equal(np.asarray(result[name]), np.asarray(array), equal_nan=True):
            raise UserError(f"{source} holds {name} twice, and not with the same values: remove one from the file")
        result[name] = array
    for name, other in _tied_names(model, wanted).items():
        if name not in result and other in result:
            result[name] = result[other]
    return result


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _without_prefixes(names: Sequence[str], *, model: Model, wanted: set[str]) -> list[str]:
    """The names without what a class of the user's, such as Lightning's model., put in front of all or some of them.

    A prefix is taken off where the names behind it are wanted. It is left where two prefixes have the same names behind
    them (a student and a teacher in one file), or where such a name also stands alone: which is meant, nobody can tell.
    """
    known = wanted | set(_tied_names(model, wanted).values())
    found = [_wanted_name(name, model=model, wanted=wanted) for name in names]
    while True:
        rest = [i for i, name in enumerate(found) if name not in known]
        there = known & set(found)
        behind = _behind_prefixes([names[i] for i in rest], model=model, wanted=wanted, known=known)
        usable = {prefix: new for prefix, new in behind.items() if not new & there}
        if not usable:
            return found
        prefix = max(usable, key=lambda prefix: (len(usable[prefix]), -len(prefix)))
        others = (other for other in behind if not (other.startswith(prefix) or prefix.startswith(other)))
        if any(behind[other] & behind[prefix] for other in others):
            return found
        for i in rest:  # also names that are not wanted, such as those of layers too many
            if names[i].startswith(prefix):
                found[i] = _wanted_name(names[i].removeprefix(prefix), model=model, wanted=wanted)


def _behind_prefixes(names: Collection[str], *, model: Model, wanted: set[str], known: set[str]) -> dict[str, set[str]]:
    """The known names behind each prefix of whole modules; prefixes that name another family are left out."""
    families = {family.base for kind, family in FAMILIES.items() if family.base in kind} - {model.family.base}
    behind: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts)):
            if parts[length - 1] in families:
                break
            new = _wanted_name(".".join(parts[length:]), model=model, wanted=wanted)
            if new in known:
                behind.setdefault(".".join(parts[:length]) + ".", set()).add(new)
    return behind


def _wanted_name(name: str, *, model: Model, wanted: set[str]) -> str:
    """Names of older files: LayerNorm.gamma and beta, and no base prefix."""
    for old, new in _OLD_ENDINGS.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    inside = f"{model.family.base}.{name}"
    return inside if name not in wanted and inside in wanted else name


def _tied_names(model: Model, wanted: set[str]) -> dict[str, str]:
    """Wanted name -> the other name of the same tensor: embedding and tied head, and the head's bias in the decoder."""
    family = model.family
    head = torch_names.torch_name(f"{family.projection}/kernel")
    tied = {} if head in wanted else {torch_names.torch_name(family.embedding): head}
    if family.projection_bias:
        tied[torch_names.torch_name(family.projection_bias)] = torch_names.torch_name(f"{family.projection}/bias")
    return tied


def check_absent(
    source: Path,
    tensors: Collection[str],
    *,
    model: Model,
    wanted: Collection[str],
    held: Collection[str],
    drawn: bool,
) -> list[str]:
    """The wanted names that the file lacks.

    Args:
      tensors: the names that there are, from `with_wanted_names`.
      held: the names as they stand in the file, for the error.
      drawn: whether what stands outside of the body, a head, may be absent, because it will be drawn at random.

    Raises:
      UserError: a tensor is absent that may not be.
    """
    absent = [name for name in wanted if name not in tensors]
    needed = [name for name in absent if not drawn or name.startswith(f"{model.family.base}.")]
    if needed:
        kind = "causal" if model.family.causal else "masked"
        raise UserError(
            f"{source} lacks {len(needed)} of the {len(wanted)} tensors of a {kind} {model.config.model_type} model: "
            f"{_some(needed)}; the file holds {_some(sorted(held)) or 'none'}: give weights that go with config.json"
        )
    return absent


def check_unexpected(source: Path, tensors: Collection[str], *, model: Model, wanted: Collection[str]) -> None:
    """Ignores heads of other tasks.

    Raises:
      UserError: a tensor of the body has no place in the model, so config.json is of another one.
    """
    base = model.family.base + "."
    layers = model.family.layers.removesuffix("{}").replace("/", ".")
    for name in sorted(set(tensors) - set(wanted)):
        # A file without the base prefix (GPT-2's on the hub) still holds its layers under their name.
        inside = name.startswith(base) or (base + name).startswith(layers)
        if inside and not any(part in name for part in model.family.ignored):
            raise UserError(
                f"{source} holds {name}, for which the configuration ({model.num_layers} layers) has no place: "
                "config.json and weights do not belong together"
            )


def _some(names: Collection[str]) -> str:
    return ", ".join([*list(names)[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])
