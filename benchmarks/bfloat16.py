"""How far bfloat16 is from float32: in the core and in PyTorch, for every form of the families' tiny models.

    pip install torch; python benchmarks/bfloat16.py [--length 100]

Both compute in bfloat16 with the same parameters, which are rounded to it, and with attention written out. The error is
the mean distance of logits from PyTorch's in float32, over the real tokens of two rows, one of them padded.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from jaxdistill.models.core import network
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.positions import position_ids

sys.path.append(str(Path(__file__).parents[1] / "tests/models/core"))
import tiny_core


def logits_of_torch(kind: str, model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    if FAMILIES[kind].causal:
        inputs["position_ids"] = torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    with torch.no_grad():
        return model(**inputs).logits.float().numpy()[mask]


def logits_of_core(kind: str, form: str, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    seen = jnp.asarray(mask)
    places = position_ids(seen) if FAMILIES[kind].causal else jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    how = network.How("own", dtype=jnp.bfloat16)
    settings, tokens = tiny_core.settings(kind, form), network.real_tokens(seen, places)
    run = jax.jit(lambda params, ids: network.forward(settings, params, ids, tokens, how).logits)
    return np.asarray(run(tiny_core.params(kind, form), jnp.asarray(ids)).astype(jnp.float32))[mask]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=100)
    args = parser.parse_args()
    table = Table("model type", "form", "size of logits", "error of PyTorch", "error of the core", "core / PyTorch")
    for kind, form in tiny_core.INSTALLED:
        ids, mask = tiny_core.batch(args.length, "right")
        model = tiny_core.torch_model(kind, form)
        exact = logits_of_torch(kind, model, ids, mask)
        theirs = logits_of_torch(kind, model.to(torch.bfloat16), ids, mask)
        errors = [np.abs(x - exact).mean() for x in (theirs, logits_of_core(kind, form, ids, mask))]
        size = np.abs(exact).mean()
        table.add_row(kind, form, f"{size:.2f}", *(f"{x:.4f}" for x in errors), f"{errors[1] / errors[0]:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
