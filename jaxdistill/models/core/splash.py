"""Attention by JAX's Pallas kernel for TPUs, "splash": scores exist on the chip alone, and a mask skips blocks.

The kernel takes documents, and a reach that is known when the program is compiled. It measures distances by the index
of a token in its row, so the tokens of a document must stand side by side in the order of their places, as they do in
every row that attends to itself. A cache, which has other numbers of queries and keys, is not for this kernel.

It is compiled ahead of time for v5e and compared with the other kernels in interpret mode; nobody has run it on a TPU.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxdistill.models.axes import TENSOR
from jaxdistill.models.core.attention import FAR, Attended, Heads, Reach

BLOCK = 512  # queries, and keys, of a block at most
LANES = 128  # of which the length of a block is a multiple


class _Form(NamedTuple):
    """What is fixed when a program is compiled."""

    reach: Reach
    cap: float
    block: int
    interpret: bool


def splash(inputs: Attended, *, scale: float, cap: float = 0.0, interpret: bool = False) -> Heads:
    """As `tiles.tiled`, with a reach of Python numbers. What stands at padding is another number.

    On several devices the program must be traced under `jax.sharding.use_abstract_mesh`: the compiler cannot split the
    kernel by itself, so every device runs it on its own rows.

    Args:
      interpret: run the kernel in plain JAX, on any backend.
    """
    length = inputs.query.shape[1]
    block = _block(length)
    # The kernel has no scale of its own.
    scaled = (inputs.query.astype(jnp.float32) * scale).astype(inputs.query.dtype)
    arrays = [_padded(x, block).swapaxes(1, 2) for x in (scaled, inputs.key, inputs.value)]
    # The added tokens are a document of their own, so that they see something: one another.
    documents = _padded(inputs.queries.document, block, fill=-1)
    run: Any = partial(_attention, _Form(inputs.reach, cap, block, interpret))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = tuple(name for name in mesh.axis_names if name != TENSOR)
        divide = len(inputs.query) % math.prod(mesh.shape[name] for name in rows) == 0
        heads = PartitionSpec(rows if divide else None, TENSOR if TENSOR in mesh.axis_names else None)
        tokens = PartitionSpec(heads[0])
        run = jax.shard_map(run, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False)
    return run(*arrays, documents).swapaxes(1, 2)[:, :length]


def _attention(
    form: _Form,
    query: Float[Array, "batch heads length size"],
    key: Float[Array, "batch kv_heads length size"],
    value: Float[Array, "batch kv_heads length size"],
    documents: Int[Array, "batch length"],
) -> Any:
    # Imported where it is needed: Pallas takes 0.2 s.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, heads, length, _ = query.shape
    before, after = (None if steps >= FAR else int(steps) for steps in form.reach)  # None = without end
    shape = (length, length)
    if before is None and after is None:
        mask = splash_attention_mask.FullMask(shape)
    else:
        mask = splash_attention_mask.LocalMask(shape, (before, after), offset=0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=form.block,
            block_kv=form.block,
            block_q_dkv=form.block,
            block_kv_dkv=form.block,
            block_q_dq=form.block,
            block_kv_dq=form.block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=form.cap or None,
        interpret=form.interpret,
    )
    return jax.vmap(kernel)(query, key, value, splash_attention_kernel.SegmentIds(documents, documents))


def _block(length: int) -> int:
    """The length of blocks that cut `length` with little padding."""
    blocks = -(-length // BLOCK)
    return -(-length // (blocks * LANES)) * LANES


def _padded(x: Array, block: int, *, fill: int = 0) -> Array:
    widths = [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=fill)
