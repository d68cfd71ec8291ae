"""Greedy text of GPT-2 by this package and by PyTorch's `generate`, on a CPU, in float32.

    python benchmarks/generate.py [--prompts 16] [--length 32] [--new 64] [--layers 12] [--rounds 5]

Both continue the same prompts with the same random weights, in a process of its own each, which take turns. The texts
are compared before anything is timed: they must be equal, up to the first token where float32 rounding decides.
`read` is the time in which the sum of an array as large as the weights was taken, in the same run: no token can be
written faster, as each reads all weights once. Times are medians, with quartiles.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from step import Worker, machine

AGREE = 0.9  # of all tokens; two libraries round differently


class Job(NamedTuple):
    folder: Path
    prompts: np.ndarray  # [prompts, length]
    new: int
    device: str = "cpu"


Texts = Iterator[Any]  # first {}, once the weights are loaded; then the tokens of all prompts, each time


def jaxdistill(job: Job) -> Texts:
    os.environ["USE_TORCH"] = "0"
    import jax

    from jaxdistill.models import hub, weights
    from jaxdistill.models.model import build_model
    from jaxdistill.sampling.decoding import Decoding
    from jaxdistill.sampling.generate import make_generator

    model = build_model(hub.load_config(job.folder))
    params = jax.device_put(weights.load_params(job.folder, model))
    decoding = Decoding(max_new_tokens=job.new)
    write = make_generator(model, decoding=decoding, batch_size=len(job.prompts))
    yield {}
    while True:
        yield [list(completion.tokens) for completion in write(params, job.prompts.tolist(), jax.random.key(0))]


def pytorch(job: Job) -> Texts:
    os.environ["USE_FLAX"] = "0"
    import torch
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(job.folder, trust_remote_code=False).eval()
    model.generation_config.eos_token_id = None  # which would end a row
    prompts = torch.from_numpy(job.prompts)
    yield {}
    with torch.inference_mode():
        while True:
            shown = torch.ones_like(prompts)
            written = model.generate(
                prompts, attention_mask=shown, max_new_tokens=job.new, do_sample=False, pad_token_id=0
            )
            yield written[:, prompts.shape[1] :].tolist()


def read(job: Job) -> Texts:
    import jax
    import jax.numpy as jnp

    size = sum(path.stat().st_size for path in job.folder.glob("*.safetensors")) // 4
    numbers = jnp.ones((size // 1024, 1024))
    total = jax.jit(lambda x: x.sum(axis=0))
    while True:
        yield {}
        total(numbers).block_until_ready()


WAYS: dict[str, Any] = {"jaxdistill": jaxdistill, "torch": pytorch, "read": read}


def make_folder(folder: Path, layers: int) -> None:
    """GPT-2 with random weights, larger than at the start of training: a text is not one word for ever."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=layers, initializer_range=768**-0.5)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"prompts": 16, "length": 32, "new": 64, "layers": 12, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    console = Console(width=140)
    console.print(f"GPT-2, {args.layers} layers, {args.prompts} prompts of {args.length} tokens, {args.new} new ones")
    console.print(machine())
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name) / "gpt2", args.layers)
        prompts = np.random.default_rng(0).integers(0, 50_257, (args.prompts, args.length))
        job: Any = Job(Path(name) / "gpt2", prompts, args.new)
        workers = {way: Worker(way, run, job) for way, run in WAYS.items()}
        texts = [np.array(workers[way].losses[0]) for way in ("jaxdistill", "torch")]
        same = np.cumprod(texts[0] == texts[1], axis=1).mean()
        if same < AGREE:
            raise SystemExit(f"the texts agree in {same:.0%} of their tokens up to the first that differs")
        times: dict[str, list[float]] = {way: [] for way in workers}
        for i in range(args.rounds):
            for way in list(workers)[:: 1 if i % 2 else -1]:
                times[way].append(workers[way].ask("step"))
        memory = {way: worker.ask("end") for way, worker in workers.items()}
    console.print(make_table(times, memory, same=same, new=args.new))


def make_table(times: dict[str, list[float]], memory: dict[str, Any], *, same: float, new: int) -> Table:
    table = Table(
        "way", "ms", "quartiles", "ms a new token", "of torch", "MB", title=f"{same:.0%} of the text is equal"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for way, taken in times.items():
        low, middle, high = 1e3 * np.percentile(taken, [25, 50, 75])
        tokens = 1 if way == "read" else new
        of_torch = "" if way == "read" else f"{middle / 1e3 / np.median(times['torch']):.2f}"
        cells = (f"{middle:,.0f}", f"{low:,.0f}-{high:,.0f}", f"{middle / tokens:.1f}", of_torch)
        table.add_row(way, *cells, f"{memory[way][1]:,.0f}")
    return table


if __name__ == "__main__":
    main()
