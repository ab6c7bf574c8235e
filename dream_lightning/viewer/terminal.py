"""Chat and row preview in a terminal."""

import json
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from itertools import groupby

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dream_lightning.errors import UserError
from dream_lightning.viewer.conversation import Conversation, Frame, Reply

_FRESH = "bold not dim not italic #10291a on #8ee0b0"
_TRAINED_LENGTH = 2_048  # of Dream; it accepts longer contexts and answers worse
_HELP = {
    "/think": "show the thinking behind the last answer",
    "/reset": "start a new conversation",
    "/params": "show the sampling parameters; /params steps=64 temperature=0.2 changes them",
    "/help": "this list",
    "/quit": "leave; so does Ctrl-D. Ctrl-C interrupts an answer",
}
LEGEND = Text.assemble(
    *(("prompt", "cyan"), " · ", ("response", "green"), " · "),
    *(("⟦masked⟧", "black on yellow"), " · ", ("⏹ eos", "bold red")),
)


class Chat:
    """Reads questions and commands, prints answers. Without a terminal (a pipe, a file) only complete answers.

    Args:
        conversation: answers the questions.
        console: where to print.
        read: returns the next line and raises EOFError after the last; None reads standard input.
    """

    def __init__(
        self, conversation: Conversation, console: Console | None = None, read: Callable[[], str] | None = None
    ) -> None:
        self.conversation, self.console = conversation, console or Console(highlight=False)
        prompt = Text("\n❯ ", "bold cyan") if self.console.is_terminal else ""
        self._read = read or (lambda: self.console.input(prompt))

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
                    self._command(*line.split())
                else:
                    self._answer(line)
            except ValueError as error:
                self._say(str(error), "yellow")

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style), soft_wrap=not self.console.is_terminal)

    def _show(self, text: str, style: str = "") -> None:
        """As `_say`, with a margin in a terminal."""
        if self.console.is_terminal:
            self.console.print(Padding(Text(text, style), (1, 2, 0, 2)))
        else:
            self._say(text)

    def _answer(self, question: str) -> None:
        frames = self.conversation.ask(question)
        try:
            if self.console.is_terminal:
                with Live(console=self.console, refresh_per_second=12, transient=True) as live:
                    for step, frame in enumerate(frames, start=1):
                        text = render(frame, self.conversation.tokenizer, step)
                        live.update(Padding(text, (1, 0, 0, 2)), refresh=step == 1)
            else:
                list(frames)
        except KeyboardInterrupt:
            self._say("interrupted; the question is not part of the conversation", "yellow")
            return
        self._show_reply(self.conversation.last)

    def _show_reply(self, reply: Reply) -> None:
        if reply.thinking is not None:
            self._show(f"▸ thought for {reply.thinking_tokens:,} tokens · /think shows them", "dim italic")
        if reply.answer:
            self._show(reply.answer)
        else:
            self._say("the model gave no answer" + (" after its thinking" if reply.thinking else ""), "yellow")
        limit, length = self.conversation.model.config.max_position_embeddings, reply.context + reply.tokens
        notes = [
            f"{reply.tokens:,} tokens in {reply.seconds:.1f} s, {reply.tokens / reply.seconds:,.0f} tok/s",
            f"conversation {length:,} of {limit:,} tokens",
        ]
        if not reply.finished:
            notes.insert(1, f"cut off at max_new_tokens={self.conversation.params.max_new_tokens:,}")
        if length > _TRAINED_LENGTH:
            notes.append(f"longer than the {_TRAINED_LENGTH:,} that Dream was trained at: /reset")
        self._show(" · ".join(notes), "dim")

    def _command(self, name: str, *words: str) -> None:
        if name == "/think":
            if self.conversation.last is None or self.conversation.last.thinking is None:
                raise UserError("there is no thinking to show: the last answer has none")
            self._show(self.conversation.last.thinking, "dim")
        elif name == "/reset":
            self.conversation.reset()
            self._say("a new conversation", "dim")
        elif name == "/params":
            self._change_params(words)
            params = self.conversation.params
            self._print_table((field.name, repr(getattr(params, field.name))) for field in fields(params))
        elif name == "/help":
            self._print_table(_HELP.items())
        else:
            raise UserError(f"there is no {name}: {', '.join(_HELP)}")

    def _change_params(self, words: Iterable[str]) -> None:
        known = sorted(field.name for field in fields(self.conversation.params))
        changes = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in known:
                raise UserError(f"{word} is not name=value with a name of {', '.join(known)}")
            changes[name] = _value(value)
        try:
            self.conversation.params = replace(self.conversation.params, **changes)
        except TypeError as error:  # a text where a number belongs
            raise UserError(f"{' '.join(words)}: {error}") from error

    def _print_table(self, rows: Iterable[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 3))
        for name, value in rows:
            table.add_row(Text(name, "cyan"), Text(value))
        self.console.print(table)


def _value(text: str) -> object:
    """JSON, Python's None, True and False, or the text itself: 0.2, true, null, entropy."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except json.JSONDecodeError:
        return text


def render(frame: Frame, tokenizer: PreTrainedTokenizerBase, step: int) -> Text:
    """One state of the answer: masks as blocks, what the step filled highlighted, thinking dim, eos as dots."""
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    text, new, ended = Text(), [], False
    pairs = zip(frame.ids, frame.fresh, strict=True)
    # Runs of one kind are decoded together: a character can consist of several tokens.
    for (kind, fresh), run in groupby(pairs, key=lambda pair: ({mask: "░", eos: "·"}.get(pair[0], ""), pair[1])):
        ids = [token for token, _ in run]
        ended = ended or kind == "·"
        start = len(text)
        text.append(kind * len(ids) or tokenizer.decode(ids), "bright_black" if ended or kind else "")
        if fresh and kind != "░":
            new.append((start, len(text)))
    start, end = text.plain.find("<think>"), text.plain.find("</think>")
    if 0 <= start < end:
        text.stylize("dim italic", start, end + len("</think>"))
    for start, end in new:
        text.stylize(_FRESH, start, end)
    filled = len(frame.ids) - frame.ids.count(mask)
    text.append(f"\n\nstep {step} · {filled} of {len(frame.ids)} filled", "dim")
    return text


def render_row(ids: list[int], maskable: list[bool], is_masked: list[bool], tokenizer: PreTrainedTokenizerBase) -> Text:
    """One clean row of L tokens, colored as in `LEGEND`, whose signs remain where there are no colors."""
    text, eos = Text(), tokenizer.eos_token_id
    rows = list(zip(ids, maskable, is_masked, strict=True))
    for is_response, part in groupby(rows, key=lambda row: row[1]):
        part = list(part)
        masked = f", {sum(row[2] for row in part):,} masked" if is_response else ""
        text.append(f"\n── {'response' if is_response else 'prompt'} · {len(part):,} tokens{masked} ──\n", "bold")
        for (hidden, ends), run in groupby(part, key=lambda row: (row[2], row[0] == eos)):
            run = [token for token, _, _ in run]
            shown = tokenizer.decode(run) if not ends else f"⏹×{len(run)}" if len(run) > 1 else "⏹"
            plain_style = "bold red" if ends else "green" if is_response else "cyan"
            text.append(f"⟦{shown}⟧" if hidden else shown, "black on yellow" if hidden else plain_style)
        text.append("\n")
    return text
