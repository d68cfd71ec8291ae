"""The model card: README.md of an exported folder, in the form that the Hugging Face hub reads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Card(NamedTuple):
    """The facts that a model card states."""

    name: str
    base_model: str  # hub name or folder of the teacher; "" for a model that was trained without one
    license: str  # the teacher's, as a hub id such as apache-2.0; "" where unknown
    recipe: Mapping[str, Any]  # the settings of the run, as JSON
    results: Mapping[str, float]  # figures of the last evaluation, by metric name
    causal: bool = False  # a causal language model; otherwise a masked one


def model_card(card: Card) -> str:
    """The text of the card; absolute paths in it are cut to their last part, as a card is public."""
    origin = f"distilled from `{_without_folders(card.base_model)}`" if card.base_model else "trained from scratch"
    return "\n".join(
        [
            *_front_matter(card),
            "",
            f"# {card.name}",
            "",
            f"A {'causal' if card.causal else 'masked'} language model {origin} with jaxdistill.",
            "",
            "## Use",
            "",
            "```python",
            "from transformers import pipeline",
            "",
            *_example(card),
            "```",
            "",
            "## Results",
            "",
            "| metric | value |",
            "|---|---|",
            *([f"| {key} | {value:.4g} |" for key, value in card.results.items()] or ["| not evaluated | |"]),
            "",
            "## Recipe",
            "",
            "```json",
            json.dumps(_without_folders(card.recipe), indent=2, default=str),
            "```",
            "",
            "## Licence",
            "",
            *_licence(card),
            "The terms of the training text apply.",
            "",
        ]
    )


def _front_matter(card: Card) -> list[str]:
    return [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if card.causal else 'fill-mask'}",
        "tags:",
        "- jaxdistill",
        "- distillation",
        *([f"base_model: {card.base_model}"] if _is_hub_name(card.base_model) else []),
        *([f"license: {card.license}"] if card.license else []),
        "---",
    ]


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)) and not Path(name).exists()


def _example(card: Card) -> list[str]:
    if card.causal:
        return [
            f'write = pipeline("text-generation", model="{card.name}")',
            'write("Once upon a time", max_new_tokens=50)',
        ]
    return [
        f'fill = pipeline("fill-mask", model="{card.name}")',
        'fill(f"Paris is the {fill.tokenizer.mask_token} of France.")',
    ]


def _licence(card: Card) -> list[str]:
    if not card.base_model:
        return []
    known = f"is {card.license}" if card.license else "is not recorded here"
    return [f"The teacher's licence {known}; it applies to this model as far as weights were taken from it."]


def _without_folders(recipe: Any) -> Any:
    """The recipe with absolute paths cut to their last part: a card is public, a user's folders are not."""
    if isinstance(recipe, Mapping):
        return {key: _without_folders(value) for key, value in recipe.items() if key != "cache_dir"}
    if isinstance(recipe, str) and recipe.startswith(("/", "~")):
        return Path(recipe).name
    return recipe
