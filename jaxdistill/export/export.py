"""Write a trained model as a folder that plain transformers opens, and believe it only after reading it back."""

import copy
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.files import refusal
from jaxdistill.models import hub, torch_names, weights
from jaxdistill.models.intercept import apply
from jaxdistill.models.model import Model, build_model, with_tied_head
from jaxdistill.models.tokenizer import check_tokenizer, load_tokenizer

# float32 is stored exactly and both sides run through one compiled program, so the difference should be 0; 1e-5 is
# room for a backend whose sums are not ordered, and a thousandth of what one wrong tensor costs.
TOLERANCE = 1e-5


def export(
    *,
    model: Model,
    params: Mapping[str, Any],
    tokenizer: Any,
    out: Path,
    to: Literal["pytorch", "flax"],
    card: str,
    probe: Mapping[str, np.ndarray],
) -> None:
    """Write config.json, weights, tokenizer files and the model card to the folder `out`. torch is not needed.

    `probe` holds input_ids and attention_mask [batch, length] of real text: the folder is written beside `out`, read
    back as any user's folder would be, and renamed to `out` only if its logits are the checkpoint's. Raises
    UserError where `out` is in use, cannot be written, or reads back differently; nothing is left then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another --out, nothing is written over")
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        _write(temporary, model=model, params=params, tokenizer=tokenizer, to=to, card=card)
        difference = _reread_difference(temporary, model=model, params=params, probe=probe)
        if not difference <= TOLERANCE:  # also where it is NaN
            raise UserError(
                f"export: the folder reads back with logits up to {difference:.3g} off the checkpoint's, "
                f"{TOLERANCE:g} are allowed; {out} was not written"
            )
        temporary.rename(out)
    except Exception as error:
        if reason := refusal(error):
            raise UserError(f"cannot write {out}: {reason}; nothing is left of it") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_card(
    *,
    name: str,
    base_model: str,
    license: str,
    recipe: Mapping[str, Any],
    results: Mapping[str, float],
    causal: bool = False,
) -> str:
    """README.md in the hub's form. `license` is the teacher's, as a hub id, or empty where unknown.

    `base_model` is empty for a model trained without a teacher.
    """
    front = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if causal else 'fill-mask'}",
        "tags:",
        "- jaxdistill",
        "- distillation",
    ]
    if _is_hub_name(base_model):
        front.append(f"base_model: {base_model}")
    if license:
        front.append(f"license: {license}")
    origin = f"distilled from `{_without_folders(base_model)}`" if base_model else "trained from scratch"
    terms = f"The teacher's licence is {license}" if license else "The teacher's licence is not recorded here"
    licence = f"{terms}; it applies to this model as far as weights were taken from it." if base_model else ""
    use = [
        f'fill = pipeline("fill-mask", model="{name}")',
        'fill(f"Paris is the {fill.tokenizer.mask_token} of France.")',
    ]
    if causal:
        use = [f'write = pipeline("text-generation", model="{name}")', 'write("Once upon a time", max_new_tokens=50)']
    numbers = [f"| {key} | {value:.4g} |" for key, value in results.items()] or ["| not evaluated | |"]
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {name}",
            "",
            f"A {'causal' if causal else 'masked'} language model {origin} with jaxdistill.",
            "",
            "## Use",
            "",
            "```python",
            "from transformers import pipeline",
            "",
            *use,
            "```",
            "",
            "## Results",
            "",
            "| metric | value |",
            "|---|---|",
            *numbers,
            "",
            "## Recipe",
            "",
            "```json",
            json.dumps(_without_folders(recipe), indent=2, default=str),
            "```",
            "",
            "## Licence",
            "",
            *([licence] if licence else []),
            "The terms of the training text apply.",
            "",
        ]
    )


def _without_folders(recipe: Any) -> Any:
    """A recipe whose absolute paths are cut to their last part: a card is public, a user's folders are not."""
    if isinstance(recipe, Mapping):
        return {key: _without_folders(value) for key, value in recipe.items() if key != "cache_dir"}
    if isinstance(recipe, str) and recipe.startswith(("/", "~")):
        return Path(recipe).name
    return recipe


def _write(folder: Path, *, model: Model, params: Mapping[str, Any], tokenizer: Any, to: str, card: str) -> None:
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), params)
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model.flax).__name__.removeprefix("Flax")]
    config.dtype = "float32"
    (folder / "config.json").write_text(config.to_json_string(use_diff=True), encoding="utf-8")
    if to == "pytorch":
        from safetensors.numpy import save_file

        save_file(torch_names.to_torch(params), folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # it writes for the owner alone
    else:
        from flax.serialization import msgpack_serialize

        # A tied causal head too: FlaxLlama and FlaxMistral would draw it at random.
        whole = jax.tree.map(np.asarray, with_tied_head(model, params))
        (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(whole))
    _tokenizer_for(model, tokenizer).save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _tokenizer_for(model: Model, tokenizer: Any) -> Any:
    """A copy that knows the model's length, and that gives a family without token types none.

    A BERT tokenizer's token_type_ids would make torch's DistilBERT refuse the call.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.max_length)
    tokenizer.init_kwargs["model_max_length"] = tokenizer.model_max_length
    if not model.family.token_types:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    return tokenizer


def _reread_difference(
    folder: Path, *, model: Model, params: Mapping[str, Any], probe: Mapping[str, np.ndarray]
) -> float:
    """The largest difference in logits, over the probe's real tokens, of the folder's model to the checkpoint's."""
    written = build_model(hub.load_config(folder), dtype=jnp.float32)
    check_tokenizer(load_tokenizer(folder), written.config)
    reread = weights.load_params(folder, written)
    inputs = {
        "input_ids": jnp.asarray(probe["input_ids"]),
        "attention_mask": jnp.asarray(probe["attention_mask"], bool),
    }
    before = build_model(model.config, dtype=jnp.float32)
    expected = _logits(before, params, **inputs)
    got = _logits(written, reread, **inputs)
    return float(np.max(np.abs(expected - got), where=inputs["attention_mask"][:, :, None], initial=0.0))


def _logits(model: Model, params: Any, **inputs: Any) -> np.ndarray:
    params = jax.tree.map(lambda array: jnp.asarray(np.asarray(array), jnp.float32), params)
    return np.asarray(jax.jit(lambda params, inputs: apply(model, params, **inputs).logits)(params, inputs))


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)) and not Path(name).exists()
