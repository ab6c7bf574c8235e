"""A Dream from a Qwen2, and the causal network against Qwen2ForCausalLM."""

import json
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from material import Recorder, addition_rows, short_trainer, tiny_data, tiny_module, write_jsonl
from tiny_models import tiny_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from dream_lightning.batch import DocumentBounds
from dream_lightning.diffusion.denoiser import annealed_mask
from dream_lightning.errors import UserError
from dream_lightning.kernels.packed_attention import make_packed_attention
from dream_lightning.model import load_tokenizer
from dream_lightning.model.autoregressive import config_from_qwen2, from_qwen2
from dream_lightning.model.modeling import DreamModel
from dream_lightning.sampling import SamplingParams, diffusion_generate

TINY = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
PUBLISHED = {  # D, intermediate, layers, heads, kv heads, vocabulary, tied: parameters
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True, 494_032_768),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True, 1_543_714_304),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True, 3_085_938_688),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False, 7_615_616_512),
}


def save_qwen(folder, *, tied=False, **sizes):
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(Qwen2Config(**TINY | sizes, tie_word_embeddings=tied)).eval()
    for parameter in qwen.parameters():  # biases, too
        torch.nn.init.normal_(parameter, std=0.2)
    qwen.save_pretrained(folder)
    return qwen


@pytest.fixture(scope="module")
def bytes_tokens():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def dream_tokens(shared):
    return load_tokenizer(shared("data/dream-v0-instruct-7b"))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_causal_logits_are_qwens(tmp_path, bytes_tokens, tied):
    qwen = save_qwen(tmp_path, tied=tied)  # its rope_theta is Qwen2Config's default
    model = from_qwen2(tmp_path, bytes_tokens).eval()
    ids = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    real = torch.arange(17) >= torch.tensor([[0], [4]])  # left padding
    positions = (real.cumsum(1) - 1).clamp(min=0)
    model.config.causal = True
    for options in ({}, {"attention_mask": real.long(), "position_ids": positions}):
        wanted, got = qwen(ids, **options).logits[real], model(ids, **options).logits[..., :260][real]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        model.config.causal = False
        assert not torch.allclose(model(ids, **options).logits[..., :260][real], wanted, atol=1e-2)
        model.config.causal = True
    bounds = DocumentBounds(torch.tensor([0, 10, 17, 34], dtype=torch.int32))
    packed = model(ids, bounds, torch.tensor([[*range(10), *range(7)], [*range(17)]])).logits[..., :260]
    parts = [qwen(ids[:1, :10]).logits[0], qwen(ids[:1, 10:]).logits[0], qwen(ids[1:]).logits[0]]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(parts), rtol=1e-5, atol=1e-5)
    last = model.model(ids, span=(5, 9))
    torch.testing.assert_close(last, model.model(ids)[:, 5:9])


def test_the_mask_row_is_the_mean_and_the_head_is_untied(tmp_path, bytes_tokens):
    qwen = save_qwen(tmp_path, tied=True)
    model = from_qwen2(tmp_path, bytes_tokens)
    assert (model.config.vocab_size, model.config.mask_token_id) == (263, bytes_tokens.mask_token_id)
    rows = qwen.model.embed_tokens.weight
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert torch.equal(weight[:260], rows)
        torch.testing.assert_close(weight[260:], rows.mean(0).expand(3, -1))
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "llama"}, "model_type is 'llama', wanted 'qwen2'"),
        ({"intermediate_size": 64}, "tensors have another shape"),
    ],
)
def test_another_network_is_refused_by_name(tmp_path, bytes_tokens, change, message):
    save_qwen(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        from_qwen2(tmp_path, bytes_tokens)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_its_names_and_shapes(tmp_path, dream_tokens, name):
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, parameters = PUBLISHED[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    old = {"model_type": "qwen2", "rope_theta": 1e6, "sliding_window": 32_768, "use_sliding_window": False}
    (tmp_path / "config.json").write_text(json.dumps(sizes | old | {"use_mrope": False, "rms_norm_eps": 1e-6}))
    config = config_from_qwen2(tmp_path, dream_tokens)
    assert (config.vocab_size, config.mask_token_id, config.rope_theta) == (vocabulary, 151_666, 1e6)
    with torch.device("meta"):
        ours, qwen = DreamModel(config), Qwen2ForCausalLM(Qwen2Config(**sizes))
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in qwen.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters + tied * vocabulary * hidden


def test_a_dream_trains_from_a_qwen(tmp_path):
    save_qwen(tmp_path / "qwen")
    rows = write_jsonl(tmp_path / "rows.jsonl", addition_rows(40))
    module = tiny_module(new_model=None, from_autoregressive=str(tmp_path / "qwen"))
    assert module.max_prompt_length == 128 - module.sampling.max_new_tokens
    short_trainer(tmp_path, max_steps=1).fit(module, tiny_data(rows, tmp_path))
    assert not module.model.config.causal


def test_the_autoregressive_loss_is_qwens(tmp_path):
    qwen = save_qwen(tmp_path / "qwen", vocab_size=264)
    rows = write_jsonl(tmp_path / "rows.jsonl", addition_rows(40))
    options = {"causal": True, "optimizer": lambda p: torch.optim.SGD(p, lr=1e-30)}
    module = tiny_module(new_model=None, from_autoregressive=str(tmp_path / "qwen"), **options)
    data = tiny_data(rows, tmp_path)
    short_trainer(tmp_path, max_steps=1).fit(module, data)
    batch = next(iter(data.train_dataloader()))
    labels = batch.input_ids.masked_fill(~batch.maskable, -100)
    wanted = qwen(batch.input_ids, attention_mask=(batch.document_ids >= 0).long(), labels=labels).loss
    noised = module.training_noise(batch)[1]
    assert torch.equal(noised.x_t, batch.input_ids)
    nll = module.masked_nll(batch, noised)
    torch.testing.assert_close(nll[noised.is_masked].mean(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.loss(batch, noised, nll).mean, wanted, rtol=1e-5, atol=1e-5)


def test_a_causal_model_answers_from_left_to_right_and_refuses_caches(deep_causal):
    prompt = torch.arange(6)[None]
    params = {"max_new_tokens": 8, "steps": 8, "forbid_mask": True, "block_length": 1}
    answer = diffusion_generate(deep_causal, prompt, params=SamplingParams(**params)).sequences
    for column in range(6, 14):  # greedy decoding
        logits = deep_causal(answer[:, :column]).logits[0, -1]
        logits[57] = -torch.inf
        assert answer[0, column] == logits.argmax()
    for wrong, message in (({"cache": "prefix"}, "no KV cache"), ({"block_length": 2}, "set block_length to 1")):
        with pytest.raises(UserError, match=message):
            diffusion_generate(deep_causal, prompt, params=SamplingParams(**params | wrong))
    with pytest.raises(UserError, match="no KV cache"):
        make_packed_attention(None, torch.zeros(1, 1, 4), torch.zeros(1), causal=True, head_dim=4)


@pytest.fixture
def deep_causal():
    return tiny_model(3, causal=True)


def test_attention_anneals_from_causal_to_bidirectional(tmp_path):
    """At a learning rate of 0; however a step is cut, and over a resume."""
    rows = write_jsonl(tmp_path / "rows.jsonl", addition_rows(40))

    def losses(steps, *callbacks, batch_size=8, ckpt_path=None, causal=False):
        sgd, seen = {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-30)}, Recorder()
        module = tiny_module(**sgd, anneal_causal_steps=steps)
        module.configure_model()
        module.model.config.causal = causal
        trainer = short_trainer(tmp_path, seen, *callbacks, max_steps=4, accumulate_grad_batches=8 // batch_size)
        trainer.fit(module, tiny_data(rows, tmp_path, batch_size=batch_size), ckpt_path=ckpt_path, weights_only=True)
        return seen.losses

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    annealed, causal, full = losses(3, save), losses(0, causal=True), losses(0)
    assert annealed[0] == pytest.approx(causal[0], rel=1e-6) and annealed[3] == full[3]
    assert all(loss not in (causal[n], full[n]) for n, loss in enumerate(annealed[1:3], 1))
    assert losses(3, batch_size=2) == pytest.approx(annealed, rel=1e-5)
    assert losses(3, ckpt_path=tmp_path / "step=1.ckpt") == annealed[1:]


def test_later_positions_become_visible_pair_by_pair_in_their_document(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", addition_rows(40))
    data = tiny_data(rows, tmp_path, batch_size=2, packing=True, max_length=160)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    whole = batch.attention_mask.to_mask(*batch.input_ids.shape, batch.input_ids.device)
    whole &= (batch.document_ids >= 0)[:, None, None]  # padding does not matter
    masks = [annealed_mask(batch, visible=v, seed=0) & whole for v in (0.0, 0.25, 0.5, 1.0)]
    assert torch.equal(masks[0], whole.tril()) and torch.equal(masks[3], whole)
    later = whole.triu(1)
    assert [float((mask & later).sum() / later.sum()) for mask in masks] == pytest.approx([0, 0.25, 0.5, 1], abs=0.02)
    assert all((less <= more).all() for less, more in pairwise(masks))
    assert not torch.equal(annealed_mask(batch, visible=0.5, seed=1) & whole, masks[2])


def test_options_that_contradict_causal_are_refused():
    with pytest.raises(UserError, match=r"anneal_causal_steps .* is 5"):
        tiny_module(causal=True, anneal_causal_steps=5)
    for options in ({"weighting": "linear"}, {"complementary_masks": True}, {"treat_eos_as_one": True}):
        with pytest.raises(UserError, match="causal has no masks"):
            tiny_module(causal=True, **options)
    with pytest.raises(UserError, match="wanted exactly one of them"):
        tiny_module(from_autoregressive="folder")
