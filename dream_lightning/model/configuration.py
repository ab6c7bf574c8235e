"""The configuration of a Dream, as in the official `config.json`."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dream_lightning.errors import UserError


class DreamConfig(PreTrainedConfig):
    """Sizes and constants of a Dream; the defaults are Dream-v0 7B.

    Raises UserError if they do not fit each other, or for RoPE scaling, a sliding window, tied embeddings or dropout.
    """

    model_type = "Dream"

    vocab_size: int = 152_064
    hidden_size: int = 3_584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    rope_scaling: dict | None = None
    attention_dropout: float = 0.0
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    use_cache: bool = False
    tie_word_embeddings: bool = False
    mask_token_id: int = 151_666
    pad_token_id: int | None = 151_643
    bos_token_id: int | None = 151_643
    eos_token_id: int | None = 151_643
    auto_map: dict | None = None
    default_top_k: int | None = None  # `top_k` of a config.json, which transformers 4 writes

    def __post_init__(self, **kwargs: Any) -> None:
        self.default_top_k = kwargs.pop("top_k", self.default_top_k)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.auto_map is None:  # so that transformers finds the authors' code
            self.auto_map = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        unsupported = ("rope_scaling", "use_sliding_window", "tie_word_embeddings", "attention_dropout")
        if self.hidden_size % heads or self.head_dim % 2:
            raise UserError(
                f"hidden_size is {self.hidden_size}, wanted num_attention_heads ({heads}) times an even number"
            )
        if heads % kv_heads:
            raise UserError(f"num_attention_heads is {heads}, wanted a multiple of num_key_value_heads ({kv_heads})")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(f"mask_token_id is {self.mask_token_id}, wanted an id below vocab_size {self.vocab_size}")
        if set_ones := [f"{name} is {getattr(self, name)}" for name in unsupported if getattr(self, name)]:
            raise UserError(f"{', '.join(set_ones)}: not supported, as no Dream has them; remove them")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "DreamConfig":
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            where = str(pretrained_model_name_or_path)
            raise UserError(
                f"no config.json can be read at {where!r} ({str(error)[:300]}): download it again"
            ) from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DreamConfig":
        if (model_type := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise UserError(
                f"model_type is {model_type!r}, wanted {cls.model_type!r}: name a Dream, such as "
                "Dream-org/Dream-v0-Instruct-7B"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        official = super().to_dict()
        if (top_k := official.pop("default_top_k")) is not None:
            official["top_k"] = top_k
        return official

    def to_diff_dict(self) -> dict[str, Any]:
        official = super().to_diff_dict()
        if official.get("dtype") is not None:  # the authors' transformers 4.46 calls it `torch_dtype`
            official["torch_dtype"] = official["dtype"]
        return official
