"""Answers written as training data, masks in the order in which they were filled, and certainty forced on them."""

import json

import pytest
import torch
from material import tiny_data, tiny_module, write_jsonl
from torch import nn
from torch.nn.functional import pad

from dream_lightning import SamplingParams, load_tokenizer
from dream_lightning.cli import run
from dream_lightning.data import read_examples
from dream_lightning.diffusion import token_nll, token_nll_and_doubt
from dream_lightning.diffusion.denoiser import logits
from dream_lightning.errors import UserError
from dream_lightning.evaluation import trajectories
from dream_lightning.sampling.generate import GenerationOutput

LENGTH = 12  # of responses, eos included


def rows(count: int, length: int = LENGTH) -> list[dict]:
    """Chats whose responses were filled in some order, several tokens at some steps and none at others."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 8, (count, length), generator=generator).tolist()
    chats = [
        [{"role": "user", "content": f"{n % 10}?"}, {"role": "assistant", "content": "a" * (n % 9 + 1)}]
        for n in range(count)
    ]
    return [{"messages": chat, "filled_at": order} for chat, order in zip(chats, steps, strict=True)]


def noised_documents(data, module):
    """(sample, t, masked positions of the response) of an epoch, in the order of samples."""
    data.setup("fit")
    found = []
    for batch in data.train_dataloader():
        noised = module.noise(batch)
        for document in batch.document_ids[batch.maskable].unique():
            where = (batch.document_ids == document) & batch.maskable
            found.append((int(batch.sample_ids[where][0]), float(noised.t[where][0]), noised.is_masked[where].tolist()))
    return sorted(found)


def test_what_the_teacher_filled_later_is_masked(tmp_path):
    written = rows(40)
    source = write_jsonl(tmp_path / "rows.jsonl", written)
    options = {"validation_source": str(source), "style": "bare", "trajectories": True, "eos_fill_to": LENGTH}
    module = tiny_module()
    found = noised_documents(tiny_data(source, tmp_path, **options), module)
    assert len(found) == 40
    for (_, t, masked), row in zip(found, written, strict=True):
        states = [[at > step for at in row["filled_at"]] for step in range(-1, 8)]  # of the teacher
        assert masked == min((state for state in states if sum(state) >= t * LENGTH), key=sum)
    for other in ({"packing": True, "max_length": 64}, {"preload": True, "max_length": LENGTH + 3}):
        assert noised_documents(tiny_data(source, tmp_path, **options | other), module) == found
    at_random = noised_documents(tiny_data(source, tmp_path, **options | {"trajectories": False}), module)
    assert [t for _, t, _ in at_random] == [t for _, t, _ in found] and at_random != found
    with pytest.raises(UserError, match=r"model\.causal has no masks, data.trajectories"):
        noised_documents(tiny_data(source, tmp_path, **options), tiny_module(causal=True))


@pytest.mark.parametrize("steps", [[0] * (LENGTH - 1), None, 3, ["0"] * LENGTH])
def test_an_order_that_is_not_that_of_the_response_is_refused(steps, tmp_path):
    (row,) = rows(1)
    data = tiny_data(
        write_jsonl(tmp_path / "rows.jsonl", [row | {"filled_at": steps}]),
        tmp_path,
        **{"validation_source": "bundled", "style": "bare", "trajectories": True, "eos_fill_to": LENGTH},
    )
    with pytest.raises(UserError, match=rf"rows.jsonl, row 1 has .* in filled_at, .*{LENGTH} tokens"):
        data.setup("fit")
    with pytest.raises(UserError, match="trajectories and batch_cutoff exclude"):
        tiny_data("bundled", tmp_path, trajectories=True, batch_cutoff=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_certainty_sharpens_right_predictions_alone(frozen):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 8, generator=generator, requires_grad=True)
    head = nn.Linear(8, 5, bias=False)
    nn.init.normal_(head.weight, generator=generator).requires_grad_(not frozen)
    out = head(h)
    targets = torch.where(torch.arange(50) < 30, out.argmax(-1), out.argmin(-1))
    nll, doubt = token_nll_and_doubt(h, head, targets, temperature=0.5, chunk=7).unbind(-1)
    torch.testing.assert_close(nll, token_nll(h, head, targets))
    p = (2 * out).softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(doubt, entropy * (torch.arange(50) < 30))
    (gradient,) = torch.autograd.grad(doubt.sum(), h)
    assert not gradient[30:].any()
    after = (2 * head(h - 1e-2 * gradient)).softmax(-1)
    assert (-(after * after.log()).sum(-1) < entropy)[:30].all()


@pytest.mark.filterwarnings("ignore:DreamModule.training_step runs outside")
def test_the_weight_of_certainty_adds_its_term(tmp_path):
    data = tiny_data(write_jsonl(tmp_path / "rows.jsonl", rows(8)), tmp_path, style="bare", batch_size=8)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    losses = []
    for weight, temperature in ((0.0, 0.5), (1.0, 0.5), (2.0, 0.5), (1.0, 2.0)):
        module = tiny_module(certainty_weight=weight, certainty_temperature=temperature)
        module.configure_model()
        noised = module.noise(batch)
        # What the model predicts becomes right.
        batch.input_ids[noised.where] = logits(module.model, noised.x_t, noised.where, batch.attention_mask).argmax(-1)
        losses.append(float(module.training_step(batch, 0).detach()))
    assert losses[0] == float(module.loss(batch, noised, module.masked_nll(batch, noised)).mean.detach())
    assert losses[0] < losses[1] < losses[3]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)
    with pytest.raises(UserError, match="set one of them to 0"):
        tiny_module(certainty_weight=1.0, focal_gamma=1.0)


@pytest.mark.parametrize("after", [0, 3])  # columns after sampling.max_length
def test_only_right_answers_that_training_reads_unchanged_are_written(tmp_path, monkeypatch, after):
    tokenizer = load_tokenizer("bytes")
    texts = ["7", "8", "seven 7", " ", "7"]  # right, wrong, right, blank, and one that goes on after eos
    answers = [tokenizer(text)["input_ids"] for text in texts]
    answers = [ids + [tokenizer.eos_token_id] * (LENGTH - len(ids)) for ids in answers]
    answers[-1][-1] = answers[0][0]
    questions = [{"question": f"{n} + ?", "answer": "7", "id": str(n)} for n in range(5)]

    def generate(model, ids, mask, *, params, sample_ids):
        new = torch.tensor([answers[n] for n in sample_ids])
        order = torch.arange(LENGTH).expand(len(new), -1) + sample_ids[:, None]
        new, order = pad(new, (0, after), value=tokenizer.eos_token_id), pad(order, (0, after), value=-1)
        return GenerationOutput(torch.cat([ids, new], 1), None, torch.cat([ids * 0 - 1, order], 1))

    monkeypatch.setattr(trajectories, "diffusion_generate", generate)

    def opened(model: str):
        return torch.zeros(0), tokenizer  # of the model, the device

    monkeypatch.setattr(trajectories, "open_model", opened)
    source, out = write_jsonl(tmp_path / "questions.jsonl", questions), tmp_path / "new.jsonl"
    options = f"--model m --source {source} --out {out} --sampling.max_new_tokens {LENGTH + after} "
    options += "--sampling.forbid_mask true" + f" --sampling.max_length {len('0 + ?') + 1 + LENGTH}" * bool(after)
    run(["write-trajectories", *options.split(), "--style", "bare", "--task", "exact", "--batch_size", "2"])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in written] == ["0"]
    assert written[0]["filled_at"] == list(range(LENGTH))
    assert [e.answer for e in read_examples(out)] == ["7"]
    with pytest.raises(UserError, match="stop_at_eos"):
        next(
            trajectories.trajectories(None, tokenizer, [], sampling=SamplingParams(stop_at_eos=True, forbid_mask=True))
        )
