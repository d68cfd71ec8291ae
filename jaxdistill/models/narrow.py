"""A model cut to fewer channels, inner units and heads: the same indexes wherever they are used.

Channels are those of the residual stream, and the same for the whole model. Inner units and heads are chosen in every
layer anew. Which axes of which parameters these are follows from the names of modules, for the Flax classes and for
the core alike.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int, PyTree

from jaxdistill.errors import UserError
from jaxdistill.models.config_fields import head_size
from jaxdistill.models.families import Family
from jaxdistill.models.model import Model
from jaxdistill.models.student import INNER_FIELD

Indexes = Int[np.ndarray, " _"]
Role = Literal["channels", "inner", "heads", "key_heads"]


class Sizes(NamedTuple):
    """The sizes of a narrower model."""

    width: int  # of the residual stream
    inner: int  # of the MLPs
    heads: int


class Scores(NamedTuple):
    """How much the parts of a model matter on a text; the larger, the more (evaluate/importance.py)."""

    channels: Float[np.ndarray, " width"]
    inner: Mapping[str, Float[np.ndarray, " inner"]]  # by module path of a layer
    heads: Mapping[str, Float[np.ndarray, " heads"]]  # by module path of a layer
    # By module path of a norm: the share of each channel in the mean square that the norm divides by, 1 on average.
    energies: Mapping[str, Float[np.ndarray, " width"]]


class Kept(NamedTuple):
    """The indexes of what is kept, in the order of the narrower model."""

    channels: Indexes
    inner: Mapping[str, Indexes]  # by module path of a layer
    heads: Mapping[str, Indexes]  # by module path of a layer


# The end of a module's path -> what its inputs and its outputs are; of several products side by side, each.
_MODULES: tuple[tuple[str, Role | None, tuple[Role | None, ...]], ...] = (
    (r"query|q_lin|q_proj", "channels", ("heads",)),
    (r"key|value|[kv]_lin|[kv]_proj", "channels", ("key_heads",)),
    (r"c_attn|Wqkv|qkv_proj", "channels", ("heads", "key_heads", "key_heads")),
    (r"attention/output/dense|attention/dense|out_lin|out_proj|o_proj|attn/c_proj|attn/Wo", "heads", ("channels",)),
    (r"intermediate/dense|lin1|ffn|fc1|c_fc|gate_proj|up_proj", "channels", ("inner",)),
    (r"Wi|gate_up_proj", "channels", ("inner", "inner")),
    (r"output/dense|lin2|ffn_output|fc2|down_proj|mlp/c_proj|mlp/Wo", "inner", ("channels",)),
    (r"(transform|head|lm_head)/dense|vocab_transform", "channels", ("channels",)),
    (r"predictions/dense|generator_predictions/dense", "channels", (None,)),  # ALBERT and ELECTRA: to the embeddings
    (r"embedding_hidden_mapping_in|embeddings_project", None, ("channels",)),
    (r"q_norm", None, ("heads",)),  # of all heads as one; those of each head are not cut
    (r"k_norm", None, ("key_heads",)),
)
_PATTERNS: tuple[tuple[re.Pattern[str], Role | None, tuple[Role | None, ...]], ...] = tuple(
    (re.compile(f"(.*/)?({pattern})"), inputs, outputs) for pattern, inputs, outputs in _MODULES
)


def full_sizes(model: Model) -> Sizes:
    """The sizes of a model as it is."""
    field = INNER_FIELD.get(model.config.model_type, "intermediate_size")
    return Sizes(model.width, getattr(model.config, field) or 4 * model.width, model.config.num_attention_heads)


def resolve_sizes(model: Model, *, width: int = 0, inner: int = 0, heads: int = 0) -> Sizes:
    """The sizes of a narrower model; those that are not given follow where they must, or stay.

    Raises:
      UserError: they are larger than the model's, or no model can have them.
    """
    if model.config.model_type == "opt" and not _embedding_is_stream(model):
        raise UserError("an OPT whose embeddings are projected (OPT-350m) is not cut to other sizes; leave them out")
    for name, asked in (("width", width), ("inner", inner), ("heads", heads)):
        if asked < 0:
            raise UserError(f"{name} {asked}: a size is a number of 1 or more; leave it out to keep the teacher's")
    full, size = full_sizes(model), head_size(model.config)
    tied = not _own_heads(model)
    if tied and width and not heads:
        heads = width // size
    if tied and heads and not width:
        width = heads * size
    sizes = Sizes(width or full.width, inner or full.inner, heads or full.heads)
    for name, asked, whole in zip(Sizes._fields, sizes, full, strict=True):
        if not 1 <= asked <= whole:
            raise UserError(f"{name} {asked}: a student is cut out of the teacher's {whole}; choose 1 to {whole}")
    if tied and sizes.width != sizes.heads * size:
        fits = Sizes(max(sizes.width // size, 1) * size, sizes.inner, max(sizes.width // size, 1))
        raise UserError(
            f"width {sizes.width} and {sizes.heads} heads: heads are cut whole and have {size} entries, so in a "
            f"{model.config.model_type} the width is {size} times the heads; give a width of {fits.width} with "
            f"{fits.heads} heads"
        )
    if model.config.model_type in ("electra", "albert") and not _embedding_is_stream(model):
        embedding = model.config.embedding_size
        if sizes.width == embedding and model.config.model_type == "electra":
            raise UserError(
                f"width {sizes.width} is that of the embeddings, and an ELECTRA of one width has no projection between "
                "the two; choose another width"
            )
    groups = _key_heads(model)
    if groups != full.heads and sizes.heads % groups:
        raise UserError(
            f"{sizes.heads} heads: the teacher's {full.heads} heads share {groups} key heads, each of which keeps "
            f"equally many; give a multiple of {groups}"
        )
    return sizes


def narrow_config(model: Model, sizes: Sizes) -> Any:
    """The configuration of the narrower model."""
    config = copy.deepcopy(model.config)
    size, same = head_size(config), _key_heads(model) == config.num_attention_heads
    width = config.hidden_size
    config.hidden_size, config.num_attention_heads = sizes.width, sizes.heads
    setattr(config, INNER_FIELD.get(config.model_type, "intermediate_size"), sizes.inner)
    if same and getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = sizes.heads
    if getattr(config, "head_dim", None) is not None or sizes.width != size * sizes.heads:
        config.head_dim = size
    for name in ("embedding_size", "word_embed_proj_dim"):
        if _embedding_is_stream(model) and getattr(config, name, None) == width:
            setattr(config, name, sizes.width)
    return config


def narrow(params: PyTree, model: Model, scores: Scores, sizes: Sizes) -> dict[str, Any]:
    """The parameters of the narrower model, in NumPy: those with the highest scores, in their old order.

    Heads are ranked inside of each group that shares a key head. Norms are scaled so that the channels that stay come
    out with the mean square that they had: where what is cut is zero, a norm over fewer channels is the same.
    """
    groups = _key_heads(model)
    kept = Kept(
        best(scores.channels, sizes.width),
        {path: best(x, sizes.inner) for path, x in scores.inner.items()},
        {path: best_heads(x, sizes.heads, groups=groups) for path, x in scores.heads.items()},
    )
    result = take(params, model, kept)
    if sizes.width != model.width:
        for path, energies in scores.energies.items():
            _scale_norm(result, path, float(np.sqrt(energies[kept.channels].mean())), model)
        _keep_embedding_scale(result, model, sizes)
    return unflatten_dict(result, sep="/")


def take(params: PyTree, model: Model, kept: Kept) -> dict[str, np.ndarray]:
    """The parameters of what is kept, by path."""
    groups, size = _key_heads(model), head_size(model.config)
    of_role: dict[str, Callable[[str], Indexes]] = {
        "channels": lambda layer: kept.channels,
        "inner": lambda layer: kept.inner[layer],
        "heads": lambda layer: _entries(kept.heads[layer], size),
        "key_heads": lambda layer: _entries(_key_heads_of(kept.heads[layer], model), size),
    }
    ends = {"channels": model.width, "heads": model.config.num_attention_heads * size, "key_heads": groups * size}
    ends["inner"] = full_sizes(model).inner
    result = {}
    for path, stored in flatten_dict(params, sep="/").items():
        array = np.asarray(stored)  # one at a time, as they may lie in files
        layer = layer_of(path, model.family)
        for axis, roles in enumerate(roles_of(path, array.ndim, model)):
            if not any(roles) or array.shape[axis] != sum(ends[role] for role in roles if role):
                continue  # a norm of each head by itself
            starts = np.cumsum([0, *(ends[role] for role in roles if role)])
            parts = [of_role[role](layer) + start for role, start in zip(roles, starts, strict=False) if role]
            array = np.take(array, np.concatenate(parts), axis=axis)
        result[path] = array
    return result


def best(scores: Float[np.ndarray, " of"], count: int) -> Indexes:
    """The indexes of the highest scores, ascending; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def best_heads(scores: Float[np.ndarray, " heads"], count: int, *, groups: int) -> Indexes:
    """The heads that stay: equally many of each group that shares a key head; without groups the best of all."""
    if groups == len(scores):
        return best(scores, count)
    each = len(scores) // groups
    return np.concatenate([best(scores[i * each : (i + 1) * each], count // groups) + i * each for i in range(groups)])


def layer_of(path: str, family: Family) -> str:
    """The module path of the layer that a path is inside of; "" outside. ALBERT's are the layers of a group."""
    inside = re.match(re.escape(family.layers).replace(r"\{\}", r"\d+") + r"(/albert_layers/\d+)?(?=/|$)", path)
    return inside.group() if inside else ""


def roles_of(path: str, ndim: int, model: Model) -> list[tuple[Role | None, ...]]:
    """What each axis of a parameter is; several roles stand one after the other on the axis, (None,) is not cut."""
    family = model.family
    module, _, leaf = path.rpartition("/")
    plain: tuple[Role | None, ...] = ("channels",)
    if path == family.projection_bias:
        return [(None,)]
    if module == family.projection:
        return [plain if _embedding_is_stream(model) else (None,), (None,)] if leaf == "kernel" else [(None,)]
    if leaf == "embedding":
        return [(None,), plain if _embedding_is_stream(model) else (None,)]
    inputs, outputs = _of_module(module)
    if module == "generator_predictions/dense" and _embedding_is_stream(model):
        outputs = plain
    if leaf == "kernel" and ndim == 2:
        pair = [(inputs,), outputs]
        return pair[::-1] if model.config.model_type == "gpt2" else pair
    if outputs != (None,) or inputs is not None:
        return [outputs]
    if not _embedding_is_stream(model) and re.search(r"embeddings/|^predictions/|^generator_predictions/", path):
        return [(None,)]
    return [plain]  # a norm


def inputs_of(module: str) -> Role | None:
    """What the inputs of the module at a path are."""
    return _of_module(module)[0]


def is_norm(path: str, shape: Sequence[int], model: Model) -> bool:
    """Whether a parameter is the factor of a norm over the channels of the residual stream."""
    leaf = path.rpartition("/")[2]
    stream = roles_of(path, len(shape), model) == [("channels",)]
    return leaf in ("scale", "weight") and tuple(shape) == (model.width,) and stream


def _of_module(module: str) -> tuple[Role | None, tuple[Role | None, ...]]:
    for pattern, inputs, outputs in _PATTERNS:
        if pattern.fullmatch(module):
            return inputs, outputs
    return None, (None,)


def _own_heads(model: Model) -> bool:
    """Whether heads of a given size may stand beside any width."""
    return model.family.rotary


def _key_heads(model: Model) -> int:
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


def _embedding_is_stream(model: Model) -> bool:
    """Whether the embeddings are in the residual stream; ALBERT, some ELECTRAs and OPT-350m project them."""
    config = model.config
    if config.model_type == "albert":
        return False
    name = {"electra": "embedding_size", "opt": "word_embed_proj_dim"}.get(config.model_type)
    return name is None or getattr(config, name) == config.hidden_size


def _entries(heads: Indexes, size: int) -> Indexes:
    return (heads[:, None] * size + np.arange(size)[None, :]).ravel()


def _key_heads_of(heads: Indexes, model: Model) -> Indexes:
    """The key heads that stay beside the heads of queries: all where several share one."""
    groups = _key_heads(model)
    return heads if groups == model.config.num_attention_heads else np.arange(groups)


def _scale_norm(params: dict[str, np.ndarray], path: str, factor: float, model: Model) -> None:
    name = f"{path}/scale" if f"{path}/scale" in params else f"{path}/weight"
    plus_one = model.config.model_type.startswith("gemma")  # norms multiply by 1 + weight
    weight = params[name]
    params[name] = ((weight + 1) * factor - 1 if plus_one else weight * factor).astype(weight.dtype)


def _keep_embedding_scale(params: dict[str, np.ndarray], model: Model, sizes: Sizes) -> None:
    """Gemma multiplies embeddings by the root of the width; what is smaller there is put into the embeddings."""
    if not model.config.model_type.startswith("gemma"):
        return
    factor = float(np.sqrt(model.width / sizes.width))
    path = model.family.embedding
    params[path] = (params[path] * factor).astype(params[path].dtype)
    if model.config.tie_word_embeddings:  # the head reads the same numbers
        _scale_norm(params, f"{model.family.base}/norm", 1 / factor, model)
