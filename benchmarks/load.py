"""Memory of the host that it takes to load a teacher in bfloat16 and to write a student, besides the devices' arrays.

    python benchmarks/load.py [--layers 8] [--width 2048] [--shards 4] [--fsdp 8]

Makes a Llama of these sizes in shards of safetensors, and loads it in processes of their own onto 8 simulated devices:

streamed   as a run does: slices of the files become the arrays of the mesh
whole      all weights as float32 on the host, then put on the devices, as before
written    the same parameters, in float32 on the mesh, as the file of an exported folder

On a CPU the arrays of the devices are in the memory of the host too, so their bytes are taken off the peak: the rest is
what a host beside an accelerator needs. The peak is Linux's count of resident memory, pages of files included.

4 layers of 1,024 in 2 shards: streamed 0.18 x the largest shard, whole 2.89 x, written 1.2 x the largest tensor.
"""

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DEVICES = 8
WORDS = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 8), ("width", 2048), ("shards", 4), ("fsdp", DEVICES)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        largest = make_shards(Path(folder), layers=args.layers, width=args.width, shards=args.shards)
        print(f"largest shard {largest / 1e6:,.0f} MB")
        for way in ("streamed", "whole", "written"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                arrays, tensor, peak = pool.apply(load, (Path(folder), way, args.fsdp))
            part, size = ("tensor", tensor) if way == "written" else ("shard", largest)
            print(
                f"{way:9} arrays {arrays / 1e6:,.0f} MB, at most {peak / 1e6:,.0f} MB besides: "
                f"{peak / size:.2f} x the largest {part}"
            )


def config_of(*, layers: int, width: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
    )


def make_shards(folder: Path, *, layers: int, width: int, shards: int) -> int:
    """Writes config and random weights; returns the bytes of the largest file."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict
    from safetensors.flax import save_file

    from jaxdistill.models import torch_names
    from jaxdistill.models.model import build_model, param_shapes

    config = config_of(layers=layers, width=width)
    config.save_pretrained(folder)
    shapes = flatten_dict(param_shapes(build_model(config)), sep="/")
    rng, files = np.random.default_rng(0), {}
    per_shard = math.ceil(len(shapes) / shards)
    for start in range(0, len(shapes), per_shard):
        file, tensors = f"model-{start}.safetensors", {}
        for path, shape in list(shapes.items())[start : start + per_shard]:
            size = shape.shape[::-1] if path.endswith("/kernel") else shape.shape
            tensors[torch_names.torch_name(path)] = jnp.asarray(rng.standard_normal(size, np.float32), jnp.bfloat16)
            files[torch_names.torch_name(path)] = file
        save_file(tensors, folder / file)
        jax.block_until_ready(tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def load(folder: Path, way: str, fsdp: int) -> tuple[int, int, int]:
    """Bytes of the arrays, of the largest of them, and the most memory besides them and what the process had before."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_num_cpu_devices", DEVICES)
    from jaxdistill.export.folder import FORMATS
    from jaxdistill.models import hub, stored, weights
    from jaxdistill.models.model import build_model, param_shapes
    from jaxdistill.step import sharding

    model = build_model(hub.load_config(folder), dtype=jnp.bfloat16)
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), param_shapes(model))
    places = sharding.by_rule(shapes, mesh, family=model.family)

    def streamed() -> Any:
        return stored.placed(weights.open_params(folder, model), places, jnp.bfloat16)

    def whole() -> Any:
        host = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights.load_params(folder, model))
        return jax.device_put(host, places)

    if way == "written":
        params = jax.block_until_ready(stored.placed(weights.open_params(folder, model), places, jnp.float32))
        _, peak = watched(lambda: FORMATS["pytorch"](folder, model, params))
    else:
        params, peak = watched({"streamed": streamed, "whole": whole}[way])
    arrays = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    return arrays, max(x.nbytes for x in jax.tree.leaves(params)), peak - (0 if way == "written" else arrays)


def watched(make: Callable[[], Any]) -> tuple[Any, int]:
    """(what make() gives, the most that resident memory grew by)."""
    import jax

    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    made = jax.block_until_ready(make())
    done.set()
    thread.join()
    return made, max(peak, resident()) - before


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
