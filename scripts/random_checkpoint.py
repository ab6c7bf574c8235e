"""A folder in the official format with random weights, by default in the shapes of the 7B: to measure speed and memory.

python scripts/random_checkpoint.py --folder dream-random --tokenizer Dream-org/Dream-v0-Instruct-7B
"""

import json
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from jsonargparse import auto_cli
from safetensors.torch import save_file
from torch import Tensor

from dream_lightning.cli import readable_errors
from dream_lightning.export import new_folder, save_tokenizer
from dream_lightning.model import DreamConfig, DreamModel, load_tokenizer
from dream_lightning.model.loading import INDEX


def main(
    folder: str,
    tokenizer: str | None = None,
    device: str | None = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    vocab_size: int = 152_064,
    hidden_size: int = 3_584,
    intermediate_size: int = 18_944,
    num_hidden_layers: int = 28,
    num_attention_heads: int = 28,
    num_key_value_heads: int = 4,
    max_position_embeddings: int = 131_072,
    initializer_range: float = 0.02,
    mask_token_id: int = 151_666,
    eos_token_id: int = 151_643,
    max_shard_size: str = "5GB",
) -> None:
    """Write the folder; one file at a time is in memory.

    Args:
        folder: to write; new or empty.
        tokenizer: folder, hub id or bytes; its tokenizer is written too.
        device: where the numbers are drawn, by default a GPU if there is one; they depend on it.
        seed: of the weights.
        dtype: of the weights.
        vocab_size: tokens.
        hidden_size: of the residual stream.
        intermediate_size: of the MLP.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        max_position_embeddings: longest context, as config.json says.
        initializer_range: standard deviation of matrices and biases; norms are 1.
        mask_token_id: of the mask.
        eos_token_id: of eos, which is also pad and bos.
        max_shard_size: of one file.
    """
    config = DreamConfig(
        architectures=["DreamModel"],
        dtype=dtype,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=initializer_range,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        bos_token_id=eos_token_id,
        use_cache=True,  # as in the official config.json; nothing reads it
        use_mrope=False,
    )
    if tokenizer is not None and (mask := load_tokenizer(tokenizer).mask_token_id) != mask_token_id:
        raise ValueError(
            f"mask_token_id is {mask_token_id}, that of tokenizer {tokenizer} is {mask}: set --mask_token_id {mask}, "
            "the tokenizer of a folder must have the same mask"
        )
    with torch.device("meta"):
        state = DreamModel(config).to(getattr(torch, dtype)).state_dict()
    shards = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    generator = torch.Generator(device or ("cuda" if torch.cuda.is_available() else "cpu")).manual_seed(seed)

    with new_folder(folder, size=shards.metadata["total_size"]) as partial:
        for file, names in shards.filename_to_tensors.items():
            tensors = {name: random_like(state[name], name, initializer_range, generator) for name in names}
            save_file(tensors, partial / file, metadata={"format": "pt"})
            del tensors  # before the next shard is drawn
        if shards.is_sharded:
            write_json(partial / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
        config.save_pretrained(partial)
        ids = {"mask": mask_token_id, "eos": eos_token_id, "pad": eos_token_id, "bos": eos_token_id}
        write_json(partial / "generation_config.json", {f"{name}_token_id": i for name, i in ids.items()})
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
    size, files = shards.metadata["total_size"], len(shards.filename_to_tensors)
    print(f"wrote {folder}: {size / 1e9:.3g} GB of weights in {files} file{'s' if files > 1 else ''}")


def random_like(tensor: Tensor, name: str, std: float, generator: torch.Generator) -> Tensor:
    """Ones for a norm, else normal numbers, drawn on the generator's device and copied to the CPU."""
    drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=generator.device)
    if name.endswith("norm.weight"):
        return drawn.fill_(1).cpu()
    return drawn.normal_(0, std, generator=generator).cpu()


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
