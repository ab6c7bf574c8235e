"""A conversation of several messages, whose answers can be watched while they are denoised."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Example, Message
from dream_lightning.data.prompt_format import Style, encode_prompt
from dream_lightning.errors import UserError
from dream_lightning.model import DreamModel
from dream_lightning.sampling import SamplingParams, denoising_steps
from dream_lightning.tasks import split_thinking


@dataclass(frozen=True)
class Frame:
    """The answer after one denoising step."""

    ids: list[int]  # [N]
    fresh: list[bool]  # [N], filled by this step


@dataclass(frozen=True)
class Reply:
    """A complete answer."""

    thinking: str | None  # without tags
    answer: str
    thinking_tokens: int
    tokens: int  # of the response without eos
    seconds: float
    finished: bool  # has an eos, so it was not cut off
    context: int  # tokens of the prompt


class Conversation:
    """Messages of user and model. Earlier answers are given to the model without their thinking.

    Args:
        system_prompt: replaces that of the chat template.
        style: of the prompts, as in training.
        history: give the model the earlier messages; False asks every question alone.
    """

    def __init__(
        self,
        model: DreamModel,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        system_prompt: str | None = None,
        *,
        style: Style = "chat",
        history: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.params, self.history = model, tokenizer, params, history
        self.prompting = {"style": style, "system_prompt": system_prompt}
        self.reset()

    def reset(self) -> None:
        self.messages: list[Message] = []
        self.last: Reply | None = None

    def ask(self, question: str) -> Iterator[Frame]:
        """The answer after every step. After the last one, `last` holds the reply and `messages` has both messages.

        An answer that is interrupted leaves the conversation unchanged.

        Raises:
            UserError: an empty question; conversation and answer together exceed the model's context.
        """
        if not question.strip():
            raise UserError("nothing was asked: type a question, or /help")
        messages = [*(self.messages if self.history else ()), Message(role="user", content=question)]
        example = Example("chat", tuple(messages), None, "", None, "the conversation")
        prompt = encode_prompt(example, self.tokenizer, **self.prompting)
        start, eos = time.perf_counter(), self.tokenizer.eos_token_id
        ids = [self.tokenizer.mask_token_id] * self.params.room(len(prompt))
        input_ids = torch.tensor([prompt], device=self.model.device)
        for state in denoising_steps(self.model, input_ids, params=self.params):
            before, ids = ids, state.x[0, len(prompt) :].tolist()
            yield Frame(ids, [new != old for new, old in zip(ids, before, strict=True)])
        kept = ids[: ids.index(eos)] if eos in ids else ids
        thinking, answer = split_thinking(self.tokenizer.decode(kept, skip_special_tokens=True))
        self.last = Reply(
            thinking=thinking,
            answer=answer.strip(),
            thinking_tokens=len(self.tokenizer(thinking)["input_ids"]) if thinking else 0,
            tokens=len(kept),
            seconds=time.perf_counter() - start,
            finished=eos in ids,
            context=len(prompt),
        )
        said = self.last.answer or (f"<think>\n{thinking}" if thinking else "")
        self.messages = [*self.messages, messages[-1], Message(role="assistant", content=said)]
