"""The fast tokenizer against the ids of the authors' slow one (golden/tokenizer.json), and the byte-level one."""

import hashlib
import json
import random
import shutil

import pytest

from dream_lightning.model import loading
from dream_lightning.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(shared):
    return shared("data/dream-v0-instruct-7b")


@pytest.fixture(scope="module")
def dream(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads(shared("golden/tokenizer.json").read_text())


def sha256(ids):
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def test_ids_are_the_authors(dream, golden):
    for text in golden["texts"]:
        assert dream.encode(text["text"]) == text["ids"], text["text"]
        assert dream.decode(text["ids"]) == dream.backend_tokenizer.normalizer.normalize_str(text["text"])


def test_chat_template_is_the_authors(dream, golden):
    for chat in golden["multi_turn"]:
        text = dream.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True)
        assert text == chat["text"]
        assert dream.encode(text) == chat["ids"]


def test_all_s1k_rows_have_the_authors_ids(dream, golden, shared):
    rows = [json.loads(line) for line in shared("data/s1k/s1k_gemini_traces.jsonl").open()]
    assert len(golden["s1k"]) == 91
    for wanted in golden["s1k"]:
        row = rows[wanted["row"]]
        question = [{"role": "user", "content": row["question"]}]
        prompt = dream.encode(dream.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
        response = [*dream.encode(f"<think>\n{row['thinking_trajectories'][0]}\n</think>\n{row['attempt']}"), 151643]
        assert (len(prompt), sha256(prompt)) == (wanted["prompt_tokens"], wanted["prompt_sha256"])
        assert (len(response), sha256(response)) == (wanted["response_tokens"], wanted["response_sha256"])


def test_special_ids(dream, golden):
    ids = {name: getattr(dream, f"{name}_token_id") for name in ("mask", "eos", "pad", "bos")}
    assert ids | {"length": len(dream)} == {name: golden["special"][name] for name in (*ids, "length")}


@pytest.mark.parametrize("name", ["bytes", "dream"])
def test_saved_and_loaded_again_it_is_the_same(name, tmp_path, request):
    before = load_tokenizer("bytes") if name == "bytes" else request.getfixturevalue("dream")
    before.save_pretrained(tmp_path)
    after = load_tokenizer(tmp_path)
    assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    assert after.chat_template == before.chat_template
    assert after.special_tokens_map == before.special_tokens_map
    assert after.model_max_length == before.model_max_length
    text = "<think>é 1+1\n\n</think> <|mask|><|im_end|>"
    assert after.decode(after.encode(text), skip_special_tokens=True) == "<think>é 1+1\n\n</think> "


def test_the_bytes_tokenizer_has_dreams_special_tokens():
    tokenizer = load_tokenizer("bytes")
    assert len(tokenizer) == 263
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert (tokenizer.bos_token, tokenizer.mask_token) == ("<|beginoftext|>", "<|mask|>")
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>", "<think>", "</think>"):
        assert len(tokenizer.encode(token)) == 1


def test_bytes_ids_are_the_bytes():
    tokenizer, generator = load_tokenizer("bytes"), random.Random(0)
    for _ in range(300):
        text = "".join(chr(generator.choice([generator.randrange(0xD800), 0x1F600])) for _ in range(20))
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(list(text.encode()), skip_special_tokens=True) == text


def test_bytes_template_has_a_system_turn_only_if_given():
    def rendered(*turns):
        turns = [{"role": role, "content": content} for role, content in turns]
        return load_tokenizer("bytes").apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    question = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(("user", "hi")) == question
    assert rendered(("system", "Be brief."), ("user", "hi")) == "<|im_start|>system\nBe brief.<|im_end|>\n" + question


def test_from_the_hub_only_tokenizer_files_are_fetched(monkeypatch, folder):
    asked = {}

    def snapshot_download(name, *, allow_patterns, revision):
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    assert load_tokenizer("Dream-org/Dream-v0-Instruct-7B").mask_token_id == 151666
    (patterns,) = asked.values()
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= set(patterns)
    assert not any(name.endswith((".py", ".safetensors", ".bin")) or "*" in name for name in patterns)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the official tokenizer files that a test may damage."""
    for file in folder.iterdir():
        if file.name.startswith(("vocab", "merges", "tokenizer", "added", "special")):
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def cut(count):
    return lambda file: file.write_text("".join(file.read_text().splitlines(True)[:count]))


def cut_merges_of_json(file):
    content = json.loads(file.read_text())
    del content["model"]["merges"][1000:]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("merges.txt", cut(100_000), r"51388 tokens of the vocabulary have no merge.*was cut"),
        ("merges.txt", lambda file: file.write_text(file.read_text() + "Ġ zzz\n"), "'zzz'.*was cut"),
        ("merges.txt", lambda file: file.write_bytes(b"\xff" + file.read_bytes()), r"merges.txt is damaged.*Unicode"),
        ("merges.txt", lambda file: (file.unlink(), file.mkdir()), r"merges.txt cannot be read: Is a directory"),
        ("vocab.json", lambda file: file.write_text(file.read_text()[:-9]), r"vocab.json is damaged or no JSON object"),
        ("vocab.json", lambda file: file.write_text("{}"), "are not in the vocabulary"),
        ("added_tokens.json", lambda file: file.write_text("[" * 100_000), r"added_tokens.json is damaged.*Recursion"),
        ("special_tokens_map.json", lambda file: file.write_text("null"), r"special_tokens_map.json is damaged"),
        ("tokenizer_config.json", lambda file: file.write_text("[]"), r"tokenizer_config.json is damaged.*a list"),
        ("tokenizer_config.json", lambda file: file.write_text("{}"), r"tokenizer_config.json lacks eos_token"),
        ("tokenizer.json", cut_merges_of_json, "tokens of the vocabulary have no merge"),
        ("tokenizer.json", lambda file: file.write_text("{}"), r"tokenizer.json is damaged"),
    ],
)
def test_files_that_are_damaged_or_do_not_fit_together_are_refused_by_name(copy, dream, name, damage, words):
    if name == "tokenizer.json":
        dream.backend_tokenizer.save(str(copy / name))
    damage(copy / name)
    with pytest.raises(ValueError, match=words):
        load_tokenizer(copy)


def test_as_transformers_4_57_saves_the_official_class(copy, dream, golden):
    """The chat template has a file of its own, and special tokens may be objects; without a pad token it is eos."""
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    (copy / "chat_template.jinja").write_text(settings.pop("chat_template"))
    del settings["pad_token"]
    settings["eos_token"] = {"content": settings["eos_token"], "__type": "AddedToken", "special": True}
    file.write_text(json.dumps(settings))
    loaded = load_tokenizer(copy)
    assert loaded.chat_template == dream.chat_template and loaded.special_tokens_map == dream.special_tokens_map
    assert all(loaded.encode(text["text"]) == text["ids"] for text in golden["texts"])
    file.write_text(json.dumps(settings | {"mask_token": None}))
    with pytest.raises(ValueError, match="has no mask_token"):
        load_tokenizer(copy)


def test_errors_say_what_to_do(monkeypatch, tmp_path, folder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for nothing in ("no/such-model", tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"no tokenizer: .* hub id .* local folder, .* bytes"):
            load_tokenizer(nothing)
    with pytest.raises(ValueError, match=r"neither tokenizer.json nor vocab.json, merges.txt, tokenizer_config.json"):
        load_tokenizer(tmp_path)
    for name in ("vocab.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"nor merges.txt; copy"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    with pytest.raises(ValueError, match=r"gets id 3, tokenizer_config.json wants 151643"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load_tokenizer(tmp_path / "vocab.json")
