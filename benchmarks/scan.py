"""How long a model compiles, by its depth: layers one by one, and as a loop (student.scan, teacher.scan).

    python benchmarks/scan.py [--layers 8 24 48] [--width 256] [--length 128]
    pip install 'jaxdistill[tpu]'; python benchmarks/scan.py --topology v5e:2x2

Value and gradient of a Gemma 3 of random shapes, five layers with a window to one without, in bfloat16; the program is
compiled and not run. `one by one` is rematerialised as the loop is, so that memory can be compared, too: XLA's count of
temporaries, the same on every run. Seconds are from one compilation each, tracing included.
"""

import argparse
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxdistill.cost.program import devices_of
from jaxdistill.models.core import network
from jaxdistill.models.core.attention import Tokens
from jaxdistill.models.core.modules import How
from jaxdistill.models.core.rows import read_settings
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.remat import rematerialise
from jaxdistill.models.scan import scan_layers

FAMILY = FAMILIES["gemma3_text"]
WAYS = {"one by one": lambda: rematerialise(FAMILY, "full"), "loop": lambda: scan_layers(FAMILY, remat="full")}


def settings_of(layers: int, width: int) -> Any:
    from transformers import Gemma3TextConfig

    types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    config = Gemma3TextConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=width // 4,
        sliding_window=64,
        layer_types=types,
    )
    return read_settings(config)


def compiled(way: str, settings: Any, args: argparse.Namespace, device: Any) -> tuple[Any, float]:
    """(the program, seconds)."""
    place = jax.sharding.SingleDeviceSharding(device)
    shapes: Any = network.param_shapes(settings), jax.ShapeDtypeStruct((args.rows, args.length), jnp.int32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)

    def number(params: Any, ids: jax.Array) -> jax.Array:
        tokens = Tokens(jnp.broadcast_to(jnp.arange(args.length), ids.shape), jnp.ones_like(ids))
        with nn.intercept_methods(WAYS[way]()):
            out = network.forward(settings, params, ids, tokens, How("xla", dtype=jnp.bfloat16))
        return jnp.sum(jnp.sin(out.logits.astype(jnp.float32)))

    begin = time.perf_counter()
    program = jax.jit(jax.value_and_grad(number)).lower(*shapes).compile()
    return program, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24, 48])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--topology", default="", help="compile for one chip of this slice, such as v5e:2x2")
    args = parser.parse_args()
    device = devices_of(args.topology)[0] if args.topology else jax.devices()[0]
    table = Table("layers", "way", "seconds", "temporary MiB")
    for layers in args.layers:
        settings = settings_of(layers, args.width)
        for way in WAYS:
            program, seconds = compiled(way, settings, args, device)
            memory = program.memory_analysis().temp_size_in_bytes / 2**20
            table.add_row(f"{layers}", way, f"{seconds:.1f}", f"{memory:,.0f}")
    Console(width=120).print(f"{device.device_kind}, width {args.width}, {args.rows} x {args.length} tokens", table)


if __name__ == "__main__":
    main()
