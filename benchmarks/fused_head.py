"""The LM head with its losses (forward KL at T = 2 and cross entropy), value and gradient, alone: three ways.

    python benchmarks/fused_head.py [--tokens 256 1024 4096] [--vocab 30522 50257] [--tied] [--dtype float32] \
        [--rounds 5]

dense       logits of all tokens, autodiff through them
checkpoint  lax.scan over chunks of tokens, each under jax.checkpoint: what is usually done
fused       jaxdistill.fused_head, its own choice of chunk

All are given the same features and kernels (student and teacher 768 wide; kernels of their own, or with --tied the word
embeddings), compiled once, and run in turn within each round. Losses and gradients are compared before anything is
timed. Memory is XLA's count of temporaries for the compiled program: exact, and the same on every run. Times are
medians, in brackets the quartiles.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxdistill.losses import divergences, fused_head
from jaxdistill.losses.fused_head import HeadLoss
from jaxdistill.models.head import Head

TEMPERATURE, WEIGHTS = 2.0, {"forward_kl": 5.0, "cross_entropy": 2.0}


def of_tokens(student: Head, teacher: Head, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum over these tokens, every array of [tokens, vocab] written out."""

    def logits(head: Head) -> jax.Array:
        assert head.features is not None and head.bias is not None
        kernel, bias = (x.astype(head.features.dtype) for x in (head.kernel, head.bias))
        return head.features @ (kernel.T if head.tied else kernel) + bias

    s, t = logits(student), logits(teacher)
    kl = divergences.forward_kl(s, jax.lax.stop_gradient(t), temperature=TEMPERATURE)
    ce = divergences.cross_entropy(s, labels)
    weighted = WEIGHTS["forward_kl"] * kl + WEIGHTS["cross_entropy"] * jnp.where(mask, ce, 0.0)
    return weighted.sum()


def checkpointed(student: Head, teacher: Head, labels: jax.Array, mask: jax.Array, *, chunk: int) -> jax.Array:
    @jax.checkpoint
    def piece(own: jax.Array, taught: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
        return of_tokens(student._replace(features=own), teacher._replace(features=taught), labels, mask)

    cut = lambda x: x.reshape(-1, chunk, *x.shape[1:])  # noqa: E731
    pieces = (cut(student.features), cut(teacher.features), cut(labels), cut(mask))
    return jax.lax.scan(lambda total, x: (total + piece(*x), None), jnp.float32(0), pieces)[0]


def fused(student: Head, teacher: Head, labels: jax.Array, mask: jax.Array, *, chunk: int | None = None) -> jax.Array:
    losses = {
        "forward_kl": HeadLoss(divergences.DIVERGENCES["forward_kl"], jnp.ones_like(mask), WEIGHTS["forward_kl"]),
        "cross_entropy": HeadLoss(divergences.CROSS_ENTROPY, mask, WEIGHTS["cross_entropy"]),
    }
    return fused_head.fused_head(student, teacher, labels, losses, temperature=TEMPERATURE, chunk=chunk)[0]


def inputs(tokens: int, vocab: int, width: int, dtype: Any, *, tied: bool) -> tuple[Head, Head, jax.Array, jax.Array]:
    def head(seed: int) -> Head:
        keys = jax.random.split(jax.random.key(seed), 3)
        return Head(
            jax.random.normal(keys[0], (tokens, width), dtype),
            0.05 * jax.random.normal(keys[1], (vocab, width) if tied else (width, vocab)),
            0.1 * jax.random.normal(keys[2], (vocab,)),
            tied=tied,
        )

    rng = np.random.default_rng(0)
    return head(0), head(1), jnp.asarray(rng.integers(0, vocab, tokens)), jnp.asarray(rng.random(tokens) < 0.15)


def compiled(f: Callable, arguments: Any) -> Any:
    return jax.jit(jax.value_and_grad(f)).lower(*arguments).compile()


def check(name: str, ours: Any, dense: Any, *, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
        error = float(jnp.abs(a - b).max()) / float(jnp.abs(b).max())
        if not error <= tolerance:
            raise SystemExit(f"{name} is not dense: relative error {error:.1e}")


def seconds(programs: dict[str, Any], arguments: Any, rounds: int) -> dict[str, list[float]]:
    """Each program once a round, first in turn another one each time."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds):
        order = list(programs)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            begin = time.perf_counter()
            jax.block_until_ready(programs[name](*arguments))
            times[name].append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--vocab", type=int, nargs="+", default=[30_522, 50_257])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", default="float32", help="of the features: float32 | bfloat16")
    parser.add_argument("--tied", action="store_true", help="kernels are the word embeddings, [vocab, width]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="*", default=[], help="also time the fused head with these")
    parser.add_argument("--memory-only", action="store_true", help="compile and count, run nothing")
    args = parser.parse_args()
    table = Table("tokens", "vocab", "way", "chunk", "ms", "quartiles", "of dense", "temporary MB", "of dense")
    for column in table.columns[3:]:
        column.justify = "right"
    for vocab in args.vocab:
        for tokens in args.tokens:
            measure(table, args, tokens, vocab)
    device = jax.devices()[0]
    Console(width=120).print(f"{device.platform} {device.device_kind}, {args.dtype}, width {args.width}", table)


def measure(table: Table, args: argparse.Namespace, tokens: int, vocab: int) -> None:
    make = functools.partial(inputs, tokens, vocab, args.width, jnp.dtype(args.dtype), tied=args.tied)
    shapes = jax.eval_shape(make)
    own = fused_head.chunk_size(tokens=tokens, platform=jax.default_backend())
    piece = next(n for n in range(min(own, tokens), 0, -1) if tokens % n == 0)  # checkpoint has no padding
    ways: dict[str, tuple[Callable, int]] = {
        "dense": (of_tokens, tokens),
        "checkpoint": (functools.partial(checkpointed, chunk=piece), piece),
        "fused": (fused, own),
        **{f"fused {n}": (functools.partial(fused, chunk=n), n) for n in args.chunks if n <= tokens},
    }
    programs = {name: compiled(f, shapes) for name, (f, _) in ways.items()}
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    times = {name: [float("nan")] for name in ways}
    if not args.memory_only:
        arguments = make()
        dense = programs["dense"](*arguments)
        for name, program in programs.items():
            check(name, program(*arguments), dense, tolerance=1e-5 if args.dtype == "float32" else 2e-2)
        del dense
        times = seconds(programs, arguments, args.rounds)
    for name, (_, chunk) in ways.items():
        low, middle, high = 1e3 * np.percentile(times[name], [25, 50, 75])
        ran = not args.memory_only
        table.add_row(
            f"{tokens:,}",
            f"{vocab:,}",
            name,
            f"{chunk:,}",
            f"{middle:.0f}" if ran else "",
            f"{low:.0f}-{high:.0f}" if ran else "",
            f"{middle / 1e3 / np.median(times['dense']):.2f}" if ran else "",
            f"{memory[name] / 2**20:,.0f}",
            f"{memory[name] / memory['dense']:.2f}",
        )


if __name__ == "__main__":
    main()
