"""The native Dream: configuration, network, loading, tokenizer."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from dream_lightning.model.configuration import DreamConfig
from dream_lightning.model.modeling import DreamModel
from dream_lightning.model.tokenizer import check_same_vocabulary, check_tokenizer, load_tokenizer

# So that AutoModel.from_pretrained of an official folder takes this code instead of remote code.
AutoConfig.register(DreamConfig.model_type, DreamConfig, exist_ok=True)
for automatic in (AutoModel, AutoModelForMaskedLM):
    automatic.register(DreamConfig, DreamModel, exist_ok=True)

__all__ = ["DreamConfig", "DreamModel", "check_same_vocabulary", "check_tokenizer", "load_tokenizer"]
