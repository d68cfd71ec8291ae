"""What a dropped layer saves: loss and gradient of a masked LM with k of its layers run, k as LayerDrop may draw it.

    python benchmarks/layer_drop.py [--layers 12] [--width 256] [--rows 8] [--length 128] [--rounds 7]

One compiled program runs them all, since which layers run is an argument; `plain` is the model without the
interceptor. Run in turn within each round. Times are medians, in brackets the quartiles.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import BertConfig

from jaxdistill.losses.divergences import cross_entropy
from jaxdistill.models import intercept, layer_drop
from jaxdistill.models.inputs import Inputs
from jaxdistill.models.model import build_model, init_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("width", 256), ("rows", 8), ("length", 128), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    sizes = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_attention_heads": args.width // 64}
    model = build_model(BertConfig(vocab_size=4000, num_hidden_layers=args.layers, **sizes))
    params = init_params(model, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (args.rows, args.length), 5, 4000)

    def loss(params: Any, kept: Any) -> jax.Array:
        dropped = () if kept is None else (layer_drop.keep_layers(model.family, kept),)
        logits = intercept.apply(model, params, Inputs(ids, jnp.ones_like(ids, bool)), interceptors=dropped).logits
        return cross_entropy(logits, ids).mean()

    step = jax.jit(jax.value_and_grad(loss))
    counts = sorted({args.layers * part // 4 for part in range(5)}, reverse=True)
    ways: dict[str, Any] = {"plain": None} | {f"{k} of {args.layers}": np.arange(args.layers) < k for k in counts}
    # Compiled, and compared, before anything is timed.
    values = {name: float(jax.block_until_ready(step(params, kept))[0]) for name, kept in ways.items()}
    np.testing.assert_allclose(values[f"{args.layers} of {args.layers}"], values["plain"], rtol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, kept in ways.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(params, kept))
            times[name].append(time.perf_counter() - begin)
    table = Table("layers run", "ms", "quartiles", "of plain")
    for name, taken in times.items():
        low, middle, high = 1e3 * np.percentile(taken, [25, 50, 75])
        ratio = middle / 1e3 / np.median(times["plain"])
        table.add_row(name, f"{middle:.0f}", f"{low:.0f}-{high:.0f}", f"{ratio:.2f}")
    device = jax.devices()[0]
    Console(width=100).print(
        f"{device.platform}, width {args.width}, {args.rows} x {args.length} tokens, loss and gradient", table
    )


if __name__ == "__main__":
    main()
