"""Every shape of a mesh gives the update of one device, and moves between devices what it is meant to move.

The models are wide enough to be split: a leaf of fewer than 2^14 entries never is.
"""

import functools
import math
import re
from types import SimpleNamespace
from typing import Any

import grids
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from jaxdistill.cost import hlo
from jaxdistill.errors import UserError
from jaxdistill.losses.term import Objective
from jaxdistill.models import partition
from jaxdistill.models.model import Model, build_model, param_shapes
from jaxdistill.step import sharding
from jaxdistill.step.forward import Distillation
from jaxdistill.step.optimizer import OptimConfig, make_optimizer
from jaxdistill.step.settings import MeshConfig
from jaxdistill.step.sharding import Meshes
from jaxdistill.step.state import Placement, TrainState
from jaxdistill.step.train_step import UpdateSettings, make_train_step

ROWS, LENGTH, WIDTH, HEADS, GROUP, LABELLED = 32, 64, 256, 4, 2, 16
HIDDEN = ROWS * LENGTH * WIDTH  # entries of the hidden states of the batch


def config_of(kind: str, *, layers: int, words: int) -> Any:
    import transformers

    sizes = {"vocab_size": words, "max_position_embeddings": 128, "num_hidden_layers": layers}
    heads = {"hidden_size": WIDTH, "num_attention_heads": HEADS}
    inner, kv = {"intermediate_size": 2 * WIDTH}, {"num_key_value_heads": HEADS}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    of_class: dict[str, dict[str, Any]] = {
        "Bert": inner,
        "GPT2": {},
        "Llama": {**inner, **kv, "tie_word_embeddings": False},
        "Qwen3": {**inner, **kv, "head_dim": WIDTH // HEADS, "tie_word_embeddings": True},
        "Phi3": {**inner, **kv, **special, "original_max_position_embeddings": 128},
        "ModernBert": {**inner, **special, "cls_token_id": 1, "sep_token_id": 2},
    }
    return getattr(transformers, f"{kind}Config")(**sizes, **heads, **of_class[kind])


@functools.cache
def pair(kind: str, classes: str, *, scan: bool, words: int) -> SimpleNamespace:
    teacher, student = (
        build_model(config_of(kind, layers=layers, words=words), classes=classes, scan=scan)  # type: ignore[arg-type]
        for layers in ((3, 2) if scan else (2, 1))
    )
    rng = np.random.default_rng(0)

    def drawn(model: Model) -> Any:
        return jax.tree.map(lambda x: (0.05 * rng.standard_normal(x.shape)).astype(np.float32), param_shapes(model))

    ids = rng.integers(3, words, (ROWS, LENGTH)).astype(np.int32)
    labelled = np.arange(LENGTH)[None, :] < np.full((ROWS, 1), LABELLED // GROUP)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(labelled), "labels": ids, "label_mask": labelled}
    causal = student.family.causal
    objective = Objective(
        {"ce": 1.0, "clm" if causal else "mlm": 1.0, "cos": 1.0},
        2.0,
        "all" if causal else "masked",
        layer_map=(),
        head="fused",
    )
    return SimpleNamespace(
        distillation=Distillation(student, teacher, objective, GROUP, lambda width: LABELLED),
        student=drawn(student),
        teacher=drawn(teacher),
        batch=batch,
    )


@functools.cache
def updated(
    kind: str,
    shape: tuple[int, int, int] = (1, 1, 1),
    *,
    classes: str = "auto",
    scan: bool = False,
    words: int = 1024,
    teacher_fsdp: int = 0,
    accumulation: int = 1,
) -> SimpleNamespace:
    """One update: its metrics, the gradient that reached the optimizer, and the text of the program."""
    made = pair(kind, classes, scan=scan, words=words)
    data, fsdp, tensor = shape
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: math.prod(shape)])
    meshes = Meshes(mesh, mesh)
    if teacher_fsdp:
        settings = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, teacher_fsdp=teacher_fsdp)
        meshes = sharding.make_meshes(settings, student=0, teacher=0)
        assert not meshes.separate
    record = optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params), lambda updates, state, params=None: (updates, updates)
    )
    params = {"student": made.student, "projections": {}}
    optimizer = optax.chain(record, make_optimizer(params, OptimConfig(), steps=1, freeze=()))

    def init(params: Any) -> TrainState:
        params = jax.tree.map(jnp.array, params)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    models = made.distillation
    of_state = sharding.by_rule(jax.eval_shape(init, params), mesh, family=models.student.family)
    of_teacher = sharding.by_rule(made.teacher, meshes.teacher, family=models.teacher.family)
    settings = UpdateSettings(dropout=False, accumulation=accumulation)
    step: Any = make_train_step(models, optimizer, Placement(meshes, of_state, of_teacher), settings)
    state = jax.jit(init, out_shardings=of_state)(params)
    arguments = (state, jax.device_put(made.teacher, of_teacher), sharding.put_batch(made.batch, mesh))
    program = step.lower(*arguments, jax.random.key(0)).compile()
    state, metrics = program(*arguments, jax.random.key(0))
    return SimpleNamespace(
        metrics=jax.device_get(metrics),
        gradient=jax.device_get(state.opt_state[0]),
        text=program.as_text(),
        teacher=arguments[1],
        state=state,
    )


def assert_same(many: SimpleNamespace, one: SimpleNamespace) -> None:
    np.testing.assert_allclose(many.metrics["loss"], one.metrics["loss"], rtol=1e-5)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(one.gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), many.gradient, one.gradient
    )


def moved(text: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(kind of the collective, shape of an array that it gives, the operation that needs it)."""
    found = []
    for _, line in hlo.lines_run(text):
        if match := re.search(rf"= (.*?) ({'|'.join(hlo.COLLECTIVES)})(-start)?\(", line):
            name = re.search(r'op_name="([^"]*)"', line)
            shapes = [tuple(map(int, axes.split(","))) for axes in re.findall(r"\w+\[([\d,]+)\]", match[1])]
            found += [(match[2], shape, name[1] if name else "") for shape in shapes]
    return found


def check_moved(text: str, shape: tuple[int, int, int]) -> None:
    """Refuses what a mesh of this shape has no need to move."""
    data, fsdp, tensor = shape
    own = HIDDEN // (data * fsdp)  # entries of the hidden states of a device
    for kind, array, name in moved(text):
        entries, told = math.prod(array), f"{kind} {array} for {name}"
        if data * fsdp > 1:
            assert entries < HIDDEN, told
        if len(array) >= 3 and kind == "all-reduce":  # the sum of a pair of products
            assert tensor > 1 and entries <= own, told
        elif len(array) >= 3:  # rows of the embedding that go home, and parts of a weight
            assert kind == "all-to-all" and fsdp * tensor > 1 and entries <= own, told
        elif kind != "all-reduce":  # weights, and the ids of the batch
            assert fsdp * tensor > 1, told


MIXED = (2, 2, 2)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 1, 4), (1, 4, 2), (2, 1, 4)]
CASES = [
    *(("Bert", {}, shape) for shape in MESHES),
    ("Qwen3", {}, (1, 8, 1)),
    ("Qwen3", {}, (1, 1, 4)),
    ("Bert", {}, MIXED),
    ("Bert", {"classes": "core"}, MIXED),
    ("GPT2", {}, MIXED),
    ("GPT2", {"classes": "core", "words": 1023}, MIXED),  # words that nothing divides
    ("Llama", {}, MIXED),
    ("Qwen3", {}, MIXED),
    ("Qwen3", {"scan": True}, MIXED),
    ("Phi3", {}, MIXED),
    ("ModernBert", {}, MIXED),
]
# Every axis alone and beside another, and every module whose kernels the axes split.
STAND_FOR_ALL = [
    *(("Bert", {}, shape) for shape in [(1, 8, 1), (2, 4, 1), (1, 1, 4)]),
    ("Bert", {"classes": "core"}, MIXED),
    ("GPT2", {"classes": "core", "words": 1023}, MIXED),
    ("Qwen3", {"scan": True}, MIXED),
    ("Phi3", {}, MIXED),
    ("ModernBert", {}, MIXED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options", "shape"), grids.everyday(CASES, *STAND_FOR_ALL))
def test_every_mesh_is_one_device(kind: str, options: dict[str, Any], shape: tuple[int, int, int]) -> None:
    many = updated(kind, shape, **options)
    assert_same(many, updated(kind, **options))
    check_moved(many.text, shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 4, 2), (8, 1, 1)])
def test_micro_batches_on_a_mesh(shape: tuple[int, int, int]) -> None:
    assert_same(updated("Qwen3", shape, accumulation=ROWS // GROUP // (shape[0] * shape[1])), updated("Qwen3"))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "pieces"), [((4, 2, 1), 1), ((8, 1, 1), 8)])
def test_the_teacher_is_split_by_a_number_of_its_own(shape: tuple[int, int, int], pieces: int) -> None:
    many = updated("Bert", shape, teacher_fsdp=pieces)
    assert_same(many, updated("Bert"))
    check_moved(many.text, (1, 8, 1))
    kernel = many.teacher["bert"]["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // pieces


@pytest.mark.parametrize("kind", tiny.INSTALLED)
def test_the_table_knows_every_kernel_of_a_layer(kind: str) -> None:
    """`tensor` splits the axis that a bias has for outputs, and the other one for the way back."""
    model = tiny.model(kind)
    shapes: dict[str, Any] = dict(flatten_dict(param_shapes(model), sep="/"))
    layers = model.family.layers.removesuffix("{}")
    found = set()
    for path, leaf in shapes.items():
        module, _, name = path.rpartition("/")
        cut, told = partition.cut_of(f"0/mu/student/{path}", len(leaf.shape), model.family), f"{path} {leaf.shape}"
        if name != "kernel" or not path.startswith(layers):
            continue
        found.add(what := partition.kind_of(module))
        assert what in ("outputs", "inputs", "qkv", "halves"), told
        if what in ("qkv", "halves"):
            assert cut == partition.Cut(over=("fsdp", "tensor")), told
            continue
        outputs = 0 if model.family.transposed_kernels else 1
        assert cut.tensor == (outputs if what == "outputs" else 1 - outputs), told
        if bias := shapes.get(f"{module}/bias"):
            assert bias.shape[0] == leaf.shape[outputs], told
            of_bias = partition.cut_of(f"{module}/bias", 1, model.family)
            assert of_bias.tensor == (0 if what == "outputs" else None), told
    assert "inputs" in found and found & {"outputs", "qkv"}
    # What holds such modules is none of them: its hidden states are whole.
    holders = {path.rsplit("/", i)[0] for path in shapes for i in range(2, path.count("/") + 1)}
    assert {path: partition.kind_of(path) for path in holders if partition.kind_of(path)} == {}
    assert partition.cut_of(model.family.embedding, 2, model.family).tensor == 0
    if f"{model.family.projection}/kernel" in shapes:
        assert partition.cut_of(f"{model.family.projection}/kernel", 2, model.family).tensor == 1
    if model.projection_bias:
        assert partition.cut_of(model.projection_bias, 1, model.family).tensor == 0


def test_where_parameters_lie() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = build_model(config_of("Bert", layers=1, words=1024))
    specs = jax.tree.map(lambda x: x.spec, sharding.by_rule(param_shapes(model), mesh, family=model.family))
    flat = flatten_dict(specs, sep="/")
    layer = "bert/encoder/layer/0"
    assert flat[f"{layer}/attention/self/query/kernel"] == PartitionSpec("fsdp", "tensor")
    assert flat[f"{layer}/attention/self/query/bias"] == PartitionSpec("tensor")
    assert flat[f"{layer}/attention/output/dense/kernel"] == PartitionSpec("tensor", "fsdp")
    assert flat[f"{layer}/attention/output/dense/bias"] == PartitionSpec()
    assert flat[f"{layer}/intermediate/dense/kernel"] == PartitionSpec("fsdp", "tensor")
    assert flat[f"{layer}/output/dense/kernel"] == PartitionSpec("tensor", "fsdp")
    assert flat["bert/embeddings/word_embeddings/embedding"] == PartitionSpec("tensor", "fsdp")
    assert flat["bert/embeddings/position_embeddings/embedding"] == PartitionSpec()
    assert flat["cls/predictions/bias"] == PartitionSpec("tensor")


def test_tensor_divides_heads() -> None:
    model = build_model(config_of("Bert", layers=1, words=1024))
    partition.check_heads(model, 4, "student")
    with pytest.raises(
        UserError, match=r"config\.mesh\.tensor=8 must divide the 4 heads of the student; .*divisor of 4"
    ):
        partition.check_heads(model, 8, "student")
