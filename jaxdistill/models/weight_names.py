"""Which tensor of a file is which of the model, where wrappers, older classes and tied weights say another name."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.models import torch_names
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.model import Model

Tensors = dict[str, np.ndarray]  # by torch name; floats are float32

# What torch.compile, FSDP and activation checkpointing put into names, before any module and not only at the beginning.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}  # of layer norms
_SHOWN = 3  # names in an error


def with_wanted_names(source: Path, tensors: Mapping[str, np.ndarray], *, model: Model, wanted: set[str]) -> Tensors:
    """The tensors under the names that the model wants; those that it has no place for keep theirs.

    Raises:
      UserError: two tensors that differ are one by their names.
    """
    shared = _shared_prefix(tensors, model=model, wanted=wanted)
    result: Tensors = {}
    for old, array in tensors.items():
        name = _wanted_name(_unwrapped(old).removeprefix(shared), model=model, wanted=wanted)
        if name in result and not np.array_equal(result[name], array, equal_nan=True):
            raise UserError(f"{source} holds {name} twice, and not with the same values: remove one from the file")
        result[name] = array
    for name, other in _tied_names(model, wanted).items():
        if name not in result and other in result:
            result[name] = result[other]
    return result


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _shared_prefix(tensors: Collection[str], *, model: Model, wanted: set[str]) -> str:
    """The shortest prefix that all names share and without which the most of them are wanted; "" for none.

    What module. (DataParallel) and model. (Lightning) put in front is such a prefix.
    """
    names = [_unwrapped(name) for name in tensors]

    def fitting(prefix: str) -> int:
        return sum(_wanted_name(name.removeprefix(prefix), model=model, wanted=wanted) in wanted for name in names)

    return max(_shared_prefixes(names, model), key=fitting)  # the first of equals, and they come by length


def _shared_prefixes(names: Collection[str], model: Model) -> Iterator[str]:
    """All prefixes of whole modules that the names share, the shortest first, up to one that names another family."""
    yield ""
    others = {family.base for kind, family in FAMILIES.items() if family.base in kind} - {model.family.base}
    first = next(iter(names), "").split(".")
    for length in range(1, len(first)):
        prefix = ".".join(first[:length]) + "."
        if first[length - 1] in others or not all(name.startswith(prefix) for name in names):
            return
        yield prefix


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
