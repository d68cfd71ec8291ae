"""How long a checkpoint keeps the next step waiting: arrays cut into a part for every device, and small ones whole.

    python benchmarks/save.py [--devices 8] [--layers 6] [--width 256] [--words 8000] [--rounds 9]

A BERT of these sizes and the two moments of AdamW, on each of so many simulated devices, saved by turns in both ways:

parts   orbax's default: each device that holds a copy writes its part of every array
whole   as a run does: an array of which a part would have less than 1 MiB is written by one device

`waiting` is the time until the next step may begin, `all` the time until the checkpoint is on disk; medians of the
rounds, with the quartiles of the ratio of two saves that follow each other.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("devices", 8), ("layers", 6), ("width", 256), ("words", 8000), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    import jax
    import orbax.checkpoint as ocp

    jax.config.update("jax_num_cpu_devices", args.devices)
    from jaxdistill.run import checkpoint

    items = {"student": state(args)}
    parts = ocp.type_handlers.get_type_handler(jax.Array)  # orbax's own, until a run's manager is opened
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.open_manager(Path(folder) / "none").close()
        handlers = {"parts": parts, "whole": ocp.type_handlers.get_type_handler(jax.Array)}
        managers = {way: checkpoint.open_manager(Path(folder) / way) for way in handlers}
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in handlers}
        for step in range(args.rounds + 1):
            for way, handler in handlers.items():
                ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
                seconds[way].append(save(managers[way], step, items))
        for manager in managers.values():
            manager.close()
    arrays = jax.tree.leaves(items)
    print(f"{len(arrays)} arrays, {sum(x.nbytes for x in arrays) / 1e6:,.0f} MB, on each of {args.devices} devices")
    for i, column in enumerate(("waiting", "all")):
        times = {way: [both[i] for both in of[1:]] for way, of in seconds.items()}  # the first save compiles
        low, middle, high = statistics.quantiles([a / b for a, b in zip(*times.values(), strict=True)])
        told = ", ".join(f"{way} {1000 * statistics.median(of):.0f} ms" for way, of in times.items())
        print(f"{column:8} {told}: parts / whole {middle:.1f} ({low:.1f} to {high:.1f})")


def state(args: argparse.Namespace) -> Any:
    """Parameters and the two moments of AdamW, a copy on every device."""
    import jax
    import jax.numpy as jnp
    from transformers import BertConfig

    from jaxdistill.models.model import build_model, param_shapes
    from jaxdistill.step import sharding

    config = BertConfig(
        vocab_size=args.words,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        intermediate_size=4 * args.width,
    )
    model = build_model(config)
    shapes = param_shapes(model)
    places = sharding.by_rule(shapes, sharding.make_mesh(data=-1, fsdp=1), family=model.family)
    params = jax.device_put(jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), shapes), places)
    return {"params": params, "mu": params, "nu": params}


def save(manager: Any, step: int, items: Any) -> tuple[float, float]:
    """Seconds until the next step may begin, and until the checkpoint is on disk."""
    from jaxdistill.run import checkpoint

    began = time.perf_counter()
    checkpoint.save(manager, step, items, notes={}, metrics=None)
    waited = time.perf_counter() - began
    checkpoint.finish(manager)
    return waited, time.perf_counter() - began


if __name__ == "__main__":
    main()
