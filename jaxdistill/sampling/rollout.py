"""Sampling during training: prompts out of a batch of text, and the batch of their completions by student and teacher.

Prompts are padded on the left, so that all completions begin in the same column. The sampled batch can be given to
`intercept.apply` as it is, which counts positions from the first real token of a row.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree

from jaxdistill.errors import UserError
from jaxdistill.models.model import Model
from jaxdistill.sampling.decoding import Decoding, check_decoding
from jaxdistill.sampling.generate import Decoded, check_causal, make_decoder
from jaxdistill.step.batch import Batch

# (student_params, teacher_params, prompts, key) -> the sampled batch
Sampler = Callable[[PyTree, PyTree, Batch, Key[Array, ""]], dict[str, Array]]


def prompts_of(batch: Mapping[str, np.ndarray], *, length: int, prompt_tokens: int, eos: int) -> dict[str, np.ndarray]:
    """The prompts of a host batch: input_ids, attention_mask [rows, length], padded on the left, and live [rows].

    With `prompt_tokens`, this number of tokens at the start of a row is its prompt. With 0, the prompt goes up to the
    first token that is followed by a predicted token, or is the whole row where nothing is predicted. The eos at the
    end of a row belongs to no prompt. Of longer prompts the last `length` tokens are kept. Rows without a prompt are
    not live.

    Args:
      batch: input_ids, attention_mask, label_mask [rows, width], padded on the right; label_mask[t] is True where the
        token after t is predicted.
      eos: ends the texts of training; also what rows are padded with.
    """
    ids, predicted = batch["input_ids"], batch["label_mask"] & batch["attention_mask"]
    tokens = batch["attention_mask"].sum(axis=1)
    last = np.take_along_axis(ids, np.maximum(tokens - 1, 0)[:, None], axis=1)[:, 0]
    tokens = tokens - ((tokens > 0) & (last == eos))
    wanted = prompt_tokens or np.where(predicted.any(axis=1), predicted.argmax(axis=1) + 1, tokens)
    ends = np.minimum(tokens, wanted)
    positions = ends[:, None] - length + np.arange(length)
    real = positions >= 0
    input_ids = np.where(real, np.take_along_axis(ids, np.maximum(positions, 0), axis=1), eos)
    return {"input_ids": input_ids.astype(np.int32), "attention_mask": real, "live": ends > 0}


def make_sampler(
    *,
    student: Model,
    teacher: Model | None,
    decoding: Decoding,
    mixture: float,
    length: int,
    words: int | None = None,
) -> Sampler:
    """Returns the jitted function sample(student_params, teacher_params, prompts, key) -> the sampled batch.

    prompts are those of `prompts_of`, on the device, `length` wide; row i draws with fold_in(key, i). The arrays of the
    batch are [rows, length + max_new_tokens]: the prompt and the new tokens of each row, then decoding.pad_id. They are
      input_ids, and attention_mask, True for the tokens of the prompt and for new ones;
      labels, the token after each, and sampled_mask, True where the label is a new token, the end token included.

    Args:
      teacher: None, with None for its parameters, where there is no teacher.
      mixture: the teacher's share of the distribution that tokens are drawn from (teacher-mixed sampling, Gu et al.
        2024). With 0 only the student runs, and with 1 only the teacher.
      words: tokens are drawn from this many words; None = from all that the models have in common.

    Raises:
      UserError: a masked LM; a row that does not fit the positions of both models.
    """
    check_decoding(decoding)
    if not 0 <= mixture <= 1:
        raise UserError(f"the teacher's share of what is sampled from is {mixture:g}; it must be between 0 and 1")
    if teacher is None and mixture:
        raise UserError(f"the teacher's share of what is sampled from is {mixture:g}, and there is no teacher")
    models = (student,) if teacher is None else (student, teacher)
    for role, model in zip(("student", "teacher"), models, strict=False):
        _check_model(model, role, length=length, new=decoding.max_new_tokens)
    decode = make_decoder(models, weights=(1 - mixture, mixture)[: len(models)], decoding=decoding, words=words)

    @jax.jit
    def sample(student_params: PyTree, teacher_params: PyTree, prompts: Batch, key: Key[Array, ""]) -> dict[str, Array]:
        rows, width = prompts["input_ids"].shape
        assert width == length, (width, length)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
        params = (student_params, teacher_params)[: len(models)]
        return _sampled_batch(prompts, decode(params, **prompts, keys=keys), pad=decoding.pad_id)

    return sample


def _check_model(model: Model, role: str, *, length: int, new: int) -> None:
    check_causal(model)
    if length + new > model.max_length:
        raise UserError(
            f"prompts of {length} tokens and {new} new ones do not fit the {role}'s {model.max_length} positions"
        )


def _sampled_batch(prompts: Batch, decoded: Decoded, *, pad: int) -> dict[str, Array]:
    """Prompts and their completions as one batch; see `make_sampler`."""
    new = jnp.arange(decoded.tokens.shape[1])[None, :] < decoded.lengths[:, None]
    input_ids = jnp.concatenate([prompts["input_ids"], decoded.tokens], axis=1)
    is_new = jnp.concatenate([jnp.zeros_like(prompts["attention_mask"]), new], axis=1)
    return {
        "input_ids": input_ids,
        "attention_mask": jnp.concatenate([prompts["attention_mask"], new], axis=1),
        "labels": _shifted(input_ids, pad),
        "sampled_mask": _shifted(is_new, False),
    }


def _shifted(x: Int[Array, "batch length"] | Bool[Array, "batch length"], last: int | bool) -> Array:
    """x[t + 1] at t, and `last` at the end."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=last)
