"""The table of the model types that the core computes: each reads a configuration into settings.

A row reads every field that its torch class computes with. What is left over is refused (reader.py), so that a field of
a later version of a class cannot be passed over in silence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxdistill.errors import UserError
from jaxdistill.models.core.activations import ACTIVATIONS
from jaxdistill.models.core.attention import FAR, Reach
from jaxdistill.models.core.reader import Reader, reader_of
from jaxdistill.models.core.rope import Rope
from jaxdistill.models.core.rope_fields import FULL, SLIDING, Ropes, read_ropes
from jaxdistill.models.core.settings import (
    NORMS_AFTER,
    NORMS_AROUND,
    BertSettings,
    DecoderSettings,
    DistilBertSettings,
    Gpt2Settings,
    LayerKind,
    ModernBertSettings,
    Settings,
)


def read_settings(config: Any) -> Settings:
    """What a configuration of transformers says that the model computes.

    Raises:
      UserError: the model type has no row, or a field cannot be followed.
    """
    if config.model_type not in ROWS:
        raise UserError(f"model_type {config.model_type!r} is none of {', '.join(ROWS)}")
    read = reader_of(config)
    settings = ROWS[config.model_type](read)
    read.finish()
    return settings


def _common(read: Reader) -> dict[str, Any]:
    """The settings that every architecture has under the same names of fields."""
    width, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    size = read.integer("head_dim", width // heads)
    if size == width // heads and width % heads:
        raise read.refusal(f"hidden size {width} is not divisible by {heads} heads")
    return {
        "vocab": read.integer("vocab_size"),
        "width": width,
        "inner": read.integer("intermediate_size"),
        "heads": heads,
        "head_size": size,
        "tied": read.flag("tie_word_embeddings"),
        "attention_dropout": read.dropout("attention_dropout"),
        "initializer_range": read.number("initializer_range", positive=False),
    }


def _activation(read: Reader, name: str) -> str:
    return read.word(name, tuple(ACTIVATIONS))


# Decoders


def _decoder(read: Reader) -> dict[str, Any]:
    common = _common(read)
    kv_heads = read.integer("num_key_value_heads", common["heads"])
    if common["heads"] % kv_heads:
        raise read.refusal(f"{common['heads']} heads are not divisible by {kv_heads} key/value heads")
    common |= {"kv_heads": kv_heads, "score_scale": common["head_size"] ** -0.5, "eps": read.number("rms_norm_eps")}
    return common


def _biases(read: Reader) -> dict[str, Any]:
    bias = read.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


def _alike(read: Reader, rope: Rope, window: int | None = None) -> tuple[LayerKind, ...]:
    """Layers of one kind; a window counts the query's own place."""
    reach = Reach() if window is None else Reach(before=window - 1)
    return (LayerKind(reach, rope),) * read.integer("num_hidden_layers")


def _by_types(read: Reader, ropes: Ropes) -> tuple[LayerKind, ...]:
    """Layers by the list `layer_types`, which the configuration classes fill in where it is not given."""
    sliding = layer_types(read)
    window = read.integer("sliding_window") if any(sliding) else read.value("sliding_window")
    kinds = {True: LayerKind(Reach(before=(window or 1) - 1), ropes.sliding), False: LayerKind(Reach(), ropes.full)}
    return tuple(kinds[one] for one in sliding)


def layer_types(read: Reader) -> list[bool]:
    """Which layers have a window.

    Raises:
      UserError: `layer_types` has another length than there are layers, or names another kind of layer.
    """
    layers, kinds = read.integer("num_hidden_layers"), read.value("layer_types")
    if not isinstance(kinds, Sequence) or len(kinds) != layers:
        raise read.refusal(f"layer_types is {kinds!r}; it must name the kind of each of the {layers} layers")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise read.refusal(f"layer_types names {kind!r}; known here are {FULL} and {SLIDING}")
    return [kind == SLIDING for kind in kinds]


def _full_rope(read: Reader, size: int) -> Rope:
    return read_ropes(read, size).full


def _llama(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    return DecoderSettings(
        **common,
        **_biases(read),
        mlp_bias=read.flag("mlp_bias"),
        layers=_alike(read, _full_rope(read, common["head_size"])),
        activation=_activation(read, "hidden_act"),
    )


def _eurobert(read: Reader) -> DecoderSettings:
    """A Llama that sees both sides (Boizard et al. 2025, arXiv:2503.05500)."""
    # Of classifiers, and what files of the hub hold besides the fields of the class.
    read.pass_over("classifier_pooling", "clf_pooling", "hidden_dropout")
    read.pass_over("bos_token", "eos_token", "pad_token", "mask_token")
    settings = _llama(read)
    everything = tuple(replace(layer, reach=Reach(after=FAR)) for layer in settings.layers)
    # The torch class gives its head the bias of the MLPs.
    return replace(settings, layers=everything, projection_bias=settings.mlp_bias)


def _mistral(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    window = read.integer("sliding_window") if read.value("sliding_window") is not None else None
    return DecoderSettings(
        **common,
        layers=_alike(read, _full_rope(read, common["head_size"]), window),
        activation=_activation(read, "hidden_act"),
    )


def _ministral(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    return DecoderSettings(
        **common,
        layers=_by_types(read, read_ropes(read, common["head_size"])),
        activation=_activation(read, "hidden_act"),
    )


def _qwen2(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    read.pass_over("use_sliding_window", "max_window_layers")  # the class made layer_types and sliding_window of them
    return DecoderSettings(
        **common,
        qkv_bias=True,
        layers=_by_types(read, read_ropes(read, common["head_size"])),
        activation=_activation(read, "hidden_act"),
    )


def _qwen3(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    read.pass_over("use_sliding_window", "max_window_layers")  # as in qwen2
    return DecoderSettings(
        **common,
        **_biases(read),
        head_norm="each",
        layers=_by_types(read, read_ropes(read, common["head_size"])),
        activation=_activation(read, "hidden_act"),
    )


def _smollm3(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    # The class made no_rope_layers of the interval, and layer_types of use_sliding_window.
    read.pass_over("no_rope_layer_interval", "use_sliding_window", "max_window_layers")
    layers = _by_types(read, read_ropes(read, common["head_size"]))
    rotary = read.value("no_rope_layers")  # 1 where a layer has rotary positions, whatever the name says
    if not isinstance(rotary, Sequence) or len(rotary) != len(layers) or not set(rotary) <= {0, 1}:
        raise read.refusal(f"no_rope_layers is {rotary!r}; it must hold 0 or 1 for each of the {len(layers)} layers")
    return DecoderSettings(
        **common,
        **_biases(read),
        mlp_bias=read.flag("mlp_bias"),
        layers=tuple(layer if has else replace(layer, rope=None) for layer, has in zip(layers, rotary, strict=True)),
        activation=_activation(read, "hidden_act"),
    )


def _olmo2(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    return DecoderSettings(
        **common,
        **_biases(read),
        norms=NORMS_AFTER,
        head_norm="all",
        layers=_alike(read, _full_rope(read, common["head_size"])),
        activation=_activation(read, "hidden_act"),
    )


def _olmo3(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    return DecoderSettings(
        **common,
        **_biases(read),
        norms=NORMS_AFTER,
        head_norm="all",
        layers=_by_types(read, read_ropes(read, common["head_size"], scaled=(FULL,))),
        activation=_activation(read, "hidden_act"),
    )


def _gemma(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    read.pass_over("hidden_activation")  # the torch class uses hidden_act
    return DecoderSettings(
        **common,
        **_biases(read),
        norm_plus_one=True,
        embedding_scale=math.sqrt(common["width"]),
        layers=_alike(read, _full_rope(read, common["head_size"])),
        activation=_activation(read, "hidden_act"),
    )


def _gemma2(read: Reader) -> DecoderSettings:
    common = _scaled_by_scalar(read)
    return DecoderSettings(
        **common,
        **_biases(read),
        norms=NORMS_AROUND,
        norm_plus_one=True,
        score_cap=read.number("attn_logit_softcapping", 0.0, positive=False),
        logit_cap=read.number("final_logit_softcapping", 0.0, positive=False),
        embedding_scale=math.sqrt(common["width"]),
        layers=_by_types(read, read_ropes(read, common["head_size"])),
        activation=_activation(read, "hidden_activation"),
    )


def _gemma3(read: Reader) -> DecoderSettings:
    common = _scaled_by_scalar(read)
    # The torch class holds a cap of scores and does not use it; the class of the configuration made layer_types.
    read.pass_over("attn_logit_softcapping", "sliding_window_pattern", "_sliding_window_pattern")
    return DecoderSettings(
        **common,
        **_biases(read),
        norms=NORMS_AROUND,
        norm_plus_one=True,
        head_norm="each",
        logit_cap=read.number("final_logit_softcapping", 0.0, positive=False),
        embedding_scale=math.sqrt(common["width"]),
        layers=_by_types(
            read, read_ropes(read, common["head_size"], local_theta="rope_local_base_freq", scaled=(FULL,))
        ),
        activation=_activation(read, "hidden_activation"),
    )


def _scaled_by_scalar(read: Reader) -> dict[str, Any]:
    """As `_decoder`, with scores scaled by a field of the configuration."""
    read.pass_over("hidden_act")  # stands beside hidden_activation in files of the hub
    return {**_decoder(read), "score_scale": read.number("query_pre_attn_scalar") ** -0.5}


def _gpt2(read: Reader) -> Gpt2Settings:
    width, heads = read.integer("n_embd"), read.integer("n_head")
    if width % heads:
        raise read.refusal(f"hidden size {width} is not divisible by {heads} heads")
    # Of classifiers, of how torch's own code rounds, and an old name of n_positions.
    read.pass_over("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
    read.pass_over("summary_first_dropout", "reorder_and_upcast_attn", "n_ctx")
    return Gpt2Settings(
        vocab=read.integer("vocab_size"),
        width=width,
        inner=read.integer("n_inner", 4 * width),
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        layers=(LayerKind(Reach()),) * read.integer("n_layer"),
        activation=_activation(read, "activation_function"),
        eps=read.number("layer_norm_epsilon"),
        tied=read.flag("tie_word_embeddings"),
        attention_dropout=read.dropout("attn_pdrop"),
        residual_dropout=read.dropout("resid_pdrop"),
        embedding_dropout=read.dropout("embd_pdrop"),
        initializer_range=read.number("initializer_range", positive=False),
        positions=read.integer("n_positions"),
        score_scale=(width // heads) ** -0.5 if read.flag("scale_attn_weights", True) else 1.0,
    )


def _granite(read: Reader) -> DecoderSettings:
    common = {**_decoder(read), "score_scale": read.number("attention_multiplier")}
    return DecoderSettings(
        **common,
        **_biases(read),
        mlp_bias=read.flag("mlp_bias"),
        embedding_scale=read.number("embedding_multiplier"),
        residual_scale=read.number("residual_multiplier"),
        logit_scale=1 / read.number("logits_scaling"),
        layers=_alike(read, _full_rope(read, common["head_size"])),
        activation=_activation(read, "hidden_act"),
    )


def _phi3(read: Reader) -> DecoderSettings:
    common = _decoder(read)
    # The first is not used by the torch class, and the second goes with longrope alone.
    read.pass_over("embd_pdrop", "original_max_position_embeddings")
    window = read.integer("sliding_window") if read.value("sliding_window") is not None else None
    return DecoderSettings(
        **common,
        fused=True,
        residual_dropout=read.dropout("resid_pdrop"),
        layers=_alike(read, _full_rope(read, common["head_size"]), window),
        activation=_activation(read, "hidden_act"),
    )


# Encoders


def _bert(read: Reader, family: str = "bert") -> BertSettings:
    common = {**_common(read), "attention_dropout": read.dropout("attention_probs_dropout_prob")}
    read.pass_over("classifier_dropout")
    read.word("position_embedding_type", ("absolute",), "absolute")
    if read.flag("is_decoder"):
        raise read.refusal("is_decoder is true; a masked LM must see both sides")
    return BertSettings(
        **common,
        family=family,
        kv_heads=common["heads"],
        eps=read.number("layer_norm_eps"),
        positions=read.integer("max_position_embeddings"),
        positions_after=read.integer("pad_token_id", least=0) if family == "roberta" else None,
        types=read.integer("type_vocab_size"),
        dropout=read.dropout("hidden_dropout_prob"),
        projection_bias=True,
        layers=(LayerKind(Reach(after=FAR)),) * read.integer("num_hidden_layers"),
        activation=_activation(read, "hidden_act"),
    )


def _roberta(read: Reader) -> BertSettings:
    return _bert(read, "roberta")


def _distilbert(read: Reader) -> DistilBertSettings:
    width, heads = read.integer("dim"), read.integer("n_heads")
    if width % heads:
        raise read.refusal(f"hidden size {width} is not divisible by {heads} heads")
    # Of other tasks, and how positions began, which are parameters in any case.
    read.pass_over("qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds")
    if read.flag("is_decoder"):
        raise read.refusal("is_decoder is true; a masked LM must see both sides")
    return DistilBertSettings(
        vocab=read.integer("vocab_size"),
        width=width,
        inner=read.integer("hidden_dim"),
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        layers=(LayerKind(Reach(after=FAR)),) * read.integer("n_layers"),
        activation=_activation(read, "activation"),
        eps=1e-12,
        tied=read.flag("tie_word_embeddings"),
        projection_bias=True,
        attention_dropout=read.dropout("attention_dropout"),
        dropout=read.dropout("dropout"),
        initializer_range=read.number("initializer_range", positive=False),
        positions=read.integer("max_position_embeddings"),
    )


def _modernbert(read: Reader) -> ModernBertSettings:
    common = _common(read)
    # Of classifiers, of how torch's own code runs, and two left from BERT in files of the hub.
    read.pass_over("classifier_pooling", "classifier_dropout", "deterministic_flash_attn", "reference_compile")
    read.pass_over("sparse_prediction", "sparse_pred_ignore_index", "repad_logits_with_grad")
    read.pass_over("layer_norm_eps", "position_embedding_type")
    # A window is to both sides of the query, half of it to each.
    reach = read.integer("local_attention") // 2
    ropes = read_ropes(read, common["head_size"], theta="global_rope_theta", local_theta="local_rope_theta")
    kinds = {True: LayerKind(Reach(reach, reach), ropes.sliding), False: LayerKind(Reach(after=FAR), ropes.full)}
    return ModernBertSettings(
        **common,
        kv_heads=common["heads"],
        eps=read.number("norm_eps"),
        norm_bias=read.flag("norm_bias"),
        attention_bias=read.flag("attention_bias"),
        mlp_bias=read.flag("mlp_bias"),
        mlp_dropout=read.dropout("mlp_dropout"),
        embedding_dropout=read.dropout("embedding_dropout"),
        head_bias=read.flag("classifier_bias"),
        head_activation=_activation(read, "classifier_activation"),
        projection_bias=read.flag("decoder_bias"),
        initializer_cutoff=read.number("initializer_cutoff_factor"),
        layers=tuple(kinds[one] for one in _local_layers(read)),
        activation=_activation(read, "hidden_activation"),
    )


def _local_layers(read: Reader) -> list[bool]:
    """Which layers of a ModernBERT have a window: those that `layer_types` names, which transformers 5 writes.

    Without, and always in transformers 4, the kind of a layer goes by its number.
    """
    every = read.integer("global_attn_every_n_layers", 3)
    if read.value("layer_types") is not None:
        return layer_types(read)
    return [i % every != 0 for i in range(read.integer("num_hidden_layers"))]


# model_type of a configuration -> reads it.
ROWS: dict[str, Callable[[Reader], Settings]] = {
    "llama": _llama,
    "mistral": _mistral,
    "ministral": _ministral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "granite": _granite,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "modernbert": _modernbert,
    "eurobert": _eurobert,
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "distilbert": _distilbert,
}
