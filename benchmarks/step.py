"""The train step, time and memory: jaxdistill and a PyTorch distiller of the same mathematics, on a CPU or a GPU.

    python benchmarks/step.py [--tokens all masked] [--ways jaxdistill torch-eager ...] [--rounds 9]
    python benchmarks/step.py --device cuda --rows 256 --ways jaxdistill-bf16 torch-eager-bf16 torch-compile-bf16 \
        --peak 989

BERT into DistilBERT by the recipe configs/bert_mlm.py: 5 x KL at T = 2, 2 x masked LM, 1 x cosine of the last hidden
states, clipping, AdamW. What differs from it: no dropout, a constant learning rate, and rows without padding.
`all` takes the KL over all tokens; `masked` over the masked ones, which both sides gather before either head.

jaxdistill            the step that the trainer runs, float32
jaxdistill-bf16       with student.dtype=bfloat16 and teacher.dtype=bfloat16; on a GPU by cuDNN's attention
torch-eager           transformers' classes with sdpa attention, no logits that no loss looks at, fused AdamW; float32
torch-compile         as torch-eager, both models and the losses under torch.compile
torch-...-bf16        as these, under autocast to bfloat16

Each way has a process of its own. All start from the same weights (drawn by jaxdistill, exported for PyTorch), and
every loss of the first steps is compared before anything is timed: the later ones show that the updates agree. Then
each runs one step a round, first in turn another one each time, while the others sleep; so do products of matrices
(float32 on a CPU, bfloat16 on a GPU), which show the machine's peak where --peak does not give the maker's. Times are
medians, in brackets the quartiles.

With GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command, both libraries have their memory in huge pages, where
Linux offers these on request (`madvise`). The program says first on which CPU it runs, and whether they are on.

Memory on a GPU is the most that the library's allocator had in use. On a CPU it is what is resident by Linux's count:
`loaded` with libraries and weights there, `steps` the most in the timed steps, `peak` the most since loading, with
compilation in it. (ru_maxrss would begin with that of the parent process.)

On a GPU the way of this package ran on an H200; PyTorch's was never timed there.
"""

import argparse
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

# Every process imports this file, and has jax or torch but not both: they are imported where they are used.

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "bert_mlm.py"
TERMS = ("ce", "mlm", "cos")
CHECKED = 4  # steps, on as many batches, whose losses are compared; they compile and warm up
SIDE, PRODUCTS = {"cpu": 2048, "cuda": 8192}, 8  # of the matrices for the peak, and how many make a step
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")  # as Linux calls them
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

Batch = dict[str, np.ndarray]


class Job(NamedTuple):
    config: Any
    folder: Path  # with teacher and student for PyTorch
    batches: list[Batch]
    device: str  # cpu or cuda, as both libraries call them


Steps = Iterator[dict[str, float]]  # first {}, once the weights are loaded; then a step each time, and its losses


def jaxdistill(job: Job, *, half: bool) -> Steps:
    os.environ["USE_TORCH"] = "0"  # transformers would import it
    import jax

    from jaxdistill.losses.objective import make_objective
    from jaxdistill.run import memory
    from jaxdistill.run.models import load_pair
    from jaxdistill.run.training import make_training
    from jaxdistill.step import sharding
    from jaxdistill.step.sharding import Meshes

    config = job.config
    if half:
        side = {"dtype": "bfloat16", **({"attention": "cudnn"} if job.device == "cuda" else {})}
        config = config.changed(teacher=side, student=side)
    models = load_pair(config, allow_pickle=False, report=print)
    yield {}
    mesh = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    objective = make_objective(config.loss, config.policy, models)
    training = make_training(config, models, objective, Meshes(mesh, mesh), steps=1000)
    state = training.init(models.student_params)
    teacher_params = jax.device_put(models.teacher_params, training.teacher_shardings)
    del models  # as PyTorch, which has the weights once
    memory.give_back()  # here and after the first step, as the trainer does
    for i, batch in enumerate(itertools.cycle(job.batches)):
        state, metrics = training.step(state, teacher_params, sharding.put_batch(batch, mesh), jax.random.key(0))
        jax.block_until_ready(state)
        if i == 0:
            memory.give_back()
        yield {name: float(metrics[name]) for name in TERMS}


def pytorch(job: Job, *, compiled: bool, half: bool) -> Steps:
    os.environ |= {"USE_FLAX": "0", "USE_TORCH": "1"}
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes of its own beside this one
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job.folder / "compiled")  # anew in each run, as jaxdistill's
    import torch
    import torch.nn.functional as F
    from transformers import BertForMaskedLM, DistilBertForMaskedLM

    loading: Any = {"attn_implementation": "sdpa", "dtype": torch.float32}
    teacher: Any = BertForMaskedLM.from_pretrained(job.folder / "teacher", **loading).eval()
    student: Any = DistilBertForMaskedLM.from_pretrained(job.folder / "student", **loading).train()
    teacher.to(job.device)
    student.to(job.device)
    yield {}
    c, o = job.config.loss, job.config.optim
    adamw = {"lr": o.learning_rate, "betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}
    optimizer = torch.optim.AdamW(student.parameters(), **adamw, fused=True)

    def losses(input_ids: Any, attention_mask: Any, attended: Any, head: Any, labelled: Any, labels: Any) -> Any:
        with torch.no_grad():
            taught = teacher.bert(input_ids, attention_mask).last_hidden_state.flatten(0, 1)
            t = teacher.cls(taught[head])
        learnt = student.distilbert(input_ids, attention_mask).last_hidden_state.flatten(0, 1)
        transformed = student.vocab_layer_norm(student.activation(student.vocab_transform(learnt[head])))
        s = student.vocab_projector(transformed)
        log_q, log_p = (F.log_softmax(x / c.temperature, dim=-1, dtype=torch.float32) for x in (s, t))
        a, b = learnt[attended].float(), taught[attended].float()
        return {
            "ce": c.temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True),
            "mlm": F.cross_entropy(s[labelled].float(), labels),
            "cos": F.cosine_embedding_loss(a, b, a.new_ones(len(a))),
        }

    losses = torch.compile(losses) if compiled else losses
    for batch in itertools.cycle([with_indexes(batch, tokens=c.tokens) for batch in job.batches]):
        with torch.autocast(job.device, torch.bfloat16, enabled=half):
            terms = losses(**{name: torch.from_numpy(x).to(job.device) for name, x in batch.items()})
            loss = torch.stack([getattr(c, f"alpha_{name}") * terms[name] for name in TERMS]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), o.clip)
        optimizer.step()
        if job.device == "cuda":
            torch.cuda.synchronize()
        yield {name: terms[name].item() for name in TERMS}


def with_indexes(batch: Batch, *, tokens: str) -> Batch:
    """Indexes for masks: how many tokens a mask selects would be unknown to torch.compile."""
    attended, masked = np.flatnonzero(batch["attention_mask"]), np.flatnonzero(batch["label_mask"])
    head = attended if tokens == "all" else masked
    return {
        "input_ids": batch["input_ids"].astype(np.int64),
        "attention_mask": batch["attention_mask"].astype(np.int64),
        "attended": attended,
        "head": head,
        "labelled": np.searchsorted(head, masked),  # the masked ones among those of the head
        "labels": batch["labels"].flat[masked].astype(np.int64),
    }


def product(job: Job) -> Steps:
    import jax

    x = jax.random.normal(jax.random.key(0), (SIDE[job.device],) * 2, "bfloat16" if job.device == "cuda" else "float32")
    multiply = jax.jit(lambda a: a @ a)
    while True:
        yield {}
        for _ in range(PRODUCTS):
            multiply(x).block_until_ready()


WAYS: dict[str, Callable[[Job], Steps]] = {
    "jaxdistill": functools.partial(jaxdistill, half=False),
    "jaxdistill-bf16": functools.partial(jaxdistill, half=True),
    "torch-eager": functools.partial(pytorch, compiled=False, half=False),
    "torch-compile": functools.partial(pytorch, compiled=True, half=False),
    "torch-eager-bf16": functools.partial(pytorch, compiled=False, half=True),
    "torch-compile-bf16": functools.partial(pytorch, compiled=True, half=True),
}


def resident(field: str) -> float:
    """Megabytes: VmRSS, resident now, or VmHWM, the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def in_use() -> float:
    """Megabytes of the GPU, the most that this process's library had in use."""
    if "torch" in sys.modules:
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    return sys.modules["jax"].devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def serve(connection: Any, way: Callable[[Job], Steps], job: Job) -> None:
    """One way's process: sends its first losses, the seconds of a step at each "step", then (loaded, steps, peak)."""
    steps = way(job)
    next(steps)
    loaded = resident("VmRSS")
    forget_peak()
    connection.send([next(steps) for _ in range(CHECKED)])
    before = resident("VmHWM")
    forget_peak()
    with contextlib.suppress(EOFError, ConnectionError):  # the main process has ended, and says why
        while connection.recv() == "step":
            begin = time.perf_counter()
            next(steps)
            connection.send(time.perf_counter() - begin)
        most = resident("VmHWM")
        on_gpu = job.device == "cuda"
        connection.send((loaded, *(in_use(),) * 2) if on_gpu else (loaded, most, max(before, most)))


class Worker:
    def __init__(self, name: str, way: Callable[[Job], Steps], job: Job):
        spawn = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, way, job), daemon=True)
        self.process.start()
        theirs.close()  # theirs alone from here on, so that their death ends the connection
        self.losses: list[dict[str, float]] = self._answer()

    def ask(self, message: str) -> Any:
        with contextlib.suppress(ConnectionError):  # which the answer tells
            self.connection.send(message)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise SystemExit(f"{self.name} died with exit code {self.process.exitcode}; see above") from None


def check(one: Worker, other: Worker) -> None:
    tolerance = 2e-2 if "bf16" in one.name + other.name else 1e-4
    for step, (a, b) in enumerate(zip(one.losses, other.losses, strict=True)):
        for term in TERMS:
            if not abs(a[term] - b[term]) <= tolerance * abs(b[term]):
                raise SystemExit(f"{term} of step {step}: {a[term]:.7g} by {one.name}, {b[term]:.7g} by {other.name}")


def measure(ways: list[str], job: Job, rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """(seconds of every round, megabytes) by way; the machine's peak is among them as "product"."""
    workers: dict[str, Worker] = {}
    for name in ways:
        workers[name] = Worker(name, WAYS[name], job)
        check(workers[name], workers[ways[0]])
    workers["product"] = Worker("product", product, job)
    times: dict[str, list[float]] = {name: [] for name in workers}
    for i in range(rounds):
        order = list(workers)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(workers[name].ask("step"))
    return times, {name: worker.ask("end") for name, worker in workers.items()}


def make_config(args: argparse.Namespace, folder: Path, tokens: str) -> Any:
    from jaxdistill import recipe

    changes = {"teacher.name": folder / "teacher", "student.layers": args.student_layers, "data.path": "none"}
    changes |= {"data.max_length": args.length, "train.batch_size": args.rows, "train.accumulation": 1}
    changes |= {"mask.group": math.gcd(args.rows, 8), "loss.tokens": tokens}
    changes |= {"optim.schedule": "constant", "optim.warmup": 0.0}
    return recipe.read(str(RECIPE), [f"--config.{key}={value}" for key, value in changes.items()])


def make_folders(args: argparse.Namespace, folder: Path) -> None:
    """A random teacher, and the student that jaxdistill cuts from it."""
    import jax
    from transformers import BertConfig, BertTokenizerFast

    from jaxdistill.export.export import export
    from jaxdistill.models.model import build_model, init_params
    from jaxdistill.run.models import load_pair

    sizes = {"vocab_size": args.vocab, "num_hidden_layers": args.teacher_layers, "num_attention_heads": args.heads}
    sizes |= {"hidden_size": args.width, "intermediate_size": 4 * args.width}
    # BERT's own 0.02 makes layers that do little: a student would say what its teacher does.
    scales = {"initializer_range": args.width**-0.5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = build_model(BertConfig(**sizes, **scales))
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + [f"word{i}" for i in range(len(SPECIAL), args.vocab)]))
    ids = np.arange(args.length)[None] % args.vocab
    probe = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    write = functools.partial(export, tokenizer=tokenizer, to="pytorch", card="", probe=probe)
    write(model=teacher, params=init_params(teacher, jax.random.key(0)), out=folder / "teacher")
    pair = load_pair(make_config(args, folder, "all"), allow_pickle=False, report=print)
    write(model=pair.student, params=pair.student_params, out=folder / "student")


def make_batch(config: Any, *, vocab: int, seed: int) -> Batch:
    """Rows without padding; as many tokens masked as in training, in each group of rows."""
    rng = np.random.default_rng(seed)
    rows, length, group = config.train.batch_size, config.data.max_length, config.mask.group
    labels = rng.integers(len(SPECIAL), vocab, (rows, length), np.int32)
    order = rng.random((rows // group, group * length)).argsort().argsort()
    label_mask = (order < math.ceil(config.mask.fraction * group * length)).reshape(rows, length)
    input_ids = np.where(label_mask, np.int32(SPECIAL.index("[MASK]")), labels)
    attention_mask = np.ones_like(label_mask)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "label_mask": label_mask}


def work(args: argparse.Namespace, head_tokens: int) -> float:
    """FLOP of a step's matrix products: the teacher forwards, the student forwards and twice that for its gradient."""
    layer = args.rows * args.length * (24 * args.width**2 + 4 * args.length * args.width)
    head = head_tokens * 2 * args.width * (args.width + args.vocab)
    return (args.teacher_layers + 3 * args.student_layers) * layer + (1 + 3) * head


def make_table(
    title: str, times: dict[str, list[float]], memory: dict[str, Any], *, tokens: int, flop: float, peak: float
) -> Table:
    first = next(iter(times))
    columns = (
        "way",
        "ms",
        "quartiles",
        "tokens/s",
        f"of {first}",
        "of peak",
        "loaded MB",
        "steps MB",
        f"of {first}",
        "peak MB",
    )
    table = Table(*columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for way, taken in times.items():
        low, middle, high = 1e3 * np.percentile(taken, [25, 50, 75])
        loaded, steps, most = memory[way]
        figures = [
            f"{middle:.0f}",
            f"{low:.0f}-{high:.0f}",
            f"{tokens / (middle / 1e3):,.0f}",
            f"{middle / 1e3 / np.median(times[first]):.2f}",
        ]
        figures += [f"{flop / (middle / 1e3) / peak:.0%}", f"{loaded:,.0f}", f"{steps:,.0f}"]
        table.add_row(way, *figures, f"{steps / memory[first][1]:.2f}", f"{most:,.0f}")
    return table


def machine() -> str:
    """The CPU's name, what multiplies matrices on it, and whether memory is in huge pages."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in info.items()}
    features = [name for name in FEATURES if name in named.get("flags", "").split()]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    offered = re.search(r"\[(\w+)\]", pages.read_text()) if pages.exists() else None
    asked = re.search(r"glibc\.malloc\.hugetlb=[12]", os.environ.get("GLIBC_TUNABLES", ""))
    return (
        f"{named.get('model name', 'CPU without a name')}, family {named.get('cpu family', '?')} model "
        f"{named.get('model', '?')}, {os.cpu_count()} cores, {' '.join(features) or 'no vector instructions known'}; "
        f"huge pages: {offered[1] if offered else 'none'}, {'asked' if asked else 'not asked'} for by malloc"
    )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    sizes = {"teacher-layers": 12, "student-layers": 6, "width": 768, "heads": 12, "vocab": 30_522}
    for name, default in {**sizes, "rows": 8, "length": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", nargs="+", choices=["all", "masked"], default=["all", "masked"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", choices=list(SIDE), default="cpu")
    parser.add_argument("--peak", type=float, help="TFLOP/s by the maker; left out, a product of matrices shows it")
    args = parser.parse_args()
    # The CPU beside a GPU, where weights are read; several processes share the GPU.
    os.environ["JAX_PLATFORMS"] = "cpu" if args.device == "cpu" else f"{args.device},cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    console = Console(width=140)
    layers = f"{args.teacher_layers} to {args.student_layers} layers, width {args.width}, vocabulary {args.vocab:,}"
    console.print(f"{layers}, {args.rows} x {args.length} tokens")
    console.print(machine())
    with tempfile.TemporaryDirectory() as name:
        make_folders(args, Path(name))
        for tokens in args.tokens:
            config = make_config(args, Path(name), tokens)
            batches = [make_batch(config, vocab=args.vocab, seed=seed) for seed in range(CHECKED)]
            times, memory = measure(args.ways, Job(config, Path(name), batches, args.device), args.rounds)
            measured = PRODUCTS * 2 * SIDE[args.device] ** 3 / float(np.median(times.pop("product")))
            peak = measured if args.peak is None else args.peak * 1e12
            on_head = batches[0]["attention_mask" if tokens == "all" else "label_mask"]
            flop = work(args, int(on_head.sum()))
            title = f"{tokens}: {flop / 1e9:,.1f} GFLOP a step, peak {peak / 1e9:,.0f} GFLOP/s"
            shown = make_table(title, times, memory, tokens=args.rows * args.length, flop=flop, peak=peak)
            console.print(shown)


if __name__ == "__main__":
    main()
