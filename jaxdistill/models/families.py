"""The table of model families: where the parts of a model are, which is the same for Flax classes and for the core.

A new family is one row here and one in tests/models/tiny.py, and one in models/core/rows.py where the core computes it.
Derived elsewhere, and so not in the table: the torch class, the parameter names (Flax
path, with kernel/scale/embedding renamed to weight), and the sizes, which every configuration class answers under the
names num_hidden_layers, hidden_size and num_attention_heads (transformers' `attribute_map`).

Causal families have one head, `lm_head`, a Dense without bias. Where the embeddings are tied the head has no parameter
of its own: `model.with_tied_head` fills in the transposed embedding, for every causal family in the same way
(FlaxLlama and FlaxMistral ignore tie_word_embeddings; the others apply their head outside of the module tree, where an
interceptor does not see the head's path).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row. Paths are paths of linen modules or of parameters, joined by "/"."""

    layers: str  # module path of layer {}
    head: str  # the first submodule that receives the hidden states of the last layer
    projection: str  # the vocabulary projection; owns a kernel only when the embeddings are not tied
    embedding: str  # the parameter of the input word embeddings, whose transpose is the kernel of a tied head
    projection_bias: str = ""  # the parameter that holds the vocabulary bias, where there is one
    causal: bool = False  # predicts the next token from those before it; the others are masked language models
    rotary: bool = False  # positions are rotary embeddings, which have no parameters
    deterministic_argument: bool = False  # OPT: the call takes deterministic=, all others take train=
    shared_layers: bool = False  # ALBERT: `layers` names parameter groups, each run several times
    positions_after_pad: bool = False  # RoBERTa: position ids start at pad_token_id + 1
    head_activation: str = ""  # ELECTRA: torch's head ignores config.hidden_act and always uses this activation
    torch_class: str = ""  # "" = named as the configuration class, with ForCausalLM or ForMaskedLM
    token_types: bool = True  # the forward pass takes token_type_ids
    transposed_kernels: bool = False  # GPT-2: kernels of its layers are [out, in], as torch's Conv1D keeps [in, out]
    # Parts of the names of torch tensors that the Flax class has no parameter for.
    ignored: tuple[str, ...] = ("pooler.", "position_ids", "token_type_ids")

    @property
    def base(self) -> str:
        """The module that holds everything but the head, such as "bert"; torch's `base_model_prefix`."""
        return self.layers.split("/")[0]


_ROBERTA = Family(
    layers="roberta/encoder/layer/{}",
    head="lm_head",
    projection="lm_head/decoder",
    embedding="roberta/embeddings/word_embeddings/embedding",
    projection_bias="lm_head/bias",
    positions_after_pad=True,
)
_CAUSAL_BUFFERS = (".attn.bias", ".masked_bias", ".attention.bias", "rotary_emb.inv_freq", "decoder.version")


def _causal(*, layers: str, embedding: str, rotary: bool = False, deterministic_argument: bool = False) -> Family:
    return Family(
        layers=layers,
        head="lm_head",
        projection="lm_head",
        embedding=embedding,
        causal=True,
        rotary=rotary,
        deterministic_argument=deterministic_argument,
        token_types=False,
        ignored=_CAUSAL_BUFFERS,
    )


_GPT = _causal(layers="transformer/h/{}", embedding="transformer/wte/embedding")
_ROTARY = _causal(layers="model/layers/{}", embedding="model/embed_tokens/embedding", rotary=True)

FAMILIES: dict[str, Family] = {
    "bert": Family(
        layers="bert/encoder/layer/{}",
        head="cls",
        projection="cls/predictions/decoder",
        embedding="bert/embeddings/word_embeddings/embedding",
        projection_bias="cls/predictions/bias",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Family(
        layers="distilbert/transformer/layer/{}",
        head="vocab_transform",
        projection="vocab_projector",
        embedding="distilbert/embeddings/word_embeddings/embedding",
        projection_bias="vocab_projector/bias",
        token_types=False,
    ),
    "electra": Family(
        layers="electra/encoder/layer/{}",
        head="generator_predictions",
        projection="generator_lm_head",
        embedding="electra/embeddings/word_embeddings/embedding",
        projection_bias="generator_lm_head/bias",
        head_activation="gelu",
    ),
    "albert": Family(
        layers="albert/encoder/albert_layer_groups/{}",
        head="predictions",
        projection="predictions/decoder",
        embedding="albert/embeddings/word_embeddings/embedding",
        projection_bias="predictions/bias",
        shared_layers=True,
    ),
    "modernbert": Family(
        layers="model/layers/{}",
        head="head",
        projection="decoder",
        embedding="model/embeddings/tok_embeddings/embedding",
        projection_bias="decoder/bias",
        token_types=False,
    ),
    "gpt2": replace(_GPT, torch_class="GPT2LMHeadModel", transposed_kernels=True),
    "gpt_neo": _GPT,
    "opt": _causal(
        layers="model/decoder/layers/{}",
        embedding="model/decoder/embed_tokens/embedding",
        deterministic_argument=True,
    ),
    **dict.fromkeys(("llama", "mistral", "gemma"), _ROTARY),
    # Computed by the core alone, as transformers has no Flax classes for them.
    **dict.fromkeys(("ministral", "qwen2", "qwen3", "smollm3", "olmo2", "olmo3"), _ROTARY),
    **dict.fromkeys(("gemma2", "granite", "phi3"), _ROTARY),
    "eurobert": replace(_ROTARY, causal=False, projection_bias="lm_head/bias"),  # needs transformers 5
    "gemma3_text": replace(_ROTARY, torch_class="Gemma3ForCausalLM"),
}


# Fields that mark models of a kind that no family here is, and what such a model is.
_OTHER_KINDS = {
    "a mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "a model of more than text": ("vision_config", "audio_config", "image_token_id", "image_token_index"),
    "a hybrid of attention and recurrent layers": ("linear_num_key_heads", "mamba_d_state", "conv_L_cache", "ssm_cfg"),
    "an encoder with a decoder": ("decoder_layers", "num_decoder_layers", "is_encoder_decoder"),
}


def other_kind(fields: Mapping[str, Any]) -> str:
    """What a configuration of no family here describes, as far as its fields tell; "" where they do not."""
    return next((kind for kind, names in _OTHER_KINDS.items() if any(fields.get(name) for name in names)), "")
