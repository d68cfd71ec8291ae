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
from jaxdistill import workdir as folders
from jaxdistill.config import Config
from jaxdistill.data import batching, masking, pipeline, sources, tokenize
from jaxdistill.errors import UserError
from jaxdistill.models import load, student
from jaxdistill.models.load import Model
from jaxdistill.objective import BY_LAYER, Objective

Tell = Callable[[str], None]


class Models(NamedTuple):
    student: Model
    student_params: PyTree
    teacher: Model | None
    teacher_params: PyTree  # {} without a teacher
    tokenizer: Any
    layers: tuple[int, ...] | None  # of the teacher, that the student was cut from


class Text(NamedTuple):
    train: tokenize.TokenStore
    held_out: tokenize.TokenStore
    token_counts: np.ndarray
    vocabulary: tokenize.Vocabulary
    path: Path


def build_models(config: Config, *, allow_pickle: bool, tell: Tell) -> Models:
    """Loads the teacher, makes the student, and checks that they, and the tokenizer, go together.

    Raises:
      UserError: whatever does not fit; before any text is read and anything compiled.
    """
    key = jax.random.key(config.seed)
    teacher, teacher_params = build_teacher(config, allow_pickle=allow_pickle)
    made, params, layers, student_folder = _build_student(
        config, teacher, teacher_params, key=key, allow_pickle=allow_pickle, tell=tell
    )
    if config.tokenizer.name:
        folder = load.resolve(config.tokenizer.name, revision=config.tokenizer.revision)
    elif config.teacher.name:
        folder = load.resolve(config.teacher.name, revision=config.teacher.revision)
    else:
        assert student_folder is not None  # validate() saw to it
        folder = student_folder
    tokenizer = load.load_tokenizer(folder)
    load.check_tokenizer(tokenizer, made.config)
    if tokenizer.mask_token_id is None:
        raise UserError("the tokenizer has no mask token; masked-LM training needs one")
    if teacher is not None:
        own = [load.load_tokenizer(student_folder)] if student_folder and _has_tokenizer(student_folder) else []
        student.check_same_vocabulary(teacher.config, made.config, [tokenizer, *own])
    for role, model in (("teacher", teacher), ("student", made)):
        if model is not None and config.data.max_length > model.max_length:
            raise UserError(
                f"config.data.max_length={config.data.max_length} is longer than the {role}'s "
                f"{model.max_length} positions; lower it"
            )
    teacher_params = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(config.teacher.dtype)), teacher_params)
    return Models(made, params, teacher, teacher_params, tokenizer, layers)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def build_teacher(config: Config, *, allow_pickle: bool) -> tuple[Model | None, PyTree]:
    """The teacher and its float32 parameters; (None, {}) where the config names none."""
    if not config.teacher.name:
        return None, {}
    folder = load.resolve(config.teacher.name, revision=config.teacher.revision, allow_pickle=allow_pickle)
    teacher = load.build(load.load_config(folder), dtype=jnp.dtype(config.teacher.dtype))
    return teacher, load.load_params(folder, teacher, allow_pickle=allow_pickle)


def _build_student(
    config: Config,
    teacher: Model | None,
    teacher_params: PyTree,
    *,
    key: jax.Array,
    allow_pickle: bool,
    tell: Tell,
) -> tuple[Model, PyTree, tuple[int, ...] | None, Path | None]:
    """Restore order after this run's own checkpoints: another run, a Hugging Face folder, the teacher, scratch."""
    c = config.student
    dtype = jnp.dtype(c.dtype)
    if c.name and (Path(c.name) / "config.json").exists() and (Path(c.name) / "student").is_dir():
        other = folders.load_student(Path(c.name), tell=tell)
        # To the host, as they lie on one device and the run's state may lie on others.
        params = jax.device_get(other.params)
        return load.build(other.model.config, dtype=dtype), params, None, Path(c.name) / "student"
    if c.name:
        folder = load.resolve(c.name, revision=c.revision, allow_pickle=allow_pickle)
        model = load.build(load.load_config(folder), dtype=dtype)
        params = load.load_params(folder, model, allow_pickle=allow_pickle, missing="init", key=key)
        return model, params, None, folder
    overrides = dict(c.overrides or {})
    if c.init == "random":
        base = _scratch_config(overrides) if teacher is None else teacher.config
        family = overrides.pop("model_type", base.model_type)
        model = load.build(student.student_config(base, family=family, layers=(), overrides=overrides), dtype=dtype)
        return model, load.init_params(model, key), None, None
    assert teacher is not None  # validate() saw to it
    spec = c.layers if c.layers is not None else max(teacher.num_layers // 2, 1)
    spec = tuple(spec) if isinstance(spec, list | tuple) else spec
    layers = student.resolve_layers(spec, of=teacher.num_layers)
    cut = student.student_config(
        teacher.config, family=c.family or teacher.config.model_type, layers=layers, overrides=overrides
    )
    model = load.build(cut, dtype=dtype)
    params = student.cut_student(
        teacher_params,
        teacher=teacher,
        student=model,
        layers=layers,
        reference_init=c.reference_init,
        key=key,
    )
    return model, params, layers, None


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
    )


def prepare_text(config: Config, source: sources.Source | None, tokenizer: Any, *, tell: Tell) -> Text:
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
        tell=tell,
    )
    path = Path(c.prepared) if source is None else prepare(source)
    store = tokenize.open_store(path)
    vocabulary = tokenize.vocabulary_of(tokenizer)
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
    return Text(train, held, counts, vocabulary, path)


def build_objective(config: Config, models: Models) -> Objective:
    """Raises UserError where the layer map names a layer that is not there."""
    weights = configs.alphas(config)
    layer_map: tuple[tuple[int, int], ...] = ()
    if any(name in weights for name in BY_LAYER):
        layer_map = _layer_map(config.loss.layer_map, models)
        if "attention" in weights and not any(s > 0 and t > 0 for s, t in layer_map):
            raise UserError("config.loss.layer_map holds only embeddings (-1), which have no attention to transfer")
    return Objective(
        weights=weights, temperature=config.loss.temperature, tokens=config.loss.tokens, layer_map=layer_map
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


def make_batches(config: Config, text: Text, *, steps: int, limit: int) -> Any:
    """The training batches as a grain iterator with checkpointable state."""
    return pipeline.train_batches(
        text.train,
        vocabulary=text.vocabulary,
        batch_size=config.train.batch_size,
        buckets=buckets(config),
        mask=_masking(config),
        token_counts=text.token_counts,
        seed=config.seed,
        steps=steps,
        limit_batches=limit,
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )


def make_held_out(config: Config, text: Text) -> Sequence[dict[str, np.ndarray]]:
    return pipeline.eval_batches(
        text.held_out,
        vocabulary=text.vocabulary,
        batch_size=config.evaluate.batch_size,
        buckets=buckets(config),
        mask=_masking(config),
        token_counts=text.token_counts,
        seed=0,  # and not config.seed: runs of different seeds are compared on the same masks
        limit=config.evaluate.batches,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


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


def describe(config: Config, models: Models, text: Text, *, mesh: dict[str, int], steps: int, per_epoch: int) -> str:
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
