"""Rows of whole documents, and the authors' batch cutoff."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from dream_lightning.batch import Document, SampleKey
from dream_lightning.data.packing import collate, collate_with_cutoff, pack
from dream_lightning.diffusion.denoiser import logits
from dream_lightning.model import DreamConfig, DreamModel


def document(prompt, response):
    return Document("x", list(prompt), list(response), [1.0] * len(response))


def test_packing_keeps_whole_documents_and_fills_rows():
    rng = random.Random(0)
    lengths = [min(9_000, int(rng.lognormvariate(8.5, 0.5))) for _ in range(1000)]  # median about 5,000, like s1K
    for budget in (9_000, 16_384):
        rows = pack(lengths, budget)
        assert sorted(i for row in rows for i in row) == list(range(1000))
        assert max(sum(lengths[i] for i in row) for row in rows) <= budget
        assert pack(lengths, budget) == rows
    assert sum(lengths) / (len(rows) * 16_384) > 0.97
    with pytest.raises(ValueError, match="a packed row 8000"):
        pack(lengths, 8_000)


def test_a_document_without_a_prompt_is_refused():
    """Its first token would be predicted from the last position of its neighbor."""
    with pytest.raises(AssertionError, match="document x has no prompt"):
        collate([[(SampleKey(0, 0, 0), document([1], [2])), (SampleKey(0, 1, 1), document([], [3]))]], pad_token_id=0)


def test_rows_of_s1k_are_nearly_full(shared):
    """At 8,192 most documents are longer than half a row and too few are short enough to fill the rest."""
    s1k = json.loads(shared("golden/tokenizer.json").read_text())["s1k"]
    whole = [row["prompt_tokens"] + row["response_tokens"] for row in s1k]
    for budget, least in ((8_192, 0.91), (16_384, 0.97)):
        lengths = [min(length, budget) for length in whole]  # what truncate_trace leaves
        for documents in (lengths, random.Random(0).choices(lengths, k=1000)):
            assert sum(documents) >= least * budget * len(pack(documents, budget))


@torch.no_grad()
def test_a_packed_document_gets_the_logits_it_gets_alone():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = DreamModel(DreamConfig(vocab_size=64, num_key_value_heads=2, mask_token_id=60, pad_token_id=61, **sizes))
    documents = [document(range(i, i + 3 + i), range(20, 30 + 2 * i)) for i in range(4)]
    keyed = [(SampleKey(0, i, i), d) for i, d in enumerate(documents)]
    packed = collate([keyed[:3], keyed[3:]], pad_token_id=61)
    assert packed.document_bounds is not None and packed.maskable.sum() == sum(len(d.response_ids) for d in documents)
    together = logits(model, packed.input_ids, packed.maskable, packed.attention_mask, packed.position_ids)
    alone = []
    for one in keyed:
        row = collate([[one]], pad_token_id=61)
        alone.append(logits(model, row.input_ids, row.maskable, row.attention_mask, row.position_ids))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_documents_first_token_and_uncounted_documents_are_not_maskable():
    keyed = [(SampleKey(0, i, i), document([1, 2], [3, 4, 5])) for i in range(5)]
    for batch in (collate([keyed[:2], keyed[2:]], pad_token_id=0), collate([[d] for d in keyed], pad_token_id=0)):
        assert not batch.maskable[batch.position_ids == 0].any()
    uncounted = (SampleKey(0, 0, 0, counted=False), document([1], [2, 3]))
    assert collate([keyed[:1], [uncounted]], pad_token_id=0).maskable.sum(1).tolist() == [3, 0]


@pytest.mark.parametrize("kept", [5, 9, 12])
def test_batch_cutoff_equals_the_authors(shared, kept):
    golden = load_file(shared("golden/dream-tiny/golden.safetensors"))
    masks = golden["cutoff.loss_mask"].bool()
    rows = [
        [(SampleKey(0, i, i), document(ids[~mask].tolist(), ids[mask].tolist()))]
        for i, (ids, mask) in enumerate(zip(golden["cutoff.input_ids"], masks, strict=True))
    ]
    batch = collate_with_cutoff(rows, pad_token_id=499, eos_token_id=499, seed=0, kept=kept)
    prefix = f"cutoff.kept{kept}."
    assert torch.equal(batch.input_ids, golden[prefix + "input_ids"])
    assert torch.equal(batch.maskable, golden[prefix + "loss_mask"].bool())
    assert torch.equal(batch.document_ids >= 0, golden[prefix + "attention_mask"].bool())
    assert torch.equal(batch.position_ids, golden[prefix + "position_ids"])


def test_the_cutoff_is_one_of_the_rows_lengths_and_differs_between_batches():
    lengths = set()
    for order in range(40):
        rows = [[(SampleKey(0, order, i), document([1, 2], [3] * n + [9] * 4))] for i, n in enumerate((2, 5, 7))]
        lengths.add(int(collate_with_cutoff(rows, pad_token_id=9, eos_token_id=9, seed=0).maskable.sum(1)[0]))
    assert lengths == {2, 5, 7}


def test_eos_of_the_cutoff_has_the_extra_weight_of_eos():
    weighted = [Document("x", [1], [3] * n + [9] * 2, [2.0] * n + [0.1] * 2) for n in (2, 5)]
    whole = Document("y", [1], [3], [2.0])  # without eos
    rows = [[(SampleKey(0, i, i), d)] for i, d in enumerate((*weighted, whole))]
    batch = collate_with_cutoff(rows, pad_token_id=9, eos_token_id=9, seed=0, kept=4)
    wanted = [[2.0, 2.0, 0.1, 0.1], [2.0] * 4, [2.0, 1.0, 1.0, 1.0]]
    torch.testing.assert_close(batch.extra_weight[:, 1:], torch.tensor(wanted))
