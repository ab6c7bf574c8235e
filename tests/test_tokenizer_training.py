"""Training a tokenizer: what it learns from which files, and that a model trains with it."""

import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from material import addition_rows, short_trainer, tiny_data, write_jsonl

from dream_lightning import DreamModule, cli
from dream_lightning.batch import Example
from dream_lightning.data.prompt_format import response_text
from dream_lightning.data.tokenization import encode
from dream_lightning.errors import UserError
from dream_lightning.model import load_tokenizer
from dream_lightning.tokenizer_training import TAGS, learn

WORDS = ["the", "quick", "brown", "fox", "thinks", "我们", "学习", "思考", "答案", "é", "naïve", "12", "+", "30"]


def lines(count=400, seed=0):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=12)) for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The same texts as a .jsonl, a .parquet and a .txt file."""
    folder = tmp_path_factory.mktemp("corpus")
    chats = [{"id": f"zzzz-{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(lines())]
    (folder / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    pyarrow.parquet.write_table(pa.table({"text": lines()}), folder / "b.parquet")
    (folder / "c.txt").write_text("\n".join(lines(4000)))
    return folder


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """As the command line writes it."""
    new = tmp_path_factory.mktemp("new") / "tokenizer"
    cli.run(["train-tokenizer", str(corpus), "--folder", str(new), "--vocab_size", "320", "--tags", "true"])
    return new


def test_the_folder_holds_dreams_tokens_and_round_trips_other_text(folder):
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 320
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert (tokenizer.bos_token, tokenizer.mask_token) == ("<|beginoftext|>", "<|mask|>")
    assert tokenizer.get_chat_template() == load_tokenizer("bytes").get_chat_template()
    for text in (*lines(3, seed=1), "never seen: ژ 🙂\t\r\n\n  <|mask|>"):
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.mask_token_id not in ids
    assert len(tokenizer.encode(" thinks 我们")) == 2  # 12 bytes


def test_tags_in_a_response_are_single_tokens(folder):
    tokenizer = load_tokenizer(folder)
    example = Example("a", ({"role": "user", "content": "q"},), "think", "<answer>12</answer>", None, "row 1")
    for form in (encode(example, tokenizer).document.response_ids, tokenizer.encode(response_text(example))):
        assert [form.count(tokenizer.convert_tokens_to_ids(tag)) for tag in TAGS] == [1, 1, 1, 1]


def test_a_new_model_trains_with_it(folder, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = DreamModule(new_model=sizes, tokenizer=str(folder))
    rows = write_jsonl(tmp_path / "rows.jsonl", addition_rows(40))
    short_trainer(tmp_path, max_steps=1).fit(module, tiny_data(rows, tmp_path))
    assert module.model.config.vocab_size == 320
    assert module.model.config.mask_token_id == load_tokenizer(folder).mask_token_id


def test_every_kind_of_file_is_read_without_ids_and_roles(corpus):
    kinds = {name: learn([str(corpus / name)], vocab_size=300) for name in ("a.jsonl", "b.parquet", "c.txt")}
    assert kinds["a.jsonl"].held_out == kinds["b.parquet"].held_out  # neither ids nor roles are learned
    assert kinds["a.jsonl"].tokenizer.get_vocab() == kinds["b.parquet"].tokenizer.get_vocab()
    assert kinds["a.jsonl"].texts + len(kinds["a.jsonl"].held_out) == 400
    columns = learn([str(corpus / "a.jsonl")], vocab_size=300, columns=["id"])
    assert columns.held_out[0] == "zzzz-0"


def test_larger_files_are_read_evenly(tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("first half\n" * 150_000 + "other part\n" * 150_000)  # 3.1 MiB
    trained = learn([str(path)], vocab_size=300, max_mib=1)
    assert 0.7 * 2**20 < trained.text_bytes <= 1.1 * 2**20
    assert len(trained.tokenizer.encode(" half")) == len(trained.tokenizer.encode(" part")) == 1


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("one text", {}, "has 1 texts, wanted at least 2"),
        (b"\xff\xfea", {}, "a.txt is damaged or no UTF-8 text"),
        ("text", {"vocab_size": 260}, "vocab_size is 260, wanted at least 261"),
        ("text", {"max_mib": 0}, "max_mib is 0"),
        (None, {}, "is no file or folder of files that end in .jsonl"),
    ],
)
def test_mistakes_are_named(tmp_path, content, options, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        learn([str(path)], **options)
