"""From a config to the things of a run: models, text, objective. Every check that needs them is made here."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill import config as configs
from jaxdistill import policy
from jaxdistill import workdir as folders
from jaxdistill.config import Config
from jaxdistill.data import batching, masking, pipeline, sources, tokenize
from jaxdistill.data import causal as causal_data
from jaxdistill.errors import UserError
from jaxdistill.evaluate import EVALUATORS, rouge
from jaxdistill.evaluate.context import Completions
from jaxdistill.generate import Decoding
from jaxdistill.models import layer_drop, load, student
from jaxdistill.models.load import Model
from jaxdistill.objective import BY_LAYER, ON_HIDDEN, Objective, Ramp
from jaxdistill.on_policy import Rollouts, Sampling, make_rollouts

Tell = Callable[[str], None]


class Models(NamedTuple):
    student: Model
    student_params: PyTree
    teacher: Model | None
    teacher_params: PyTree  # {} without a teacher
    tokenizer: Any
    layers: tuple[int, ...] | None  # of the teacher, that the student was cut from


class Made(NamedTuple):
    """A student before its parameters."""

    model: Model
    layers: tuple[int, ...] | None  # of the teacher, that it is cut from
    folder: Path | None  # that it is read from


class Text(NamedTuple):
    train: tokenize.TokenStore
    held_out: tokenize.TokenStore
    token_counts: np.ndarray
    vocabulary: tokenize.Vocabulary
    path: Path
    causal: bool


def build_models(config: Config, *, allow_pickle: bool, tell: Tell) -> Models:
    """Loads the teacher, makes the student, and checks that they, and the tokenizer, go together.

    Raises:
      UserError: whatever does not fit; before any text is read and anything compiled.
    """
    teacher, teacher_params = build_teacher(config, allow_pickle=allow_pickle)
    made = _student_model(config, teacher, allow_pickle=allow_pickle)
    check_model(config, made.model, "student")
    _check_same_kind(teacher, made.model)
    params = _student_params(config, made, teacher, teacher_params, allow_pickle=allow_pickle, tell=tell)
    if config.tokenizer.name:
        folder = load.resolve(config.tokenizer.name, revision=config.tokenizer.revision)
    elif config.teacher.name:
        folder = load.resolve(config.teacher.name, revision=config.teacher.revision)
    else:
        assert made.folder is not None  # validate() saw to it
        folder = made.folder
    tokenizer = load.load_tokenizer(folder)
    load.check_tokenizer(tokenizer, made.model.config)
    if tokenizer.mask_token_id is None and not made.model.family.causal:
        raise UserError("the tokenizer has no mask token; masked-LM training needs one")
    if teacher is not None:
        own = [load.load_tokenizer(made.folder)] if made.folder and _has_tokenizer(made.folder) else []
        student.check_same_vocabulary(teacher.config, made.model.config, [tokenizer, *own])
    teacher_params = stored(teacher_params, config.teacher.dtype)
    return Models(made.model, params, teacher, teacher_params, tokenizer, made.layers)


def build_shapes(config: Config) -> Models:
    """As `build_models`, with shapes for parameters and no tokenizer: for `plan`, which reads no weights.

    Raises:
      UserError: as `build_models`.
    """
    teacher = _teacher_model(config, allow_pickle=False)[0]
    made = _student_model(config, teacher, allow_pickle=False)
    check_model(config, made.model, "student")
    if teacher is not None:
        check_model(config, teacher, "teacher")
        _check_same_kind(teacher, made.model)
        student.check_same_vocabulary(teacher.config, made.model.config)
    dtype = jnp.dtype(config.teacher.dtype)
    shapes = {} if teacher is None else load.param_shapes(teacher)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return Models(made.model, load.param_shapes(made.model), teacher, shapes, None, made.layers)


def check_model(config: Config, model: Model, role: str) -> None:
    """What needs no tokenizer and no weights: settings that are for this kind of model, and rows that fit it."""
    c, kind = config, "causal" if model.family.causal else "masked"
    who = f"the {role} is a {model.config.model_type}, a {kind} language model"
    if c.data.max_length > model.max_length:
        raise UserError(
            f"config.data.max_length={c.data.max_length} is longer than the {role}'s {model.max_length} positions; "
            "lower it"
        )
    if not model.family.causal and configs.samples(c):
        raise UserError(f"{who}, which writes no text; set config.sample and config.loss.alpha_policy to 0")
    if model.family.causal and c.loss.tokens == "masked":
        raise UserError(f"{who}, which masks nothing; set config.loss.tokens to all, or to labels")
    if not model.family.causal and c.data.prompt_column:
        raise UserError(f"{who}, and config.data.prompt_column={c.data.prompt_column!r} is for causal ones")
    for name in c.evaluate.metrics:
        if EVALUATORS[name].kind not in ("", kind):
            raise UserError(f"{who}, and {name} in config.evaluate.metrics is for {EVALUATORS[name].kind} ones")
    if "rouge" in c.evaluate.metrics:
        if not (c.data.prompt_column or c.data.prepared):
            raise UserError("rouge in config.evaluate.metrics scores completions; name config.data.prompt_column")
        rouge.check_installed()


def _check_same_kind(teacher: Model | None, model: Model) -> None:
    if teacher is not None and teacher.family.causal != model.family.causal:
        kinds = [f"{one.config.model_type} ({'causal' if one.family.causal else 'masked'})" for one in (teacher, model)]
        raise UserError(f"teacher {kinds[0]} and student {kinds[1]}: both must be masked, or both causal")


def stored(params: PyTree, dtype: str) -> PyTree:
    """Parameters on the host in the dtype they are kept in: a teacher's are not trained, so bfloat16 will do."""
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def build_teacher(config: Config, *, allow_pickle: bool) -> tuple[Model | None, PyTree]:
    """The teacher and its float32 parameters; (None, {}) where the config names none."""
    teacher, folder = _teacher_model(config, allow_pickle=allow_pickle)
    if teacher is None or folder is None:
        return None, {}
    check_model(config, teacher, "teacher")  # before its weights are read
    return teacher, load.load_params(folder, teacher, allow_pickle=allow_pickle)


def _teacher_model(config: Config, *, allow_pickle: bool) -> tuple[Model | None, Path | None]:
    if not config.teacher.name:
        return None, None
    folder = load.resolve(config.teacher.name, revision=config.teacher.revision, allow_pickle=allow_pickle)
    return build_model(load.load_config(folder), config.teacher), folder


def build_model(model_config: Any, side: Config) -> Model:
    """The class of a transformers config; `side` is config.teacher or config.student.

    Raises UserError for a configuration that the Flax class, or the attention that is asked for, cannot follow.
    """
    attention = "" if side.attention == "own" else side.attention
    size = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    if attention == "cudnn" and (size % 8 or size > 256):
        raise UserError(
            "attention=cudnn takes heads of a multiple of 8 up to 256 entries, and those of this "
            f"{model_config.model_type} have {size}; set xla"
        )
    return load.build(model_config, dtype=jnp.dtype(side.dtype), attention=attention)


def _student_model(config: Config, teacher: Model | None, *, allow_pickle: bool) -> Made:
    """Restore order after this run's own checkpoints: another run, a Hugging Face folder, the teacher, scratch."""
    c = config.student
    if c.name:
        own = Path(c.name) / "student"
        folder = own if _is_run(c.name) else load.resolve(c.name, revision=c.revision, allow_pickle=allow_pickle)
        return Made(build_model(load.load_config(folder), c), None, folder)
    overrides = dict(c.overrides or {})
    if c.init == "random":
        base = _scratch_config(overrides) if teacher is None else teacher.config
        family = overrides.pop("model_type", base.model_type)
        made = student.student_config(base, family=family, layers=(), overrides=overrides)
        return Made(build_model(made, c), None, None)
    assert teacher is not None  # validate() saw to it
    spec = c.layers if c.layers is not None else max(teacher.num_layers // 2, 1)
    spec = tuple(spec) if isinstance(spec, list | tuple) else spec
    layers = student.resolve_layers(spec, of=teacher.num_layers)
    cut = student.student_config(
        teacher.config, family=c.family or teacher.config.model_type, layers=layers, overrides=overrides
    )
    return Made(build_model(cut, c), layers, None)


def _student_params(
    config: Config, made: Made, teacher: Model | None, teacher_params: PyTree, *, allow_pickle: bool, tell: Tell
) -> PyTree:
    key = jax.random.key(config.seed)
    if made.layers is not None:
        assert teacher is not None
        return student.cut_student(
            teacher_params,
            teacher=teacher,
            student=made.model,
            layers=made.layers,
            reference_init=config.student.reference_init,
            key=key,
        )
    if made.folder is None:
        return load.init_params(made.model, key)
    if _is_run(config.student.name):
        # To the host, as they lie on one device and the run's state may lie on others.
        return jax.device_get(folders.load_student(Path(config.student.name), tell=tell).params)
    return load.load_params(made.folder, made.model, allow_pickle=allow_pickle, missing="init", key=key)


def _is_run(name: str) -> bool:
    return (Path(name) / "config.json").exists() and (Path(name) / "student").is_dir()


def _scratch_config(overrides: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if overrides.get("model_type") not in load.FAMILIES:
        raise UserError(
            f"config.student.overrides needs a model_type, one of {', '.join(load.FAMILIES)}; "
            f"it has {overrides.get('model_type')!r}"
        )
    return AutoConfig.for_model(overrides["model_type"])


def open_text(config: Config) -> sources.Source | None:
    """The training text, checked to be there; None where a prepared folder stands for it."""
    c = config.data
    if c.prepared:
        return None
    return _source(config, path=c.path, split=c.split)


def _source(config: Config, *, path: str, split: str) -> sources.Source:
    c = config.data
    return sources.open_source(
        source=c.source,
        path=path,
        column=c.column,
        subset=c.subset,
        revision=c.revision,
        split=split,
        streaming=c.streaming,
        limit=c.limit,
        prompt_column=c.prompt_column,
    )


def prepare_text(config: Config, source: sources.Source | None, tokenizer: Any, *, causal: bool, tell: Tell) -> Text:
    """Tokenises what is not yet cached, and opens it.

    Raises:
      UserError: no usable text, or prepared text that does not fit the tokenizer or data.max_length.
    """
    c = config.data
    prepare = partial(
        tokenize.prepare,
        tokenizer=tokenizer,
        cache_dir=Path(c.cache_dir).expanduser(),
        max_length=c.max_length,
        min_tokens=c.min_tokens,
        max_unk_fraction=c.max_unk_fraction,
        pack=c.batching == "packed",
        causal=causal,
        template=c.template if causal and c.prompt_column else "",
        tell=tell,
    )
    path = Path(c.prepared) if source is None else prepare(source)
    store = tokenize.open_store(path)
    vocabulary = tokenize.vocabulary_of(tokenizer, causal=causal)
    if store.meta.get("causal", False) != causal:
        kinds = ("a masked", "a causal")
        raise UserError(f"{path} was prepared for {kinds[not causal]} language model, and this is {kinds[causal]} one")
    if store.meta["max_length"] != c.max_length or store.meta["pack"] != (c.batching == "packed"):
        raise UserError(
            f"{path} was prepared with max_length {store.meta['max_length']} and batching "
            f"{'packed' if store.meta['pack'] else 'length'}; the config says {c.max_length} and {c.batching}"
        )
    if len(store.token_counts) != vocabulary.size:
        raise UserError(
            f"{path} was prepared with a vocabulary of {len(store.token_counts)}; the tokenizer has {vocabulary.size}"
        )
    if c.eval_path or c.eval_split:
        held = tokenize.open_store(prepare(_source(config, path=c.eval_path or c.path, split=c.eval_split or c.split)))
        train = store
    else:
        train, held = tokenize.split_store(store, fraction=c.eval_fraction)
    counts = tokenize.load_token_counts(Path(c.token_counts)) if c.token_counts else store.token_counts
    if len(counts) != vocabulary.size:
        raise UserError(
            f"config.data.token_counts={c.token_counts!r} has {len(counts)} counts, the vocabulary {vocabulary.size}"
        )
    return Text(train, held, counts, vocabulary, path, causal)


def build_objective(config: Config, models: Models) -> Objective:
    """Raises UserError where no loss is left, or the layer map names a layer that is not there."""
    weights = configs.alphas(config)
    causal = models.student.family.causal
    weights.pop("mlm" if causal else "clm", None)
    if not weights:
        raise UserError(f"no loss is enabled: set config.loss.alpha_{'clm' if causal else 'mlm'}, or another")
    for role, model in (("student", models.student), ("teacher", models.teacher)):
        narrow = model and getattr(model.config, "word_embed_proj_dim", model.width) != model.width
        if narrow and any(name in weights for name in ON_HIDDEN):
            raise UserError(f"the {role}'s last hidden states are projected (OPT-350m): set the losses on them to 0")
    layer_map: tuple[tuple[int, int], ...] = ()
    if any(name in weights for name in BY_LAYER):
        layer_map = _layer_map(config.loss.layer_map, models)
        if "attention" in weights and not any(s > 0 and t > 0 for s, t in layer_map):
            raise UserError("config.loss.layer_map holds only embeddings (-1), which have no attention to transfer")
    return Objective(
        weights=weights,
        temperature=config.loss.temperature,
        tokens=config.loss.tokens,
        layer_map=layer_map,
        divergence=config.loss.divergence,
        beta=config.loss.beta,
        head=config.loss.head,
        policy=policy_settings(config),
    )


def policy_settings(config: Config) -> policy.Settings | None:
    """None where nothing is learnt from samples by alpha_policy or a penalty."""
    c = config.policy
    if not configs.on_samples(config):
        return None
    return policy.Settings(
        semantics=c.semantics,
        mixture=c.mixture,
        single_step=c.single_step,
        length_norm=c.length_norm,
        clip=c.clip,
        gamma=c.gamma,
        reward_scale=c.reward_scale,
        reward_clip=c.reward_clip,
        diversity_target=c.diversity_target,
        entropy_target=c.entropy_target,
    )


def build_rollouts(config: Config, models: Models, *, mesh: Any) -> Rollouts | None:
    """None where nothing is sampled.

    Raises:
      UserError: prompt and completion do not fit a model's positions.
    """
    if not configs.samples(config):
        return None
    c, end = config.sample, models.tokenizer.eos_token_id
    decoding = Decoding(c.max_new_tokens, c.temperature, c.top_k, c.top_p, end_ids=(end,), pad_id=end)
    sampling = Sampling(
        student=c.student,
        teacher=c.teacher,
        decoding=decoding,
        prompt_length=config.data.max_length - c.max_new_tokens,
        prompt_tokens=c.prompt_tokens,
        reuse=config.policy.reuse,
        accumulation=config.train.accumulation,
        group=config.mask.group,
    )
    return make_rollouts(
        student=models.student,
        teacher=models.teacher,
        sampling=sampling,
        settings=policy_settings(config),
        mesh=mesh,
        seed=config.seed,
    )


def _layer_map(pairs: Sequence[Sequence[int]] | None, models: Models) -> tuple[tuple[int, int], ...]:
    """((student, teacher), ...) counted from 0, -1 = embeddings, to indexes into hidden_states."""
    assert models.teacher is not None
    sizes = models.student.num_layers, models.teacher.num_layers
    if pairs is None:
        # The layers that were cut out, or evenly spread ones that end with the last (TinyBERT's uniform map).
        taught = models.layers or [(i + 1) * sizes[1] // sizes[0] - 1 for i in range(sizes[0])]
        pairs = list(enumerate(taught))
    result = []
    for pair in pairs:
        fits = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(i, int) for i in pair)
        if not fits or not all(-1 <= i < n for i, n in zip(pair, sizes, strict=True)):
            raise UserError(
                f"config.loss.layer_map holds {pair!r}; it must be (student layer, teacher layer), with layers "
                f"-1 to {sizes[0] - 1} and -1 to {sizes[1] - 1}"
            )
        result.append((pair[0] + 1, pair[1] + 1))
    return tuple(result)


def pruned(config: Config, model: Model) -> dict[str, tuple[int, ...]]:
    """The sub-networks to measure: evaluate.pruned, resolved on a student.

    Raises:
      UserError: one names layers that are not there.
    """
    try:
        return {spec: student.resolve_layers(spec, of=model.num_layers) for spec in config.evaluate.pruned}
    except UserError as e:
        raise UserError(f"config.evaluate.pruned, of the student's {model.num_layers} layers: {e}") from None


def drop_rates(config: Config, model: Model, *, steps: int) -> layer_drop.DropRates | None:
    """LayerDrop's rate of every student layer at every step; None where it is off."""
    c = config.student
    if not c.layer_drop:
        return None
    return layer_drop.make_drop_rates(
        rate=c.layer_drop,
        layers=model.num_layers,
        depth=c.layer_drop_depth,
        schedule=c.layer_drop_schedule,
        steps=steps,
    )


def build_ramp(config: Config, objective: Objective, *, steps: int) -> Ramp | None:
    """Where temperature and weights go; None where they stay. Weights of losses that are off are passed over."""
    ends = {key: x for key, x in configs.ends(config).items() if key == "temperature" or key in objective.weights}
    return Ramp(ends, config.loss.ramp, steps) if ends else None


def make_batches(config: Config, text: Text, *, steps: int) -> Any:
    """The training batches as a grain iterator with checkpointable state."""
    common: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "buckets": buckets(config),
        "seed": config.seed,
        "steps": steps,
        "limit_batches": config.train.limit_batches,
        "host": jax.process_index(),
        "hosts": jax.process_count(),
        "threads": config.data.threads,
        "prefetch": config.data.prefetch,
    }
    if text.causal:
        return causal_data.train_batches(
            text.train, pad=text.vocabulary.pad, prompt_loss=config.data.prompt_loss, **common
        )
    return pipeline.train_batches(
        text.train, vocabulary=text.vocabulary, mask=_masking(config), token_counts=text.token_counts, **common
    )


def batch_shapes(config: Config, *, causal: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """What a training batch of the widest rows looks like."""
    shape = config.train.batch_size, config.data.max_length
    kinds = {"input_ids": jnp.int32, "labels": jnp.int32, "attention_mask": jnp.bool_, "label_mask": jnp.bool_}
    if causal and config.data.batching == "packed":
        kinds["segment_ids"] = jnp.int32
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}


def make_held_out(config: Config, text: Text) -> Sequence[dict[str, np.ndarray]]:
    common: dict[str, Any] = {
        "batch_size": config.evaluate.batch_size,
        "buckets": buckets(config),
        "limit": config.evaluate.batches,
        "host": jax.process_index(),
        "hosts": jax.process_count(),
    }
    if text.causal:
        return causal_data.eval_batches(
            text.held_out, pad=text.vocabulary.pad, prompt_loss=config.data.prompt_loss, **common
        )
    return pipeline.eval_batches(
        text.held_out,
        vocabulary=text.vocabulary,
        mask=_masking(config),
        token_counts=text.token_counts,
        seed=0,  # and not config.seed: runs of different seeds are compared on the same masks
        **common,
    )


def completions(config: Config, models: Models, text: Text) -> Completions | None:
    """What rouge asks the student; None where it is not among the metrics."""
    if "rouge" not in config.evaluate.metrics:
        return None
    if jax.process_count() > 1:
        raise UserError("rouge in config.evaluate.metrics: text is generated by one process; evaluate the run later")
    pairs = causal_data.pairs_of(text.held_out, limit=config.evaluate.rouge_rows)
    if not pairs:
        raise UserError("rouge in config.evaluate.metrics: no held-out row has a prompt")
    longest, new = max(len(prompt) for prompt, _ in pairs), config.evaluate.max_new_tokens
    if longest + new > models.student.max_length:
        raise UserError(
            f"config.evaluate.max_new_tokens={new} and a held-out prompt of {longest} tokens do not fit the student's "
            f"{models.student.max_length} positions; lower it, or config.data.max_length"
        )
    decode = partial(models.tokenizer.batch_decode, skip_special_tokens=True)
    return Completions(
        prompts=decode([prompt for prompt, _ in pairs]),
        prompt_ids=[prompt for prompt, _ in pairs],
        references=[reference.strip() for reference in decode([completion for _, completion in pairs])],
        decoding=greedy(config, models),
        batch_size=config.evaluate.batch_size,
        tokenizer=models.tokenizer,
    )


def greedy(config: Config, models: Models) -> Decoding:
    """How held-out prompts are continued."""
    end = models.tokenizer.eos_token_id
    return Decoding(max_new_tokens=config.evaluate.max_new_tokens, end_ids=(end,), pad_id=end)


def _masking(config: Config) -> pipeline.Masking:
    c = config.mask
    return pipeline.Masking(fraction=c.fraction, replace=tuple(c.replace), smoothing=c.smoothing, group=c.group)


def buckets(config: Config) -> tuple[int, ...]:
    if config.data.batching == "packed":
        return (config.data.max_length,)
    return tuple(config.data.buckets) or batching.default_buckets(config.data.max_length)


def capacity(config: Config, *, group: int) -> Callable[[int], int]:
    """Row length -> the most masked positions a group of rows has."""
    return lambda width: masking.masked_capacity(fraction=config.mask.fraction, group=group, width=width)


def probe_of(batches: Sequence[dict[str, np.ndarray]], rows: int = 4) -> dict[str, np.ndarray]:
    """A few real rows for the comparison at export, masked as in training."""
    batch = batches[0]
    return {name: np.asarray(batch[name][:rows]) for name in ("input_ids", "attention_mask")}


def describe(config: Config, models: Models, text: Text, *, mesh: dict[str, Any], steps: int, per_epoch: int) -> str:
    """The one line at the start that says what was built."""
    million = lambda params: f"{load.count_params(params) / 1e6:.1f}M"  # noqa: E731
    taught = ""
    if models.teacher is not None:
        taught = f"teacher {models.teacher.config.model_type} {million(models.teacher_params)} -> "
    made = f"student {models.student.config.model_type} {million(models.student_params)}"
    layers = f" (layers {','.join(map(str, models.layers))})" if models.layers else ""
    return (
        f"{taught}{made}{layers} | {jax.device_count()} {jax.devices()[0].platform} device(s), mesh {json.dumps(mesh)} "
        f"| {text.train.lengths.sum():,} tokens an epoch in {len(text.train):,} rows "
        f"| {steps} steps of {config.train.batch_size} rows, {per_epoch} an epoch"
    )
