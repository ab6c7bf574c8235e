"""The conversation in a terminal: answers fill in live, thinking is folded, commands begin with a slash."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import groupby

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dream_lightning.errors import UserError
from dream_lightning.viewer.conversation import Conversation, Frame

_MASK = "░"
_FRESH = "bold not dim not italic #10291a on #8ee0b0"
_TRAINED = 2_048  # tokens that Dream was trained at: the model takes more, and answers worse
_HELP = {
    "/think": "unfold the thinking behind the last answer",
    "/reset": "start a new conversation",
    "/params": "show how answers are sampled; /params steps=64 temperature=0.2 changes it",
    "/help": "this list",
    "/quit": "leave; so does Ctrl-D. Ctrl-C stops an answer",
}


class Chat:
    """Reads questions and commands, prints answers.

    Without a terminal (a pipe, a file) only finished answers are printed.

    Args:
        conversation: whom to ask.
        console: where to print.
        read: gives the next line and raises EOFError after the last; None reads standard input.
    """

    def __init__(
        self, conversation: Conversation, console: Console | None = None, read: Callable[[], str] | None = None
    ) -> None:
        self.conversation, self.console = conversation, console or Console(highlight=False)
        self._read = read or self._read_line

    def run(self) -> None:
        """Until /quit or the end of the input."""
        if self.console.is_terminal:
            self._say("Ask something. /help lists the commands.", "dim")
        while True:
            try:
                line = self._read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D leaves", "dim")
                continue
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    self._answer(line)
            except ValueError as error:
                self._say(str(error), "yellow")

    def _read_line(self) -> str:
        return self.console.input(Text("\n❯ ", "bold cyan") if self.console.is_terminal else "")

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style), soft_wrap=not self.console.is_terminal)

    def _show(self, text: str, style: str = "") -> None:
        """Set off from what was typed; in a file the lines stay as they are."""
        if self.console.is_terminal:
            self.console.print(Padding(Text(text, style), (1, 2, 0, 2)))
        else:
            self._say(text)

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _answer(self, question: str) -> None:
        frames = self.conversation.ask(question)
        try:
            if self.console.is_terminal:
                with Live(console=self.console, refresh_per_second=12, transient=True) as live:
                    for number, frame in enumerate(frames, start=1):
                        state = render(frame, self.conversation.tokenizer, number)
                        live.update(Padding(state, (1, 0, 0, 2)), refresh=number == 1)
            else:
                for _ in frames:
                    pass
        except KeyboardInterrupt:
            self._say("stopped; the conversation goes on as if this had not been asked", "yellow")
            return
        reply = self.conversation.last
        if reply.thinking is not None:
            self._show(f"▸ thought for {reply.thinking_tokens:,} tokens · /think unfolds it", "dim italic")
        if reply.answer:
            self._show(reply.answer)
        else:
            self._say("the model gave no answer" + (" after its thinking" if reply.thinking else ""), "yellow")
        notes = [f"{reply.tokens:,} tokens in {reply.seconds:.1f} s, {reply.tokens / reply.seconds:,.0f} a second"]
        if not reply.finished:
            notes.append(f"cut off at max_new_tokens={self.conversation.params.max_new_tokens:,}")
        length = reply.context + reply.tokens
        notes.append(f"conversation {length:,} of {self.conversation.model.config.max_position_embeddings:,} tokens")
        if length > _TRAINED:
            notes.append(f"beyond the {_TRAINED:,} that Dream was trained at: /reset")
        self._show(" · ".join(notes), "dim")

    # ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _command(self, line: str) -> None:
        name, *words = line.split()
        if name == "/think":
            reply = self.conversation.last
            if reply is None or reply.thinking is None:
                raise UserError("there is no thinking to unfold: the last answer came without")
            self._show(reply.thinking, "dim")
        elif name == "/reset":
            self.conversation.reset()
            self._say("a new conversation", "dim")
        elif name == "/params":
            self._params(words)
        elif name == "/help":
            self.console.print(_table(_HELP))
        else:
            raise UserError(f"there is no {name}: {', '.join(_HELP)}")

    def _params(self, words: list[str]) -> None:
        params = self.conversation.params
        known = {field.name for field in fields(params)}
        changes = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in known:
                raise UserError(f"{word} is not name=value with a name of {', '.join(sorted(known))}")
            changes[name] = _value(value)
        try:
            self.conversation.params = replace(params, **changes)
        except TypeError as error:  # a text where a number belongs
            raise UserError(f"{' '.join(words)}: {error}") from error
        shown = {field.name: repr(getattr(self.conversation.params, field.name)) for field in fields(params)}
        self.console.print(_table(shown))


def render(frame: Frame, tokenizer: PreTrainedTokenizerBase, step: int) -> Text:
    """A state of the answer: masks as grey blocks, what the step filled highlighted, thinking dim, eos as dots.

    Runs of one kind are decoded together, so that characters of several tokens stay whole.
    """
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    text, new, ended = Text(), [], False
    pairs = zip(frame.ids, frame.fresh, strict=True)
    for (kind, fresh), run in groupby(pairs, key=lambda pair: ({mask: "mask", eos: "eos"}.get(pair[0], ""), pair[1])):
        ids = [token for token, _ in run]
        ended = ended or kind == "eos"
        start = len(text)
        shown = {"mask": _MASK * len(ids), "eos": "·" * len(ids)}.get(kind) or tokenizer.decode(ids)
        text.append(shown, "bright_black" if ended or kind == "mask" else "")
        if fresh and kind != "mask":
            new.append((start, len(text)))
    start, end = text.plain.find("<think>"), text.plain.find("</think>")
    if start >= 0 and end > start:
        text.stylize("dim italic", start, end + len("</think>"))
    for start, end in new:
        text.stylize(_FRESH, start, end)
    masked = frame.ids.count(mask)
    text.append(f"\n\nstep {step} · {len(frame.ids) - masked} of {len(frame.ids)} filled", "dim")
    return text


def _table(rows: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 3))
    for name, value in rows.items():
        table.add_row(Text(name, "cyan"), Text(value))
    return table


def _value(text: str) -> object:
    """JSON, Python's None, True and False, or the text itself: 0.2, true, null, entropy."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except json.JSONDecodeError:
        return text
