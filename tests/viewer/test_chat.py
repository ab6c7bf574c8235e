"""A conversation and how it looks on the screen, with a scripted model and with a real one."""

import io
from types import SimpleNamespace

import pytest
import torch
from material import SIZES
from rich.console import Console

from dream_lightning import SamplingParams, load_tokenizer
from dream_lightning.model_factory import random_model
from dream_lightning.viewer import Chat, Conversation, Frame, conversation
from dream_lightning.viewer.terminal import render, render_row

TOKENIZER = load_tokenizer("bytes")
MASK, EOS = TOKENIZER.mask_token_id, TOKENIZER.eos_token_id
NEW = 40


def make_conversation(system_prompt=None, **options):
    torch.manual_seed(0)
    model = random_model(SIZES | {"max_position_embeddings": 300}, TOKENIZER).eval()
    params = SamplingParams(max_new_tokens=NEW, steps=4, forbid_mask=True, **options)
    return Conversation(model, TOKENIZER, params, system_prompt)


@pytest.fixture
def says(monkeypatch):
    """`says("a", "b")`: the model's next answers, filled from the left in 4 steps; returns the prompts it gets."""

    def script(*texts):
        prompts, answers = [], iter(texts)

        def steps(model, input_ids, *, params):
            prompts.append(TOKENIZER.decode(input_ids[0]))
            ids = TOKENIZER(next(answers))["input_ids"]
            ids += [EOS] * (NEW - len(ids))
            for step in range(1, 5):
                shown = ids[: NEW * step // 4] + [MASK] * (NEW - NEW * step // 4)
                yield SimpleNamespace(x=torch.cat([input_ids, torch.tensor([shown])], dim=1))

        monkeypatch.setattr(conversation, "denoising_steps", steps)
        return prompts

    return script


def test_the_next_prompt_has_earlier_answers_without_their_thinking(says):
    prompts, talk = says("<think>\nhm\n</think>\nfour", "", "five"), make_conversation("Be brief.")
    frames = list(talk.ask("2+2?"))
    assert [frame.ids.count(MASK) for frame in frames] == [30, 20, 10, 0]
    assert [sum(frame.fresh) for frame in frames] == [10, 10, 10, 10]
    assert (talk.last.thinking, talk.last.answer, talk.last.finished) == ("hm", "four", True)
    assert (talk.last.thinking_tokens, talk.last.tokens) == (2, 11)
    list(talk.ask("and?"))
    assert (talk.last.thinking, talk.last.answer, talk.last.tokens) == (None, "", 0)
    list(talk.ask("one more?"))
    message = "<|im_start|>{}\n{}<|im_end|>\n".format
    first = message("system", "Be brief.") + message("user", "2+2?")
    second = message("assistant", "four") + message("user", "and?")
    third = message("assistant", "") + message("user", "one more?")
    expected = [first, first + second, first + second + third]
    assert prompts == [prompt + "<|im_start|>assistant\n" for prompt in expected]
    talk.reset()
    assert talk.messages == [] and talk.last is None


def test_an_interrupted_answer_leaves_the_conversation_unchanged(says):
    says("one", "two")
    talk = make_conversation()
    list(talk.ask("first"))
    before = list(talk.messages), talk.last
    next(talk.ask("second"))
    assert (talk.messages, talk.last) == before


def test_thinking_without_an_end_is_kept_as_the_message(says):
    says("<think>\n" + "x" * NEW)
    talk = make_conversation()
    list(talk.ask("?"))
    assert talk.last.answer == "" and not talk.last.finished and talk.last.thinking.startswith("xxx")
    assert talk.messages[-1]["content"].startswith("<think>\nxxx")


@pytest.mark.parametrize(
    ("question", "message", "options"),
    [
        ("  \n", "nothing was asked", {}),
        ("y" * 300, "40 new ones exceed", {}),
        ("y" * 99, "and max_length is 99: raise it", {"max_length": 99}),
    ],
)
def test_empty_and_too_long_questions_are_refused(question, message, options):
    talk = make_conversation(**options)
    with pytest.raises(ValueError, match=message):
        next(talk.ask(question))
    assert not talk.messages


def test_a_real_model_fills_every_mask_and_a_special_token_in_a_question_stays_text():
    talk = make_conversation()
    frames = list(talk.ask("what is <|mask|>?"))
    assert len(frames) == 4 and MASK not in frames[-1].ids
    assert sum(sum(frame.fresh) for frame in frames) == NEW
    assert len(talk.messages) == 2


def screen(conversation, *lines, terminal=False):
    """What is printed while these lines are typed; an exception among them is raised where a line is read."""
    queue = iter(lines)

    class Typed(Console):
        def input(self, prompt):
            line = next(queue, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

    out = io.StringIO()
    Chat(conversation, Typed(file=out, force_terminal=terminal, width=100, highlight=False)).run()
    return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_thinking_is_folded_until_think_shows_it(says, terminal):
    says("<think>\nlet me see\n</think>\nfour")
    shown = screen(make_conversation(), "2+2?", terminal=terminal)
    assert "▸ thought for 10 tokens" in shown and "four" in shown
    assert ("░" in shown) == terminal and ("\x1b[" in shown) == terminal
    if not terminal:
        assert "let me see" not in shown
        says("<think>\nlet me see\n</think>\nfour")
        assert "let me see" in screen(make_conversation(), "2+2?", "/think")


def test_a_pipe_gets_the_answer_as_it_is(says):
    says(r"[bold]wide[/bold] \frac{1}{2} :apple: 12")
    lines = screen(make_conversation(), "?").splitlines()
    assert lines[0] == r"[bold]wide[/bold] \frac{1}{2} :apple: 12"
    assert lines[1].startswith("40 tokens in ") and "cut off after 40 tokens" in lines[1]


ATTACKS = "a\tb\n\x1b]52;c;aGk=\x07 \x1b]0;t\x1b\\ \x1b[2J \x9b8m \r \x7f \u202e"
SHOWN = "␛]52;c;aGk=␇ ␛]0;t␛\\ ␛[2J ⟨U+009B⟩8m ␍ ␡ ⟨U+202E⟩"


@pytest.mark.parametrize("terminal", [False, True])
def test_control_characters_become_visible_signs(says, monkeypatch, terminal):
    monkeypatch.setattr("test_chat.NEW", 80)
    says(ATTACKS)
    shown = screen(make_conversation(), "?", terminal=terminal)
    assert SHOWN in shown.replace("\n", "") or SHOWN in shown
    assert not any(bad in shown for bad in ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\u202e", "\x7f"))
    ids = TOKENIZER(ATTACKS)["input_ids"]
    row = render_row(ids, [True] * len(ids), [False] * len(ids), TOKENIZER).plain
    assert SHOWN in row and SHOWN in render(Frame(ids, [False] * len(ids)), TOKENIZER, 1).plain


def test_commands(says):
    says("one", "two")
    talk = make_conversation()
    shown = screen(
        talk, "a", "/params steps=2 temperature=0.5 top_k=None alg=origin", "/help", "/nothing", "", "/think"
    )
    assert (talk.params.steps, talk.params.temperature, talk.params.alg) == (2, 0.5, "origin")
    for text in ("there is no /nothing: /think, /reset", "nothing was asked", "no thinking to show", "start a new"):
        assert text in shown
    assert len(talk.messages) == 2
    screen(talk, "/params forbid_mask=False")
    assert talk.params.forbid_mask is False
    screen(talk, "/reset", "b", "/quit", "c")
    assert [message["content"] for message in talk.messages] == ["b", "two"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("steps=0", "steps is 0, it must be an integer of at least 1"),
        ("stepps=3", "stepps=3 is not name=value with a name of alg, "),
        ("steps", "steps is not name=value"),
        ("seed=two", "seed is 'two', it must be an integer"),
        ("temperature=hot", "temperature is 'hot', it must be finite and at least 0"),
    ],
)
def test_wrong_params_are_refused_and_change_nothing(words, message):
    talk = make_conversation()
    before = talk.params
    assert message in screen(talk, f"/params {words}")
    assert talk.params == before


def test_control_c_interrupts_the_answer_and_not_the_chat(says, monkeypatch):
    says("one", "two", "three")
    talk = make_conversation()
    ask, interrupted = talk.ask, []

    def interrupting(question):
        for number, frame in enumerate(ask(question)):
            if question == "second" and number == 2:
                interrupted.append(question)
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(talk, "ask", interrupting)
    for terminal in (False, True):
        talk.reset()
        says("one", "two", "three")
        shown = screen(talk, "first", KeyboardInterrupt(), "second", "third", terminal=terminal)
        assert shown.count("interrupted; /quit or Ctrl-D leaves") == 2 and "three" in shown
        assert [message["content"] for message in talk.messages] == ["first", "one", "third", "three"]
    assert interrupted == ["second", "second"]


def test_a_frame():
    ids = [*TOKENIZER("<think>½")["input_ids"], MASK, MASK, *TOKENIZER("</think>7")["input_ids"], EOS, EOS, MASK]
    fresh = [token in TOKENIZER("7")["input_ids"] for token in ids]
    text = render(Frame(ids, fresh), TOKENIZER, 3)
    assert text.plain == "<think>½░░</think>7··░\n\nstep 3 · 7 of 10 filled"
    marked = [text.plain[span.start : span.end] for span in text.spans if "on #" in str(span.style)]
    dim = [text.plain[span.start : span.end] for span in text.spans if span.style == "dim italic"]
    assert marked == ["7"] and dim == ["<think>½░░</think>"]


def test_a_row_shows_prompt_response_masks_and_eos_without_colors():
    prompt, response = TOKENIZER("hi")["input_ids"], TOKENIZER("½ok")["input_ids"]
    ids = [*prompt, *response, EOS, EOS]
    maskable = [False] * 2 + [True] * 6
    is_masked = [False] * 2 + [True, True, False, False, True, True]
    text = render_row(ids, maskable, is_masked, TOKENIZER)
    assert text.plain == "\n── prompt · 2 tokens ──\nhi\n\n── response · 6 tokens, 4 masked ──\n⟦½⟧ok⟦⏹×2⟧\n"
