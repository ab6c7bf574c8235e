"""Official → ours → official keeps everything; checkpoints become official folders; writing is atomic."""

import errno
import filecmp
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from material import quiet_trainer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from dream_lightning import DreamModule, S1KDataModule
from dream_lightning import export as module
from dream_lightning.adapters import LoraParams, add_lora, merge_lora
from dream_lightning.atomic import PARTIAL
from dream_lightning.export import AUTHORS_CODE, export_checkpoint, export_model, model_from_checkpoint, save_tokenizer
from dream_lightning.model import DreamConfig, DreamModel, load_tokenizer
from dream_lightning.training.optimizer import AdamW8bit

SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
IDS = {"mask_token_id": 260, "pad_token_id": 256, "bos_token_id": 259, "eos_token_id": 256}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DreamModel(DreamConfig(**SIZES, **IDS)).to(torch.bfloat16)


def stored(folder):
    """Name → tensor as the files hold it."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def fit(lightning_module, source, path):
    """Save a checkpoint after one step; returns the weights in it."""
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0, default_root_dir=path.parent)
    tokenizer = load_tokenizer("bytes")
    trainer.fit(lightning_module, S1KDataModule(str(source), tokenizer=tokenizer, cache_dir=str(path.parent / "cache")))
    trainer.save_checkpoint(path)
    return {name: tensor.clone() for name, tensor in lightning_module.model.state_dict().items()}


@pytest.fixture
def scratch_checkpoint(sums, tmp_path):
    torch.manual_seed(0)
    module = DreamModule(new_model=SIZES, tokenizer="bytes", optimizer=partial(torch.optim.AdamW, lr=1e-2))
    return tmp_path / "last.ckpt", fit(module, sums, tmp_path / "last.ckpt")


def test_official_to_ours_to_official_keeps_every_bit(shared, tmp_path):
    source = shared("golden/dream-tiny")
    written = export_model(DreamModel.from_pretrained(source), tmp_path / "out", max_shard_size="200KB")
    assert len(list(written.glob("model-*-of-*.safetensors"))) > 1
    assert_same(stored(written), load_file(source / "model.safetensors"))
    golden = load_file(source / "golden.safetensors")
    with torch.no_grad():
        logits = DreamModel.from_pretrained(written).eval()(golden["forward.full.input_ids"]).logits
    torch.testing.assert_close(logits, golden["forward.full.logits"], rtol=1e-5, atol=1e-5)


def test_every_key_of_the_official_config_keeps_its_value(shared, tmp_path):
    """Except who wrote it: `_name_or_path` and `transformers_version`."""
    official = json.loads((shared("data/dream-v0-instruct-7b") / "config.json").read_text())
    small = {"num_hidden_layers": 1, "hidden_size": 56, "intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(official | small))
    config = DreamConfig.from_pretrained(tmp_path)
    written = export_model(DreamModel(config).to(torch.bfloat16), tmp_path / "out")
    got = json.loads((written / "config.json").read_text())
    official = {k: v for k, v in (official | small).items() if k not in ("_name_or_path", "transformers_version")}
    assert official == {key: got.get(key) for key in official}
    assert got["torch_dtype"] == "bfloat16" and got["use_cache"] is True and got["use_mrope"] is False


def test_the_folder_is_complete(model, tmp_path):
    written = export_model(model, tmp_path / "new" / "folder", tokenizer=load_tokenizer("bytes"))
    assert type(AutoModel.from_pretrained(written, trust_remote_code=False)) is DreamModel
    assert len(load_tokenizer(written)) == 263
    fast = AutoTokenizer.from_pretrained(written)  # as llama.cpp's converter does; the authors' code is not there
    assert fast.is_fast and fast("<|mask|>1+1")["input_ids"] == [260, *b"1+1"]
    generation = json.loads((written / "generation_config.json").read_text())
    assert generation["mask_token_id"] == 260  # the authors' from_pretrained wants the file, their sampler the id
    assert all(file.stat().st_mode & 0o777 == 0o666 & written.stat().st_mode for file in written.iterdir())
    assert [path.name for path in written.parent.iterdir()] == ["folder"]


def test_tokenizer_files_equal_the_official_ones(model, shared, tmp_path):
    official = shared("data/dream-v0-instruct-7b")
    source = tmp_path / "official"
    source.mkdir()
    for file in official.iterdir():
        (source / file.name).symlink_to(file)
    for name in AUTHORS_CODE:
        (source / name).write_text(f"# {name}\n")
    before = load_tokenizer(official)
    with pytest.raises(ValueError, match=r"151667 tokens .* the model 320"):  # of another vocabulary
        export_model(model, tmp_path / "out", tokenizer=before)
    written = tmp_path / "out"
    written.mkdir()
    save_tokenizer(source, written)
    for name in ("vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        assert json.loads((written / name).read_text()) == json.loads((official / name).read_text()), name
    for name in ("merges.txt", *AUTHORS_CODE):
        assert filecmp.cmp(written / name, source / name, shallow=False), name
    texts = json.loads(shared("golden/tokenizer.json").read_text())["texts"]
    for with_tokenizer_json in (True, False):
        after = load_tokenizer(written)
        assert after.chat_template == before.chat_template and after.special_tokens_map == before.special_tokens_map
        assert all(after.encode(text["text"]) == text["ids"] for text in texts)
        if with_tokenizer_json:
            assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
            (written / "tokenizer.json").unlink()


def test_a_model_from_scratch_is_exported_with_its_own_sizes(scratch_checkpoint, tmp_path):
    path, weights = scratch_checkpoint
    written = export_checkpoint(path, tmp_path / "out", tokenizer="bytes")
    assert_same(stored(written), weights)
    config = json.loads((written / "config.json").read_text())
    assert (SIZES | IDS | {"torch_dtype": "float32"}).items() <= config.items()
    assert_same(DreamModel.from_pretrained(written).state_dict(), weights)


def test_bfloat16_is_rounded_once(scratch_checkpoint, tmp_path):
    path, weights = scratch_checkpoint
    written = export_checkpoint(path, tmp_path / "out", dtype="bfloat16")
    assert_same(stored(written), {name: tensor.bfloat16() for name, tensor in weights.items()})
    assert json.loads((written / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_tokenizer_with_other_ids_than_that_of_the_training_is_refused(model, tmp_path):
    path, folder = tmp_path / "x.ckpt", tmp_path / "other"
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = {"state_dict": state, "dream_config": model.config.to_dict(), "tokenizer": "bytes"}
    torch.save(checkpoint, path)
    folder.mkdir()
    save_tokenizer("bytes", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"other has 2 tokens with other ids than bytes, .* such as 'a': leave"):
        export_checkpoint(path, tmp_path / "out", tokenizer=folder)
    torch.save(checkpoint | {"tokenizer": str(tmp_path / "gone")}, path)
    with pytest.warns(UserWarning, match="not compared with that of the training: no tokenizer: .*gone"):
        export_checkpoint(path, tmp_path / "out", tokenizer=folder)


def test_full_fine_tuning_takes_the_tokenizer_from_its_base(model, sums, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = export_model(model, tmp_path / "base", tokenizer="bytes")
    training = DreamModule(str(base), dtype="bfloat16", optimizer=partial(AdamW8bit, lr=1e-2), warmup_fraction=0)
    weights = fit(training, sums, tmp_path / "last.ckpt")
    assert not torch.equal(weights["lm_head.weight"], model.lm_head.weight)
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out")
    assert_same(stored(tmp_path / "out"), weights)
    assert len(load_tokenizer(tmp_path / "out")) == 263
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"no tokenizer: .*base"):
        export_checkpoint(tmp_path / "last.ckpt", tmp_path / "again")
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "again", pretrained=tmp_path / "moved")


def test_an_export_without_a_tokenizer_warns(model, tmp_path):
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "dream_config": model.config.to_dict()}, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"does not say what its tokenizer is: .* name it in tokenizer"):
        export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_weights_with_nan_are_refused(model, tmp_path):
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"model.norm.weight in the model holds NaN"):
        export_model(model, tmp_path / "out")


def test_merged_adapters_are_exported_and_unmerged_ones_refused(model, tmp_path):
    plain = model.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    add_lora(model, LoraParams(rank=4))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(p)
    with pytest.raises(ValueError, match="merge adapters first"):
        export_model(model, tmp_path / "out")
    merge_lora(model)
    merged = stored(export_model(model, tmp_path / "out"))
    assert_same(merged, model.state_dict())
    assert not torch.equal(merged["model.layers.0.self_attn.q_proj.weight"], plain)


def test_broken_checkpoints_are_refused(scratch_checkpoint, tmp_path):
    path, _ = scratch_checkpoint
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(path.read_bytes()[:-5000])
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "object": Path("x")}, tmp_path / "pickle.ckpt")
    torch.save({"state_dict": {}, "dream_config": []}, tmp_path / "foreign.ckpt")
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1  # of a weight: only its checksum shows it
    (tmp_path / "flipped.ckpt").write_bytes(flipped)
    (tmp_path / "text.ckpt").write_text("hello")
    for name in ("torn", "other", "pickle", "foreign", "flipped", "text"):
        with pytest.raises(ValueError, match=f"{name}.ckpt (is damaged or no checkpoint|cannot be read)"):
            model_from_checkpoint(tmp_path / f"{name}.ckpt")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # what tokenizers raises
    ],
    ids=str,
)
def test_a_disk_that_becomes_full_is_reported(model, tmp_path, monkeypatch, error):
    def fail(_, partial):
        assert partial.parent == tmp_path and partial.suffix == PARTIAL and not (tmp_path / "out").exists()
        raise error

    monkeypatch.setattr(module, "save_tokenizer", fail)
    with pytest.raises(ValueError, match="was not written"):
        export_model(model, tmp_path / "out", tokenizer="bytes")
    assert not list(tmp_path.iterdir())


def test_only_a_new_or_empty_folder_is_written(model, tmp_path):
    (tmp_path / "empty").mkdir()
    export_model(model, tmp_path / "empty")
    before = {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()}
    for taken in (tmp_path / "empty", tmp_path / "empty" / "config.json"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            export_model(model, taken)
    assert before == {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()}


def test_incomplete_models_are_refused(model, tmp_path):
    model.lm_head.float()
    with pytest.raises(ValueError, match="wanted one floating-point type"):
        export_model(model, tmp_path / "out")
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        export_model(DreamModel(model.config), tmp_path / "out")
    for size in ("abc", "0GB", "-1GB"):
        with pytest.raises(ValueError, match=f"max_shard_size is {size}, wanted"):
            export_model(model.float(), tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())
