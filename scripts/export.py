"""The official folder of a checkpoint, for this package, the authors' code and the hub; or its adapters for PEFT.

python scripts/export.py --checkpoint logs/last.ckpt --folder my-dream --pretrained Dream-org/Dream-v0-Instruct-7B
python scripts/export.py --checkpoint logs/last.ckpt --folder my-adapters --adapter true
"""

from typing import Literal

from jsonargparse import auto_cli

from dream_lightning.export import AUTHORS_CODE, export_adapter, export_checkpoint
from dream_lightning.readable_errors import readable_errors


def main(
    checkpoint: str,
    folder: str,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["keep", "bfloat16"] = "bfloat16",
    max_shard_size: str = "5GB",
    adapter: bool = False,
) -> None:
    """Write the folder.

    Args:
        checkpoint: what training saved, a file or the folder of a sharded run.
        folder: where to; new or empty.
        pretrained: folder or hub id of the model that training started from.
        tokenizer: folder or hub id, or bytes; that of pretrained by default.
        dtype: bfloat16 like the official weights, or keep.
        max_shard_size: of one file.
        adapter: write a PEFT folder with the adapters alone, for PeftModel.from_pretrained on the official base.
    """
    if adapter:
        written = export_adapter(checkpoint, folder, pretrained=pretrained)
        print(f"wrote {written}: {', '.join(sorted(file.name for file in written.iterdir()))}")
        return
    written = export_checkpoint(
        checkpoint, folder, pretrained=pretrained, tokenizer=tokenizer, dtype=dtype, max_shard_size=max_shard_size
    )
    print(f"wrote {written}: {', '.join(sorted(file.name for file in written.iterdir()))}")
    if missing := [name for name in AUTHORS_CODE if not (written / name).exists()]:
        print(f"to load it with trust_remote_code, copy {', '.join(missing)} there from the official model folder")


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
