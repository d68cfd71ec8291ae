"""Weights of a folder: what is read, and one clear line for what is missing, damaged or of another model."""

import json
import logging

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusal import refused
from safetensors.numpy import save_file

from jaxdistill.models import torch_names, weights
from jaxdistill.models.model import count_params, param_shapes


@pytest.fixture
def folder(tmp_path):
    model = tiny.model("bert")
    model.config.save_pretrained(tmp_path)
    save_file(torch_names.to_torch(tiny.params("bert")), tmp_path / "model.safetensors")
    return tmp_path


def change(folder, change_tensors):
    tensors = dict(torch_names.to_torch(tiny.params("bert")))
    change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_read_back(folder):
    params = weights.load_params(folder, tiny.model("bert"))
    jax.tree.map(np.testing.assert_array_equal, params, tiny.params("bert"))
    shapes = param_shapes(tiny.model("bert"))
    assert count_params(shapes) == count_params(params) == sum(x.size for x in jax.tree.leaves(params))


def test_missing_tensors(folder, caplog):
    model = tiny.model("bert")
    change(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("cls.")])
    refused(lambda: weights.load_params(folder, model), "lacks 5 of the 42 tensors", "cls.predictions.bias", ", ...")
    with caplog.at_level(logging.WARNING):
        params = weights.load_params(folder, model, missing="init", key=jax.random.key(0))
    assert "drawn at random: cls.predictions.bias" in caplog.text and len(caplog.records) == 1
    flat, source = flatten_dict(params, sep="/"), flatten_dict(tiny.params("bert"), sep="/")
    assert flat.keys() == source.keys()
    for path, array in flat.items():
        assert np.array_equal(array, source[path]) != path.startswith("cls/")


def test_damaged_weights(folder):
    model, file = tiny.model("bert"), folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(lambda: weights.load_params(folder, model), "model.safetensors is truncated or damaged")

    name = "bert.encoder.layer.1.output.dense.weight"
    change(folder, lambda t: t.update({name: t[name][:, :-1].copy()}))
    refused(lambda: weights.load_params(folder, model), name, "(16, 23)", "(16, 24)")
    change(folder, lambda t: t.update({name: np.full_like(t[name], np.nan)}))
    refused(lambda: weights.load_params(folder, model), name, "NaN or infinite")
    change(folder, lambda t: t.update({name.replace(".1.", ".2."): t[name]}))
    refused(
        lambda: weights.load_params(folder, model),
        "layer.2",
        "configuration (2 layers)",
        "do not belong together",
    )
    file.unlink()
    refused(lambda: weights.load_params(folder, model), "holds no weights")


def test_damaged_index_of_shards(folder):
    model, index = tiny.model("bert"), folder / "model.safetensors.index.json"
    (folder / "model.safetensors").unlink()
    index.write_text("{")
    refused(lambda: weights.load_params(folder, model), "is not JSON")
    odd = ({}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["x"]}, {"weight_map": {"a": 3, "b": "x"}})
    for content in ([], None, 3, *odd):
        index.write_text(json.dumps(content))
        refused(lambda: weights.load_params(folder, model), "is no index of shards")
    (folder / "evil.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    # A name of another folder, one that no file can have, one that stands for the folder, and another kind of file.
    for shard in ("model-1.safetensors", "../model.safetensors", "/etc/passwd", "", ".", "x" * 5000, "x\0", "evil.bin"):
        index.write_text(json.dumps({"weight_map": {"bert.x": shard}}))
        refused(lambda: weights.load_params(folder, model), "which is not in the folder")


def test_flax_files_of_odd_shapes(folder):
    from flax.serialization import msgpack_serialize

    model, file = tiny.model("bert"), folder / "flax_model.msgpack"
    (folder / "model.safetensors").unlink()
    packed = [
        *(b"", b"\xc0", b"\x03", b"\x80\x80", b"\x81\xa1a" * 100_000, b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff"),
        *(b"\x81\x90\x01", b"\x81\xa1a\xa1x", b"\x81\xa1a\xd4\x01x", b"\x81\xa1a\xd4\x63x", b"\x81\x01\x81\x02\x03"),
        msgpack_serialize({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2**40}, "chunks": {}}}),
    ]
    for data in packed:
        file.write_bytes(data)
        refused(lambda: weights.load_params(folder, model), str(file))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
def test_weights_that_are_no_floats(folder, dtype):
    tensors = torch_names.to_torch(tiny.params("bert"))
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file({**tensors, name: tensors[name].astype(dtype)}, folder / "model.safetensors")
    refused(lambda: weights.load_params(folder, tiny.model("bert")), name, dtype, "quantised")


def save_pickle(folder, saved):
    import torch

    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(saved, folder / "pytorch_model.bin")


def state_dict():
    import torch

    return {name: torch.nn.Parameter(torch.tensor(x)) for name, x in torch_names.to_torch(tiny.params("bert")).items()}


def wrapped(prefix):
    return {prefix + name: value for name, value in state_dict().items()}


TRAINERS = {
    "a plain state dict": lambda rest: state_dict(),
    "beside a counter": lambda rest: {**state_dict(), "epoch": 3},
    "a loop of the user's": lambda rest: {"model": state_dict(), **rest},
    "the tutorials of torch": lambda rest: {"model_state_dict": state_dict(), "loss": 0.1, **rest},
    "Lightning": lambda rest: {"state_dict": wrapped("model."), "hyper_parameters": {"lr": 0.1}, **rest},
    "DeepSpeed": lambda rest: {"module": wrapped("module."), **rest},
    "twice": lambda rest: {"state": {"x": 1}, "model": {"state_dict": state_dict(), **rest}},
    "a name of the user's": lambda rest: {"student": state_dict(), **rest},
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_pickles_as_trainers_write_them(folder, trainer):
    import torch

    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    rest = {"optimizer": optimizer.state_dict(), "epoch": 3, "step": torch.tensor(7)}
    if trainer == "a name of the user's":
        del rest["step"]
    save_pickle(folder, TRAINERS[trainer](rest))
    params = weights.load_params(folder, tiny.model("bert"), allow_pickle=True)
    jax.tree.map(np.testing.assert_array_equal, params, tiny.params("bert"))
    refused(lambda: weights.load_params(folder, tiny.model("bert")), "is a pickle", "--allow-pickle")


def test_pickles_that_are_refused(folder):
    import argparse

    import torch

    def said(*parts):
        refused(lambda: weights.load_params(folder, tiny.model("bert"), allow_pickle=True), *parts)

    save_pickle(folder, {"model": state_dict(), "args": argparse.Namespace(lr=0.1)})
    said("holds a argparse.Namespace", "save model.state_dict() alone")
    save_pickle(folder, torch.nn.Linear(2, 2))
    said("Linear")
    save_pickle(folder, [torch.ones(2)])
    said("holds a list")
    save_pickle(folder, {"student": state_dict(), "teacher": state_dict()})
    said("holds student, teacher, and no tensors of one model")
    save_pickle(folder, {})
    said("holds nothing")
    file = folder / "pytorch_model.bin"
    save_pickle(folder, state_dict())
    whole = file.read_bytes()
    for size in (0, 3, 100, len(whole) // 2):
        file.write_bytes(whole[:size])
        said("pytorch_model.bin", "is no file of torch, or is damaged")
    file.rename(folder / "best.ckpt")
    (folder / "optimizer.pt").write_bytes(b"")
    said("best.ckpt", "rename it to pytorch_model.bin")
    refused(lambda: weights.load_params(folder, tiny.model("bert")), "best.ckpt is a pickle", "--allow-pickle")


def test_weights_are_read_where_jax_may_not_use_the_cpu(folder, monkeypatch):
    """As with JAX_PLATFORMS=cuda, where JAX has no CPU to make arrays on."""

    def no_cpu(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    wanted = weights.load_params(folder, tiny.model("bert"))
    monkeypatch.setattr(weights.jax, "local_devices", no_cpu)
    got = weights.load_params(folder, tiny.model("bert"))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
