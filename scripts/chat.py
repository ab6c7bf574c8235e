"""Talk to a Dream in the terminal.

python scripts/chat.py --model Dream-org/Dream-v0-Instruct-7B
python scripts/chat.py --model lightning_logs/tiny/checkpoints/last.ckpt --tokenizer bytes --params.max_new_tokens 30
"""

from jsonargparse import auto_cli

from dream_lightning import SamplingParams
from dream_lightning.readable_errors import readable_errors
from dream_lightning.viewer import Chat, Conversation, open_model


def main(
    model: str,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    system_prompt: str | None = None,
    params: SamplingParams = SamplingParams(forbid_mask=True),  # noqa: B008 (frozen)
) -> None:
    """Chat until /quit.

    Args:
        model: folder in the official format, hub id, or checkpoint (.ckpt) of training.
        tokenizer: folder, hub id or bytes; by default the model's own.
        pretrained: what the training of a checkpoint started from.
        device: cpu, cuda, …; auto takes a GPU if there is one.
        system_prompt: replaces the template's.
        params: how answers are sampled.
    """
    network, words = open_model(model, tokenizer=tokenizer, pretrained=pretrained, device=device)
    Chat(Conversation(network, words, params, system_prompt=system_prompt)).run()


if __name__ == "__main__":
    with readable_errors():
        auto_cli(main, as_positional=False)
