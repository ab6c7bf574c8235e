"""Dream's tokenizer as a fast one without remote code, and a byte-level one for tests and small models.

The authors ship `vocab.json`, `merges.txt`, `tokenizer_config.json` and a slow Python tokenizer as remote code. Here
the same files become a Rust tokenizer with the same ids (tests/model/test_tokenizer.py compares them).
One difference, in decoding only: `skip_special_tokens` also skips `<|im_start|>` and `<|im_end|>`.
"""

import json
import warnings
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dream_lightning.errors import UserError, reading
from dream_lightning.model.configuration import DreamConfig
from dream_lightning.model.loading import local_folder

# Pieces that byte-pair merges never cross, from the authors' tokenization_dream.py (it is Qwen2's): contractions, words
# with at most one leading other character, single digits, punctuation with its line breaks, line breaks, spaces.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
_TEMPLATE = "chat_template.jinja"
_OFFICIAL = ("vocab.json", "merges.txt", "tokenizer_config.json")
_FILES = (*_OFFICIAL, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", _TEMPLATE)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load_tokenizer(path_or_hub_id: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or hub id; `"bytes"` is `bytes_tokenizer`.

    A folder with `tokenizer.json` (which `save_pretrained` writes) is loaded unmodified; the official folder has none
    and is converted. Raises UserError if the folder or hub id does not exist, or a file is missing, damaged, or does
    not fit another.
    """
    if str(path_or_hub_id) == "bytes":
        return bytes_tokenizer()
    try:
        folder = local_folder(path_or_hub_id, files=_FILES)
    except UserError as error:
        raise UserError(f"no tokenizer: {error}. The package's own tokenizer is called bytes") from error
    settings = {
        name: _read_json(folder / name) for name in _FILES if name.endswith("json") and (folder / name).exists()
    }
    if "tokenizer.json" in settings:
        with reading(folder / "tokenizer.json", "a tokenizer"):
            model, added = (settings["tokenizer.json"][name] for name in ("model", "added_tokens"))
            if model["type"] == "BPE" and not model.get("ignore_merges") and not model.get("byte_fallback"):
                merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
                _check_merges(folder, model["vocab"], merges, {token["content"] for token in added})
        with reading(folder / "tokenizer.json", "a tokenizer that transformers reads"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    elif missing := [name for name in _OFFICIAL if not (folder / name).exists()]:
        raise UserError(
            f"no tokenizer in {folder}: it has neither tokenizer.json nor {', '.join(missing)}; copy the official files"
            " there, or name another folder"
        )
    else:
        tokenizer = _dream_tokenizer(folder, settings["vocab.json"], settings["tokenizer_config.json"])
    if missing := [name for name in ("eos_token", "mask_token") if getattr(tokenizer, name) is None]:
        raise UserError(f"the tokenizer in {folder} has no {' and no '.join(missing)}: use a Dream's")
    if tokenizer.pad_token is None:  # Dream pads with eos
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: DreamConfig) -> None:
    """Raise UserError for a tokenizer with more tokens than the model, or another mask or eos token."""
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    if len(tokenizer) > config.vocab_size or mask != config.mask_token_id or eos != (config.eos_token_id or eos):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and mask token {mask}, eos {eos}, the model "
            f"{config.vocab_size}, {config.mask_token_id} and {config.eos_token_id}: set model.tokenizer to the "
            "model's own folder or hub id"
        )


def check_same_vocabulary(tokenizer: PreTrainedTokenizerBase | str | Path, trained_with: str | Path) -> None:
    """Raise UserError if a token has another id than in the tokenizer of the training; warn if that is not here."""
    given = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    try:
        known = load_tokenizer(trained_with)
    except UserError as error:
        warnings.warn(f"the tokenizer is not compared with that of the training: {error}", stacklevel=3)
        return
    pairs = given.get_vocab().items() ^ known.get_vocab().items()
    if different := sorted({token for token, _ in pairs}):
        raise UserError(
            f"the tokenizer {tokenizer if isinstance(tokenizer, str | Path) else 'given'} has {len(different)} tokens "
            f"with other ids than {trained_with}, the one of the training, such as {different[0]!r:.80}: leave "
            "tokenizer out, or name the one of the training"
        )


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """263 tokens: one for each byte (ids 0-255, no merges), Dream's special tokens, and `<think>` and `</think>`."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_dreams_tokens(tokenizer, ("<think>", "</think>"))


def set_pieces(tokenizer: Tokenizer) -> None:
    """Normalize and split text, and decode tokens, as Dream's tokenizer does."""
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()


def with_dreams_tokens(tokenizer: Tokenizer, tags: Sequence[str]) -> PreTrainedTokenizerFast:
    """A small tokenizer with Dream's special tokens, their roles and the chat template; each tag is one plain token."""
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|beginoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        chat_template=_CHATML,
        clean_up_tokenization_spaces=False,
    )


def _dream_tokenizer(folder: Path, vocab: dict[str, int], settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    if (folder / _TEMPLATE).exists():  # where transformers writes it since 4.52
        with reading(folder / _TEMPLATE, "a text"):
            settings = settings | {"chat_template": (folder / _TEMPLATE).read_text(encoding="utf-8")}
    tokens = ("bos_token", "eos_token", "pad_token", "mask_token")
    missing = [key for key in ("eos_token", "mask_token", "added_tokens_decoder") if key not in settings]
    if missing or "chat_template" not in settings:
        missing += [] if "chat_template" in settings else [f"chat_template (and there is no {_TEMPLATE})"]
        raise UserError(
            f"{folder / 'tokenizer_config.json'} lacks {', '.join(missing)}: it is not Dream's; use the official file"
        )
    with reading(folder / "merges.txt", "a file of merges"):
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.strip() for line in lines if line.strip() and not line.startswith("#version")]
    with reading(folder / "tokenizer_config.json", "a tokenizer's settings"):
        added = {int(key): AddedToken(**entry) for key, entry in settings["added_tokens_decoder"].items()}
        named = {name: _content(settings[name]) for name in tokens if settings.get(name) is not None}
    with reading(folder / "vocab.json", "a vocabulary"):
        _check_merges(folder, vocab, merges, {token.content for token in added.values()})
        tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    set_pieces(tokenizer)
    for wanted, token in sorted(added.items(), key=itemgetter(0)):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != wanted:
            raise UserError(
                f"{folder}: token {token.content!r} gets id {tokenizer.token_to_id(token.content)}, "
                f"tokenizer_config.json wants {wanted}: vocab.json is another model's; copy all files from one folder"
            )
    with reading(folder / "tokenizer_config.json", "a tokenizer's settings"):
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=settings["chat_template"],
            model_max_length=settings.get("model_max_length"),
            clean_up_tokenization_spaces=False,
            **named,
        )


def _check_merges(folder: Path, vocab: dict[str, int], merges: list[str], added: set[str]) -> None:
    """Raise UserError if vocabulary and merges do not fit: a file was cut, or is another model's."""
    results = {merge.replace(" ", "", 1) for merge in merges}
    parts = {part for merge in merges for part in merge.split(" ", 1)}
    unmerged = vocab.keys() - results - added
    problems = {
        "parts or results of merges are not in the vocabulary": sorted((parts | results) - vocab.keys()),
        "tokens of the vocabulary have no merge": sorted(token for token in unmerged if len(token) > 1),
    }
    if found := [f"{len(items)} {problem}, such as {items[0]!r:.80}" for problem, items in problems.items() if items]:
        raise UserError(
            f"the files of the tokenizer in {folder} do not fit together: {'; '.join(found)}. A file was cut or is "
            "another model's: copy vocab.json and merges.txt, or tokenizer.json, from one folder again"
        )


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _read_json(path: Path) -> dict[str, Any]:
    with reading(path, "a JSON object"):
        if not isinstance(content := json.loads(path.read_text(encoding="utf-8")), dict):
            raise TypeError(f"it is a {type(content).__name__}")
        return content


def byte_characters() -> list[str]:
    """The character for each byte in byte-level BPE (GPT-2's table): itself if visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(spare)) for byte in range(256)]
