"""A plan as text: for `python -m dream_lightning plan`, and for the error when the memory did not suffice."""

from dream_lightning.plan.advice import changes, faster
from dream_lightning.plan.environment import environment, gpus
from dream_lightning.plan.memory import GAPS, GIB, RESERVE, Plan, make_plan
from dream_lightning.plan.setting import Setting

_PARTS = {
    "weights": "as they are stored{sharded}",
    "copies": "{copies}",
    "optimizer": "states on the GPU{sharded}",
    "gradients": "{accumulated}{sharded}",
    "activations": "what {layers} layers keep{recomputed}",
    "logits": "of {chunk} masked tokens at a time",
    "temporaries": "of one layer's backward pass, or of the optimiser's step",
}


def report(setting: Setting, gpu_gib: float | None) -> str:
    """The environment, the plan, and what to change where it does not fit.

    Args:
        gpu_gib: memory of the card to plan for; None takes this machine's.
    """
    here = gpus()
    gpu_gib, card = (gpu_gib, "a card") if gpu_gib else (here[0].total, here[0].name) if here else (None, "")
    lines = [f"{name + ':':<11} {value}" for name, value in environment().items()]
    plan = make_plan(setting)
    lines += ["", *describe(plan), ""]
    if gpu_gib is None:
        lines.append("No GPU is visible: --gpu_memory_gib 24 says whether this fits a card of that size.")
    elif plan.needed_gib <= gpu_gib:
        lines += [f"It fits {card} of {gpu_gib:.1f} GiB.", *_faster(setting, gpu_gib)]
    else:
        lines += [f"It does NOT fit {card} of {gpu_gib:.1f} GiB.", *advice(setting, gpu_gib)]
    return "\n".join(lines)


def _faster(setting: Setting, gpu_gib: float) -> list[str]:
    if (found := faster(setting, gpu_gib)) is None:
        return []
    options, plan = found
    return [
        f"So it does with {options}, which is faster: {plan.needed_gib:.2f} GiB needed, {plan.setting.recomputed} "
        f"layers recomputed in place of {setting.recomputed} (recomputing all is about a third slower)."
    ]


def describe(plan: Plan) -> list[str]:
    """The plan by part, at its peak."""
    s, p = plan.setting, plan.parameters
    layers, recomputed = s.config.num_hidden_layers, s.recomputed
    words = {
        "copies": "gathered from the other GPUs"
        if s.gpus > 1
        else ("of one weight, taken out of 4 bits" if s.four_bit else "in bfloat16, of float32 weights"),
        "sharded": f", 1/{s.gpus} of them on each GPU" if s.gpus > 1 else "",
        "accumulated": "kept between micro-batches" if s.accumulation > 1 else "the last step's, or this one's so far",
        "layers": layers,
        "recomputed": f", {recomputed} of them only their input; and one recomputed layer" if recomputed else "",
        "chunk": min(s.chunk, s.tokens),
    }
    kind = "all weights" if s.lora is None else f"adapters of rank {s.lora.rank} on {', '.join(s.lora.target_names)}"
    base = "nf4" if s.four_bit else str(s.dtype).removeprefix("torch.")
    lines = [
        f"{p.total:,} parameters ({base}), {p.trainable:,} train ({100 * p.trainable / p.total:.4f} %): {kind}",
        f"{s.rows} × {s.length:,} tokens a micro-batch and GPU" + (f", sharded over {s.gpus} GPUs" * (s.gpus > 1)),
        "",
        f"Peak while training, {plan.peak_moment}:",
    ]
    larger = " or, if that is more, a step of the optimiser with all it pages" if plan.optimizer.paged else ""
    for part, size in vars(plan.peak).items():
        if size >= GIB / 200:
            lines.append(f"  {part:<12} {size / GIB:7.2f} GiB   {_PARTS[part].format(**words)}")
    lines += [
        f"  {'sum':<12} {plan.peak_gib:7.2f} GiB   what torch.cuda.max_memory_allocated will say",
        f"  {'needed':<12} {plan.needed_gib:7.2f} GiB   the sum{larger}, {GAPS:.0%} between the allocator's "
        f"blocks, and {RESERVE:.0f} GiB for the CUDA context",
    ]
    if plan.optimizer.paged:
        lines.append(
            f"  {'paged':<12} {plan.optimizer.paged / GIB:7.2f} GiB   optimiser states in managed memory, not in the "
            "sum: on the GPU while it steps, lent out while activations need the room"
        )
    lines.append("Loading, validation and generation are not counted.")
    return lines


def advice(setting: Setting, gpu_gib: float) -> list[str]:
    """What to change, a line each."""
    found = changes(setting, gpu_gib)
    lines = ["What to change, in this order, each on top of those above:"] if found else []
    for options, plan in found:
        verdict = "fits" if plan.needed_gib <= gpu_gib else "does not fit"
        lines.append(f"  {plan.needed_gib:7.2f} GiB needed, {verdict}: {options}")
    if not any(plan.needed_gib <= gpu_gib for _, plan in found):
        lines.append("None of this suffices: take a larger GPU, or a smaller model.")
    return lines


def out_of_memory(setting: Setting, error: Exception) -> str:
    """For the user whose run ended so: what was needed, what to change."""
    here = gpus()
    total = here[0].total if here else make_plan(setting).needed_gib * 0.99
    first = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return "\n".join(
        [
            f"the GPU's memory did not suffice ({first}). Checkpoints that were written stay good: --ckpt_path last "
            "goes on from the newest.",
            *describe(make_plan(setting)),
            *advice(setting, total),
        ]
    )
