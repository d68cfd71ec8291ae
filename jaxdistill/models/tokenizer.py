"""Tokenizers of model folders, their fit to a model and to each other, and the tokens that end a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from jaxdistill.errors import UserError, first_line
from jaxdistill.files import check_fetched, read_json
from jaxdistill.models import hub, transformers_5
from jaxdistill.models.library_messages import quiet

# Special tokens of a folder that holds a bare tokenizer.json, recognised by its mask token or its end token.
_SPECIAL_TOKENS = {
    "[MASK]": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "<mask>": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    },
    "<|endoftext|>": {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    },
}

# The files from which a tokenizer is made, each set of them by itself.
FILES = (
    ("tokenizer.json",),
    ("tokenizer_config.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tokenizer.model",),
)
_SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in FILES)


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder (transformers.PreTrainedTokenizerFast); a bare tokenizer.json is enough.

    Raises:
      UserError: the folder has no fast tokenizer, or it cannot be read.
    """
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not has_tokenizer(folder):
        files = ", ".join(" with ".join(names) for names in FILES)
        raise UserError(f"{folder} has no tokenizer: none of {files}")
    for pattern in (*hub.SMALL_FILES, f"{hub.TEMPLATES}/*.jinja"):
        for small in folder.glob(pattern):
            check_fetched(small)
    if not any((folder / name).is_file() for name in (file.name, "vocab.txt", "vocab.json")):
        for pieces in (folder / name for name in _SENTENCEPIECE if (folder / name).is_file()):
            _check_pieces(pieces)
    try:
        tokenizer = _read(folder, file, settings)
        if tokenizer.is_fast:  # a vocabulary without its unknown token fails at the first word
            tokenizer.backend_tokenizer.encode("a")
        if not isinstance(tokenizer.model_max_length, int | float):
            raise UserError(f"{settings}: model_max_length is {tokenizer.model_max_length!r}; it must be a number")
    except UserError:
        raise
    except Exception as error:  # the Rust parser raises plain Exception
        raise UserError(f"{folder} has no tokenizer that can be read: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder} has no fast tokenizer: a tokenizer.json is needed")
    vocabulary = type(tokenizer).vocab_files_names.get("vocab_file", file.name)
    if not file.is_file() and not (folder / vocabulary).is_file():  # transformers 5 then makes up a vocabulary
        lacks = " nor ".join(dict.fromkeys([file.name, vocabulary]))
        raise UserError(f"{folder} has no tokenizer that can be read: there is no {lacks}")
    return tokenizer


def _check_pieces(file: Path) -> None:
    """Checks that a SentencePiece model can be converted, as transformers says of no file what is wrong with it.

    Raises:
      UserError: its package is missing, or the file is no such model.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(
            f"{file} is a SentencePiece model, which is read with an extra: pip install 'jaxdistill[sentencepiece]', "
            "or save tokenizer.json beside it"
        ) from error
    try:
        SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is not a SentencePiece model ({first_line(error)}): fetch it again") from error


def _read(folder: Path, file: Path, settings: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    described = (folder / "config.json").is_file()
    if not settings.is_file() and not described and file.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **_special_tokens(file))
    fields = read_json(settings) if settings.is_file() else {}
    if file.is_file() and transformers_5.stands_alone(fields):
        with quiet():
            return transformers_5.read_as_it_stands(folder, fields)
    options = {}
    if fields.get("tokenizer_class") is None and not described:
        options = _by_vocabulary(folder)
    elif fields.get("tokenizer_class") is None and "model_type" not in hub.config_fields(folder):
        options["config"] = hub.load_config(folder)  # AutoTokenizer goes by the folder's name
    with quiet():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)


def _by_vocabulary(folder: Path) -> dict[str, Any]:
    """What AutoTokenizer needs to know of a folder that holds a vocabulary, and nothing that names its family.

    Raises:
      UserError: no kind of vocabulary is there.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = {}
    if (folder / "vocab.txt").is_file():
        kind = "bert"
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split()
        options["do_lower_case"] = not any(word != word.lower() for word in words if not word.startswith("["))
    elif (folder / "vocab.json").is_file():
        kind = "roberta" if "<mask>" in read_json(folder / "vocab.json") else "gpt2"
    elif (folder / "spiece.model").is_file():
        kind = "albert"
    elif (folder / "sentencepiece.bpe.model").is_file():
        kind = "xlm-roberta"
    elif (folder / "tokenizer.model").is_file():
        kind = "llama"
    else:
        raise UserError(f"{folder} has a tokenizer_config.json that names no tokenizer_class, and no vocabulary")
    logging.warning("%s has no config.json; by its vocabulary its tokenizer is read as that of %s", folder, kind)
    return {"config": AutoConfig.for_model(kind), **options}


def _special_tokens(file: Path) -> dict[str, str]:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(file)).get_vocab()
    for sign, special in _SPECIAL_TOKENS.items():
        if sign in vocabulary:
            return special
    raise UserError(f"{file} has none of the tokens {', '.join(_SPECIAL_TOKENS)}: add a tokenizer_config.json")


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Checks that the model has an embedding for every id that the tokenizer can produce.

    Raises:
      UserError: the largest id is outside of the model's vocabulary.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer does not fit the model: its largest id is {largest}, "
            f"the model's vocabulary has {config.vocab_size} entries"
        )


def check_same_vocabulary(
    teacher_config: Any,
    student_config: Any,
    tokenizers: Sequence[Any] = (),
    *,
    of: tuple[str, str] = ("the teacher", "the student"),
) -> None:
    """Checks that both models, and the tokenizers given (teacher's, student's), have the same words.

    With the same tokenizer, the embeddings may be padded to unlike sizes.

    Args:
      of: what the two models are called in messages.

    Raises:
      UserError: the tokenizers differ in a token's id, or the sizes differ and no tokenizer says which words both have.
    """
    sizes, (one, other_one) = (teacher_config.vocab_size, student_config.vocab_size), of
    if sizes[0] != sizes[1] and not tokenizers:
        raise UserError(
            f"vocabularies differ: {one}'s has {sizes[0]} entries, {other_one}'s {sizes[1]}, and no tokenizer "
            f"stands beside {other_one} to say which words they share; save {other_one}'s tokenizer in its folder"
        )
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    for other in vocabularies[1:]:
        first = vocabularies[0]
        if other != first:
            different = len(set(first.items()) ^ set(other.items()))
            raise UserError(
                f"vocabularies differ: {one}'s tokenizer has {len(first)} entries, {other_one}'s {len(other)}, and "
                f"{different} (token, id) pairs stand in one only"
            )


def end_ids(config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text: by the configuration, else the tokenizer's eos, else its sep; () for none.

    `hub.load_config` puts the ids of generation_config.json into the configuration. Ids beyond the vocabulary, such as
    the defaults of a configuration class, do not count.
    """
    for holder, name in ((config, "eos_token_id"), (tokenizer, "eos_token_id"), (tokenizer, "sep_token_id")):
        given = getattr(holder, name)
        listed = given if isinstance(given, list | tuple) else [given]
        if ids := tuple(id for id in listed if id is not None and 0 <= id < config.vocab_size):
            return ids
    return ()


def end_texts_alike(tokenizer: Any, *configs: Any) -> None:
    """Makes training, generation and export end texts alike: changes the tokenizer and the configurations in place.

    A tokenizer without eos gets the first end token. All configurations get the end tokens of the first, and the eos
    with which training texts end.
    """
    ends = end_ids(configs[0], tokenizer)
    if not ends:
        return
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    ends = tuple(dict.fromkeys([*ends, tokenizer.eos_token_id]))
    for config in configs:
        config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
