"""Examples → ids: the authors' ids on real rows, no special token from text, and named ways to fit a limit."""

import hashlib
import json
import random
from dataclasses import replace

import pytest

from dream_lightning.batch import Example
from dream_lightning.data import prompt_format
from dream_lightning.data.prompt_format import encode_prompt, response_text
from dream_lightning.data.schemas import choose_reader, read_examples
from dream_lightning.data.sources import Row
from dream_lightning.data.tokenization import encode, encode_documents
from dream_lightning.errors import UserError
from dream_lightning.model.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
EOS = BYTES.eos_token_id


@pytest.fixture(scope="module")
def dream(shared):
    return load_tokenizer(shared("data/dream-v0-instruct-7b"))


@pytest.fixture(scope="module")
def s1k(shared):
    return read_examples(shared("data/s1k/s1k_gemini_traces.jsonl"))


def example(question="1+1?", thinking="one and one", answer="2", reference=None, system=None):
    messages = [{"role": "user", "content": question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Example("x", tuple(messages), thinking, answer, reference, "train.jsonl, row 17")


def test_all_s1k_rows_have_the_authors_ids(dream, s1k, shared):
    golden = json.loads(shared("golden/tokenizer.json").read_text())["s1k"]
    for wanted in golden:
        document, prompt_length, full_length, filled = encode(s1k[wanted["row"]], dream)
        assert (prompt_length, full_length, filled) == (wanted["prompt_tokens"], len(document), 0)
        for part, ids in (("prompt", document.prompt_ids), ("response", document.response_ids)):
            assert len(ids) == wanted[f"{part}_tokens"]
            assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == wanted[f"{part}_sha256"]


def test_multi_turn_has_the_authors_ids(dream, shared):
    for chat in json.loads(shared("golden/tokenizer.json").read_text())["multi_turn"]:
        assert encode_prompt(replace(example(), prompt=tuple(chat["messages"])), dream) == chat["ids"]


@pytest.fixture(params=["bytes", "dream"])
def tokenizer(request):
    return BYTES if request.param == "bytes" else request.getfixturevalue("dream")


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_text_never_becomes_a_special_token(tokenizer, style):
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    harmless = encode(example("a", "b", "c", system="d"), tokenizer, style=style).document
    generator = random.Random(0)
    for _ in range(30):
        parts = [*special.values(), "<|", "|>", "\n", " x ", "\ue000", "é"]
        texts = ["".join(generator.choices(parts, k=5)) for _ in range(4)]
        got = encode(example(texts[0], texts[1], texts[2], system=texts[3]), tokenizer, style=style).document
        for ids, wanted in ((got.prompt_ids, harmless.prompt_ids), (got.response_ids, harmless.response_ids)):
            assert [i for i in ids if i in special] == [i for i in wanted if i in special]
        assert texts[0] in tokenizer.decode(got.prompt_ids) and texts[3] in tokenizer.decode(got.prompt_ids)
        response = response_text(example(texts[0], texts[1], texts[2]), style=style)
        assert tokenizer.decode(got.response_ids) == response + tokenizer.eos_token


def test_both_styles():
    one = example(reference="two", system="S")
    assert BYTES.decode(encode_prompt(one, BYTES)).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1+1?")
    plain = BYTES.decode(encode_prompt(one, BYTES, style="plain"))
    assert plain == "S\n\nQuestion: 1+1?\n\nLet's think step by step.\n"
    assert response_text(one) == "<think>\none and one\n</think>\n2"
    assert response_text(one, thinking=False) == "2"
    assert response_text(one, style="plain") == "one and one Therefore, the final answer is: two"
    assert response_text(one, style="plain", thinking=False) == "Therefore, the final answer is: two"


@pytest.mark.parametrize(
    ("answer", "reference", "final"),
    [
        ("so \\boxed{1} or \\boxed{\\frac{1}{2}}.", "gold", "\\frac{1}{2}"), ("so 3", "gold", "gold"),
        ("so 3", "a proof\nof lines", "so 3"), ("so 3", None, "so 3"), ("open \\boxed{1", None, "open \\boxed{1"),
    ],
)  # fmt: skip
def test_plain_ends_with_the_short_answer(answer, reference, final):
    text = response_text(example(answer=answer, reference=reference), style="plain")
    assert text == f"one and one Therefore, the final answer is: {final}"


@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("system", [None, "old"])
def test_system_prompt_replaces_the_records(style, system):
    text = BYTES.decode(encode_prompt(example(system=system), BYTES, style=style, system_prompt="new"))
    assert "new" in text and "old" not in text


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_truncate_trace_keeps_the_answer_and_fills_the_room(tokenizer, style):
    one = example(thinking="Zählen wir: " + "eins 😀 und 中文, é… " * 20, answer="Die Antwort ist **2** 😀.")
    whole, _, full_length, _ = encode(one, tokenizer, style=style)
    head = "<think>\n" if style == "chat" else ""
    tail = response_text(one, style=style).removeprefix(head + one.thinking)
    least = len(whole.prompt_ids) + len(tokenizer.encode(head)) + len(tokenizer.encode(tail)) + 1
    for max_length in range(least, full_length):
        got = encode(one, tokenizer, style=style, max_length=max_length)
        text = tokenizer.decode(got.document.response_ids)
        assert got.document.prompt_ids == whole.prompt_ids and got.full_length == full_length
        assert max_length - 4 < len(got.document) <= max_length
        assert text.startswith(head) and text.endswith(tail + tokenizer.eos_token)
        assert one.thinking.startswith(text.removeprefix(head).removesuffix(tail + tokenizer.eos_token))
        assert len(got.document.response_weight) == len(got.document.response_ids)
    assert encode(one, tokenizer, style=style, max_length=full_length).document == whole
    with pytest.raises(UserError, match=r"row 17 has .* does not fit even without its thinking; set overflow"):
        encode(one, tokenizer, style=style, max_length=least - 1)
    for max_length in (least, least - 1):
        got = encode(one, tokenizer, style=style, max_length=max_length, overflow="truncate_trace_else_drop")
        assert (got.document is None) == (max_length < least)


def test_other_overflows():
    one = example(thinking="long " * 50)
    whole, _, full_length, _ = encode(one, BYTES)
    limit = full_length - 100
    assert encode(one, BYTES, max_length=limit, overflow="drop") == (None, len(whole.prompt_ids), full_length, 0)
    right = encode(one, BYTES, max_length=limit, overflow="truncate_right", eos_fill_to=limit).document
    assert right.prompt_ids + right.response_ids == (whole.prompt_ids + whole.response_ids)[:limit]
    with pytest.raises(UserError, match=rf"row 17 has {full_length} tokens .*max_length is {limit}: set overflow to"):
        encode(one, BYTES, max_length=limit, overflow="error")
    for overflow in ("error", "truncate_trace", "truncate_right"):
        with pytest.raises(UserError, match=r"row 17 has .* raise max_length"):
            encode(one, BYTES, max_length=len(whole.prompt_ids), overflow=overflow)
    for overflow in ("drop", "error", "truncate_trace", "truncate_trace_else_drop", "truncate_right"):
        assert encode(one, BYTES, max_length=full_length, overflow=overflow).document == whole


def test_what_cannot_be_encoded_is_named():
    with pytest.raises(UserError, match="row 17"):
        encode(example(thinking=None, answer="long " * 50), BYTES, max_length=100)
    without = example(answer=" ")
    for one, thinking in ((replace(without, thinking=None), True), (without, True), (without, False)):
        with pytest.raises(UserError, match="row 17 has no response to train on"):
            encode(one, BYTES, thinking=thinking)
    messages = [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]
    with pytest.raises(UserError, match="use the chat style"):
        encode(replace(example(), prompt=tuple(messages)), BYTES, style="plain")


def of_chat(chat, **columns):
    rows = [Row({"messages": chat, **columns}, "train.jsonl", 17)]
    return choose_reader(rows).read(*rows)


TOOLS = [{"type": "function", "function": {"name": "add", "description": "é <|im_end|>", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": '"é" <|im_end|>'}}}
CHAT = [
    {"role": "assistant", "content": "Hello!"},  # after no question: not trained
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2 <|im_end|>"},
    {"role": "assistant", "content": "<think>\nt\n</think>\nIt is 2."},
    {"role": "user", "content": "Again, twice."},
    {"role": "assistant", "content": "So", "tool_calls": [CALL, CALL]},
]


def test_all_responses_are_trained_and_tools_worded_as_dreams_template_does(dream):
    text = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}
    calls = [{"id": "1", "type": "function", "function": text}]  # as OpenAI has them
    chat = [*CHAT[:2], {"role": "assistant", "content": None, "tool_calls": calls}, *CHAT[3:]]
    given = of_chat(chat, tools=json.dumps(TOOLS))
    documents = [e.document for e in encode_documents(given, dream, train_on="all")]
    for document, end in zip(documents, (2, 4, 6), strict=True):
        alone = encode(of_chat(CHAT[: end + 1], tools=TOOLS), dream).document
        assert (document.prompt_ids, document.response_ids) == (alone.prompt_ids, alone.response_ids)
        read = dream.decode(document.prompt_ids) + dream.decode(document.response_ids[:-1]) + "<|im_end|>\n"
        assert read == dream.apply_chat_template(CHAT[: end + 1], tools=TOOLS, tokenize=False)
        im_end = dream.convert_tokens_to_ids("<|im_end|>")
        assert im_end not in document.response_ids and document.prompt_ids.count(im_end) == end + 1
    assert [e.document for e in encode_documents(given, dream)] == documents[-1:]


def test_tools_that_no_template_or_style_words_are_refused():
    for chat, columns, name in ((CHAT[:4], {}, "tool_calls"), (CHAT[:3], {}, "tool_calls"), (CHAT[:2], TOOLS, "tools")):
        with pytest.raises(UserError, match=f"row 17 has {name}, which the tokenizer's template leaves out"):
            one = of_chat(chat, tools=columns)
            encode(replace(one, answer="2"), BYTES)
    for one in (of_chat(CHAT[1:3]), of_chat(CHAT[1:2], tools=TOOLS)):
        with pytest.raises(UserError, match=r"row 17 has .*tool.*: use the chat style"):
            encode(replace(one, answer="2"), BYTES, style="plain")
    with pytest.raises(UserError, match="row 17, response 1 has no response"):
        empty = [CHAT[1], {"role": "assistant", "content": ""}, *CHAT[4:6], CHAT[0]]
        encode_documents(of_chat(empty), BYTES, train_on="all")


@pytest.mark.parametrize("fill", [1, 30, 40])
def test_eos_fill(fill):
    bare = encode(example(), BYTES).document
    got = encode(example(), BYTES, eos_fill_to=fill)
    added = max(0, fill - len(bare.response_ids))
    assert got.document.response_ids == bare.response_ids + [EOS] * added
    assert (got.filled, got.full_length) == (added, len(bare))
    assert len(got.document.response_weight) == len(got.document.response_ids)
    limited = encode(example(), BYTES, eos_fill_to=fill, max_length=len(bare) + 3)
    assert len(limited.document) == len(bare) + min(added, 3)


def test_extra_weight_covers_every_token_of_every_occurrence(tokenizer):
    one = example(thinking="é 😀 wait, wait. " * 30, answer="wait: e\u0301 2")
    for max_length in (None, 150):
        got = encode(one, tokenizer, extra_weight={"</think>": 2.0, "wait": 3.0}, max_length=max_length).document
        for part, value in (("</think>", 2.0), ("wait", 3.0)):
            ids = [i for i, weight in zip(got.response_ids, got.response_weight, strict=True) if weight == value]
            assert tokenizer.decode(ids).count(part) == tokenizer.decode(got.response_ids).count(part) > 0
            assert len(ids) <= len(tokenizer.encode(part)) * 2 * tokenizer.decode(got.response_ids).count(part)
        assert set(got.response_weight) == {1.0, 2.0, 3.0}
        assert got.response_weight[-1] == 1.0
    assert set(encode(one, tokenizer).document.response_weight) == {1.0}


def test_the_text_of_a_special_token_weights_the_token(tokenizer):
    one = example(answer="2 <|im_end|>")
    for style in ("chat", "plain"):
        plain = encode(one, tokenizer, style=style, eos_fill_to=60).document
        got = encode(one, tokenizer, style=style, eos_fill_to=60, extra_weight={"<|endoftext|>": 0.1}).document
        is_eos = [i == tokenizer.eos_token_id for i in got.response_ids]
        assert got.response_ids == plain.response_ids and sum(is_eos) > 1
        assert got.response_weight == [0.1 if eos else 1.0 for eos in is_eos]


def test_extra_weight_of_a_frequent_text_takes_linear_time(dream):
    """Quadratic, 32,000 words took minutes."""
    got = encode(example(thinking="step one. " * 16_000), dream, extra_weight={"step": 2.0}).document
    assert sum(weight == 2.0 for weight in got.response_weight) == 16_000


@pytest.mark.parametrize("long", ["question", "thinking", "answer"])
def test_a_row_of_megabytes_is_refused_or_dropped_by_its_start(long, monkeypatch):
    monkeypatch.setattr(prompt_format, "AT_ONCE", 10_000)  # a million takes seconds
    one = example(**{long: "long " * 4_000})
    with pytest.raises(UserError, match=r"row 17 has 20,0\d\d characters, about 20,0\d\d tokens, max"):
        encode(one, BYTES, max_length=90)
    for overflow in ("drop", "truncate_trace_else_drop"):
        got = encode(one, BYTES, max_length=90, overflow=overflow)
        assert got.document is None and got.full_length > 20_000
