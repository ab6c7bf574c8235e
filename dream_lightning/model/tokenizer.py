"""Dream's tokenizer as a fast one without remote code, and a byte-level one for tests and small models.

The authors ship `vocab.json`, `merges.txt`, `tokenizer_config.json` and a slow Python tokenizer as remote code. Here
the same files become a Rust tokenizer with the same ids (tests/model/test_tokenizer.py compares them).
One difference, in decoding only: `skip_special_tokens` also skips `<|im_start|>` and `<|im_end|>`.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dream_lightning.errors import UserError
from dream_lightning.model.loading import local_folder

# Pieces that byte-pair merges never cross, from the authors' tokenization_dream.py (it is Qwen2's): contractions, words
# with at most one leading other character, single digits, punctuation with its line breaks, line breaks, spaces.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OFFICIAL = ("vocab.json", "merges.txt", "tokenizer_config.json")
_FILES = (*_OFFICIAL, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load_tokenizer(path_or_hub_id: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or hub id; `"bytes"` is `bytes_tokenizer`.

    A folder with `tokenizer.json` (which `save_pretrained` writes) is loaded unmodified; the official folder has none
    and is converted. Raises UserError if the folder or hub id does not exist, or a file is missing or broken.
    """
    if str(path_or_hub_id) == "bytes":
        return bytes_tokenizer()
    try:
        folder = local_folder(path_or_hub_id, files=_FILES)
    except ValueError as error:
        raise UserError(f"no tokenizer: {error}. The package's own tokenizer is called bytes") from error
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if missing := [name for name in _OFFICIAL if not (folder / name).exists()]:
        raise UserError(
            f"no tokenizer in {folder}: it has neither tokenizer.json nor {', '.join(missing)}; copy the official files"
            " there, or name another folder"
        )
    return _dream_tokenizer(folder)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """263 tokens: one for each byte (ids 0-255, no merges), Dream's special tokens, and `<think>` and `</think>`."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|beginoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        chat_template=_CHATML,
        clean_up_tokenization_spaces=False,
    )


def _dream_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    settings = _read_json(folder / "tokenizer_config.json")
    tokens = ("bos_token", "eos_token", "pad_token", "mask_token")
    missing = [key for key in (*tokens, "added_tokens_decoder", "chat_template") if key not in settings]
    if missing:
        raise UserError(
            f"{folder / 'tokenizer_config.json'} lacks {', '.join(missing)}: it is not Dream's; use the official file"
        )
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for wanted, entry in sorted((int(key), value) for key, value in settings["added_tokens_decoder"].items()):
        token = AddedToken(**entry)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != wanted:
            raise UserError(
                f"{folder}: token {token.content!r} gets id {tokenizer.token_to_id(token.content)}, "
                f"tokenizer_config.json wants {wanted}: vocab.json is another model's; copy all files from one folder"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=settings["chat_template"],
        model_max_length=settings.get("model_max_length"),
        clean_up_tokenization_spaces=False,
        **{token: settings[token] for token in tokens},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error


def byte_characters() -> list[str]:
    """The character for each byte in byte-level BPE (GPT-2's table): itself if visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(spare)) for byte in range(256)]
