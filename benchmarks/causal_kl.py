"""The LM head with a divergence between next-token distributions, value and gradient: jaxdistill, TRL and Tunix.

    python benchmarks/causal_kl.py --trl-python PATH --tunix-python PATH \
        [--tokens 256 1024] [--vocab 50257] [--width 768] [--rounds 7]

jaxdistill fused   jaxdistill.fused_head, its own choice of chunk
jaxdistill dense   jaxdistill.losses on logits, under jit
TRL eager          GKDTrainer.generalized_jsd_loss on logits
TRL torch.compile  the same, compiled
TRL chunked        what DistillationTrainer calls: tiles of the logits, made once more for the backward pass
Tunix              LogitStrategy.get_train_loss, under jit; of the three divergences it has forward KL alone

PATH is the interpreter of an environment with `pip install trl` or `pip install google-tunix`; without one, its ways
are left out. From features and kernels of student and teacher (T = 1, float32, CPU) each way projects to logits, takes
the loss, and its gradient in the student's features and kernel. TRL is called without labels, which spares it the copy
that it makes for its mask. Tunix always adds cross entropy, here with weight 0; its teacher's is not asked for.

Every way has a process of its own, which sleeps while another is timed. Losses and gradients are compared before
anything is timed; then all run in turn within each round. Times are medians, with the quartiles. Memory is what a
call adds to the process at its peak, inputs and libraries not counted (Linux only).
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# No import of more than numpy up here: every environment runs this file.

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # M = beta p + (1 - beta) q, in jaxdistill as in TRL
Call = Callable[[], tuple[Any, tuple[Any, Any]]]  # -> (loss, its gradients in the student's features and kernel)


def head(folder: Path, who: str) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / f"{who} features.npy"), np.load(folder / f"{who} kernel.npy")


def jitted(loss: Callable, folder: Path, *more: Any) -> Call:
    import jax

    student, teacher = (tuple(jax.numpy.asarray(x) for x in head(folder, who)) for who in ("student", "teacher"))
    f = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(f(student, teacher, *more))


def jaxdistill(divergence: str, folder: Path, *, fuse: bool) -> Call:
    import jax.numpy as jnp

    from jaxdistill.losses.divergences import DIVERGENCES
    from jaxdistill.losses.fused_head import HeadLoss, fused_head
    from jaxdistill.models.head import Head

    beta = BETA[divergence]

    def fused(student: Any, teacher: Any) -> Any:
        labels = jnp.zeros(len(student[0]), int)  # of cross entropy, which is not among the losses
        losses = {divergence: HeadLoss(DIVERGENCES[divergence], jnp.ones_like(labels, bool), 1.0)}
        return fused_head(Head(*student), Head(*teacher), labels, losses, temperature=1.0, beta=beta)[0]

    def dense(student: Any, teacher: Any) -> Any:
        s, t = (features @ kernel for features, kernel in (student, teacher))
        return DIVERGENCES[divergence].value(s, t, 1.0, beta).sum()

    return jitted(fused if fuse else dense, folder)


def trl(divergence: str, folder: Path, *, how: str) -> Call:
    import torch
    from torch.nn.functional import linear
    from trl.experimental.gkd import GKDTrainer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def tensors(who: str) -> list[torch.Tensor]:
        features, kernel = head(folder, who)
        kernel = np.ascontiguousarray(kernel.T)  # [vocab, width], as torch.nn.Linear has it
        return [torch.from_numpy(x).requires_grad_(who == "student") for x in (features, kernel)]

    student, teacher, beta = tensors("student"), tensors("teacher"), BETA[divergence]

    def dense(student: Any, teacher: Any) -> torch.Tensor:
        return GKDTrainer.generalized_jsd_loss(linear(*student), linear(*teacher), beta=beta, reduction="sum")

    def chunked(student: Any, teacher: Any) -> torch.Tensor:
        return ChunkedDivergenceFunction.apply(*student, None, *teacher, None, beta)[0].sum()  # None: no bias

    loss = {"eager": dense, "compile": torch.compile(dense, dynamic=False, fullgraph=True), "chunked": chunked}[how]

    def call() -> Any:
        value = loss(student, teacher)
        features, kernel = torch.autograd.grad(value, student)
        return value.detach(), (features, kernel.T)

    return call


def tunix(divergence: str, folder: Path) -> Call:
    import jax
    from tunix.distillation.strategies import LogitStrategy

    tokens, vocab = len(head(folder, "student")[0]), head(folder, "student")[1].shape[1]

    def project(model: Any, labels: jax.Array) -> jax.Array:
        return model[0] @ model[1]

    def one_hot(labels: jax.Array) -> jax.Array:
        return jax.nn.one_hot(labels, vocab)

    strategy = LogitStrategy(project, project, one_hot, temperature=1.0, alpha=1.0)

    def loss(student: Any, teacher: Any, labels: jax.Array) -> jax.Array:
        inputs = {"labels": labels}
        return strategy.get_train_loss(student, strategy.get_teacher_outputs(teacher, inputs), inputs)[0]

    return jitted(loss, folder, jax.numpy.zeros(tokens, int))


class Way(NamedTuple):
    make: Callable[[str, Path], Call]
    packages: tuple[str, ...]  # of the environment, the first gives it its name
    divergences: tuple[str, ...] = tuple(BETA)


FUSED, DENSE = "jaxdistill fused", "jaxdistill dense"  # what times, and what losses and gradients, are compared with
WAYS = {
    FUSED: Way(functools.partial(jaxdistill, fuse=True), ("jaxdistill", "jax")),
    DENSE: Way(functools.partial(jaxdistill, fuse=False), ("jaxdistill", "jax")),
    "TRL eager": Way(functools.partial(trl, how="eager"), ("trl", "torch")),
    "TRL torch.compile": Way(functools.partial(trl, how="compile"), ("trl", "torch")),
    "TRL chunked": Way(functools.partial(trl, how="chunked"), ("trl", "torch")),
    "Tunix": Way(tunix, ("google-tunix", "jax"), ("forward_kl",)),
}


def scale(way: str, divergence: str, tokens: int) -> float:
    """What a way's loss has to be multiplied by to be jaxdistill's, by their definitions."""
    if way == "Tunix":
        return tokens  # a mean over tokens, where the others are sums
    if way.startswith("TRL") and divergence == "jsd":
        return 1 / (BETA["jsd"] * (1 - BETA["jsd"]))  # losses.jsd is divided by it, to be continuous in beta
    return 1.0


def write_inputs(folder: Path, tokens: int, vocab: int, width: int) -> None:
    rng = np.random.default_rng(0)
    for who in ("student", "teacher"):
        for part, shape, size in (("features", (tokens, width), 1.0), ("kernel", (width, vocab), 1.5 / width**0.5)):
            np.save(folder / f"{who} {part}.npy", np.float32(size) * rng.standard_normal(shape, np.float32))


def work(way: str, divergence: str, folder: Path) -> None:
    """A way's own process. Calls once for each line of stdin, and answers the first with its versions and results
    written, each further one with [seconds, peak MB]."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    answer = lambda x: print(json.dumps(x), file=answers, flush=True)  # noqa: E731
    call = WAYS[way].make(divergence, folder)
    if not sys.stdin.readline():
        return
    results = call()
    for part, array in (("value", results[0]), ("features", results[1][0]), ("kernel", results[1][1])):
        np.save(folder / f"{way} {part}.npy", np.asarray(array))
    del results, array
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what compilation left behind is not to hide what a call needs
    answer(" with ".join(f"{name} {metadata.version(name)}" for name in WAYS[way].packages))
    for _ in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        held = peak_mb()
        begin = time.perf_counter()
        call()
        answer([time.perf_counter() - begin, peak_mb() - held])


def peak_mb() -> float:
    """Of resident memory, since its last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def start(way: str, python: str, divergence: str, folder: Path) -> subprocess.Popen:
    # Waiting threads sleep. Inductor compiles in the process itself: one of a pool would outlive it, its pipes open.
    settings = {"OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_COMPILE_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [python, __file__, "--worker", way, divergence, str(folder)]
    with open(folder / f"{way}.log", "wb") as log:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "bufsize": 0}
        return subprocess.Popen(command, env=os.environ | settings, **pipes)


def ask(worker: Any, log: Path) -> Any:
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(b"\n")
    if not (line := worker.stdout.readline()):
        raise SystemExit(f"{log.read_text()}{log.stem} ended with {worker.wait()}")
    return json.loads(line)


def check(way: str, divergence: str, folder: Path, *, tolerance: float = 1e-4) -> None:
    factor = scale(way, divergence, len(head(folder, "student")[0]))
    for part in ("value", "features", "kernel"):
        theirs, dense = (np.load(folder / f"{name} {part}.npy") for name in (way, DENSE))
        error = np.abs(factor * theirs - dense).max() / np.abs(dense).max()
        if not error <= tolerance:
            raise SystemExit(f"{divergence}, {part}: {way} is not {DENSE}, relative error {error:.1e}")


def measure(pythons: dict[str, str], divergence: str, folder: Path, rounds: int) -> tuple[dict[str, Any], list[str]]:
    """({way: [[seconds, peak MB] of each round]}, versions)."""
    environments = {name: way.packages[0] for name, way in WAYS.items() if divergence in way.divergences}
    ways = [name for name, environment in environments.items() if pythons[environment]]
    with contextlib.ExitStack() as stack:
        started = (start(way, pythons[environments[way]], divergence, folder) for way in ways)
        workers = {way: stack.enter_context(worker) for way, worker in zip(ways, started, strict=True)}
        call = lambda way: ask(workers[way], folder / f"{way}.log")  # noqa: E731
        versions = [call(way) for way in ways]
        for way in ways:
            check(way, divergence, folder)
        answers: dict[str, Any] = {way: [] for way in ways}
        for i in range(rounds):
            for way in ways[i % len(ways) :] + ways[: i % len(ways)]:
                answers[way].append(call(way))
    return answers, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default="", help="the interpreter of an environment with TRL")
    parser.add_argument("--tunix-python", default="", help="the interpreter of an environment with Tunix")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        way, divergence, folder = args.worker
        return work(way, divergence, Path(folder))

    from rich.console import Console  # here, because the workers' environments may lack it
    from rich.table import Table

    pythons = {"jaxdistill": sys.executable, "trl": args.trl_python, "google-tunix": args.tunix_python}
    table = Table("tokens", "divergence", "way", "ms", "quartiles", "of fused", "peak MB")
    for column in table.columns[3:]:
        column.justify = "right"
    versions: list[str] = []
    for tokens in args.tokens:
        for divergence in BETA:
            with tempfile.TemporaryDirectory() as folder:
                write_inputs(Path(folder), tokens, args.vocab, args.width)
                answers, more = measure(pythons, divergence, Path(folder), args.rounds)
            versions += more
            fused = np.median([seconds for seconds, _ in answers[FUSED]])
            for way, rounds in answers.items():
                low, middle, high = np.percentile([seconds for seconds, _ in rounds], [25, 50, 75])
                milliseconds = f"{1e3 * middle:.0f}", f"{1e3 * low:.0f}-{1e3 * high:.0f}"
                peak = f"{max(mb for _, mb in rounds):,.0f}"
                table.add_row(f"{tokens:,}", divergence, way, *milliseconds, f"{middle / fused:.2f}", peak)
            table.add_section()
    left_out = [name for name, python in pythons.items() if not python]
    console = Console(width=120)
    console.print(f"{os.cpu_count()} cores, vocabulary {args.vocab:,}, width {args.width}", table)
    console.print("; ".join(dict.fromkeys(versions)), *(f"\nleft out, without an interpreter: {x}" for x in left_out))


if __name__ == "__main__":
    main()
