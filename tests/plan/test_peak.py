"""The plan's peak against a real step's, which torch's profiler counts on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dream_lightning.adapters import LoraParams, add_lora
from dream_lightning.diffusion.denoiser import features
from dream_lightning.diffusion.head import token_nll
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.plan import Setting, make_plan

CONFIG = DreamConfig(
    vocab_size=4000,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    mask_token_id=90,
    pad_token_id=91,
    bos_token_id=91,
    eos_token_id=91,
)


def adamw(groups):
    return torch.optim.AdamW(groups, foreach=False)  # as on the CPU


FULL = Setting(CONFIG, rows=2, length=512, optimizer=adamw, head_chunk=128)
LORA = replace(FULL, dtype=torch.bfloat16, lora=LoraParams(targets="all-linear"))


def measured(s: Setting) -> int:
    """Bytes at the peak of the second step: what stays between steps, and what the profiler sees on top."""
    model = DreamModel(CONFIG).to(s.dtype).train()
    if s.lora is not None:
        add_lora(model, s.lora)
    if s.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.model.checkpointed_layers = s.recomputed
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = s.optimizer(trained)
    x_t = torch.arange(s.tokens).reshape(s.rows, s.length) % 80
    is_masked = torch.ones_like(x_t, dtype=torch.bool)

    def step():
        """In Lightning's order: the last step's gradients are freed after the forward pass."""
        for micro_batch in range(s.accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=s.mixed):
                loss = token_nll(features(model, x_t, is_masked), model.lm_head, x_t[is_masked], chunk=s.chunk)
            if micro_batch == 0:
                optimizer.zero_grad()
            loss.sum().backward()
            del loss
        optimizer.step()

    step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    now = peak = sum(t.nbytes for t in [*model.parameters(), *(p.grad for p in trained), *states])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "setting",
    [
        FULL,
        replace(FULL, checkpointed=False),
        replace(FULL, checkpointed=3),
        replace(FULL, accumulation=2),
        replace(FULL, mixed=False),
        replace(FULL, dtype=torch.bfloat16),
        LORA,
        replace(LORA, checkpointed=False),
        replace(LORA, lora=LoraParams(targets=["q_proj", "v_proj"])),
    ],
    ids=["full", "kept", "half", "accumulated", "float32", "bfloat16", "lora", "lora kept", "lora q, v"],
)
def test_within_15_percent_of_a_real_step(setting):
    assert make_plan(setting).peak.total == pytest.approx(measured(setting), rel=0.15)
