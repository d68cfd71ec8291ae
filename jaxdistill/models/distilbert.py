"""DistilBERT from BERT (Sanh et al. 2019, arXiv:1910.01108): the configuration, and each parameter's new path."""

from typing import Any

import numpy as np

from jaxdistill.errors import UserError

_TOKEN_TYPES = "bert/embeddings/token_type_embeddings/embedding"
_POSITIONS = "bert/embeddings/position_embeddings/embedding"

# BERT's modules, and the one bias without a module, by their paths in DistilBERT.
_MODULES = {
    "attention/self/query": "attention/q_lin",
    "attention/self/key": "attention/k_lin",
    "attention/self/value": "attention/v_lin",
    "attention/output/dense": "attention/out_lin",
    "attention/output/LayerNorm": "sa_layer_norm",
    "intermediate/dense": "ffn/lin1",
    "output/dense": "ffn/lin2",
    "output/LayerNorm": "output_layer_norm",
    "cls/predictions/transform/dense": "vocab_transform",
    "cls/predictions/transform/LayerNorm": "vocab_layer_norm",
    "cls/predictions/decoder": "vocab_projector",
    "cls/predictions/bias": "vocab_projector/bias",
}


def distilbert_config(bert: Any, *, cut: bool) -> Any:
    """The transformers.DistilBertConfig with BERT's sizes.

    Args:
      cut: whether parameters of BERT are copied, and so must mean the same in DistilBERT.

    Raises:
      UserError: BERT's layer norms have an eps that DistilBERT does not have.
    """
    from transformers import DistilBertConfig

    if cut and bert.layer_norm_eps != 1e-12:
        raise UserError(
            f"DistilBERT's layer norms have eps 1e-12, the teacher's {bert.layer_norm_eps}: cut a bert student instead"
        )
    return DistilBertConfig(
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        sinusoidal_pos_embds=False,
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        dropout=bert.hidden_dropout_prob,
        attention_dropout=bert.attention_probs_dropout_prob,
        activation=bert.hidden_act,
        initializer_range=bert.initializer_range,
        pad_token_id=bert.pad_token_id,
        tie_word_embeddings=bert.tie_word_embeddings,
    )


def distilbert_params(bert: dict[str, Any], *, drop_token_types: bool) -> dict[str, Any]:
    """BERT's parameters, by path, under DistilBERT's paths.

    DistilBERT has no token types. BERT adds those of type 0 at every position of a single text, so that row is added
    to the position embeddings, unless `drop_token_types`.
    """
    params = {path: array for path, array in bert.items() if path != _TOKEN_TYPES}
    if not drop_token_types:
        params[_POSITIONS] = np.asarray(params[_POSITIONS]) + np.asarray(bert[_TOKEN_TYPES])[:1]
    return {_distilbert_path(path): array for path, array in params.items()}


def _distilbert_path(path: str) -> str:
    layers = "bert/encoder/layer/"
    if path.startswith(layers):
        index, _, inner = path.removeprefix(layers).partition("/")
        module, leaf = inner.rsplit("/", 1)
        return f"distilbert/transformer/layer/{index}/{_MODULES[module]}/{leaf}"
    if path in _MODULES:
        return _MODULES[path]
    module, leaf = path.rsplit("/", 1)
    if module.startswith("bert/embeddings/"):
        return f"distilbert/embeddings/{module.removeprefix('bert/embeddings/')}/{leaf}"
    return f"{_MODULES[module]}/{leaf}"
