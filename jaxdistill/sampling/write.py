"""Prompts of a file, continued by a model of a folder."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill.data.prompts import prompt_ids
from jaxdistill.errors import UserError
from jaxdistill.files import write_text, writing
from jaxdistill.knobs import check_seed
from jaxdistill.models import hub, stored, weights
from jaxdistill.models.model import Model, build_model
from jaxdistill.models.tokenizer import check_tokenizer, end_ids, load_tokenizer
from jaxdistill.sampling.decoding import Decoding, check_decoding
from jaxdistill.sampling.generate import make_generator
from jaxdistill.step import sharding


class Continuation(NamedTuple):
    """A prompt and its continuation."""

    prompt: str
    completion: str
    tokens: int  # new tokens
    stop: str  # why the continuation ended, see generate.Completion


class Writer(NamedTuple):
    """A model that continues prompts."""

    model: Model
    tokenizer: Any
    load: Callable[[], PyTree]  # reads the parameters, once the rest is found to fit


def writer_of(name: str, *, revision: str, allow_pickle: bool, mesh: Mesh | None = None) -> Writer:
    """The model of a folder or of a hub name.

    Args:
      mesh: holds the parameters, split over its devices; None = those of this process, as few as have room.

    Raises:
      UserError: it cannot be read.
    """
    folder = hub.resolve(name, revision=revision, allow_pickle=allow_pickle)
    config = hub.load_config(folder)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config)
    model = build_model(config)

    def load() -> PyTree:
        params = weights.open_params(folder, model, allow_pickle=allow_pickle)
        return stored.placed(params, sharding.on_mesh(params, mesh, family=model.family), jnp.float32)

    return Writer(model, tokenizer, load)


def continue_prompts(
    writer: Writer, prompts: list[str], decoding: Decoding, *, batch_size: int, seed: int, mesh: Mesh | None = None
) -> list[Continuation]:
    """Continues each prompt with a causal model, `batch_size` prompts at a time.

    Args:
      decoding: its end_ids are replaced by the end tokens of the model.
      mesh: whose devices share the prompts of a batch, and hold the parameters; None = where the parameters are.

    Raises:
      UserError: the model cannot be read or generates no text; a value of `decoding`, the seed, or a
        prompt does not fit.
    """
    check_decoding(decoding)
    check_seed(seed)
    model, tokenizer, load = writer
    decoding = dataclasses.replace(decoding, end_ids=end_ids(model.config, tokenizer))
    generate = make_generator(model, decoding=decoding, batch_size=batch_size, mesh=mesh)
    params = jax.device_put(load()) if mesh is None else load()
    ids = prompt_ids(tokenizer, prompts)
    completions = generate(params, ids, jax.random.key(seed))
    return [
        Continuation(prompt, _completion(tokenizer, before, tokens), len(tokens), stop)
        for prompt, before, (tokens, stop) in zip(prompts, ids, completions, strict=True)
    ]


def _completion(tokenizer: Any, before: list[int], tokens: tuple[int, ...]) -> str:
    # The end of the whole text: decoded alone, the new tokens would lose the space before their first word.
    whole, start = tokenizer.batch_decode([[*before, *tokens], before], skip_special_tokens=True)
    return whole[len(start) :]


def write_records(records: list[Continuation], out: Path) -> None:
    """Writes one JSON object a line: the whole file or nothing."""
    with writing(out):
        write_text(out, "".join(json.dumps(record._asdict()) + "\n" for record in records))


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a text file or of standard input (None), or the field "prompt" of each line of a .jsonl file.

    Raises:
      UserError: the file cannot be read, holds no prompt, or a line is no JSON object with a "prompt".
    """
    name = "standard input" if path is None else str(path)
    lines = _read_lines(path, name)
    if path is None or path.suffix != ".jsonl":
        return lines
    return [_prompt_of(line, f"{name}, line {number}") for number, line in enumerate(lines, 1)]


def _read_lines(path: Path | None, name: str) -> list[str]:
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
    return lines


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{where} is no JSON object with a "prompt"') from error
    # JSON can carry half a surrogate pair, which no tokenizer accepts.
    if not isinstance(prompt, str) or any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UserError(f"{where}: the prompt is {prompt!r}, not a text")
    return prompt
