"""The reference's distillation step in PyTorch: what the parity tests hold jaxdistill to.

Written from the description of the DistilBERT distiller (Sanh et al. 2019), not from its code, and with nothing of
jaxdistill in it. The models are transformers' torch classes in float64, so that all that is left between the two
sides is float32 rounding of ours.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Tensors = Mapping[str, torch.Tensor]
IGNORED = -100


def load_model(config: Any, state_dict: Tensors, *, train: bool) -> Any:
    """The torch masked-LM class of `config` in float64. Eager attention, the one that returns its probabilities.

    Raises:
      RuntimeError: a tensor that the class has no place for, or one that it misses and does not tie.
    """
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager").double()
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    tied = tuple(model._tied_weights_keys)  # tails of names
    if unexpected or not all(name.endswith(tied) for name in missing):
        raise RuntimeError(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.train(train)  # dropout is off by the config


def forward(model: Any, batch: Tensors) -> Any:
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"].long(),
        output_hidden_states=True,
        output_attentions=True,
    )


def terms(
    student: Any,
    teacher: Any,
    batch: Tensors,
    *,
    temperature: float,
    restrict_ce_to_mask: bool,
    layer_map: Sequence[tuple[int, int]],
    projections: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Every loss of one micro-batch, each the mean over its own tokens.

    Args:
      student: torch MaskedLMOutput with hidden states and attentions.
      teacher: same.
      batch: labels hold IGNORED wherever nothing is predicted.
      layer_map: (student, teacher) indexes into hidden_states.
      projections: student width x teacher width, by "student>teacher"; absent where the widths agree.
    """
    attended = batch["attention_mask"].bool()
    labels = batch["labels"]
    selected = labels > -1 if restrict_ce_to_mask else attended
    s, t = student.logits[selected], teacher.logits[selected]

    log_q, p = F.log_softmax(s / temperature, dim=-1), F.softmax(t / temperature, dim=-1)
    ce = temperature**2 * F.kl_div(log_q, p, reduction="none").sum() / len(s)
    mlm = F.cross_entropy(student.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    mse = (s - t).square().sum() / len(s)

    def hidden(pair: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = student.hidden_states[pair[0]][attended], teacher.hidden_states[pair[1]][attended]
        kernel = projections.get(f"{pair[0]}>{pair[1]}")
        return (a if kernel is None else a @ kernel), b

    def cosine(pair: tuple[int, int]) -> torch.Tensor:
        a, b = hidden(pair)
        return F.cosine_embedding_loss(a, b, a.new_ones(len(a)))

    def attention(pair: tuple[int, int]) -> torch.Tensor:
        a, b = student.attentions[pair[0] - 1], teacher.attentions[pair[1] - 1]
        if a.shape[1] != b.shape[1]:
            a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
        divergence = F.kl_div(a.clamp_min(1e-30).log(), b, reduction="none")  # 0 at padded keys, where b is 0
        return divergence.sum(-1).mean(1)[attended].mean()

    last = len(student.hidden_states) - 1, len(teacher.hidden_states) - 1
    mean = lambda values: torch.stack(list(values)).mean()  # noqa: E731
    return {
        "ce": ce,
        "mlm": mlm,
        "mse": mse,
        "cos": cosine(last),
        "hidden_mse": mean(F.mse_loss(*hidden(pair)) for pair in layer_map),
        "hidden_cos": mean(cosine(pair) for pair in layer_map),
        "attention": mean(attention(pair) for pair in layer_map if min(pair) > 0),
    }


def total(values: Tensors, weights: Mapping[str, float]) -> torch.Tensor:
    return torch.stack([weight * values[name] for name, weight in weights.items()]).sum()


def learning_rate(step: int, *, peak: float, steps: int, warmup: float) -> float:
    """Linear from 0 over ceil(warmup * steps) updates, then linear to 0 at `steps`; `step` counts from 0."""
    rise = math.ceil(warmup * steps)
    return peak * (step / rise if step < rise else max(0.0, (steps - step) / max(1, steps - rise)))


def adamw(parameters: Mapping[str, torch.nn.Parameter], *, weight_decay: float) -> torch.optim.Optimizer:
    """Betas and eps of the reference; no decay of biases and layer norms, whatever their names."""
    decayed = [x for name, x in parameters.items() if x.ndim > 1]
    plain = [x for name, x in parameters.items() if x.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6)


def update(
    optimizer: torch.optim.Optimizer, losses: Sequence[torch.Tensor], *, learning_rate: float, clip: float
) -> float:
    """One optimizer step from the mean of the micro-batches' losses; returns the gradient norm before clipping."""
    optimizer.zero_grad()
    for loss in losses:
        (loss / len(losses)).backward()
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return float(norm)
