"""What a forward pass keeps for its backward pass: bytes a token, term by term.

Letters: D hidden size, I MLP size, V vocabulary. A test compares the terms with what autograd saves.
"""

from dream_lightning.plan.setting import Setting

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EAGER_DEQUANTIZATION = 9 + 9 / 16  # bytes a weight at its peak, 4 bits to float8, not compiled
_SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # layers that read the same input


def layer_keeps(s: Setting) -> dict[str, int]:
    """Bytes a token that one decoder layer keeps when it is not recomputed.

    With compiled layers at most: the compiler may choose to keep less. Attention is counted as its kernels for a GPU
    keep it, without an L² term.
    """
    c = s.config
    hidden, inner, key_value = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
    keeps = {
        "q, k, v": s.compute * (hidden + 2 * key_value),
        "attention output": s.compute * hidden + 4 * c.num_attention_heads,  # and the softmax's log-sums
    }
    if s.lora is not None:
        keeps["A's outputs"] = s.compute * s.lora.rank * len(s.lora.target_names)
    if s.compiled:  # what is cheap is computed again: inputs of linear layers, norms, silu, the sum after attention
        keeps["input, o_proj's output, 1/rms"] = s.stream * hidden + s.compute * hidden + 2 * 4
        keeps["gate, up"] = 2 * s.compute * inner
        return keeps
    keeps["inputs of linear layers"] = _inputs(s)
    # The float32 input of each norm (the residual stream itself, where that is float32) and 1/rms.
    keeps["norms"] = 2 * (4 * hidden + 4)
    keeps["gate, silu(gate), up"] = 3 * s.compute * inner
    if s.lora is None:
        keeps["quotients, for the norms' weights"] = 2 * s.stream * hidden
    return keeps


def _inputs(s: Setting) -> int:
    """Bytes a token of the inputs that trained layers, or adapters, need for their gradients.

    q, k, v share one, gate and up another; o_proj reads the attention output, which is kept anyway. Autocast
    casts a float32 input for each reader anew.
    """
    hidden, inner = s.config.hidden_size, s.config.intermediate_size
    targets = ALL_TARGETS if s.lora is None else s.lora.target_names
    read = [t for t in targets if t != "o_proj"] if s.casts else {_SHARED.get(t, t) for t in targets} - {"o_proj"}
    return s.compute * sum(inner if name == "down_proj" else hidden for name in read)


def layer_temporaries(s: Setting) -> int:
    """Bytes a token that the backward pass of a layer holds beside what was kept: at its peak, in the MLP.

    Three gradients as wide as the MLP: of the product's two factors, and of gate. And twice that of the residual
    stream.
    """
    return 3 * s.compute * s.config.intermediate_size + 2 * s.stream * s.config.hidden_size


def float8_temporaries(s: Setting) -> float:
    """Bytes that the widest product in 8-bit floats takes beyond one in bfloat16.

    Its gradient in 8 bits; uncompiled also twice in float32, and before that 4-bit weights with their levels and codes.
    Compiled weights take no more: float8, and again transposed, instead of bfloat16.
    """
    if not s.float8_products:
        return 0
    wide = s.tokens * s.config.intermediate_size
    if s.compiled:
        return wide
    weights = s.config.hidden_size * s.config.intermediate_size * s.four_bit
    return max(9 * wide, (EAGER_DEQUANTIZATION - s.compute) * weights)


def checkpoint_keeps(s: Setting) -> int:
    """Bytes a token that a recomputed layer keeps: its input."""
    return s.stream * s.config.hidden_size


def top_keeps(s: Setting) -> int:
    """Bytes a token between the last layer and the loss: the last norm, the masked tokens' hidden states.

    A frozen head keeps their gradient, which it finds in its forward pass, while they themselves are still there.
    """
    hidden = s.config.hidden_size
    norm = 4 * hidden + 4 + (s.stream * hidden if s.lora is None else 0)
    return norm + s.stream * hidden * (1 if s.lora is None else 2)


def logits_bytes(s: Setting, *, backward: bool) -> int:
    """What one chunk of the head makes of its logits.

    At most every token of a micro-batch is masked, so a chunk has `Setting.chunk` rows, or fewer if there are no more.

    | head    | pass     | plain, bytes a logit                                     | compiled                     |
    |---------|----------|----------------------------------------------------------|------------------------------|
    | trained | forward  | float32 logits, log-softmax: 8                           | 16-bit logits: 2, and 2      |
    |         | backward | and their gradient: 12                                   | and their gradient: 4, and 2 |
    | frozen  | forward  | logits in 16 bits and float32, log p, p, hits as bool    | logits, gradient: 4          |
    |         |          | and float32, gradient: 23                                |                              |
    |         | backward | 0                                                        | 0                            |
    """
    rows = min(s.chunk, s.tokens) if not s.compiled else s.chunk
    if s.lora is not None:
        plain, compiled = (0, 0) if backward else (19 + s.compute * 2, 2 * s.compute)
    else:
        plain, compiled = (12, 3 * s.compute) if backward else (8, 2 * s.compute)
    return (compiled if s.compiled else plain) * rows * s.config.vocab_size
