"""Self-attention alone, value and gradient, by kernel and length: memory and time.

    python benchmarks/attention.py [--lengths 256 1024 4096] [--ways own xla tiles] [--window 1024] [--rounds 5]
    python benchmarks/attention.py --lengths 8192 32768 --memory-only
    pip install 'jaxdistill[tpu]'
    python benchmarks/attention.py --topology v5e:2x2 --dtype bfloat16 --ways xla tiles splash

own     all scores written out
xla     jax.nn.dot_product_attention
tiles   models/core/tiles.py
splash  models/core/splash.py, for a TPU alone

Rows of text, causal or both ways. Each kernel is compiled once; all run in turn within each round, after their values
and gradients were compared. Memory is XLA's count of temporaries: exact, and the same on every run. Times are medians,
in brackets the quartiles. With --topology the programs are compiled for one chip of a TPU slice that need not be here,
and nothing is run: `expected` is then what the compiler's cost model expects (see benchmarks/tpu.py). It counts tiles
that are skipped as well, and knows nothing of the inside of splash.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fused_head import check, seconds
from rich.console import Console
from rich.table import Table
from tpu import CLOCK, expectations

from jaxdistill.cost.program import devices_of
from jaxdistill.models.core.attention import FAR, Attended, Reach, Tokens
from jaxdistill.models.core.kernels import KERNELS


def number(kernel: Callable[..., jax.Array], window: int, after: int, *arrays: jax.Array) -> jax.Array:
    """A number whose gradient in query, key and value is measured."""
    query, key, value, place, document = arrays
    tokens, reach = Tokens(place, document), Reach(window - 1 if window else FAR, after)
    mixed = kernel(Attended(query, key, value, tokens, tokens, reach), scale=query.shape[-1] ** -0.5, cap=0.0)
    return jnp.sum(jnp.sin(mixed.astype(jnp.float32)))


def inputs(args: argparse.Namespace, length: int) -> tuple[jax.Array, ...]:
    shapes = [(args.rows, length, heads, args.size) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    arrays = [jax.random.normal(jax.random.key(i), shape, args.dtype) for i, shape in enumerate(shapes)]
    return *arrays, jnp.tile(jnp.arange(length), (args.rows, 1)), jnp.ones((args.rows, length), jnp.int32)


def compiled(kernel: Callable[..., jax.Array], args: argparse.Namespace, length: int, device: Any) -> Any:
    shapes = jax.eval_shape(partial(inputs, args, length))
    mesh = jax.sharding.Mesh(np.array([device]), ("rows",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    graded = jax.value_and_grad(partial(number, kernel, args.window, FAR if args.both_ways else 0), argnums=(0, 1, 2))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(graded).lower(*shapes).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--ways", nargs="+", default=["own", "xla", "tiles"], choices=list(KERNELS))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--window", type=int, default=0, help="keys that a query sees, its own included; 0 = all")
    parser.add_argument("--both-ways", action="store_true", help="as in an encoder; else causal")
    parser.add_argument("--dtype", default="float32", help="float32 | bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-only", action="store_true", help="compile and count, run nothing")
    parser.add_argument("--topology", default="", help="compile for one chip of this slice, such as v5e:2x2")
    args = parser.parse_args()
    device = devices_of(args.topology)[0] if args.topology else jax.devices()[0]
    table = Table("length", "kernel", "ms", "quartiles", f"of {args.ways[0]}", "temporary MiB", "of it", "expected ms")
    for column in table.columns[2:]:
        column.justify = "right"
    for length in args.lengths:
        measure(table, args, length, device)
    heads = f"{args.heads} heads of {args.size}, {args.kv_heads} of keys, window {args.window or 'none'}"
    heads += ", both ways" if args.both_ways else ", causal"
    Console(width=120).print(f"{device.platform} {device.device_kind}, {args.dtype}, {heads}", table)


def measure(table: Table, args: argparse.Namespace, length: int, device: Any) -> None:
    programs = {name: compiled(KERNELS[name], args, length, device) for name in args.ways}
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    times: dict[str, list[float]] = {}
    if not (args.memory_only or args.topology):
        arrays = inputs(args, length)
        for name, program in programs.items():
            tolerance = 1e-4 if args.dtype == "float32" else 2e-2
            check(name, program(*arrays), programs[args.ways[0]](*arrays), tolerance=tolerance)
        times = seconds(programs, arrays, args.rounds)
    first = args.ways[0]
    for name, program in programs.items():
        quartiles = 1e3 * np.percentile(times[name], [25, 50, 75]) if times else None
        clock = CLOCK.get(device.device_kind)
        cycles = sum(n for _, n in expectations(program.as_text())) if clock else 0
        table.add_row(
            f"{length:,}",
            name,
            f"{quartiles[1]:.1f}" if quartiles is not None else "",
            f"{quartiles[0]:.1f}-{quartiles[2]:.1f}" if quartiles is not None else "",
            f"{quartiles[1] / 1e3 / np.median(times[first]):.2f}" if quartiles is not None else "",
            f"{memory[name] / 2**20:,.0f}",
            f"{memory[name] / memory[first]:.2f}" if memory[first] else "",
            f"{1e3 * cycles / clock:.2f}" if clock else "",
        )


if __name__ == "__main__":
    main()
