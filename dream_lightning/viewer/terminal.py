"""Chat and row preview in a terminal."""

from ast import literal_eval
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import groupby

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dream_lightning.errors import UserError, visible
from dream_lightning.viewer.conversation import Conversation, Frame

_FRESH = "bold not dim not italic #10291a on #8ee0b0"
SINGLE = "This model was trained on single questions: it does not get the earlier ones. --history true changes that."
_TRAINED_LENGTH = 2_048  # of Dream; it accepts longer contexts and answers worse
_HELP = {
    "/think": "show the thinking behind the last answer",
    "/reset": "start a new conversation",
    "/params": "show the sampling parameters; /params steps=64 temperature=0.2 changes them",
    "/help": "this list",
    "/quit": "leave; so does Ctrl-D. Ctrl-C interrupts an answer",
}
LEGEND = Text.assemble(
    *(("prompt", "cyan"), " · ", ("response: trained", "green"), " · "),
    *(("⟦masked⟧", "black on yellow"), " · ", ("⏹ eos", "bold red")),
)


class Chat:
    """Reads questions and commands, prints answers. Without a terminal (a pipe, a file) only complete answers.

    Args:
        conversation: answers the questions.
        console: where to read and print.
        note: is printed once, before the second question is answered.
    """

    def __init__(self, conversation: Conversation, console: Console | None = None, *, note: str = "") -> None:
        self.conversation, self.console, self.note = conversation, console or Console(highlight=False), note

    def run(self) -> None:
        """Until /quit or the end of the input."""
        prompt = Text("\n❯ ", "bold cyan") if self.console.is_terminal else ""
        if self.console.is_terminal:
            self._print("Ask something. /help lists the commands.", "dim")
        while True:
            try:
                line = self.console.input(prompt).strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self._command(*line.split())
                else:
                    self._answer(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._print("interrupted; /quit or Ctrl-D leaves", "yellow")
            except ValueError as error:
                self._print(str(error), "yellow")

    def _print(self, text: str, style: str = "", margin: bool = False) -> None:
        """The text; only in a terminal wrapped and with a margin."""
        shown = Text(visible(text), style)
        if self.console.is_terminal:
            self.console.print(Padding(shown, (1, 2, 0, 2)) if margin else shown)
        else:
            self.console.print(shown, soft_wrap=True)

    def _answer(self, question: str) -> None:
        if self.note and self.conversation.messages:
            self._print(self.note, "yellow")
            self.note = ""
        frames = self.conversation.ask(question)
        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=12, transient=True) as live:
                for step, frame in enumerate(frames, start=1):
                    text = render(frame, self.conversation.tokenizer, step)
                    live.update(Padding(text, (1, 0, 0, 2)), refresh=step == 1)
        else:
            list(frames)
        reply = self.conversation.last
        if reply.thinking is not None:
            self._print(f"▸ thought for {reply.thinking_tokens:,} tokens · /think shows it", "dim italic", margin=True)
        self._print(reply.answer or "the model gave no answer", "" if reply.answer else "yellow", margin=True)
        limit, length = self.conversation.model.config.max_position_embeddings, reply.context + reply.tokens
        notes = [f"{reply.tokens:,} tokens in {reply.seconds:.1f} s, {reply.tokens / reply.seconds:,.0f} tok/s"]
        if not reply.finished:
            notes.append(f"cut off after {reply.tokens:,} tokens, by max_new_tokens or max_length")
        notes.append(f"conversation {length:,} of {limit:,} tokens")
        if length > _TRAINED_LENGTH:
            notes.append(f"longer than the {_TRAINED_LENGTH:,} that Dream was trained at: /reset")
        self._print(" · ".join(notes), "dim", margin=True)

    def _command(self, name: str, *words: str) -> None:
        if name == "/think":
            if self.conversation.last is None or self.conversation.last.thinking is None:
                raise UserError("there is no thinking to show: the last answer has none")
            self._print(self.conversation.last.thinking, "dim", margin=True)
        elif name == "/reset":
            self.conversation.reset()
            self._print("a new conversation", "dim")
        elif name == "/params":
            self._change_params(words)
            self._print_table({name: repr(value) for name, value in asdict(self.conversation.params).items()})
        elif name == "/help":
            self._print_table(_HELP)
        else:
            raise UserError(f"there is no {name}: {', '.join(_HELP)}")

    def _change_params(self, words: Iterable[str]) -> None:
        known, changes = sorted(asdict(self.conversation.params)), {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in known:
                raise UserError(f"{word} is not name=value with a name of {', '.join(known)}")
            try:
                changes[name] = literal_eval(value)
            except (ValueError, SyntaxError):  # a text, such as entropy
                changes[name] = value
        self.conversation.params = replace(self.conversation.params, **changes)

    def _print_table(self, rows: dict[str, str]) -> None:
        table = Table.grid(padding=(0, 3))
        for name, value in rows.items():
            table.add_row(Text(name, "cyan"), Text(visible(value)))
        self.console.print(table)


def render(frame: Frame, tokenizer: PreTrainedTokenizerBase, step: int) -> Text:
    """One state of the answer: masks as blocks, what the step filled highlighted, thinking dim, eos as dots."""
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    text, new, ended = Text(), [], False
    pairs = zip(frame.ids, frame.fresh, strict=True)
    # Runs are decoded together: a character can consist of several tokens.
    for (kind, fresh), run in groupby(pairs, key=lambda pair: ({mask: "░", eos: "·"}.get(pair[0], ""), pair[1])):
        ids = [token for token, _ in run]
        ended = ended or kind == "·"
        start = len(text)
        text.append(kind * len(ids) or visible(tokenizer.decode(ids)), "bright_black" if ended or kind else "")
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
            shown = visible(tokenizer.decode(run)) if not ends else f"⏹×{len(run)}" if len(run) > 1 else "⏹"
            plain_style = "bold red" if ends else "green" if is_response else "cyan"
            text.append(f"⟦{shown}⟧" if hidden else shown, "black on yellow" if hidden else plain_style)
        text.append("\n")
    return text


def render_tokens(
    ids: list[int], weights: list[float | None], is_masked: list[bool], tokenizer: PreTrainedTokenizerBase
) -> Text:
    """A line for each token: its id, its weight in the loss (– = not trained), and its text, as in `render_row`."""
    text = Text()
    for token, weight, hidden in zip(ids, weights, is_masked, strict=True):
        style = "black on yellow" if hidden else "cyan" if weight is None else "green"
        shown = repr(visible(tokenizer.decode([token])))
        text.append(f"{token:>7} {'–' if weight is None else f'{weight:g}':>5}  ")
        text.append(f"⟦{shown}⟧\n" if hidden else f"{shown}\n", style)
    return text
