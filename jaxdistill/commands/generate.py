"""`jaxdistill generate`: continues prompts with a causal model."""

import argparse
from pathlib import Path

from jaxdistill.errors import UserError

HELP = "continue prompts with a causal model"
TAKES_CONFIG = False


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--revision", default="", help="branch, tag or commit of the hub name")
    parser.add_argument("--input", type=Path, help='a prompt a line, or .jsonl with "prompt"; default standard input')
    parser.add_argument("--out", type=Path, help="write prompt, completion, tokens, stop here as JSON lines")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the fewest with this probability")
    parser.add_argument(
        "--stop-repeats",
        type=int,
        nargs=2,
        metavar=("N", "TIMES"),
        default=(0, 0),
        help="end a text where its last N new tokens have stood in it TIMES times",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, with torch's weights_only")


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    from jaxdistill.sampling.decoding import Decoding, check_decoding
    from jaxdistill.sampling.write import continue_prompts, read_prompts, write_records

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
    written = continue_prompts(
        flags.model,
        read_prompts(flags.input),
        decoding,
        revision=flags.revision,
        allow_pickle=flags.allow_pickle,
        batch_size=flags.batch_size,
        seed=flags.seed,
    )
    if flags.out is None:
        for one in written:
            print(one.prompt + one.completion, flush=True)
        return
    write_records(written, flags.out)
    print(f"{len(written)} completions, {sum(one.tokens for one in written):,} tokens, are in {flags.out}")
