"""`jaxdistill generate`: continues prompts with a causal model."""

import argparse
import hashlib
from pathlib import Path

from jaxdistill import processes
from jaxdistill.arguments import add_mesh_flags
from jaxdistill.console import LOADING, say, taking
from jaxdistill.errors import UserError

HELP = "continue prompts with a causal model"
TAKES_CONFIG = False
LESS_MEMORY = "lower --batch-size or --max-new-tokens, or raise --tensor or --fsdp where there are several devices"
INTERRUPTED = "nothing was written"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a model or of a run, or name on the hub")
    parser.add_argument("--step", default="last", help="of a run: a step, best or last; default: %(default)s")
    parser.add_argument("--revision", default="", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--input", type=Path, help='one prompt a line, or .jsonl with a field "prompt"; default: standard input'
    )
    parser.add_argument(
        "--out", type=Path, help="write prompt, completion, tokens and stop to this file, as JSON lines"
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: always the likeliest token")
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw among the k likeliest tokens; 0, the default: among all"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the fewest tokens that have this probability together"
    )
    parser.add_argument(
        "--stop-repeats",
        type=int,
        nargs=2,
        metavar=("N", "TIMES"),
        default=(0, 0),
        help="end a text when its last N new tokens have occurred TIMES times among its new tokens",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws; default: %(default)s")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="prompts that are continued at a time; default: %(default)s"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only")
    add_mesh_flags(parser)


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    with taking(LOADING):
        from jaxdistill.jobs.generate import writer_named
        from jaxdistill.sampling.decoding import Decoding, check_decoding
        from jaxdistill.sampling.write import continue_prompts, read_prompts, write_records
        from jaxdistill.step.sharding import mesh_of_flags

    decoding = Decoding(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        repeat_ngram=flags.stop_repeats[0],
        repeat_times=flags.stop_repeats[1],
    )
    check_decoding(decoding)
    if flags.out is not None and flags.out.is_dir():
        raise UserError(f"--out {flags.out} is a folder; name a file")
    mesh = mesh_of_flags(fsdp=flags.fsdp, tensor=flags.tensor)
    prompts = read_prompts(flags.input)
    processes.check_same(
        "prompts",
        {"the digest of the prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()},
        advice="name a file with --input that all hosts see",
    )
    writer = writer_named(
        flags.model, step=flags.step, revision=flags.revision, allow_pickle=flags.allow_pickle, report=say, mesh=mesh
    )
    continuations = continue_prompts(writer, prompts, decoding, batch_size=flags.batch_size, seed=flags.seed, mesh=mesh)
    if flags.out is None:
        for continuation in continuations:
            print(continuation.prompt + continuation.completion, flush=True)
        return
    if processes.is_first():
        write_records(continuations, flags.out)
    print(f"{len(continuations)} completions, {sum(x.tokens for x in continuations):,} tokens, are in {flags.out}")
