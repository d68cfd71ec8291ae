"""The model card: README.md of an exported folder, in the form that the Hugging Face hub reads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.export.origin import Origin
from jaxdistill.models.model_card import is_hub_name
from jaxdistill.models.pair import OF_TEACHER


class Results(NamedTuple):
    """Figures, and what they are of."""

    figures: Mapping[str, float]  # of the last evaluation, by metric name
    step: int | None  # after how many updates; None where that is not recorded
    text: str  # the held-out text, as the end of "on ..."


class Card(NamedTuple):
    """The facts that a model card states."""

    name: str
    origin: Origin
    recipe: Mapping[str, Any]  # the settings of the run, as JSON
    license: str = ""  # a hub id such as apache-2.0; "" = that of the models it was made from
    results: Results | None = None
    step: int = 0  # updates that the model was trained for
    causal: bool = False  # a causal language model; otherwise a masked one


def model_card(card: Card) -> str:
    """The text of the card; absolute paths in it are cut to their last part, as a card is public."""
    return "\n".join(
        [
            *_front_matter(card),
            "",
            f"# {card.name}",
            "",
            f"{_statement(card)}",
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
            *_results(card.results),
            "",
            "## Recipe",
            "",
            "```json",
            json.dumps(without_folders(card.recipe), indent=2, default=str),
            "```",
            "",
            "## Licence",
            "",
            *_licence(card),
            "The terms of the training text apply.",
            "",
        ]
    )


def _statement(card: Card) -> str:
    kind = "causal" if card.causal else "masked"
    updates = f", in {card.step:,} updates" if card.step else ""
    return f"A {kind} language model {_public(card.origin).sentence()}{updates}. It was made with jaxdistill."


def _front_matter(card: Card) -> list[str]:
    bases = card.origin.base_models
    licence = {"license": card.license} if card.license else card.origin.licence
    return [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if card.causal else 'fill-mask'}",
        "tags:",
        "- jaxdistill",
        *(["- distillation", "- knowledge-distillation"] if card.origin.how == "distilled" else []),
        *_data_set(card.recipe),
        *([f"base_model: {bases[0]}"] if len(bases) == 1 else []),
        *(["base_model:", *(f"- {name}" for name in bases)] if len(bases) > 1 else []),
        *(f"{field}: {json.dumps(value)}" for field, value in licence.items()),
        *_model_index(card),
        "---",
    ]


def _data_set(recipe: Mapping[str, Any]) -> list[str]:
    """The data set of the hub that the model learnt from, by which the hub filters."""
    data = recipe.get("data", {})
    if data.get("source") != "hf" or data.get("prepared") or not is_hub_name(data.get("path", "")):
        return []
    return ["datasets:", f"- {data['path']}"]


def _model_index(card: Card) -> Iterator[str]:
    """The model's own figures as the hub reads them: values in YAML that are JSON."""
    own = {name: value for name, value in (card.results.figures if card.results else {}).items() if _is_own(name)}
    if card.results is None or not own:
        return
    task = "text-generation" if card.causal else "fill-mask"
    yield from ["model-index:", f"- name: {json.dumps(card.name)}", "  results:"]
    yield from ["  - task:", f"      type: {task}"]
    yield from ["    dataset:", "      type: text", f"      name: {json.dumps(card.results.text.replace('`', ''))}"]
    yield "    metrics:"
    for name, value in own.items():
        kind = "accuracy" if name.endswith("_accuracy") else name
        yield from [
            f"    - type: {json.dumps(kind)}",
            f"      name: {json.dumps(name)}",
            f"      value: {_in_yaml(value)}",
        ]


def _in_yaml(value: float) -> str:
    """A number that YAML 1.1 reads as one: with a point before an exponent."""
    digits, exponent, power = f"{value:.6g}".partition("e")
    return f"{digits}{'' if '.' in digits or not exponent else '.0'}{exponent}{power}"


def _is_own(name: str) -> bool:
    return not name.startswith(OF_TEACHER)


def _results(results: Results | None) -> Iterator[str]:
    """A row for each figure of the model, with the teacher's own beside it."""
    if results is None or not results.figures:
        yield "The model was not evaluated."
        return
    own = {name: value for name, value in results.figures.items() if _is_own(name)}
    when = "At the last evaluation" if results.step is None else f"After {results.step:,} updates"
    yield f"{when}, on {results.text}:"
    yield ""
    beside = len(own) < len(results.figures)
    yield "| metric | value | teacher |" if beside else "| metric | value |"
    yield "|---|---|---|" if beside else "|---|---|"
    for name, value in own.items():
        teachers = results.figures.get(f"{OF_TEACHER}{name}")
        cells = [name, f"{value:.4g}", *(["" if teachers is None else f"{teachers:.4g}"] if beside else [])]
        yield f"| {' | '.join(cells)} |"


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


def _licence(card: Card) -> Iterator[str]:
    if card.license:
        yield f"This model's licence is {card.license}."
    for source in _public(card.origin).sources:
        licence = source.licence.get("license_name", source.licence.get("license", ""))
        known = f"is {licence}" if licence else "is not recorded here"
        yield f"The licence of `{source.name}` {known}; it applies as far as weights were taken from it."


def _public(origin: Origin) -> Origin:
    return Origin.model_validate(without_folders(origin.model_dump()))


def without_folders(recipe: Any) -> Any:
    """Values with absolute paths cut to their last part: a card is public, a user's folders are not."""
    if isinstance(recipe, Mapping):
        return {key: without_folders(value) for key, value in recipe.items() if key != "cache_dir"}
    if isinstance(recipe, list | tuple):
        return [without_folders(value) for value in recipe]
    if isinstance(recipe, str) and recipe.startswith(("/", "~")):
        return Path(recipe).name
    return recipe
