"""What a model computes, read out of a configuration (rows.py); frozen, so that it can be a static argument."""

from dataclasses import dataclass

from jaxdistill.models.core.attention import Reach
from jaxdistill.models.core.rope import Rope


@dataclass(frozen=True)
class LayerKind:
    """What differs between the layers of one model."""

    reach: Reach
    rope: Rope | None = None  # None = the layer knows no positions


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every architecture has."""

    vocab: int
    width: int
    inner: int  # width of the MLPs
    heads: int
    kv_heads: int  # of keys and values, each shared by equally many heads of queries
    head_size: int
    layers: tuple[LayerKind, ...]
    activation: str
    eps: float  # of the norms
    tied: bool  # the head's kernel is the word embedding
    projection_bias: bool = False  # the head adds a bias to its logits
    attention_dropout: float = 0.0
    logit_scale: float = 1.0  # logits are multiplied by it, before the cap
    logit_cap: float = 0.0  # logits become cap * tanh(logits / cap); 0 = no cap
    initializer_range: float = 0.02

    def initial_std(self, *, into_sum: bool) -> float:
        """The standard deviation of initial weights; of a product that is added to the hidden states, smaller by the
        number of layers (Radford et al. 2019, section 2.3)."""
        return self.initializer_range / (2 * len(self.layers)) ** 0.5 if into_sum else self.initializer_range


@dataclass(frozen=True)
class Norms:
    """The names of a layer's norms, by where they stand; "" = there is none."""

    before_attention: str = ""
    after_attention: str = ""
    before_mlp: str = ""
    after_mlp: str = ""


# Torch gives the same name to norms at different places.
NORMS_BEFORE = Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
NORMS_AFTER = Norms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")
NORMS_AROUND = Norms(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(Settings):
    """Llama and its kin: RMS norms, a gated MLP, rotary positions; causal but for EuroBERT, by the layers' reach."""

    norms: Norms = NORMS_BEFORE
    norm_plus_one: bool = False  # gemma: norms multiply by 1 + weight
    head_norm: str = ""  # norms of queries and keys: "each" head by itself, "all" heads as one, "" = none
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False  # phi3: one kernel makes query, key and value, and one makes both parts of the MLP
    score_scale: float
    score_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    residual_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModernBertSettings(Settings):
    """ModernBERT: a masked LM with layer norms before each branch."""

    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    embedding_dropout: float = 0.0
    head_bias: bool = False  # of the dense layer before the vocabulary projection
    head_activation: str
    initializer_cutoff: float = 2.0  # in standard deviations


@dataclass(frozen=True, kw_only=True)
class BertSettings(Settings):
    """BERT and RoBERTa: masked LMs with learned positions and norms after the sums."""

    family: str = ""  # bert or roberta, by which modules are named, and the head is built
    positions: int
    positions_after: int | None = None  # roberta: the id of padding, after which positions begin
    types: int = 0
    dropout: float


@dataclass(frozen=True, kw_only=True)
class DistilBertSettings(BertSettings):
    """DistilBERT: BERT without types of tokens, under other names."""


@dataclass(frozen=True, kw_only=True)
class Gpt2Settings(Settings):
    """GPT-2: a causal LM with learned positions and layer norms before each branch."""

    positions: int
    score_scale: float
    residual_dropout: float
    embedding_dropout: float
