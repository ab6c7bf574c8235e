"""The native Dream: a bidirectional transformer with the official parameter names.

Axis letters as in `dream_lightning/batch.py` and `attention.py`.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dream_lightning.batch import DocumentBounds
from dream_lightning.errors import UserError, reading
from dream_lightning.model.attention import Attention, Span, make_attention, scaled_dot_product, within
from dream_lightning.model.configuration import DreamConfig
from dream_lightning.model.kv_cache import KeyValueCache, LayerCache, store
from dream_lightning.model.loading import check_finite, check_weights, local_folder


class DreamRMSNorm(nn.Module):
    """x / rms(x) · weight; the quotient in float32, cast back before the weight is applied."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [..., D]
        h = x.float()
        # A product, not pow(2): the CPU's pow costs a seventh of a training step of the tiny model.
        return self.weight * (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class DreamMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., D]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DreamAttention(nn.Module):
    """Grouped-query attention. Bias on q, k and v only."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Attention | None,
        cache: LayerCache | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """[B, L, D] → [B, W, D], at the columns of the span."""
        return self.o_proj(self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), rotation, mask, cache, span))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Attention | None,
        cache: LayerCache | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """Queries [B, L, H · E], keys and values [B, L, K · E] → the heads' outputs [B, W, H · E]."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))  # [B, H or K, L, E]
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = store(cache, k, v)
        out = scaled_dot_product(q[:, :, within(span)], k, v) if mask is None else mask.attend(q, k, v, span)
        return out.transpose(1, 2).flatten(2)  # [B, W, H · E]


class DreamDecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn = DreamAttention(config)
        self.mlp = DreamMLP(config)
        self.input_layernorm = DreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DreamRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Attention | None,
        cache: LayerCache | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """[B, L, D] → [B, W, D]."""
        x = x[:, within(span)] + self.self_attn(self.input_layernorm(x), rotation, mask, cache, span)
        return x + self.mlp(self.post_attention_layernorm(x))


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, L, E] of the rotary embedding, computed in float32 and cast to `dtype`."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * (1.0 / theta**exponent)  # [B, L, E/2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class DreamRotaryEmbedding(nn.Module):
    """`rotary_angles` as a module, so that it can be compiled as the layers are."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return rotary_angles(position_ids, self.head_dim, self.theta, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, the rotate-half form. Shapes [B, H, L, E]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class DreamPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about Dream."""

    config_class = DreamConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DreamDecoderLayer",)
    _supports_sdpa = True


class DreamBaseModel(DreamPreTrainedModel):
    """Token ids → hidden states."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        # As in the authors' code the padding row, which is also eos, gets no gradient.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DreamDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = DreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = DreamRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.checkpointed_layers = config.num_hidden_layers  # the first n, with gradient checkpointing
        self.make_attention = make_attention  # attention_mask → what all layers share
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | DocumentBounds | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        columns: Tensor | None = None,
        span: Span | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [B, L, D] after the last norm. See `DreamModel.forward`.

        Args:
            cache: KV cache of L columns, without gradients only. `input_ids` and `position_ids` then hold the `columns`
                alone, whose keys and values are computed and stored; those of the other columns come from the cache.
                `attention_mask` is None or [B, L], and the result is [B, W, D].
            columns: [W] int64, with a cache.
            span: first column and the one after the last: only their hidden states [B, W, D] are returned, and the last
                layer computes no others. With neither a cache nor a mask of another shape than [B, L].
            rotation: what `rotary` returns for the position ids, which are then not used.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.embed_tokens(input_ids)  # [B, L, D]
        options = {"training": self.training} | ({"causal": True} if self.config.causal else {})
        mask = self.make_attention(attention_mask, x, columns, **options)
        rotation = rotation or self.rotary(position_ids, x.dtype)
        for i, layer in enumerate(self.layers):
            if cache is not None:
                x = layer(x, rotation, mask, cache.of_layer(i, columns))
            elif self.gradient_checkpointing and self.training and i < self.checkpointed_layers:
                x = self._gradient_checkpointing_func(layer.__call__, x, rotation, mask)
            elif span is not None and i == len(self.layers) - 1:
                x = layer(x, rotation, mask, None, span)
            else:
                x = layer(x, rotation, mask)
        return self.norm(x)

    def new_cache(self, rows: int, length: int) -> KeyValueCache:
        """An empty KV cache for [rows, length] ids; the first forward has to compute every column."""
        c, weight = self.config, self.embed_tokens.weight
        shape = (rows, c.num_key_value_heads, length, c.head_dim)
        return KeyValueCache(len(self.layers), shape, dtype=weight.dtype, device=weight.device)


class DreamModel(DreamPreTrainedModel):
    """Dream with its head: token ids → logits, **unshifted**, as the authors return them.

    The logits at position i − 1 predict the token at position i; see `dream_lightning.diffusion.denoiser`.
    """

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | DocumentBounds | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> MaskedLMOutput | tuple[Tensor]:
        """Logits [B, L, V] of every position.

        Args:
            input_ids: [B, L] int64.
            attention_mask: None (everything is attended); bool or int [B, L], nonzero = a real token; bool
                [B, 1, L, L], True = may attend; or the DocumentBounds of packed rows.
            position_ids: [B, L] or [1, L] int64; 0 … L − 1 by default.
            labels: refused.

        Raises UserError if `labels` are given, or a mask has another shape or type.
        """
        if labels is not None:
            raise UserError(
                "DreamModel computes no loss from labels: use dream_lightning.DreamModule, or masked_nll_loss of "
                "dream_lightning.diffusion"
            )
        logits = self.lm_head(self.model(input_ids, attention_mask, position_ids))
        return MaskedLMOutput(logits=logits) if return_dict else (logits,)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, *args: Any, **kwargs: Any) -> "DreamModel":
        """Load an official folder (single or sharded safetensors) or hub id; no remote code, no pickle.

        Keyword arguments as in transformers (`dtype`, `device_map`, `revision`, …); `dtype` defaults to the
        checkpoint's. Raises UserError if the folder or hub id does not exist or is not complete.
        """
        folder = local_folder(path_or_hub_id, revision=kwargs.pop("revision", None))
        config = kwargs.pop("config", None) or DreamConfig.from_pretrained(folder)
        with torch.device("meta"):
            expected = {name: tuple(p.shape) for name, p in cls(config).state_dict().items()}
        check_weights(folder, expected)
        with reading(folder, "a Dream's weights"):
            model = super().from_pretrained(folder, *args, config=config, **kwargs)
        for name, tensor in (model[0] if isinstance(model, tuple) else model).state_dict().items():
            if not tensor.is_meta:
                check_finite(name, tensor, folder)
        return model

    def save_pretrained(self, save_directory: str | Path, max_shard_size: str = "5GB", **kwargs: Any) -> None:
        """Write an official folder, with the `generation_config.json` that the authors' loader needs."""
        super().save_pretrained(save_directory, max_shard_size=max_shard_size, **kwargs)
        sampling = {"alg": "origin", "alg_temp": None, "eps": 1e-3, "steps": 512}
        sampling |= {"temperature": 0.0, "top_k": None, "top_p": None}
        tokens = {f"{n}_token_id": getattr(self.config, f"{n}_token_id") for n in ("bos", "eos", "pad", "mask")}
        generation = {"_from_model_config": True, **sampling, **tokens, "transformers_version": "4.46.2"}
        Path(save_directory, "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
