"""The native Dream: configuration, network, loading, tokenizer."""

from transformers import AutoConfig, AutoModel

from dream_lightning.model.configuration import DreamConfig
from dream_lightning.model.modeling import DreamModel
from dream_lightning.model.tokenizer import load_tokenizer

# So that AutoModel.from_pretrained of an official folder takes this code instead of remote code.
AutoConfig.register(DreamConfig.model_type, DreamConfig, exist_ok=True)
AutoModel.register(DreamConfig, DreamModel, exist_ok=True)

__all__ = ["DreamConfig", "DreamModel", "load_tokenizer"]
