"""The configuration of a Dream, as in the official `config.json`."""

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dream_lightning.errors import UserError, check_range, reading

# Fields that would make another network, and the only value that this one implements; absent or null means that too.
_IMPLEMENTED = {
    **{"hidden_act": "silu", "attention_dropout": 0, "attention_bias": True, "mlp_bias": False, "qk_norm": False},
    **{"use_qk_norm": False, "use_sliding_window": False, "use_mrope": False, "partial_rotary_factor": 1},
    **{"tie_word_embeddings": False, "quantization_config": None, "logit_scale": 1, "final_logit_softcapping": None},
    **{"attn_logit_softcapping": None, "block_size": None},
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
_HEADS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_RANGES = {  # field: its bounds, of integers or floats
    **dict.fromkeys(_SIZES, (1, 2**24)),
    **dict.fromkeys(_HEADS, (1, 4096)),
    **{"rms_norm_eps": (1e-12, 1.0), "rope_theta": (1.0, 1e12), "initializer_range": (0.0, 1.0)},
    **dict.fromkeys(("bos_token_id", "eos_token_id"), (0, 2**31)),
}


class DreamConfig(PreTrainedConfig):
    """Sizes and constants of a Dream; the defaults are Dream-v0 7B.

    Raises UserError, naming the field, for a value out of its range or one that would make another network.
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
    rope_theta: float | None = None  # 1,000,000, or as `rope_parameters` says
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
    causal: bool = False  # attend to no later position: an autoregressive baseline; the authors' code does not know it
    expand_token_id: int | None = None  # of DreamOn: a mask in which it is predicted becomes two masks
    default_top_k: int | None = None  # `top_k` of a config.json; the official one has none

    def __post_init__(self, **kwargs: Any) -> None:
        self.default_top_k = kwargs.pop("top_k", self.default_top_k)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.auto_map is None:  # so that transformers finds the authors' code
            self.auto_map = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
        self._check_network(kwargs)
        self._check_numbers()
        super().__post_init__(**kwargs)

    def _check_network(self, others: dict[str, Any]) -> None:
        """Read RoPE's settings, in both spellings, and refuse what this network does not implement."""
        theta = 1_000_000.0 if self.rope_theta is None else self.rope_theta
        for name, rope in (
            ("rope_scaling", self.rope_scaling),
            ("rope_parameters", others.pop("rope_parameters", None)),
        ):
            known = isinstance(rope, dict) and rope.keys() <= {"type", "rope_type", "rope_theta"}
            if rope and not (known and {rope.get("type"), rope.get("rope_type")} <= {None, "default"}):
                raise UserError(f"{name} is {rope!r:.200}: another network than Dream's, which has the type default")
            theta = rope.get("rope_theta", theta) if rope else theta  # it has precedence, as in transformers
        self.rope_scaling, self.rope_theta = None, theta
        fields = vars(self) | others
        for name, value in _IMPLEMENTED.items():
            if (got := fields.get(name)) is not None and got != value:
                ours = f"no {name}" if value is None else f"{name} {value!r}"
                raise UserError(f"{name} is {got!r:.200}: another network than Dream's, which has {ours}")
        if odd := set(others.get("layer_types") or ()) - {"full_attention"}:
            raise UserError(
                f"layer_types has {', '.join(sorted(odd))}: another network than Dream's, all full_attention"
            )
        if odd := [name for name in self.architectures or () if not re.fullmatch(r"Dream\w*Model", name)]:
            raise UserError(f"architectures has {odd[0]!r:.80}: another network than Dream's, which is DreamModel")
        head_dim = others.pop("head_dim", None)
        if head_dim is not None and head_dim * self.num_attention_heads != self.hidden_size:
            raise UserError(
                f"head_dim is {head_dim}: another network than Dream's, which has hidden_size ({self.hidden_size}) "
                f"divided by num_attention_heads ({self.num_attention_heads})"
            )

    def _check_numbers(self) -> None:
        for name, (least, most) in _RANGES.items():
            if (value := getattr(self, name)) is None and not name.endswith("_id"):
                raise UserError(f"{name} is null, wanted a number")
            check_range(name, value, least=least, most=most, whole=isinstance(least, int))
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or self.head_dim % 2:
            raise UserError(
                f"hidden_size is {self.hidden_size}, wanted num_attention_heads ({heads}) times an even number"
            )
        if heads % kv_heads:
            raise UserError(f"num_attention_heads is {heads}, wanted a multiple of num_key_value_heads ({kv_heads})")
        if self.mask_token_id is None:
            raise UserError(f"mask_token_id is null, wanted an id below vocab_size {self.vocab_size}")
        for name in ("mask_token_id", "pad_token_id", "expand_token_id"):
            check_range(name, getattr(self, name), least=0, most=self.vocab_size - 1, whole=True)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "DreamConfig":
        file = Path(pretrained_model_name_or_path, "config.json")
        try:
            with reading(file, "a Dream's configuration"):
                return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except UserError as error:
            raise UserError(f"{'' if str(file) in str(error) else f'{file}: '}{error}") from error

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
        for name, absent in (("causal", False), ("expand_token_id", None)):
            if official[name] is absent:
                del official[name]
        return official

    def to_diff_dict(self) -> dict[str, Any]:
        official = super().to_diff_dict()
        if official.get("dtype") is not None:  # the authors' transformers 4.46 calls it `torch_dtype`
            official["torch_dtype"] = official["dtype"]
        return official
