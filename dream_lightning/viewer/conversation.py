"""A conversation of several turns, whose answers can be watched while they are filled in."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from dream_lightning.batch import Example, Message
from dream_lightning.data.prompt_format import encode_prompt
from dream_lightning.errors import UserError
from dream_lightning.model import DreamModel
from dream_lightning.sampling import SamplingParams, denoising_steps
from dream_lightning.tasks import split_thinking


@dataclass(frozen=True)
class Frame:
    """The answer after a step of denoising."""

    ids: list[int]  # [N]
    fresh: list[bool]  # [N], what this step filled


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    thinking: str | None  # without tags
    answer: str
    thinking_tokens: int
    tokens: int  # of the whole response, without eos
    seconds: float
    finished: bool  # ended with eos, so it was not cut off
    context: int  # tokens of the prompt


class Conversation:
    """Turns of user and model. The model sees its earlier answers without their thinking, if there is more of them."""

    def __init__(
        self,
        model: DreamModel,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        *,
        system_prompt: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.params, self.system_prompt = model, tokenizer, params, system_prompt
        self.turns: list[Message] = []
        self.last: Reply | None = None

    def reset(self) -> None:
        """Forget everything that was said."""
        self.turns, self.last = [], None

    def ask(self, question: str) -> Iterator[Frame]:
        """The answer after every step. When the last one was taken, `last` holds the reply and the turn counts.

        An answer that is broken off leaves no trace in the conversation.

        Raises:
            UserError: an empty question; a conversation that with its answer is longer than the model's context.
        """
        if not question.strip():
            raise UserError("nothing was asked: type a question, or /help")
        turns = [*self.turns, Message(role="user", content=question)]
        example = Example("chat", tuple(turns), None, "", None, "the conversation")
        ids = encode_prompt(example, self.tokenizer, system_prompt=self.system_prompt)
        room = self.model.config.max_position_embeddings
        if len(ids) + self.params.max_new_tokens > room:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, an answer {self.params.max_new_tokens:,}, and the model "
                f"sees {room:,} at once: /reset starts anew, /params max_new_tokens=… makes answers shorter"
            )
        return self._answer(ids, turns)

    def _answer(self, prompt: list[int], turns: list[Message]) -> Iterator[Frame]:
        start = time.perf_counter()
        shown = [self.tokenizer.mask_token_id] * self.params.max_new_tokens
        steps = denoising_steps(
            self.model, torch.tensor([prompt], device=self.model.device), params=self.params
        )  # each [1, P+N]
        for state in steps:
            ids = state[0, len(prompt) :].tolist()
            yield Frame(ids, [now != before for now, before in zip(ids, shown, strict=True)])
            shown = ids
        self.last = self._reply(shown, len(prompt), time.perf_counter() - start)
        said = self.last.answer or (f"<think>\n{self.last.thinking}" if self.last.thinking else "")
        self.turns = [*turns, Message(role="assistant", content=said)]

    def _reply(self, ids: list[int], context: int, seconds: float) -> Reply:
        eos = self.tokenizer.eos_token_id
        kept = ids[: ids.index(eos)] if eos in ids else ids
        thinking, answer = split_thinking(self.tokenizer.decode(kept, skip_special_tokens=True))
        return Reply(
            thinking=thinking,
            answer=answer.strip(),
            thinking_tokens=len(self.tokenizer(thinking)["input_ids"]) if thinking else 0,
            tokens=len(kept),
            seconds=seconds,
            finished=eos in ids,
            context=context,
        )
