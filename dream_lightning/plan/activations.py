"""What a forward pass keeps for its backward pass: bytes a token, term by term.

Letters: D hidden size, I MLP size, V vocabulary. A test compares the terms with what autograd saves.
"""

import torch

from dream_lightning.plan.setting import Setting


def layer_keeps(s: Setting) -> dict[str, int]:
    """Bytes a token that one decoder layer keeps when it is not recomputed.

    Attention is counted as the flash kernel keeps it, without an L² term. DoRA's and dropout's extra is not counted.
    """
    c = s.config
    hidden, inner, key_value = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
    keeps = {
        # the float32 input of each norm (the residual stream itself, where that is float32) and 1/rms
        "norms": 2 * (4 * hidden + 4),
        "q, k, v": s.compute * (hidden + 2 * key_value),
        "attention output": s.compute * hidden + 4 * c.num_attention_heads,  # and the softmax's log-sums
        "gate, silu(gate), up": 3 * s.compute * inner,
    }
    if s.lora is None:
        keeps["quotients, for the norms' weights"] = 2 * s.stream * hidden
        # A trained weight needs its input; q, k, v share one, gate and up another, but autocast casts for each anew.
        # o_proj reads the attention output, which is kept anyway.
        readers = 5 if s.casts else 2
        keeps["inputs of linear layers"] = s.compute * (readers * hidden + inner)
        return keeps
    width = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), hidden)
    width["down_proj"] = inner
    targets = s.lora.target_names
    if s.mixed or s.dtype != torch.float32:  # A reads a copy of its own: bfloat16, or float32 as A is
        read = sum((2 if s.mixed else 4) * width[t] for t in targets)
    else:
        shared = {"q_proj": "q", "k_proj": "q", "v_proj": "q", "gate_proj": "gate", "up_proj": "gate"}
        inputs = {shared.get(t, t): width[t] for t in targets if t != "o_proj"}
        read = 4 * sum(inputs.values())
    keeps["inputs of adapters"] = read
    keeps["A's outputs"] = (2 if s.mixed else 4) * s.lora.rank * len(targets)
    return keeps


def layer_temporaries(s: Setting) -> int:
    """Bytes a token that the backward pass of a layer holds beside what was kept: at its peak, in the MLP.

    Three gradients as wide as the MLP (of the product's two factors and of gate); or, where down_proj has an adapter
    that computes in float32, the product's gradient from the weight and from the adapter with its casts. And the
    gradient of the residual stream, twice.
    """
    inner = s.config.intermediate_size
    wide = 3 * s.compute * inner
    if s.lora is not None and "down_proj" in s.lora.target_names and s.mixed:
        wide = max(wide, (2 + 2 + 4 + 2) * inner)
    return wide + 2 * s.stream * s.config.hidden_size


def checkpoint_keeps(s: Setting) -> int:
    """Bytes a token that a recomputed layer keeps: its input."""
    return s.stream * s.config.hidden_size


def top_keeps(s: Setting) -> int:
    """Bytes a token between the last layer and the head: the last norm, and the hidden states of the masked tokens."""
    hidden = s.config.hidden_size
    return 4 * hidden + 4 + (s.stream * hidden if s.lora is None else 0) + s.stream * hidden


def logits_bytes(s: Setting, *, backward: bool) -> int:
    """Float32 logits of one chunk of the head: forward the logits and their log-softmax, backward also the gradient.

    At most every token of a micro-batch is masked, so a chunk has `head_chunk` rows, or fewer if there are no more.
    """
    rows = min(s.head_chunk, s.tokens)
    return (3 if backward else 2) * 4 * rows * s.config.vocab_size
