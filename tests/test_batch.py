"""A batch on a GPU knows the CPU batch that it was copied from. torch's meta device replaces a GPU here."""

import copy
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from dream_lightning.batch import Document, Example, PromptBatch, SampleKey
from dream_lightning.data.packing import collate


@pytest.fixture(params=[False, True], ids=["single", "packed"])
def batch(request):
    documents = [(SampleKey(0, i, i), Document("x", [1] * (i + 2), [2, 3, 4], [1.0] * 3)) for i in range(4)]
    return collate([documents[:2], documents[2:]] if request.param else [[d] for d in documents], pad_token_id=0)


def test_a_moved_batch_keeps_its_host_batch(batch):
    moved = batch.to("meta")
    assert moved.document_bounds is batch.document_bounds  # stays on the CPU
    assert moved.on_host is batch and batch.on_host is batch and batch.to("cpu").host is None


CHANGES = {
    "assign": lambda batch: setattr(batch, "maskable", batch.maskable & (batch.position_ids > 2)),
    "write": lambda batch: batch.maskable[:, :5].fill_(False),
    "write to a view": lambda batch: batch.extra_weight.view(-1)[0].fill_(2),
    "operate in place": lambda batch: setattr(batch, "maskable", batch.maskable.logical_and_(batch.position_ids > 2)),
}


@pytest.mark.parametrize("inference", [False, True])  # validation runs in inference mode
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_batch_has_no_host_batch(batch, change, inference):
    with torch.inference_mode(inference):
        moved = copy.deepcopy(batch).to("meta")
        assert moved.on_host is not moved
        for derived in (replace(moved), moved.twice(), copy.deepcopy(moved), pickle.loads(pickle.dumps(moved))):
            assert derived.on_host is derived
        change(moved)
        assert moved.on_host is moved


def test_half_precision_keeps_the_host_batch(batch):
    """Lightning rebuilds every dataclass of a batch before it moves it."""
    converted = HalfPrecision("bf16-true").convert_input(batch)
    assert converted.extra_weight.dtype == torch.bfloat16 and converted.to("meta").on_host is converted


def test_a_worker_sends_a_batch_without_shared_files(batch):
    """Seven a batch cost the trainer 2 ms, and many small batches exceed the limit of open files."""
    sent = bytes(ForkingPickler.dumps(batch))
    assert b"rebuild_storage" not in sent
    received = pickle.loads(sent)
    for name, x in batch.tensors().items():
        assert torch.equal(x, getattr(received, name)) and x.dtype == getattr(received, name).dtype
    received.maskable[:] = False  # its memory is writable
    assert batch.maskable.any() and received.padded == batch.padded


def test_half_precision_keeps_the_records_of_a_prompt_batch():
    example = Example("x", ({"role": "user", "content": "q"},), None, "", None, "x, row 1", "sudoku", {"n": [1, 2.5]})
    ids = torch.ones(1, 3, dtype=torch.int64)
    prompts = PromptBatch(ids, ids.bool(), ids[:, 0], ids[:, 0].bool(), [example])
    (got,) = HalfPrecision("bf16-true").convert_input(prompts).to("cpu").examples
    assert got == example and got.record == {"n": [1, 2.5]}


@pytest.mark.gpu
def test_what_is_not_pinned_is_sent_without_synchronizing(batch):
    batch = copy.deepcopy(batch)
    assert not batch.input_ids.is_pinned()
    torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to("cuda")
        assert moved.on_host is batch
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.input_ids.cpu(), batch.input_ids)
