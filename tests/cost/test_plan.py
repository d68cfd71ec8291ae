"""Costs before a machine is rented: what is counted, against programs whose cost is known, and the command itself."""

import itertools
import json
import re
import shutil
from pathlib import Path

import grids
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_causal
import tiny_run
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill import cli
from jaxdistill.cost import depth, estimate, hlo, plan, program, roofline
from jaxdistill.models.model import count_params
from jaxdistill.step import chips

CHIP = chips.Chip(flops=1e9, bandwidth=1e9, memory=2**40)


def run(tiny, *overrides: str) -> str:
    code, out, err = tiny_run.call(cli.main, ["plan", f"--config={tiny.recipe}", *overrides])
    assert code == 0, err
    return out


def number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match, text
    return float(match[1].replace(",", ""))


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    """The tiny recipe with a teacher that has no weights: its config.json is all that is read."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "teacher").mkdir()
    shutil.copy(tiny.teacher / "config.json", folder / "teacher")
    path = folder / "recipe.py"
    path.write_text(tiny.recipe.read_text().replace(repr(str(tiny.teacher)), repr(str(folder / "teacher"))))
    return tiny._replace(recipe=path)


@pytest.mark.slow
def test_a_plan_of_the_devices_here(recipe):
    out = run(recipe)
    assert "teacher bert 0.0M, student bert 0.0M parameters; 8 x cpu" in out
    assert "16 rows x 32 = 512 tokens in 1 micro-batch(es)" in out
    assert number(r"temporaries ([\d.e-]+) GB", out) > 0 and number(r"work a device: ([\d.e-]+) TFLOP", out) > 0
    assert "all-reduce" in out  # eight devices add up their gradients
    assert "expected" not in out  # nothing is known of this processor's peaks
    assert "with teacher.cache: " in out


def test_what_a_cache_would_save_is_counted_without_a_program(recipe):
    """16 x 32 tokens: 102 bytes of drawn words each, or 68 of the best 16, and the last hidden states of width 16."""

    def target(*flags: str) -> program.Target:
        return plan.read_target(str(recipe.recipe), [f"--config.{flag}" for flag in flags], topology="")

    def saved(*flags: str) -> list[plan.Cost]:
        return list(plan.saved_by_cache(target(*flags)))

    (cost,) = saved()
    figures = cost.figures["saved_by_cache"]
    assert figures["bytes_read"] == 512 * (102 + 2 * 16)
    assert figures["bytes"] == 4 * count_params(target().pair.teacher_params)
    assert "it needs config.mask.epochs and config.mask.group=1" in cost.line
    masked = "loss.tokens=masked", "loss.alpha_cos=0.0", "mask.epochs=2", "mask.group=1"
    (cost,) = saved(*masked, "cache.kind=topk", "cache.k=16")
    assert cost.figures["saved_by_cache"]["bytes_read"] == round(512 * 0.15) * 68 and "it needs" not in cost.line
    assert cost.figures["saved_by_cache"]["flops"] < figures["flops"]  # of the head, for the masked tokens alone
    (two,) = saved(*masked, "cache.kind=topk", "cache.k=16", f"teacher.also=('{recipe.folder / 'teacher'}',)")
    one = cost.figures["saved_by_cache"]
    assert two.figures["saved_by_cache"] == {name: 2 * value for name, value in one.items()}
    for cannot in ("loss.alpha_attention=1.0", "loss.divergence=jsd", "loss.alpha_mse=1.0", "teacher.name="):
        without = "student.name=" + str(recipe.folder / "teacher") if cannot == "teacher.name=" else "seed=0"
        assert saved(cannot, without, "tokenizer.name=x") == []


@pytest.mark.slow
def test_a_plan_needs_no_text_and_writes_nothing(recipe, tmp_path):
    text = tmp_path / "recipe.py"
    text.write_text(re.sub(r"config.data.path = .*", "", recipe.recipe.read_text()))
    recipe = recipe._replace(recipe=text)
    before = tiny_run.bits(recipe.folder)
    run(recipe)
    assert tiny_run.bits(recipe.folder) == before


@pytest.mark.weekly  # the next test but one compares two numbers of micro-batches
def test_micro_batches_change_the_memory_and_not_the_work(recipe):
    """XLA counts the body of a loop once: naively, half the work would be gone."""
    flags = ["--config.data.max_length=32", "--config.train.batch_size=256"]
    one, four = run(recipe, *flags), run(recipe, *flags, "--config.train.accumulation=4")
    work = [number(r"work a device: ([\d.e-]+) TFLOP", out) for out in (one, four)]
    assert work[1] == pytest.approx(work[0], rel=0.1)
    temporaries = [number(r"temporaries ([\d.e-]+) GB", out) for out in (one, four)]
    assert temporaries[1] < 0.5 * temporaries[0]


@pytest.mark.slow
def test_a_known_chip_has_a_range_and_a_largest_batch(recipe, monkeypatch):
    monkeypatch.setitem(chips.CHIPS, "cpu", CHIP)
    out = run(recipe, "--config.train.batch_size=64")
    low, high = number(r"expected: ([\d,]+)", out), number(r"to ([\d,]+) tokens/s", out)
    assert 0 < low < high
    assert re.search("bound by (arithmetic|memory)", out)
    code, printed, _ = tiny_run.call(
        cli.main, ["plan", f"--config={recipe.recipe}", "--config.train.batch_size=64", "--json"]
    )
    values = json.loads(printed)  # the same figures for a script
    assert code == 0 and [round(value) for value in values["tokens_per_s"]] == [low, high]
    assert values["fits"] and values["largest_batch"] > 64 and values["devices"] == 8
    assert number(r"about ([\d,]+) rows", out) > 64


@pytest.mark.slow
def test_what_does_not_fit_and_what_would(recipe, monkeypatch):
    flags = ["--config.train.batch_size=256"]
    peaks = {n: peak_of(run(recipe, *flags, f"--config.train.accumulation={n}")) for n in (2, 4)}
    assert peaks[4] < peaks[2]
    monkeypatch.setitem(chips.CHIPS, "cpu", CHIP._replace(memory=(peaks[4] + peaks[2]) / 2))
    out = run(recipe, *flags)
    assert "does not fit" in out and "config.train.accumulation=4 would" in out and "expected" not in out
    monkeypatch.setitem(chips.CHIPS, "cpu", CHIP._replace(memory=1000))
    out = run(recipe, *flags)
    assert "no number of micro-batches would" in out and "more than 8 devices" in out


def peak_of(out: str) -> float:
    return 1e9 * number(r"peak ([\d.e-]+) GB", out)


def test_what_is_refused(recipe, tmp_path):
    for argv, said in (
        (["plan", f"--config={recipe.recipe}", "--topology=v99:1x1"], "--topology v99:1x1"),
        (["plan", f"--config={recipe.recipe}", "--config.train.batch_size=12"], "config.train.batch_size=12"),
        (["plan", f"--config={recipe.recipe}", "--config.teacher.name=/nowhere"], "/nowhere"),
        (["plan", f"--config={recipe.recipe}", "--config.data.max_length=64"], "config.data.max_length=64"),
        (
            ["plan", f"--config={recipe.recipe}", "--config.teacher.cache=answers", "--config.student.init=random"],
            "'answers' is no teacher cache",
        ),
    ):
        code, _, err = tiny_run.call(cli.main, argv)
        assert code == 2 and said in err and err.count("\n") == 1, err


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.slow
def test_a_causal_recipe_of_packed_rows():
    packed = "data.source=text", "data.prompt_column=", "data.batching=packed", "mask.group=1"
    argv = ["plan", f"--config={CONFIGS / 'gpt2_kd.py'}:smoke", *(f"--config.{x}" for x in packed)]
    code, out, err = tiny_run.call(cli.main, argv)
    assert code == 0, err
    assert "teacher gpt2 0.2M, student gpt2 0.1M" in out and number(r"work a device: ([\d.e-]+) TFLOP", out) > 0


@pytest.mark.slow
def test_text_that_models_write_is_planned():
    """A run that writes text has a program for that, whose loop has a pass for every new token but the first."""
    figures = {}
    for new in (8, 12):  # after prompts of 40 tokens
        settings = {"sample.max_new_tokens": new, "data.max_length": 40 + new, "data.buckets": (40 + new,)}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        argv = ["plan", f"--config={CONFIGS / 'gpt2_policy.py'}:smoke", "--json", *flags]
        code, out, err = tiny_run.call(cli.main, argv)
        assert code == 0, err
        figures[new] = json.loads(out)
    programs = figures[8]["programs"]
    assert set(programs) == {"update", "writing", "scoring"}
    of_four = figures[12]["programs"]["writing"]["flops"] - programs["writing"]["flops"]
    # Both models write, and multiply nearly all of their parameters by each token of the rows on a device.
    by_hand = 4 * 2 * sum(figures[8]["parameters"].values()) * figures[8]["rows"] / 8
    assert of_four == pytest.approx(by_hand, rel=0.25)
    assert figures[8]["memory"]["peak"] > programs["writing"]["memory"]["peak"]  # the optimizer's state stays


def test_memory_and_work_of_a_matrix_product():
    m, k, n = 64, 128, 32
    compiled = jax.jit(lambda a, b: a @ b).lower(jnp.zeros((m, k)), jnp.zeros((k, n))).compile()
    memory = program.memory_of(compiled)
    assert memory.arguments == 4 * (m * k + k * n)
    assert memory.peak == memory.arguments + 4 * m * n + memory.temporaries
    assert compiled.cost_analysis()["flops"] == pytest.approx(2 * m * k * n, rel=0.01)
    assert hlo.bytes_moved(compiled.as_text()) == 4 * (m * k + k * n + m * n)


def test_a_donated_argument_is_not_counted_twice():
    x = jnp.zeros((1000,))
    kept = program.memory_of(jax.jit(lambda x: x + 1).lower(x).compile())
    donated = program.memory_of(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert kept.peak - donated.peak == 4000


def test_bytes_in_a_loop_count_every_pass():
    """A pass multiplies a [16, 16] and a row that it takes out of xs; xs itself is not read as a whole each time."""

    def f(x: jax.Array, xs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, y: (x @ y, None), x, xs)[0]

    moved = {}
    for passes in (10, 20):
        compiled = jax.jit(f).lower(jnp.zeros((16, 16)), jnp.zeros((passes, 16, 16))).compile()
        moved[passes] = hlo.bytes_moved(compiled.as_text())
    assert moved[20] - moved[10] >= 10 * 3 * 16 * 16 * 4
    assert moved[20] < 2.2 * moved[10]


def test_what_lies_on_the_chip_is_not_moved():
    text = """\
ENTRY %main (p: f32[64,8], i: s32[]) -> f32[8,8] {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %q = f32[64,8]{1,0:T(8,128)S(1)} negate(%p)
  %s = (f32[64,8]{1,0:T(8,128)S(1)}, f32[64,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %d = f32[64,8]{1,0:T(8,128)S(1)} copy-done(%s)
  %g = f32[8,8]{1,0:T(8,128)} dynamic-slice(%p, %i), dynamic_slice_sizes={8,8}
  ROOT %r = f32[8,8]{1,0:T(8,128)} dot(%q, %d), lhs_contracting_dims={0}
}"""
    assert hlo.bytes_moved(text) == 4 * (64 * 8 + 64 * 8 + 2 * 8 * 8 + 8 * 8)


def test_collectives_of_a_compiled_program():
    mesh = Mesh(np.asarray(jax.devices()), ("x",))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    gathered = jax.jit(lambda x: x, in_shardings=split, out_shardings=whole).lower(x).compile()
    assert hlo.collectives(gathered.as_text()) == {"all-gather": 8 * 256 * 4}
    summed = jax.jit(lambda x: x.sum(axis=0), in_shardings=split, out_shardings=whole).lower(x).compile()
    assert hlo.collectives(summed.as_text()) == {"all-reduce": 256 * 4}


def test_collectives_in_a_loop_count_every_pass():
    mesh = Mesh(np.asarray(jax.devices()), ("x",))
    split, whole = NamedSharding(mesh, PartitionSpec(None, "x")), NamedSharding(mesh, PartitionSpec())

    def f(xs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda total, x: (jnp.sin(total + x.sum(axis=0)), None), jnp.zeros(256), xs)[0]

    compiled = jax.jit(f, in_shardings=split, out_shardings=whole).lower(jnp.zeros((5, 8, 256))).compile()
    assert hlo.collectives(compiled.as_text()) == {"all-reduce": 5 * 256 * 4}


def test_collectives_in_a_branch_are_counted():
    text = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}
%left (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%p), to_apply=%sum
}
%right (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} negate(%p)
}
%below (s: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %l = pred[] compare(%i, %n), direction=LT
}
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} conditional(%k, %p, %p), branch_computations={%left, %right}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%below, body=%body
}"""
    assert hlo.collectives(text) == {"all-reduce": 3 * 8 * 4}


def test_collectives_that_start_early_are_counted_once():
    lines = [
        "  %a = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%p), dimensions={0}",
        "  %b = f32[16,4]{1,0} all-gather-done(%a)",
        "  ROOT %c = (bf16[8]{0}, bf16[4]{0}) all-reduce(%d, %e), to_apply=%add",
        "  %f = f32[8]{0} add(%all-reduce.1, %g)",
    ]
    text = "\n".join(["ENTRY %main (p: f32[2,4]) -> f32[8] {", *lines, "}"])
    assert hlo.collectives(text) == {"all-gather": 16 * 4 * 4, "all-reduce": (8 + 4) * 2}


WINDOWED = """\
%dot (l: bf16[2,16,8,1], r: bf16[8,2,4,1]) -> bf16[2,16,2,4] {
  %l = bf16[2,16,8,1]{2,1,0,3} parameter(0)
  %r = bf16[8,2,4,1]{2,1,0,3} parameter(1)
  ROOT %c = bf16[2,16,2,4]{3,1,2,0} convolution(%l, %r), window={size=1x2 pad=0_0x1_1}, dim_labels=0bf1_i1o0->0b1f
}
%more (a: u32[], b: u32[]) -> u32[] {
  %a = u32[]{:T(128)} parameter(0)
  %b = u32[]{:T(128)} parameter(1)
  ROOT %s = u32[]{:T(128)} add(%a, %b)
}
%below (s: (u32[], bf16[8,1,4])) -> pred[] {
  %s = (u32[]{:T(128)}, bf16[8,1,4]{2,1,0}) parameter(0)
  %n = u32[]{:T(128)} constant(4)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %l = pred[] compare(%i, %n), direction=LT
}
%body (t: (u32[], bf16[8,1,4])) -> (u32[], bf16[8,1,4]) {
  %t = (u32[]{:T(128)}, bf16[8,1,4]{2,1,0}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %j = u32[]{:T(128)} get-tuple-element(%t), index=0
  %k = u32[]{:T(128)} fusion(%j, %two), kind=kLoop, calls=%more
  %w = bf16[8,1,4]{2,1,0} get-tuple-element(%t), index=1
  %m = (bf16[8,1,4]{2,1,0}, bf16[8,1,4]{2,1,0}, u32[], u32[]) collective-permute-start(%w), channel_id=3
  %d = bf16[8,1,4]{2,1,0} collective-permute-done(%m)
  %f = bf16[2,16,2,4]{3,1,2,0} fusion(%x, %d), kind=kOutput, calls=%dot
  ROOT %u = (u32[], bf16[8,1,4]) tuple(%k, %d)
}
ENTRY %main (x: bf16[2,16,8], w: bf16[8,1,4]) -> bf16[8,1,4] {
  %w = bf16[8,1,4]{2,1,0} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %i = u32[]{:T(128)} copy(%zero)
  %start = (u32[]{:T(128)}, bf16[8,1,4]{2,1,0}) tuple(%i, %w)
  %e = (u32[]{:T(128)}, bf16[8,1,4]{2,1,0}) while(%start), condition=%below, body=%body
}"""


def test_a_windowed_product_counts_in_every_pass():
    """A TPU splits a product into a loop that sends the parts of a kernel around; its unsigned counter goes by twos."""
    # Two passes; of the window's two places, one meets the array and the other padding.
    assert hlo.flops(WINDOWED) == 2 * (2 * (2 * 16) * 8 * (2 * 4))
    assert hlo.collectives(WINDOWED) == {"collective-permute": 2 * 2 * 8 * 4}


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        # Heads as a window over dilated axes: 2 x 32 products of [2048, 128] and [128, 2048].
        (
            "bf16[2,32,2048,2048]{2,3,1,0} convolution(%l, %r), "
            "window={size=2x32 stride=1x31 lhs_dilate=2x32}, dim_labels=0b1f_0o1i->01bf",
            2 * 2 * 32 * 2048 * 128 * 2048,
        ),
        ("bf16[2,32,2048,2048]{3,2,1,0} dot(%l, %r), lhs_batch_dims={0,2}, lhs_contracting_dims={3}, "
         "rhs_batch_dims={0,2}, rhs_contracting_dims={3}", 2 * 2 * 32 * 2048 * 128 * 2048),
        ("(f32[2,32,2048,2048]{3,2,1,0}, s8[64]{0}) custom-call(%l, %r), custom_call_target=\"__cublas$gemm\", "
         "backend_config={\"dot_dimension_numbers\":{\"lhs_contracting_dimensions\":[\"3\"]}}",
         2 * 2 * 32 * 2048 * 128 * 2048),
    ],
    ids=["convolution", "dot", "cublas"],
)  # fmt: skip
def test_products_of_any_form_are_counted(product, expected):
    lines = "%l = bf16[2,2048,32,128] parameter(0)", "%r = bf16[2,2048,32,128] parameter(1)", f"ROOT %y = {product}"
    text = "\n".join(["ENTRY %main (l: bf16[2], r: bf16[2]) -> bf16[2] {", *lines, "}"])
    assert hlo.flops(text) == expected


@pytest.mark.parametrize("counter", [jnp.int32, jnp.uint32, jnp.int16])
def test_loops_of_any_counter_count_every_pass(counter):
    def f(x: jax.Array) -> jax.Array:
        def step(state: tuple) -> tuple:
            i, x = state
            return i + counter(3), jnp.tanh(x @ x)

        return jax.lax.while_loop(lambda state: state[0] < counter(20), step, (counter(5), x))[1]

    text = jax.jit(f).lower(jnp.zeros((16, 16))).compile().as_text()
    for said in (text, re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)):  # also where the compiler notes nothing
        assert hlo.flops(said) == 5 * 2 * 16**3


def test_collectives_of_several_arrays_that_start_early_are_all_counted():
    lines = [
        "%a = ((f32[2,4]{1,0}, f32[8]{0}), (f32[16,4]{1,0}, f32[64]{0})) all-gather-start(%p, %q), dimensions={0}",
        "%b = (f32[8]{0}, f32[4]{0}) all-reduce-start(%d, %e), to_apply=%add",
    ]
    text = "\n".join(["ENTRY %main (p: f32[2,4]) -> f32[8] {", *lines, "}"])
    assert hlo.collectives(text) == {"all-gather": (16 * 4 + 64) * 4, "all-reduce": (8 + 4) * 4}


def test_a_device_of_a_slice_is_a_chip():
    """With libtpu 0.0.42, these options give as many devices as the slice has chips."""
    assert program._of_chips("v5e:2x4") == program._of_chips("v5p:2x2x1") == {}
    assert program._of_chips("v5e:1x1") == program._of_chips("v5p:1x1x1") == {"chips_per_host_bounds": (1, 1, 1)}
    assert program._of_chips("v4:2x2x1") == {"chip_config_name": "megacore"}


def test_what_a_tpu_compiler_says_is_read():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.50G of 15.75G hbm. Exceeded by 9.75G."
    assert program.needed_bytes(RuntimeError(said)) == int(25.5 * 2**30)
    assert program.needed_bytes(RuntimeError("something else")) is None


def test_ranges_and_the_line_through_two_sizes():
    work = roofline.Work(flops=4e9, bytes_moved=1e9)
    assert roofline.seconds(work, CHIP) == (4.0, 1.0)
    low, high = roofline.tokens_per_second(100, work, CHIP)
    assert (low, high) == (pytest.approx(100 * roofline.REACHED / 5), 25.0)
    sizes = (32, 600), (64, 1000)
    assert estimate.largest(*sizes, step=8, limit=1500) == 104  # 200 + 12.5 a row
    assert estimate.largest(*sizes, step=8, limit=100) == 0


def bert(folder: Path) -> list[str]:
    from transformers import BertConfig

    BertConfig(vocab_size=1024, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
               max_position_embeddings=64).save_pretrained(folder)  # fmt: skip
    return ["--config.student.layers=1", "--config.data.max_length=64"]


def qwen3(folder: Path) -> list[str]:
    from transformers import Qwen3Config

    Qwen3Config(vocab_size=1024, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=64, intermediate_size=384, max_position_embeddings=64, tie_word_embeddings=True,
                ).save_pretrained(folder)  # fmt: skip
    one_by_one = "student.remat=", "student.scan=False", "teacher.scan=False"
    values = "student.name=", "student.layers=1", "loss.tokens=all", "data.max_length=64", "data.buckets=(64,)"
    return [f"--config.{value}" for value in (*one_by_one, *values)]


# (recipe, configuration, products of a token in a layer beside attention, width of all heads, products in the head's
# transform, parameters of the student in large tables and kernels, and in leaves too small to be split, hidden states
# that are summed over `tensor`: two in a layer, for the embeddings of both models, and backward one for each product
# that reads hidden states)
BY_HAND = {
    "bert": ("bert_mlm", bert, 4 * 128**2 + 2 * 128 * 512, 128, 128**2,
             1024 * 128 + 12 * 128**2 + 128**2, (64 + 2 + 9 + 3) * 128 + 512 + 1024, 3 * 2 + 2 + 5),
    "qwen3": ("qwen3_kd", qwen3, 2 * 128 * 256 + 2 * 128 * 128 + 3 * 128 * 384, 256, 0,
              1024 * 128 + 2 * 128 * 256 + 2 * 128 * 128 + 3 * 128 * 384, 2 * 64 + 3 * 128, 3 * 2 + 2 + 6),
}  # fmt: skip


def moved_by_hand(
    mesh: dict[str, int], products: int, transform: int, small: int, sums: int, *, tokens: int, pieces: int
) -> dict[str, float]:
    """Bytes of each kind of collective: two layers of the teacher, one of the student; eight devices, words x 128.

    A CPU's compiler adds gradients up in every micro-batch, over fsdp and then over data, and gathers a kernel once.
    """
    fsdp, tensor = mesh["fsdp"], mesh.get("tensor", 1)
    data, words = 8 // fsdp // tensor, 128 * 1024
    kernels = products + transform
    if fsdp == tensor == 1:  # a tied head has a gradient of its own
        return {"all-reduce": pieces * 4 * (kernels + 2 * words + small)}
    twice = 1 + (data > 1) / fsdp  # a sum over fsdp, and one of the shard over data
    hidden = 4 * 128 * tokens / (data * fsdp)
    gradients = pieces * 4 * ((kernels + words) / tensor * twice + small)
    # The kernel of a head's transform, which `tensor` splits too, is put together from halves.
    gathered = (3 * products + 2 * words) / tensor + 2 * transform * (1 if tensor == 1 else 1 + 1 / tensor)
    return {
        "all-gather": 4 * gathered + 4 * tokens / data,  # and the ids, for the columns of embeddings that fsdp splits
        "all-reduce": gradients + sums * hidden * (tensor > 1),
        "all-to-all": 3 * hidden,  # embeddings go home in both models, and the gradient of the student's goes back
    }


MESHES = ({"fsdp": 1}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2})
STAND_FOR_ALL = (("qwen3", MESHES[0]), ("bert", MESHES[1]), ("qwen3", MESHES[2]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), grids.everyday(itertools.product(BY_HAND, MESHES), *STAND_FOR_ALL))
def test_figures_are_those_of_arithmetic_by_hand(tmp_path, name, mesh):
    recipe, make, products, heads, transform, large, small, sums = BY_HAND[name]
    rows, length, pieces = 64, 64, 2
    settings = {"teacher.name": tmp_path, "train.batch_size": rows, "train.accumulation": pieces, "mask.group": 1}
    settings |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    overrides = [*make(tmp_path), *(f"--config.{key}={value}" for key, value in settings.items())]
    target = plan.read_target(str(CONFIGS / f"{recipe}.py"), overrides, topology="")
    (found,) = program.measure(target).values()
    tokens = rows * length / 8
    layer = 2 * tokens * products + 4 * tokens * length * heads
    head = 2 * tokens * (transform + 128 * 1024)
    # Two layers of the teacher; the student's layer and head forward, and twice as much backward.
    assert found.work is not None and found.work.flops == pytest.approx(5 * layer + 4 * head, rel=0.05)
    by = mesh["fsdp"] * mesh.get("tensor", 1)
    moved = moved_by_hand(mesh, products, transform, small, sums, tokens=rows * length, pieces=pieces)
    assert found.collectives.keys() == moved.keys()
    assert found.collectives == pytest.approx(moved, rel=0.05)
    # Parameters and two moments in float32.
    state = program.kept_bytes(target._replace(pair=target.pair._replace(teacher_params={})))
    assert state == pytest.approx(12 * (large / by + small), rel=0.05)
    assert found.memory.arguments == pytest.approx(program.kept_bytes(target) + 2 * rows / 8 * length * 5, rel=0.05)


@pytest.mark.slow
def test_the_line_through_few_layers_is_the_whole_model(tmp_path, monkeypatch):
    overrides = [*bert(tmp_path), f"--config.teacher.name={tmp_path}", "--config.mesh.fsdp=4"]
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    overrides += ["--config.student.layers=4"]
    target = plan.read_target(str(CONFIGS / "bert_mlm.py"), overrides, topology="")
    monkeypatch.setattr(depth, "WORTH", 2.0)
    line = depth.line_of(target)
    assert line == ((2, 3, 6), (2, 3, 4))
    found = depth.measure_by_depth(target, line)
    assert found is not None
    reckoned, whole = found["update"], program.measure(target)["update"]
    assert reckoned.work is not None and whole.work is not None
    assert reckoned.work.flops == whole.work.flops and reckoned.collectives == whole.collectives
    assert reckoned.memory.arguments == whole.memory.arguments
    assert reckoned.memory.temporaries == pytest.approx(whole.memory.temporaries, rel=0.05)
    assert reckoned.work.bytes_moved == pytest.approx(whole.work.bytes_moved, rel=0.02)


@pytest.mark.slow
def test_layers_in_a_loop_do_not_change_the_work(tmp_path):
    """XLA counts the body of a loop once. Both ways are rematerialised."""
    tiny = tiny_causal.make(tmp_path, kind="qwen3", head_dim=8, num_key_value_heads=1)
    plain = run(tiny, "--config.student.remat=full")
    loop = run(tiny, "--config.student.scan=True", "--config.teacher.scan=True")
    work = [number(r"work a device: ([\d.e-]+) TFLOP", out) for out in (plain, loop)]
    assert work[0] == pytest.approx(work[1], rel=0.02) and work[1] > 0
