"""How a model is split over the devices of a mesh: its parameters, and what its modules return.

Rows are split over `data` and `fsdp`. `fsdp` splits parameters too, which are gathered where they are used. `tensor`
splits the work on a row: heads, the units inside of an MLP, and the vocabulary (Shoeybi et al. 2019, arXiv:1909.08053).
So a pair of products, out of the hidden states and back into them, is one sum over `tensor`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxdistill.errors import UserError
from jaxdistill.models.axes import ROWS, TENSOR
from jaxdistill.models.families import Family
from jaxdistill.models.head import Head
from jaxdistill.models.model import Model

# The end of a module's path -> what `tensor` splits of its product, in transformers' Flax classes and in the core:
# "outputs" (heads, inner units) or "inputs" (the way back). Of several products side by side, "qkv" or "halves", it
# splits the outputs of each; their kernel, which no cut into equal pieces respects, lies as by fsdp and is gathered
# where it is used. Small tables are "whole": not even fsdp splits them.
MODULES = (
    (r"attention/self/(query|key|value)", "outputs"),  # BERT, RoBERTa, ELECTRA
    (r"attention/(query|key|value)", "outputs"),  # ALBERT
    (r"attention/[qkv]_lin", "outputs"),  # DistilBERT
    (r"(self_attn|attn/attention)/[qkv]_proj", "outputs"),  # Llama and its kin, OPT, GPT-Neo
    # DistilBERT's `ffn` is a module of two products, ALBERT's the first of the two.
    (r"intermediate/dense|albert_layers/\d+/ffn|ffn/lin1|fc1|c_fc|mlp/(gate|up)_proj", "outputs"),
    (r"output/dense|attention/dense|out_lin|out_proj|o_proj|c_proj|Wo", "inputs"),
    (r"ffn_output|ffn/lin2|fc2|down_proj", "inputs"),
    (r"(transform|predictions|head)/dense|vocab_transform", "head"),  # as "inputs", of hidden states that are whole
    (r"c_attn|Wqkv|qkv_proj", "qkv"),
    (r"Wi|gate_up_proj", "halves"),
    (r"position_embeddings|token_type_embeddings|wpe|embed_positions", "whole"),
)
_MODULES = tuple((re.compile(f"(.*[/_])?({pattern})"), kind) for pattern, kind in MODULES)


def is_split(mesh: Mesh | None) -> bool:
    """Whether parameters are split over a mesh."""
    return mesh is not None and mesh.shape["fsdp"] * mesh.shape[TENSOR] > 1


def check_heads(model: Model, tensor: int, role: str, *, prefix: str = "config.mesh.") -> None:
    """Checks that `tensor` devices can share the heads of a model.

    Args:
      prefix: how the user names `tensor` and `fsdp`.

    Raises:
      UserError: the number of heads, or of key heads, is no multiple of it.
    """
    heads = model.config.num_attention_heads
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    if heads % tensor or kv_heads % tensor:
        count = f"{heads} heads" if kv_heads == heads else f"{heads} heads and {kv_heads} key heads"
        raise UserError(
            f"{prefix}tensor={tensor} must divide the {count} of the {role}; set it to a divisor of "
            f"{math.gcd(heads, kv_heads)}, and split the parameters by {prefix}fsdp"
        )


class Cut(NamedTuple):
    """How a parameter is split."""

    tensor: int | None = None  # the axis that `tensor` splits; None = none
    over: tuple[str, ...] = ("fsdp",)  # what splits the longest of the other axes


def cut_of(path: str, ndim: int, family: Family) -> Cut:
    """How a parameter with this path is split, or an array that the optimizer keeps for it.

    Args:
      path: ends with the path of the parameter in the model.
      ndim: of the array; an optimizer may keep one of fewer axes for a parameter, which is not split.
    """
    if _ends_with(path, family.embedding):
        return Cut(0 if ndim == 2 else None)
    if family.projection_bias and _ends_with(path, family.projection_bias):
        return Cut(0 if ndim == 1 else None)
    module, _, leaf = path.rpartition("/")
    if _ends_with(module, family.projection):
        return Cut(1 if leaf == "kernel" and ndim == 2 else None)
    kind = kind_of(module)
    if kind in _OVER:
        return Cut(over=_OVER[kind])
    if leaf == "bias" and kind == "outputs" and ndim == 1:
        return Cut(0)
    if leaf != "kernel" or ndim != 2 or not kind:
        return Cut()
    is_last = (kind == "outputs") != family.transposed_kernels
    return Cut(1 if is_last else 0)


_OVER: dict[str, tuple[str, ...]] = {"qkv": ("fsdp", TENSOR), "halves": ("fsdp", TENSOR), "whole": ()}


def words_stay(head: Head, mesh: Mesh | None) -> Head:
    """The head with the columns of its words on each device of `tensor`; also in a program that is split by rows."""
    if mesh is None or mesh.shape[TENSOR] == 1:
        return head
    context: Any = jax.sharding.get_abstract_mesh()
    here: Any = mesh if context.empty else context

    def placed(x: Array, spec: PartitionSpec) -> Array:
        # Where `tensor` does not divide the words, the last of its devices has fewer of them.
        return jax.lax.with_sharding_constraint(x, NamedSharding(here, spec))

    kernel = PartitionSpec(TENSOR) if head.tied else PartitionSpec(None, TENSOR)
    bias = None if head.bias is None else placed(head.bias, PartitionSpec(TENSOR))
    return head._replace(kernel=placed(head.kernel, kernel), bias=bias)


def kind_of(module: str) -> str:
    """What `tensor` splits of the product of the module at a path; "" = nothing."""
    return next((kind for pattern, kind in _MODULES if pattern.fullmatch(module)), "")


def _ends_with(path: str, end: str) -> bool:
    return path == end or path.endswith(f"/{end}")


def rows_stay(mesh: Mesh, model: Model) -> Callable[..., Any]:
    """An interceptor that keeps what every module returns on the devices of its rows, and `tensor` where it belongs.

    Without it the compiler is free to gather the rows of the whole batch on every device, in place of a kernel that
    fsdp splits, and it does for BERT: more bytes move, and the memory for activations does not shrink with the devices.
    """
    heads = model.config.num_attention_heads
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    shares = {"qkv": (heads, kv_heads, kv_heads), "halves": (1, 1)}

    def intercept(
        next_call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: InterceptorContext
    ) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        kind = kind_of(path)
        if isinstance(module, nn.Embed) and not kind:
            return _looked_up(mesh, next_call, *args, **kwargs)
        if kind == "head":
            args = (_placed(args[0], mesh, ROWS, None, None), *args[1:])
        if kind in shares and mesh.shape[TENSOR] > 1:
            return _product_in_parts(module, *args, mesh=mesh, shares=shares[kind], family=model.family)
        # A product is whole or split. What follows it, such as an activation, follows it.
        whole = kind or isinstance(module, nn.Dense) or _is_norm_of_hidden(module, path)
        last = TENSOR if kind == "outputs" else None if whole else _FREE

        def place(x: Any) -> Any:
            if not isinstance(x, jax.Array) or x.ndim < 3:
                return x
            between = [_FREE if last is _FREE else None] * (x.ndim - 2)
            return _placed(x, mesh, ROWS, *between, last)

        return jax.tree.map(place, next_call(*args, **kwargs))

    return intercept


def _product_in_parts(
    module: Any, x: Array, *, mesh: Mesh, shares: Sequence[int], family: Family
) -> Float[Array, "rows tokens outputs"]:
    """The product of a kernel that holds several side by side, each split by `tensor`, and their sum with the bias.

    What cuts the result into the same parts again is undone by the compiler, so that no part changes its device.
    """
    params = module.variables["params"]
    dtype = (module.how.dtype if hasattr(module, "how") else module.dtype) or x.dtype
    kernel, *bias = (_placed(params[name], mesh, None).astype(dtype) for name in ("kernel", "bias") if name in params)
    kernel = kernel.T if family.transposed_kernels else kernel
    ends = [kernel.shape[1] * sum(shares[:i]) // sum(shares) for i in range(1, len(shares))]
    parts = [jnp.matmul(x.astype(dtype), piece) for piece in jnp.split(kernel, ends, axis=1)]
    if bias:
        parts = [y + jnp.broadcast_to(b, y.shape) for y, b in zip(parts, jnp.split(bias[0], ends), strict=True)]
    return jnp.concatenate([_placed(y, mesh, ROWS, None, TENSOR) for y in parts], axis=-1)


def _looked_up(mesh: Mesh, lookup: Callable[..., Any], ids: Array, *args: Any, **kwargs: Any) -> Array:
    """Rows of a table of embeddings, whose width fsdp splits: each device looks its columns up, and rows go home.

    That is one exchange of as many bytes as a device has rows. Left alone, the compiler gathers rows, or the table.
    """
    columns = lookup(_placed(ids, mesh, "data"), *args, **kwargs)
    return _placed(_placed(columns, mesh, "data", None, "fsdp"), mesh, ROWS, None, None)


_FREE = PartitionSpec.UNCONSTRAINED


def _is_norm_of_hidden(module: nn.Module, path: str) -> bool:
    """Whether a module norms hidden states, which are whole, and not the queries or keys of heads."""
    return type(module).__name__.endswith("Norm") and not path.endswith(("q_norm", "k_norm"))


def _placed(x: Array, mesh: Mesh, *spec: Any) -> Array:
    """The array under a sharding; as it is where the mesh does not divide it."""
    for size, axes in zip(x.shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else axes if isinstance(axes, tuple) else ()
        if size % math.prod(mesh.shape[name] for name in names):
            return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
