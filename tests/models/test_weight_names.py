"""Tensors under other names than the model's are found by what they are, or the file is refused; never drawn."""

import jax
import numpy as np
import pytest
import tiny
from refusal import refused
from safetensors.numpy import save_file

from jaxdistill.models import torch_names, weights
from jaxdistill.models.families import FAMILIES

FAMILY = pytest.mark.parametrize("kind", tiny.families(FAMILIES, weekly=True))


def write(folder, tensors, *, kind):
    tiny.config(kind).save_pretrained(folder)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")


def tensors_of(kind):
    return dict(torch_names.to_torch(tiny.params(kind)))


def head_of(kind):
    return [name for name in tensors_of(kind) if not name.startswith(f"{FAMILIES[kind].base}.")]


def load_student(folder, kind):
    return weights.load_params(folder, tiny.model(kind), missing="init", key=jax.random.key(0))


def same(params, kind):
    jax.tree.map(np.testing.assert_array_equal, params, tiny.params(kind))


WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DataParallel": lambda name: f"module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "compiled, then parallel": lambda name: f"module._orig_mod.{name}",
    "Lightning, parallel, compiled": lambda name: f"model.module._orig_mod.{name}",
    "a class of the user's": lambda name: f"net.encoder.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(".0.", ".0._fsdp_wrapped_module."),
    "checkpointed layers": lambda name: name.replace(".0.", ".0._checkpoint_wrapped_module."),
    "compiled layers": lambda name: name.replace(".1.", ".1._orig_mod."),
    "parallel layers": lambda name: name.replace(".0.", ".0.module."),
    "all but the first layer": lambda name: name if ".0." in name else f"module.{name}",
}


@FAMILY
def test_prefixes_of_wrappers_are_taken_off(tmp_path, kind):
    family = FAMILIES[kind]
    for wrap in WRAPPED.values():
        write(tmp_path, {wrap(name): array for name, array in tensors_of(kind).items()}, kind=kind)
        same(weights.load_params(tmp_path, tiny.model(kind)), kind)
        same(load_student(tmp_path, kind), kind)
    # A body alone, without its own prefix or with it.
    for base in ("", f"{family.base}."):
        body = {name: array for name, array in tensors_of(kind).items() if name not in head_of(kind)}
        body = {f"module.{base}{name.removeprefix(f'{family.base}.')}": array for name, array in body.items()}
        write(tmp_path, body, kind=kind)
        params = load_student(tmp_path, kind)
        assert all(
            np.array_equal(got, array)
            for name, got in torch_names.to_torch(params).items()
            if (array := tensors_of(kind)[name]) is not None and name not in head_of(kind)
        )


@FAMILY
def test_a_tensor_under_either_of_its_tied_names_is_that_tensor(tmp_path, kind):
    family = FAMILIES[kind]
    embedding = torch_names.torch_name(family.embedding)
    head = torch_names.torch_name(f"{family.projection}/kernel")
    tensors = tensors_of(kind)
    if head not in tensors:
        tensors[head] = tensors.pop(embedding)
    if family.projection_bias:
        bias = torch_names.torch_name(family.projection_bias)
        tensors[torch_names.torch_name(f"{family.projection}/bias")] = tensors.pop(bias)
    for prefix in ("", "module."):
        write(tmp_path, {prefix + name: array for name, array in tensors.items()}, kind=kind)
        same(weights.load_params(tmp_path, tiny.model(kind)), kind)


@FAMILY
def test_nothing_of_the_body_is_drawn(tmp_path, kind):
    """A layer, an embedding or a last norm that is not there: named, for a student too."""
    body = [name for name in tensors_of(kind) if name not in head_of(kind)]
    embedding = torch_names.torch_name(FAMILIES[kind].embedding)
    layer = FAMILIES[kind].layers.format(1).replace("/", ".") + "."
    for lacking in ([embedding], [body[-1]], [name for name in body if name.startswith(layer)]):
        write(tmp_path, {n: array for n, array in tensors_of(kind).items() if n not in lacking}, kind=kind)
        said = [f"lacks {len(lacking)} of the", lacking[0], "the file holds"]
        refused(lambda: load_student(tmp_path, kind), *said)
        refused(lambda: weights.load_params(tmp_path, tiny.model(kind)), *said)


@pytest.mark.parametrize("head", ["pooler.dense.weight", "bert.pooler.dense.weight", "classifier.weight"])
def test_a_head_is_drawn_and_named_and_other_heads_are_left(tmp_path, caplog, head):
    body = {name: array for name, array in tensors_of("bert").items() if name not in head_of("bert")}
    write(tmp_path, {**body, head: np.ones((16, 16), np.float32)}, kind="bert")
    params = load_student(tmp_path, "bert")
    drawn = [
        name for name, x in torch_names.to_torch(params).items() if not np.array_equal(x, tensors_of("bert")[name])
    ]
    assert sorted(drawn) == sorted(head_of("bert"))
    assert [record.getMessage().partition("at random: ")[2] for record in caplog.records] == [
        ", ".join(head_of("bert"))
    ]
    refused(lambda: weights.load_params(tmp_path, tiny.model("bert")), "lacks 5 of the 42", head_of("bert")[0])


@pytest.mark.parametrize(
    ("kind", "other"),
    tiny.families(
        [("gpt2", "bert"), ("bert", "gpt2"), ("gpt2", "gpt_neo"), ("bert", "roberta"), ("llama", "opt")], fast=["bert"]
    ),
)
def test_weights_of_another_family(tmp_path, kind, other):
    for wrap in ("", "module."):
        tensors = {wrap + name: array for name, array in tensors_of(other).items()}
        for kept in (tensors, {name: array for name, array in tensors.items() if FAMILIES[other].base in name}):
            write(tmp_path, kept, kind=kind)
            refused(lambda: load_student(tmp_path, kind), "lacks", "the file holds", min(kept))


def test_wrapped_names_that_are_no_prefix_of_all(tmp_path):
    tensors = {f"student.{name}": array for name, array in tensors_of("bert").items()}
    tensors |= {f"teacher.{name}": array for name, array in tensors_of("bert").items()}
    write(tmp_path, tensors, kind="bert")
    refused(lambda: load_student(tmp_path, "bert"), "lacks 37 of the 42", "student.bert.embeddings")


@FAMILY
def test_prefixes_that_only_some_names_have(tmp_path, kind):
    """A body or a head in a module of its own, and names of other things in the same file."""
    tensors, head = tensors_of(kind), head_of(kind)
    for wrap in (
        lambda name: name if name in head else f"module.{name}",
        lambda name: name if name in head else f"model.net.{name}",
        lambda name: f"lm.{name}" if name in head else name,
        lambda name: f"lm.{name}" if name in head else f"encoder.net.{name}",
    ):
        named = {wrap(name): array for name, array in tensors.items()}
        for others in ({}, {"classifier.weight": np.ones(3, np.float32), "ema.decay": np.ones(1, np.float32)}):
            write(tmp_path, named | others, kind=kind)
            same(weights.load_params(tmp_path, tiny.model(kind)), kind)
            same(load_student(tmp_path, kind), kind)


def test_a_name_that_also_stands_alone_is_that_one(tmp_path):
    tensors = tensors_of("bert")
    other = {f"teacher.{name}": array + 1 for name, array in tensors.items()}
    write(tmp_path, tensors | other, kind="bert")
    same(load_student(tmp_path, "bert"), "bert")


def test_layers_too_many_behind_a_prefix(tmp_path):
    tensors = {f"net.{name}": array for name, array in tensors_of("bert").items()}
    name = "net.bert.encoder.layer.1.output.dense.bias"
    write(tmp_path, {**tensors, name.replace(".1.", ".7."): tensors[name]}, kind="bert")
    refused(lambda: load_student(tmp_path, "bert"), "bert.encoder.layer.7", "do not belong together")


def test_one_tensor_twice(tmp_path):
    name = "bert.embeddings.LayerNorm.weight"
    tensors = tensors_of("bert")
    write(tmp_path, {**tensors, "bert.embeddings.LayerNorm.gamma": tensors[name]}, kind="bert")
    same(load_student(tmp_path, "bert"), "bert")
    write(tmp_path, {**tensors, "bert.embeddings.LayerNorm.gamma": tensors[name] + 1}, kind="bert")
    refused(lambda: load_student(tmp_path, "bert"), name, "twice")


def test_wrapped_names_in_flax_files_and_pickles(tmp_path):
    import torch
    from flax.serialization import msgpack_serialize

    tiny.config("bert").save_pretrained(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize({"params": tiny.params("bert")}))
    same(weights.load_params(tmp_path, tiny.model("bert")), "bert")
    state = {f"module.{name}": torch.tensor(array) for name, array in tensors_of("bert").items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    same(weights.load_params(tmp_path, tiny.model("bert"), allow_pickle=True), "bert")
