"""From a name to a model: configuration, tokenizer, the Flax module, and its parameters from safetensors.

transformers' own PyTorch-to-Flax loading needs torch, so the tensors are read here, by the name table of
torch_names.py, and checked one by one: a tensor that is missing, misshapen or not finite is named.
"""

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from jaxdistill.errors import UserError
from jaxdistill.models import torch_names
from jaxdistill.models.families import FAMILIES, Family

_SMALL_FILES = ["*.json", "*.txt", "*.model"]  # config, tokenizer, index of shards
# Special tokens of a folder that holds a bare tokenizer.json, recognised by its mask (or end) token.
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


_ROTARY = ("llama", "mistral", "gemma")
_ROPE_THETA = 10_000.0  # written into the Flax classes
# What the causal Flax classes do not look at: in which families, and the one value that is right for them.
_FIXED_FIELDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "scale_attn_weights": (("gpt2",), True),
    "scale_attn_by_inverse_layer_idx": (("gpt2",), False),
    "add_cross_attention": (("gpt2",), False),
    "enable_bias": (("opt",), True),
    "layer_norm_elementwise_affine": (("opt",), True),
    "mlp_bias": (("llama",), False),
    "attention_bias": (("mistral",), False),
    "attention_dropout": (("mistral",), 0.0),  # its class asks for no dropout key
    "partial_rotary_factor": (_ROTARY, 1.0),
}


Kernel = Literal["", "xla", "cudnn"]


@dataclass(frozen=True)
class Model:
    """A Flax class without parameters: those are arguments everywhere."""

    flax: Any  # transformers.FlaxPreTrainedModel, made with _do_init=False
    config: Any  # transformers.PretrainedConfig
    family: Family
    attention: Kernel = ""  # the kernel of its self-attention, see models/attention.py; "" = the class's own

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def tied_head(self) -> bool:
        """Whether the head is a causal one that shares the input embedding, and so is not in the parameters."""
        return self.family.causal and self.config.tie_word_embeddings

    @property
    def max_length(self) -> int:
        """The most tokens a sequence may have, special tokens included."""
        unused = self.config.pad_token_id + 1 if self.family.positions_after_pad else 0
        return self.config.max_position_embeddings - unused


def resolve(name: str, *, revision: str = "", allow_pickle: bool = False) -> Path:
    """The folder of a model or tokenizer: `name` is one already, or a hub name, which is downloaded or found cached."""
    if not name:
        raise UserError("the name of the model or tokenizer is empty: give a folder or a hub name")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file; name the folder it stands in")
    if name[0] in "./~" or name.count("/") > 1:
        raise UserError(f"{name}: there is no such folder, and a hub name reads user/model")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*_SMALL_FILES, "*.safetensors", *(["*.bin"] if allow_pickle else [])],
            ignore_patterns=["*/*"],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        # OSError covers no network: requests' errors and the hub's LocalEntryNotFoundError are both one.
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name}{at} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}): check the name and the network, or give a local folder"
        ) from error
    return Path(folder)


def load_config(folder: Path) -> Any:
    """The folder's configuration, of one of our families; code that stands in the folder is never run."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: it is not a model folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type not in FAMILIES:
        raise UserError(f"{path}: model_type {model_type!r} is none of the families here: {', '.join(FAMILIES)}")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    if model_type == "distilbert":
        # Where the config says sinusoidal, the file's position table still rules: DistilBERT's own training
        # overwrote the sinusoids with BERT's learned positions. As parameters they are read, kept and written.
        config.sinusoidal_pos_embds = False
    return config


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer (transformers.PreTrainedTokenizerFast); a bare tokenizer.json will do."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file() and not settings.is_file():
        raise UserError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer_config.json")
    try:
        if not settings.is_file() and not (folder / "config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(file), **_special_tokens(file))
        named = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        # transformers 5 writes this name for what 4 calls PreTrainedTokenizerFast.
        backend = named.get("tokenizer_class") == "TokenizersBackend"
        reader = PreTrainedTokenizerFast if backend else AutoTokenizer
        with _quiet():
            tokenizer = reader.from_pretrained(folder, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # the Rust parser raises plain Exception
        raise UserError(f"{folder} has no tokenizer that can be read: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder} has no fast tokenizer: a tokenizer.json is needed")
    return tokenizer


def _special_tokens(file: Path) -> dict[str, str]:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(file)).get_vocab()
    for sign, special in _SPECIAL_TOKENS.items():
        if sign in vocabulary:
            return special
    raise UserError(f"{file} has none of the tokens {', '.join(_SPECIAL_TOKENS)}: add a tokenizer_config.json")


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """UserError where the tokenizer can produce an id the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer does not fit the model: its largest id is {largest}, "
            f"the model's vocabulary has {config.vocab_size} entries"
        )


def end_ids(folder: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text: by generation_config.json, else config.json, else the tokenizer; () for none."""
    path = folder / "generation_config.json"
    fields: Any = {}
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error})") from error
    named = fields.get("eos_token_id") if isinstance(fields, dict) else None
    for ids in (named, config.eos_token_id, tokenizer.eos_token_id):
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    return ()


def build(config: Any, *, dtype: Any = jnp.float32, attention: Kernel = "") -> Model:
    """The Flax masked or causal LM class of `config`, without parameters; `dtype` is that of the computation.

    Raises UserError for a configuration that the Flax class cannot follow.
    """
    from transformers import FlaxAutoModelForCausalLM, FlaxAutoModelForMaskedLM

    _check_config(config)
    family = FAMILIES[config.model_type]
    auto = FlaxAutoModelForCausalLM if family.causal else FlaxAutoModelForMaskedLM
    with _quiet(), jax.numpy_rank_promotion("allow"):  # the library's classes broadcast biases implicitly
        flax = auto.from_config(_flax_config(config, family), _do_init=False, dtype=dtype)
    return Model(flax=flax, config=config, family=family, attention=attention)


def without_attention_dropout(model: Model) -> Model:
    """The model with no dropout on attention maps, which the classes return *after* dropout.

    A map with entries set to 0 is not the distribution that attention transfer compares.
    """
    config = copy.deepcopy(model.config)
    setattr(config, _attention_dropout(config), 0.0)
    return build(config, dtype=model.flax.dtype, attention=model.attention)


def attention_dropout(config: Any) -> float:
    """The probability with which a model leaves out attention weights in training."""
    return getattr(config, _attention_dropout(config))


def _attention_dropout(config: Any) -> str:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return next(name for name in names if hasattr(config, name))


def shortened(model: Model, length: int) -> Model:
    """The same computation for sequences of at most `length` tokens, where positions are rotary and have no parameters.

    Those classes make a causal mask of all their positions squared, a layer: 1 GB at 32,768, again for every token
    that is generated.
    """
    config = copy.deepcopy(model.config)
    if config.model_type not in _ROTARY:
        return model
    least = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if max(length, least) >= config.max_position_embeddings:
        return model
    config.max_position_embeddings = max(length, least)
    return build(config, dtype=model.flax.dtype, attention=model.attention)


def init_params(model: Model, key: Key[Array, ""]) -> dict[str, Any]:
    """Random float32 parameters, by the family's own initialisers."""

    def draw(key: Key[Array, ""]) -> dict[str, Any]:
        params = _own_params(model, model.flax.init_weights(key, (1, 8)))
        if model.config.model_type == "gemma":
            # Its norms multiply by 1 + weight, and the Flax class begins with a weight of 1 where torch has 0.
            params = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if "norm" in path[-2].key else x, params)
        return params

    with jax.numpy_rank_promotion("allow"):
        return jax.jit(draw)(key)  # eagerly, a compilation an array


def param_shapes(model: Model) -> dict[str, Any]:
    """The parameter tree as jax.ShapeDtypeStruct, without computing anything."""
    return _own_params(model, model.flax.params_shape_tree)


def embedding_of(model: Model, params: Any) -> Any:
    """A causal model's input embedding, [vocab, width]."""
    return leaf(params, model.family.embedding)


def leaf(params: Any, path: str) -> Any:
    """What stands at a path of a parameter tree, such as transformer/wte/embedding."""
    return functools.reduce(lambda tree, name: tree[name], path.split("/"), params)


def with_tied_head(model: Model, params: Any) -> Any:
    """The tree as the Flax class wants it: a tied causal head, which has no parameter of its own, is filled in.

    Its kernel is the transposed input embedding, so gradients of the head reach the embedding.
    """
    if not model.tied_head:
        return params
    return {**params, model.family.projection: {"kernel": embedding_of(model, params).T}}


def _own_params(model: Model, tree: Any) -> dict[str, Any]:
    """The inverse of `with_tied_head`."""
    return {name: x for name, x in tree.items() if not (model.tied_head and name == model.family.projection)}


def count_params(params: Any) -> int:
    """How many numbers a tree of arrays (or of shapes) has."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def load_params(
    folder: Path,
    model: Model,
    *,
    allow_pickle: bool = False,
    missing: Literal["error", "init"] = "error",
    key: Key[Array, ""] | None = None,
) -> dict[str, Any]:
    """The folder's weights as the model's parameter tree, NumPy float32 whatever they are stored in.

    Read from model.safetensors (or its shards), from flax_model.msgpack, or, only with `allow_pickle`, from
    pytorch_model.bin. `missing="init"` draws what the file does not hold with `key`, and logs which.
    """
    shapes: dict[str, Any] = flatten_dict(param_shapes(model), sep="/")
    names = {path: torch_names.torch_name(path) for path in shapes}
    source, tensors = _read(folder, allow_pickle=allow_pickle)
    tensors = _canonical(tensors, model=model, names=set(names.values()))
    absent = [path for path, name in names.items() if name not in tensors]
    if absent and missing == "error":
        some = ", ".join(names[path] for path in absent[:3])
        raise UserError(
            f"{source} lacks {len(absent)} of the {len(names)} tensors of a "
            f"{'causal' if model.family.causal else 'masked'} {model.config.model_type} "
            f"model: {some}{', ...' if len(absent) > 3 else ''}"
        )
    _check_unexpected(source, tensors, model=model, names=set(names.values()))
    loaded = {path: shape for path, shape in shapes.items() if path not in absent}
    for path, shape in loaded.items():
        _check_tensor(source, names[path], tensors[names[path]], shape.shape, transposed=path.endswith("/kernel"))
    params = flatten_dict(torch_names.from_torch(tensors, unflatten_dict(loaded, sep="/")), sep="/")
    if absent:
        assert key is not None, "missing='init' needs a key"
        logging.warning("%s: drawn at random: %s", source, ", ".join(names[path] for path in absent))
        drawn = flatten_dict(init_params(model, key), sep="/")
        params |= {path: np.asarray(drawn[path], np.float32) for path in absent}
    return unflatten_dict({path: params[path] for path in shapes}, sep="/")


def _check_config(config: Any) -> None:
    """What the Flax class would compute differently from torch, or die on without naming the key."""
    kind = config.model_type
    # Gemma's heads have a size of their own.
    if kind != "gemma" and config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{kind} config: hidden size {config.hidden_size} is not divisible by {config.num_attention_heads} heads"
        )
    if config.num_hidden_layers < 1:
        raise UserError(f"{kind} config: {config.num_hidden_layers} layers; there must be at least 1")
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"{kind} config: position_embedding_type {config.position_embedding_type!r}; only 'absolute' is known here"
        )
    if FAMILIES[kind].causal:
        _check_causal_config(config)
    elif getattr(config, "is_decoder", False):
        raise UserError(f"{kind} config: is_decoder is true; a masked LM must see both sides")
    from transformers.modeling_flax_utils import ACT2FN

    names = ("activation", "hidden_act", "activation_function")
    activation = next((value for name in names if (value := getattr(config, name, None))), None)
    if activation not in ACT2FN:
        raise UserError(f"{kind} config: activation {activation!r} is none of {', '.join(ACT2FN)}")


def _check_causal_config(config: Any) -> None:
    """Fields that a causal Flax class passes over in silence, and computes something else than torch."""
    kind = config.model_type
    for name, (kinds, only) in _FIXED_FIELDS.items():
        value = getattr(config, name, only)
        if kind in kinds and value != only:
            raise UserError(f"{kind} config: {name} is {value!r}, and transformers' Flax class knows only {only!r}")
    if kind == "gpt_neo" and len(config.attention_layers) != config.num_layers:
        raise UserError(
            f"gpt_neo config: attention_types names {len(config.attention_layers)} layers, num_layers is "
            f"{config.num_layers}"
        )
    if kind not in _ROTARY:
        return
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{kind} config: {config.num_attention_heads} heads are not divisible by "
            f"{config.num_key_value_heads} key/value heads"
        )
    head_size = config.hidden_size // config.num_attention_heads
    own_size = getattr(config, "head_dim", None) or head_size
    if kind != "gemma" and own_size != head_size:
        raise UserError(
            f"{kind} config: head_dim is {own_size}, and transformers' Flax class knows only hidden_size / heads, "
            f"{head_size}"
        )
    # transformers 5 writes rope_parameters, which 4.57 passes over.
    rope = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    rope |= getattr(config, "rope_parameters", None) or {}
    name = rope.get("rope_type", rope.get("type", "default"))
    if name != "default" or rope["rope_theta"] != _ROPE_THETA:
        raise UserError(
            f"{kind} config: rotary positions of type {name!r} with theta {rope['rope_theta']:g}; transformers' Flax "
            f"class knows only 'default' with {_ROPE_THETA:g}"
        )
    if config.max_position_embeddings < 2 * own_size:
        raise UserError(
            f"{kind} config: {config.max_position_embeddings} positions; transformers' Flax class needs at least "
            f"twice the head size, {2 * own_size}"
        )


def _flax_config(config: Any, family: Family) -> Any:
    """The configuration with which the Flax class computes what torch computes with `config`."""
    if not family.causal:
        return config
    changed = copy.deepcopy(config)
    changed.tie_word_embeddings = False  # with_tied_head does it
    if config.model_type == "mistral":
        # Torch sees a window of w keys, the query's own included; Flax w + 1, and without a window the query's alone.
        changed.sliding_window = (config.sliding_window or config.max_position_embeddings) - 1
    if config.model_type == "gemma":
        changed.hidden_activation = config.hidden_act  # torch does not look at hidden_activation
    return changed


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's lines on Flax's deprecation and on weights it was told not to make."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def _read(folder: Path, *, allow_pickle: bool) -> tuple[Path, dict[str, np.ndarray]]:
    """(the file it came from, torch names to arrays), floats upcast to float32."""
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_pickle)):
        file, index = folder / name, folder / f"{name}.index.json"
        source = file if file.is_file() else index
        if not source.is_file():
            continue
        if read is _read_pickle and not allow_pickle:
            break
        shards = [file] if source is file else _shards(index)
        return source, {key: value for shard in shards for key, value in read(shard).items()}
    msgpack = folder / "flax_model.msgpack"
    if msgpack.is_file():
        return msgpack, _read_msgpack(msgpack)
    pickles = sorted(folder.glob("*.bin"))
    if pickles and not allow_pickle:
        raise UserError(
            f"{pickles[0]} is a pickle, and loading one can run code: convert it to safetensors, "
            "or pass --allow-pickle if you trust it"
        )
    raise UserError(
        f"{folder} holds no weights: no model.safetensors (or its index), no flax_model.msgpack; "
        "pytorch_model.bin is fetched and read with --allow-pickle only"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is no index of shards: {type(error).__name__}: {error}") from error
    shards = [index.parent / name for name in names]
    for shard in shards:
        if shard.parent != index.parent or not shard.is_file():
            raise UserError(f"{index} names {shard.name}, which is not in the folder")
    return shards


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        # framework="flax" because NumPy's has no bfloat16.
        with (
            safe_open(file, framework="flax") as opened,
            jax.default_device(jax.local_devices(backend="cpu")[0]),
        ):
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensors[name] = _upcast(np.asarray(opened.get_tensor(name)))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or damaged ({_first_line(error)}): fetch it again") from error
    return tensors


def _read_pickle(file: Path) -> dict[str, np.ndarray]:
    import pickle

    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file} is a pickle: reading it needs torch (pip install torch)") from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{file} holds more than tensors, or is damaged ({_first_line(error)})") from error
    # NumPy has no bfloat16, so floats are upcast on torch's side.
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def _read_msgpack(file: Path) -> dict[str, np.ndarray]:
    """A Flax file, brought to torch names so that one set of checks serves both."""
    from flax.serialization import msgpack_restore

    try:
        flat = flatten_dict(msgpack_restore(file.read_bytes()), sep="/")
    except ValueError as error:
        raise UserError(f"{file} is truncated or damaged ({_first_line(error)}): fetch it again") from error
    tensors = {}
    for path, array in flat.items():
        array = _upcast(np.asarray(array))
        tensors[torch_names.torch_name(path)] = array.T if path.endswith("/kernel") else array
    return tensors


def _upcast(array: np.ndarray) -> np.ndarray:
    # jnp's issubdtype knows bfloat16, NumPy's does not.
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _canonical(tensors: Mapping[str, np.ndarray], *, model: Model, names: set[str]) -> dict[str, np.ndarray]:
    """Today's names for older ones: LayerNorm.gamma/beta, no base prefix, the head's bias under the decoder."""
    base = model.family.layers.split("/")[0]
    bias = torch_names.torch_name(model.family.projection_bias)
    decoder_bias = torch_names.torch_name(f"{model.family.projection}/bias")
    result = {}
    for name, array in tensors.items():
        if name.endswith((".gamma", ".beta")):
            name = name.removesuffix(".gamma") + ".weight" if name.endswith(".gamma") else name[: -len("beta")] + "bias"
        if name not in names and f"{base}.{name}" in names:
            name = f"{base}.{name}"
        result[name] = array
    if bias and bias not in result and decoder_bias in result:
        result[bias] = result[decoder_bias]
    return result


def _check_unexpected(source: Path, tensors: Mapping[str, Any], *, model: Model, names: set[str]) -> None:
    """Heads of other tasks are passed over; a tensor of the encoder that has no place means a wrong config.json."""
    base = model.family.layers.split("/")[0] + "."
    layers = model.family.layers.removesuffix("{}").replace("/", ".")
    for name in sorted(set(tensors) - names):
        # A file without the base prefix (GPT-2's on the hub) still holds its layers under their name.
        inside = name.startswith(base) or (base + name).startswith(layers)
        if inside and not any(part in name for part in model.family.ignored):
            raise UserError(
                f"{source} holds {name}, for which the configuration ({model.num_layers} layers) has no place: "
                "config.json and weights do not belong together"
            )


def _check_tensor(source: Path, name: str, array: np.ndarray, shape: tuple[int, ...], *, transposed: bool) -> None:
    wanted = shape[::-1] if transposed else shape
    if array.shape != wanted:
        raise UserError(f"{source}: {name} has shape {array.shape}, by config.json it should be {wanted}")
    if not np.isfinite(array).all():
        raise UserError(f"{source}: {name} holds NaN or infinite values")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
