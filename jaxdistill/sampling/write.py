"""Prompts of a file continued by a model of a folder."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxdistill.errors import UserError
from jaxdistill.files import write_text, writing
from jaxdistill.models import hub, weights
from jaxdistill.models.model import build_model
from jaxdistill.models.tokenizer import check_tokenizer, end_ids, load_tokenizer
from jaxdistill.sampling.decoding import Decoding, check_decoding
from jaxdistill.sampling.generate import make_generator


class Written(NamedTuple):
    """A prompt and its continuation."""

    prompt: str
    completion: str
    tokens: int  # new ones
    stop: str  # why it ended, see generate.Completion


def continue_prompts(
    name: str,
    prompts: list[str],
    decoding: Decoding,
    *,
    revision: str,
    allow_pickle: bool,
    batch_size: int,
    seed: int,
) -> list[Written]:
    """Continues each prompt with a causal model.

    Args:
      name: folder or hub name.
      decoding: its end_ids are replaced by those of the model.

    Raises:
      UserError: what does not fit.
    """
    check_decoding(decoding)
    folder = hub.resolve(name, revision=revision, allow_pickle=allow_pickle)
    config = hub.load_config(folder)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config)
    decoding = dataclasses.replace(decoding, end_ids=end_ids(folder, config, tokenizer))
    model = build_model(config)
    generate = make_generator(model, decoding=decoding, batch_size=batch_size)
    params = jax.device_put(weights.load_params(folder, model, allow_pickle=allow_pickle))
    ids = tokenizer(prompts)["input_ids"]
    completions = generate(params, ids, jax.random.key(seed))
    return [
        Written(prompt, _completion(tokenizer, before, tokens), len(tokens), stop)
        for prompt, before, (tokens, stop) in zip(prompts, ids, completions, strict=True)
    ]


def _completion(tokenizer: Any, before: list[int], tokens: tuple[int, ...]) -> str:
    # The end of the whole text: the new tokens alone would lose the space before their first word.
    whole, start = tokenizer.batch_decode([[*before, *tokens], before], skip_special_tokens=True)
    return whole[len(start) :]


def write_records(written: list[Written], out: Path) -> None:
    """Writes one JSON object a line, whole or not at all."""
    with writing(out):
        write_text(out, "".join(json.dumps(one._asdict()) + "\n" for one in written))


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a text file or of standard input (None), or the field "prompt" of those of a .jsonl file."""
    name = "standard input" if path is None else str(path)
    try:
        data = sys.stdin.buffer.read() if path is None else path.read_bytes()
        lines = data.decode().split("\n")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error})") from error
    lines = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    if not lines:
        raise UserError(f"{name} holds no prompt: give one a line")
    if path is None or path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{name}, line {number} is no JSON object with a "prompt"') from error
        if not isinstance(prompts[-1], str):
            raise UserError(f"{name}, line {number}: the prompt is {prompts[-1]!r}, not a text")
    return prompts
