"""A Dream with the weights of an autoregressive Qwen2 or Qwen2.5, whose names, shapes and shift it shares."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase, Qwen2Config

from dream_lightning.errors import UserError, reading
from dream_lightning.model.configuration import DreamConfig
from dream_lightning.model.loading import check_finite, check_weights, local_folder, weight_files
from dream_lightning.model.modeling import DreamModel

_NOT_ITS_OWN = ("model_type", "architectures", "tie_word_embeddings", "auto_map", "dtype", "torch_dtype")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def config_from_qwen2(folder: Path, tokenizer: PreTrainedTokenizerBase) -> DreamConfig:
    """The configuration of a Qwen2's folder, with the tokenizer's special ids and room for its mask token.

    Raises:
        UserError: not a Qwen2, or one that is another network, such as with sliding windows or scaled RoPE.
    """
    file = folder / "config.json"
    with reading(file, "a Qwen2's configuration"):
        raw = json.loads(file.read_text(encoding="utf-8"))
        if (kind := raw["model_type"]) != "qwen2":
            raise UserError(f"{file}: model_type is {kind!r:.80}, wanted 'qwen2': name a Qwen2 or Qwen2.5")
        complete = raw | {k: v for k, v in Qwen2Config.from_dict(dict(raw)).to_dict().items() if k not in raw}
        ours = {k: v for k, v in complete.items() if k not in _NOT_ITS_OWN}
        if not ours.get("use_sliding_window"):
            ours["layer_types"] = None  # older ones name full attention or none
        if "rope_theta" in raw:
            ours.pop("rope_parameters", None)
        ours |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "bos", "eos")}
        ours["vocab_size"] = max(raw["vocab_size"], len(tokenizer))
        try:
            return DreamConfig(**ours)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error


def from_qwen2(
    path_or_hub_id: str | Path, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype = torch.float32
) -> DreamModel:
    """Its weights in a bidirectional Dream; a tied head becomes a weight of its own.

    Tokens beyond its vocabulary, such as the mask, get the mean of the other rows in the embeddings and the head.

    Raises:
        UserError: as `config_from_qwen2`; weights are missing, damaged or of other shapes.
    """
    folder = local_folder(path_or_hub_id)
    config = config_from_qwen2(folder, tokenizer)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = weight_files(folder)
    tied = settings.get("tie_word_embeddings", False) and _VOCABULARY[1] not in files
    with torch.device("meta"):
        model = DreamModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes |= dict.fromkeys(_VOCABULARY, (settings["vocab_size"], config.hidden_size))
    check_weights(folder, {name: shape for name, shape in shapes.items() if not (tied and name == _VOCABULARY[1])})
    state = {}
    for name, file in files.items():
        with reading(file, "a whole safetensors file"), safe_open(file, framework="pt") as tensors:
            state[name] = tensors.get_tensor(name).to(dtype)
        check_finite(name, state[name], file)
    for name in _VOCABULARY:
        rows = state[_VOCABULARY[0] if tied else name]
        mean = rows.float().mean(0, keepdim=True).to(dtype)
        state[name] = torch.cat([rows, mean.expand(config.vocab_size - len(rows), -1)])  # a copy
    model.load_state_dict(state, assign=True)
    return model
