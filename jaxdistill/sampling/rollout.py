"""What models write during training: prompts out of a batch of text, and the batch of what student and teacher add.

Prompts are padded on the left, so that all completions begin in the same column; what is returned can be given to
`intercept.apply` as it is, which counts positions from a row's first real token.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree

from jaxdistill.errors import UserError
from jaxdistill.models.model import Model
from jaxdistill.sampling.generate import Decoded, Decoding, check, check_causal, make_decoder


def prompts_of(batch: Mapping[str, np.ndarray], *, length: int, prompt_tokens: int, pad: int) -> dict[str, np.ndarray]:
    """The prompts of a host batch: input_ids, attention_mask [rows, length], padded on the left, and live [rows].

    With `prompt_tokens` a row's first so many tokens are its prompt. With 0, all up to the first token that is
    followed by a predicted one, or the whole row where none is predicted. Of longer prompts the last `length` tokens
    are kept. Rows without tokens are not live.

    Args:
      batch: input_ids, attention_mask, label_mask [rows, width], padded on the right; label_mask[t] is True where the
        token after t is predicted.
    """
    ids, predicted = batch["input_ids"], batch["label_mask"] & batch["attention_mask"]
    tokens = batch["attention_mask"].sum(axis=1)
    if prompt_tokens:
        ends = np.minimum(tokens, prompt_tokens)
    else:
        ends = np.where(predicted.any(axis=1), predicted.argmax(axis=1) + 1, tokens)
    places = ends[:, None] - length + np.arange(length)
    real = places >= 0
    input_ids = np.where(real, np.take_along_axis(ids, np.maximum(places, 0), axis=1), pad)
    return {"input_ids": input_ids.astype(np.int32), "attention_mask": real, "live": ends > 0}


def make_sampler(
    *, student: Model, teacher: Model | None, decoding: Decoding, mixture: float, length: int
) -> Callable[..., dict[str, Array]]:
    """The jitted function (student_params, teacher_params, prompts, key) -> the batch that is written.

    prompts are those of `prompts_of`, on the device, `length` wide; row i draws with fold_in(key, i). The batch's
    arrays are [rows, length + max_new_tokens], each row's prompt and new tokens, then decoding.pad_id:
      input_ids, and attention_mask, True for a prompt's tokens and for new ones;
      labels, the token after each, and sampled_mask, True where that is a new one, the end token included.

    Args:
      teacher: None, with None for its parameters, where there is none.
      mixture: the teacher's share of the distribution that tokens are drawn from (teacher-mixed sampling, Gu et al.
        2024); with 0 the student alone writes and the teacher does not run, with 1 it is the other way round.

    Raises:
      UserError: a masked LM; vocabularies of different sizes; a row that does not fit both models' positions.
    """
    check(decoding)
    if not 0 <= mixture <= 1:
        raise UserError(f"the teacher's share of what is sampled from is {mixture:g}; it must be between 0 and 1")
    if teacher is None and mixture:
        raise UserError(f"the teacher's share of what is sampled from is {mixture:g}, and there is no teacher")
    models = (student,) if teacher is None else (student, teacher)
    for role, model in zip(("student", "teacher"), models, strict=False):
        check_causal(model)
        if length + decoding.max_new_tokens > model.max_length:
            raise UserError(
                f"prompts of {length} tokens and {decoding.max_new_tokens} new ones do not fit the {role}'s "
                f"{model.max_length} positions"
            )
    decode = make_decoder(models, weights=(1 - mixture, mixture)[: len(models)], decoding=decoding)

    @jax.jit
    def sample(
        student_params: PyTree, teacher_params: PyTree, prompts: Mapping[str, Array], key: Key[Array, ""]
    ) -> dict[str, Array]:
        rows, width = prompts["input_ids"].shape
        assert width == length, (width, length)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
        params = (student_params, teacher_params)[: len(models)]
        return written(prompts, decode(params, **prompts, keys=keys), pad=decoding.pad_id)

    return sample


def written(prompts: Mapping[str, Array], decoded: Decoded, *, pad: int) -> dict[str, Array]:
    """Prompts and what follows them as one batch; see `make_sampler`."""
    new = jnp.arange(decoded.tokens.shape[1])[None, :] < decoded.lengths[:, None]
    input_ids = jnp.concatenate([prompts["input_ids"], decoded.tokens], axis=1)
    is_new = jnp.concatenate([jnp.zeros_like(prompts["attention_mask"]), new], axis=1)
    return {
        "input_ids": input_ids,
        "attention_mask": jnp.concatenate([prompts["attention_mask"], new], axis=1),
        "labels": _next(input_ids, pad),
        "sampled_mask": _next(is_new, False),
    }


def _next(x: Int[Array, "batch length"] | Bool[Array, "batch length"], last: int | bool) -> Array:
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=last)
