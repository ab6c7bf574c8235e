"""A conversation, and what of it stands on the screen: over a model that says what the test wants, and a real one."""

import io

import pytest
import torch
from rich.console import Console

from dream_lightning import SamplingParams, load_tokenizer
from dream_lightning.model_factory import random_model
from dream_lightning.viewer import Chat, Conversation, Frame, conversation
from dream_lightning.viewer.terminal import render

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENIZER = load_tokenizer("bytes")
MASK, EOS = TOKENIZER.mask_token_id, TOKENIZER.eos_token_id
NEW = 40


def a_conversation(**options):
    torch.manual_seed(0)
    model = random_model(SIZES | {"max_position_embeddings": 300}, TOKENIZER).eval()
    params = SamplingParams(max_new_tokens=NEW, steps=4, forbid_mask=True)
    return Conversation(model, TOKENIZER, params, **options)


@pytest.fixture
def says(monkeypatch):
    """`says("a", "b")`: the model's next answers, filled in from the left in 4 steps; returns the prompts it got."""

    def will_say(*texts):
        prompts, answers = [], iter(texts)

        def steps(model, input_ids, *, params):
            prompts.append(TOKENIZER.decode(input_ids[0]))
            ids = TOKENIZER(next(answers))["input_ids"]
            ids += [EOS] * (NEW - len(ids))
            for step in range(1, 5):
                shown = ids[: NEW * step // 4] + [MASK] * (NEW - NEW * step // 4)
                yield torch.cat([input_ids, torch.tensor([shown])], dim=1)

        monkeypatch.setattr(conversation, "denoising_steps", steps)
        return prompts

    return will_say


def test_turns_go_on_without_the_thinking(says):
    prompts, talk = says("<think>\nhm\n</think>\nfour", "five"), a_conversation(system_prompt="Be brief.")
    frames = list(talk.ask("2+2?"))
    assert [frame.ids.count(MASK) for frame in frames] == [30, 20, 10, 0]
    assert [sum(frame.fresh) for frame in frames] == [10, 10, 10, 10]
    assert (talk.last.thinking, talk.last.answer, talk.last.finished) == ("hm", "four", True)
    assert (talk.last.thinking_tokens, talk.last.tokens) == (2, 11)
    list(talk.ask("and one more?"))
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    first = turn("system", "Be brief.") + turn("user", "2+2?")
    assert prompts[0] == first + "<|im_start|>assistant\n"
    assert prompts[1] == first + turn("assistant", "four") + turn("user", "and one more?") + "<|im_start|>assistant\n"
    talk.reset()
    assert talk.turns == [] and talk.last is None


def test_an_answer_broken_off_leaves_no_trace(says):
    says("one", "two")
    talk = a_conversation()
    list(talk.ask("first"))
    before = list(talk.turns), talk.last
    frames = talk.ask("second")
    next(frames)
    frames.close()
    assert (talk.turns, talk.last) == before


def test_thinking_without_end_is_kept_as_what_was_said(says):
    says("<think>\n" + "x" * NEW)
    talk = a_conversation()
    list(talk.ask("?"))
    assert talk.last.answer == "" and not talk.last.finished and talk.last.thinking.startswith("xxx")
    assert talk.turns[-1]["content"].startswith("<think>\nxxx")


def test_an_empty_answer_stays_empty_in_later_turns(says):
    prompts, talk = says("", "five"), a_conversation()
    list(talk.ask("2+2?"))
    assert (talk.last.thinking, talk.last.answer, talk.last.tokens) == (None, "", 0)
    list(talk.ask("and?"))
    assert "<|im_start|>assistant\n<|im_end|>" in prompts[1] and "None" not in prompts[1]


def test_too_long_and_empty_are_refused_before_anything_runs(says):
    prompts, talk = says("long " * 8, "never"), a_conversation()
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match="nothing was asked"):
            talk.ask(empty)
    list(talk.ask("y" * 150))
    with pytest.raises(ValueError, match=r"an answer 40, and the model sees 300 at once: /reset"):
        talk.ask("z" * 50)
    assert len(prompts) == 1 and len(talk.turns) == 2


def test_a_real_model_fills_every_mask_and_a_special_token_in_a_question_stays_text():
    talk = a_conversation()
    frames = list(talk.ask("what is <|mask|>?"))
    assert len(frames) == 4 and MASK not in frames[-1].ids
    assert sum(sum(frame.fresh) for frame in frames) == NEW
    assert len(talk.turns) == 2


def screen(conversation, *lines, terminal=False):
    """What is printed while these lines are typed; an exception among them is raised where a line is read."""
    queue = iter(lines)

    def read():
        line = next(queue, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    out = io.StringIO()
    Chat(conversation, Console(file=out, force_terminal=terminal, width=100, highlight=False), read).run()
    return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_thinking_is_folded_and_think_unfolds_it(says, terminal):
    says("<think>\nlet me see\n</think>\nfour")
    shown = screen(a_conversation(), "2+2?", terminal=terminal)
    assert "▸ thought for 10 tokens" in shown and "four" in shown
    assert ("░" in shown) == terminal and ("\x1b[" in shown) == terminal
    if not terminal:
        assert "let me see" not in shown
        says("<think>\nlet me see\n</think>\nfour")
        assert "let me see" in screen(a_conversation(), "2+2?", "/think")


def test_a_pipe_gets_the_answer_as_it_is(says):
    says(r"[bold]wide[/bold] \frac{1}{2} :apple: 12")
    lines = screen(a_conversation(), "?").splitlines()
    assert lines[0] == r"[bold]wide[/bold] \frac{1}{2} :apple: 12"
    assert lines[1].startswith("40 tokens in ") and "cut off at max_new_tokens=40" in lines[1]


def test_commands(says):
    says("one", "two")
    talk = a_conversation()
    shown = screen(
        talk, "a", "/params steps=2 temperature=0.5 top_k=None alg=origin", "/help", "/nothing", "", "/think"
    )
    assert (talk.params.steps, talk.params.temperature, talk.params.alg) == (2, 0.5, "origin")
    for text in ("there is no /nothing: /think, /reset", "nothing was asked", "no thinking to unfold", "start a new"):
        assert text in shown
    assert len(talk.turns) == 2
    screen(talk, "/params forbid_mask=False")
    assert talk.params.forbid_mask is False
    screen(talk, "/reset", "b", "/quit", "c")
    assert [turn["content"] for turn in talk.turns] == ["b", "two"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("steps=0", "steps is 0, it must be an integer of at least 1"),
        ("stepps=3", "stepps=3 is not name=value with a name of alg, "),
        ("steps", "steps is not name=value"),
        ("seed=two", "seed is 'two', it must be an integer"),
        ("temperature=hot", "temperature=hot: "),
    ],
)
def test_wrong_params_are_told_and_change_nothing(words, message):
    talk = a_conversation()
    before = talk.params
    assert message in screen(talk, f"/params {words}")
    assert talk.params == before


def test_control_c_stops_the_answer_and_not_the_chat(says, monkeypatch):
    says("one", "two", "three")
    talk = a_conversation()
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
        assert "stopped" in shown and "/quit or Ctrl-D leaves" in shown and "three" in shown
        assert [turn["content"] for turn in talk.turns] == ["first", "one", "third", "three"]
    assert interrupted == ["second", "second"]


def test_a_frame():
    ids = [*TOKENIZER("<think>½")["input_ids"], MASK, MASK, *TOKENIZER("</think>7")["input_ids"], EOS, EOS, MASK]
    fresh = [token in TOKENIZER("7")["input_ids"] for token in ids]
    text = render(Frame(ids, fresh), TOKENIZER, 3)
    assert text.plain == "<think>½░░</think>7··░\n\nstep 3 · 7 of 10 filled"
    marked = [text.plain[span.start : span.end] for span in text.spans if "on #" in str(span.style)]
    dim = [text.plain[span.start : span.end] for span in text.spans if span.style == "dim italic"]
    assert marked == ["7"] and dim == ["<think>½░░</think>"]
