"""The table of model families: what cannot be derived from the Hugging Face Flax classes themselves.

A new family is one row here and one in tests/models/tiny.py. Derived elsewhere, and so not in the
table: the torch class (the Flax class's name without "Flax"), the base prefix (first part of `layers`), the
parameter names (Flax path, with kernel/scale/embedding renamed to weight), and the sizes, which every config class
answers under the names num_hidden_layers, hidden_size, num_attention_heads (transformers' `attribute_map`).

Causal families have one head, `lm_head`, a Dense without bias. Where the embeddings are tied it has no parameter of
its own: `load.with_tied_head` gives it the transposed embedding, for every causal family in the same way (FlaxLlama and
FlaxMistral ignore tie_word_embeddings; the others apply their head outside of the module tree, unseen by its path).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One row. Paths are linen module or parameter paths joined by "/"."""

    layers: str  # module path of layer {}
    head: str  # the first submodule that sees the last hidden states after the last layer
    projection: str  # the vocabulary projection; owns a kernel only when the embeddings are not tied
    projection_bias: str = ""  # the parameter that holds the vocabulary bias, where there is one
    causal: bool = False  # predicts the next token from those before it; the others are masked LMs
    embedding: str = ""  # causal: the parameter of the input embeddings, which a tied head transposes
    deterministic_argument: bool = False  # OPT: the call takes deterministic=, all others take train=
    shared_layers: bool = False  # ALBERT: `layers` names parameter groups, each run several times
    positions_after_pad: bool = False  # RoBERTa: position ids start at pad_token_id + 1
    head_activation: str = ""  # torch's head ignores config.hidden_act and always uses this one
    token_types: bool = True  # the forward takes token_type_ids
    ignored: tuple[str, ...] = (
        "pooler.",
        "position_ids",
        "token_type_ids",
    )  # torch tensors with no place here


_ROBERTA = Family(
    layers="roberta/encoder/layer/{}",
    head="lm_head",
    projection="lm_head/decoder",
    projection_bias="lm_head/bias",
    positions_after_pad=True,
)
_CAUSAL_BUFFERS = (".attn.bias", ".masked_bias", ".attention.bias", "rotary_emb.inv_freq", "decoder.version")


def _causal(*, layers: str, embedding: str, deterministic_argument: bool = False) -> Family:
    return Family(
        layers=layers,
        head="lm_head",
        projection="lm_head",
        causal=True,
        embedding=embedding,
        deterministic_argument=deterministic_argument,
        token_types=False,
        ignored=_CAUSAL_BUFFERS,
    )


FAMILIES: dict[str, Family] = {
    "bert": Family(
        layers="bert/encoder/layer/{}",
        head="cls",
        projection="cls/predictions/decoder",
        projection_bias="cls/predictions/bias",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Family(
        layers="distilbert/transformer/layer/{}",
        head="vocab_transform",
        projection="vocab_projector",
        projection_bias="vocab_projector/bias",
        token_types=False,
    ),
    "electra": Family(
        layers="electra/encoder/layer/{}",
        head="generator_predictions",
        projection="generator_lm_head",
        projection_bias="generator_lm_head/bias",
        head_activation="gelu",
    ),
    "albert": Family(
        layers="albert/encoder/albert_layer_groups/{}",
        head="predictions",
        projection="predictions/decoder",
        projection_bias="predictions/bias",
        shared_layers=True,
    ),
    "gpt2": _causal(layers="transformer/h/{}", embedding="transformer/wte/embedding"),
    "gpt_neo": _causal(layers="transformer/h/{}", embedding="transformer/wte/embedding"),
    "opt": _causal(
        layers="model/decoder/layers/{}",
        embedding="model/decoder/embed_tokens/embedding",
        deterministic_argument=True,
    ),
    "llama": _causal(layers="model/layers/{}", embedding="model/embed_tokens/embedding"),
    "mistral": _causal(layers="model/layers/{}", embedding="model/embed_tokens/embedding"),
    "gemma": _causal(layers="model/layers/{}", embedding="model/embed_tokens/embedding"),
}
