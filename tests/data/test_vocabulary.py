import dataclasses

import pytest

from jaxdistill.data.vocabulary import Vocabulary, vocabulary_of
from jaxdistill.errors import UserError
from jaxdistill.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.newest


def test_vocabulary_of_real_tokenizers(shared):
    found = {
        name: vocabulary_of(load_tokenizer(shared / "tokenizers" / name))
        for name in ("bert-base-uncased", "roberta-base", "gpt2")
    }
    assert found["bert-base-uncased"] == Vocabulary(30522, 101, 102, 0, 100, 103, (0, 100, 101, 102, 103))
    assert found["roberta-base"] == Vocabulary(50265, 0, 2, 1, 3, 50264, (0, 1, 2, 3, 50264))
    assert dataclasses.replace(found["gpt2"], mask=None, special=()) == Vocabulary(
        50257, 50256, 50256, 50256, 50256, None, ()
    )


def test_tokenizers_that_do_not_do():
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match="neither cls and sep nor bos and eos"):
        vocabulary_of(bare)
    with pytest.raises(UserError, match="object is not a fast tokenizer"):
        vocabulary_of(object())
