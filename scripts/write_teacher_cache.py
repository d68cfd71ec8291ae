"""Writes a cache of a PyTorch teacher that a run reads as `teacher.cache`, by the format in docs/cache.md.

    pip install torch
    python scripts/write_teacher_cache.py --config configs/cached_kd.py --out cache/ --k 32 \
        --config.teacher.name=gpt2-medium --config.data.path=train.csv

Any program can write such a folder. This one takes the batches of the run from jaxdistill, so that prompts, masks and
documents are the run's, and the rest from PyTorch and NumPy alone: keys, answers and files are made below. It keeps the
k most likely words and the probability of all others, and writes one shard.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

from jaxdistill import recipe
from jaxdistill.config import Config
from jaxdistill.data import text as texts
from jaxdistill.data.pipeline import batches_in_order

ROWS = 16  # that the teacher sees at a time


def examples(config: Config, tokenizer: object, *, causal: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, whether each token is kept) of all examples of a run: its rows, or the documents' parts of packed ones."""
    source = texts.open_text(config.data)
    text = texts.prepare_text(config.data, source, tokenizer, causal=causal, report=print)
    for make in texts.masks_of_content(text, config.data, config.mask):
        whole = slice(0, ROWS)
        for batch in batches_in_order(make, text.train, config.data, batch_size=ROWS, limit=0, own_rows=whole):
            kept = batch["attention_mask"] if config.loss.tokens == "all" else batch["label_mask"]
            segments = batch.get("segment_ids", batch["attention_mask"].astype(int))
            for ids, is_kept, segment in zip(batch["input_ids"], kept, segments, strict=True):
                for number in range(1, segment.max() + 1):
                    part = segment == number
                    if is_kept[part].any():
                        yield ids[part], is_kept[part]


def answers(model: torch.nn.Module, ids: np.ndarray, kept: np.ndarray, *, k: int, words: int, temperature: float):
    """(words, log p at temperature 1, log of the tail at the temperature) of the kept tokens of an example."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0, torch.tensor(kept), :words]
    log_p = torch.log_softmax(logits.float(), dim=-1)
    best = log_p.topk(k, dim=-1)
    outside = torch.log_softmax(logits.float() / temperature, dim=-1).scatter(-1, best.indices, -torch.inf)
    return best.indices.numpy(), best.values.numpy(), torch.logsumexp(outside, dim=-1).numpy()


def as_stored(indices: np.ndarray, words: int) -> np.ndarray:
    if words <= 65_536:
        return indices.astype("<u2")
    return np.ascontiguousarray(indices.astype("<u4")).view("u1").reshape(*indices.shape, 4)[..., :3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--k", type=int, default=32)
    flags, overrides = parser.parse_known_args()
    config = recipe.read(flags.config, overrides)
    teacher = transformers.AutoConfig.from_pretrained(config.teacher.name, trust_remote_code=False)
    causal = not any(name.endswith("ForMaskedLM") for name in teacher.architectures or ())
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    model = auto.from_pretrained(config.teacher.name, trust_remote_code=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.teacher.name, trust_remote_code=False)
    words = len(tokenizer)
    sizes = {"k": min(flags.k, words), "words": words, "temperature": config.loss.temperature}

    found: dict[bytes, tuple] = {}
    for ids, kept in examples(config, tokenizer, causal=causal):
        key = hashlib.sha256(ids.astype("<i4").tobytes() + kept.astype("u1").tobytes()).digest()[:16]
        if key not in found:
            found[key] = len(ids), int(kept.sum()), answers(model, ids, kept, **sizes)

    shard = flags.out / "shard-torch-00000"
    part = flags.out / "part"
    part.mkdir(parents=True)
    columns = {
        "keys": np.frombuffer(b"".join(found), "u1"),
        "lengths": np.array([length for length, _, _ in found.values()], "<i4"),
        "counts": np.array([count for _, count, _ in found.values()], "<i4"),
        "words": as_stored(np.concatenate([of[0] for *_, of in found.values()]), words),
        "log_probs": np.concatenate([of[1] for *_, of in found.values()]).astype("<f2"),
        "tails": np.concatenate([of[2] for *_, of in found.values()]).astype("<f4"),
    }
    for name, values in columns.items():
        (part / f"{name}.bin").write_bytes(values.tobytes())
    prints = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in part.iterdir()}
    (part / "shard.json").write_text(json.dumps({"examples": len(found), "fingerprints": prints}))
    shutil.move(part, shard)
    teacher.save_pretrained(flags.out / "teacher")
    tokenizer.save_pretrained(flags.out / "teacher")
    meta = {
        "format_version": 1,
        "kind": "topk",
        "tokens": "all" if config.loss.tokens == "all" else "labels",
        "words": words,
        "temperatures": [config.loss.temperature],
        "k": sizes["k"],
        "causal": causal,
        "teacher": {"name": config.teacher.name, "revision": config.teacher.revision},
    }
    (flags.out / "meta.json").write_text(json.dumps(meta, indent=2))
    print(f"{len(found):,} examples in {flags.out}")


if __name__ == "__main__":
    main()
