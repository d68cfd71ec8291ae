"""Text tokenised ahead of time, without loading any weights."""

from collections.abc import Callable
from pathlib import Path

from jaxdistill.config import Config
from jaxdistill.data import text as texts
from jaxdistill.models import hub
from jaxdistill.models.tokenizer import end_texts_alike, load_tokenizer
from jaxdistill.run.models import pair_of_shapes


def prepare(config: Config, *, report: Callable[[str], None]) -> Path:
    """Tokenises a run's text, held-out text too, and returns the folder for `data.prepared`.

    Raises:
      UserError: what does not fit.
    """
    sources = texts.open_text(config.data)
    named = next(side for side in (config.tokenizer, config.teacher, config.student) if side.name)
    tokenizer = load_tokenizer(hub.resolve(named.name, revision=named.revision))
    pair = pair_of_shapes(config)
    causal = pair.student.family.causal
    if causal:
        end_texts_alike(tokenizer, (pair.teacher or pair.student).config)
    return texts.prepare_text(config.data, sources, tokenizer, causal=causal, report=report).path
