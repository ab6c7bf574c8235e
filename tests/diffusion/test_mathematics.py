"""Properties of corruption, weights, losses, the head and the shift."""

import copy
import math

import pytest
import torch
from torch import nn

from dream_lightning import diffusion
from dream_lightning.batch import Batch
from dream_lightning.diffusion import corrupt, reduce_nll, token_nll, token_weights, with_complements
from dream_lightning.diffusion.denoiser import align, features
from dream_lightning.diffusion.head import chunk_of

MASK, EOS = 9, 8


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 8, (6, 50), generator=generator)
    maskable = torch.arange(50).expand(6, 50) >= torch.tensor([5, 10, 20, 49, 1, 30])[:, None]
    return x_0, maskable, generator


def test_only_maskable_positions_change(rows):
    x_0, maskable, generator = rows
    noised = corrupt(x_0, maskable, mask_token_id=MASK, t=torch.full((6,), 0.7), generator=generator)
    assert not (noised.is_masked & ~maskable).any()
    assert (noised.x_t[noised.is_masked] == MASK).all()
    assert torch.equal(noised.x_t[~noised.is_masked], x_0[~noised.is_masked])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"u": None}, r"torch\.Generator"),
        ({"maskable": torch.ones(6, 50)}, "maskable is"),
        ({"u": torch.zeros(6, 1)}, "u has shape"),  # would mask whole rows
        ({"u": torch.zeros(50)}, "u has shape"),  # would mask the same columns in all rows
        ({"t": torch.ones(5)}, "t has shape"),
    ],
)
def test_missing_noise_and_wrong_shapes_are_refused(rows, wrong, words):
    x_0, maskable, _ = rows
    inputs = {"x_0": x_0, "maskable": maskable, "t": torch.ones(6), "u": torch.zeros(6, 50)} | wrong
    with pytest.raises(ValueError, match=words):
        corrupt(**inputs, mask_token_id=MASK)


def test_complements_mask_every_response_token_once(rows):
    x_0, maskable, generator = rows
    integers = torch.zeros_like(x_0)
    batch = Batch(x_0, maskable, integers, integers, integers, integers, torch.rand(x_0.shape, generator=generator))
    noised = corrupt(x_0, maskable, mask_token_id=MASK, t=torch.rand(6, generator=generator), generator=generator)
    batch, both = batch.twice(), with_complements(batch, noised, mask_token_id=MASK)
    assert torch.equal(both.is_masked[:6], noised.is_masked) and torch.equal(both.x_t[:6], noised.x_t)
    assert torch.equal(both.is_masked[:6] ^ both.is_masked[6:], maskable)
    assert torch.equal(both.is_masked, (both.x_t == MASK))
    assert torch.equal(both.x_t[~both.is_masked], batch.input_ids[~both.is_masked])
    torch.testing.assert_close(both.t[:6] + both.t[6:], torch.ones(6, 50))
    assert torch.equal(batch.extra_weight[:6], batch.extra_weight[6:]) and torch.equal(batch.maskable[6:], maskable)


def test_final_eos_run_is_one_unit_in_packed_rows():
    """Two documents in a row, each ending in three eos; an eos inside the answer is masked on its own."""
    x_0 = torch.tensor([[1, 2, EOS, 3, EOS, EOS, EOS, 4, 5, EOS, EOS, EOS, 7, 7]])
    document_ids = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1]])
    maskable = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]]).bool()
    u = torch.tensor([[0.9, 0.9, 0.1, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1]])
    noised = corrupt(
        x_0, maskable, mask_token_id=MASK, t=torch.tensor([0.5]), u=u, eos_as_one=EOS, document_ids=document_ids
    )
    assert noised.is_masked.long().tolist() == [[0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("p", [0.02, 0.1, 0.8, 1.0])
def test_cart_equals_the_dense_sum_and_stays_in_its_document(p):
    generator = torch.Generator().manual_seed(2)
    is_masked = torch.rand(3, 300, generator=generator) < 0.6
    document_ids = (torch.arange(300) // torch.tensor([300, 77, 50])[:, None]).expand(3, 300)
    i, j = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    kernel = torch.where(i == j, 0.0, 0.5 * p * (1 - p) ** ((i - j).abs() - 1).clamp(min=0).double())
    same = document_ids[:, :, None] == document_ids[:, None, :]
    dense = torch.einsum("ij,bij,bj->bi", kernel, same.double(), (~is_masked).double())
    fast = token_weights(is_masked, torch.ones(3), weighting="cart", cart_p=p, document_ids=document_ids)
    torch.testing.assert_close(fast.double(), dense, rtol=1e-5, atol=1e-7)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="original, linear, cart, none"):
        token_weights(torch.ones(1, 2).bool(), torch.ones(1), weighting="cosine")
    with pytest.raises(ValueError, match="maskable, masked, micro_batch"):
        reduce_nll(torch.ones(2), torch.ones(2), normalizer="tokens")
    with pytest.raises(ValueError, match="needs masked_count"):
        reduce_nll(torch.ones(2, 3), torch.ones(2, 3), normalizer="masked")  # some of them may be zeros


def test_the_sum_and_count_of_parts_are_those_of_the_whole():
    nll, weight = torch.rand(10) + 0.1, torch.rand(10)
    whole = reduce_nll(nll, weight, maskable_count=30)
    parts = [reduce_nll(nll[s], weight[s], maskable_count=c) for s, c in ((slice(0, 3), 7), (slice(3, 10), 23))]
    torch.testing.assert_close(parts[0].sum + parts[1].sum, whole.sum)
    assert parts[0].count + parts[1].count == whole.count


@pytest.mark.parametrize("normalizer", ["maskable", "masked", "micro_batch"])
def test_nothing_masked_gives_zero_loss_and_zero_gradients(normalizer):
    head = nn.Linear(4, 11)
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    h = hidden[torch.zeros(2, 5).bool()]
    nll = token_nll(h, head, torch.zeros(0, dtype=torch.int64))
    terms = reduce_nll(nll, torch.zeros(0), maskable_count=0, normalizer=normalizer)
    terms.mean.backward()
    assert terms.mean == 0
    assert (head.weight.grad == 0).all() and (hidden.grad == 0).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_certain_token_has_a_finite_focal_gradient(gamma):
    nll = torch.tensor([0.0, 1.0], requires_grad=True)
    reduce_nll(nll, torch.ones(2), maskable_count=2, focal_gamma=gamma).sum.backward()
    assert 0 <= nll.grad[0] < 1e-6 < nll.grad[1]


@pytest.mark.parametrize(("vocabulary", "rows"), [(152_064, 512), (1_000_000, 512), (32_000, 2048), (264, 294_912)])
def test_a_chunk_holds_as_many_logits_as_512_rows_of_dream_7b(vocabulary, rows):
    assert chunk_of(vocabulary) == rows


@pytest.mark.parametrize("trains", [True, False])
def test_chunked_head_equals_the_plain_one(trains):
    torch.manual_seed(0)
    head = nn.Linear(8, 33, bias=False).requires_grad_(trains)
    plain_head = copy.deepcopy(head)
    h = torch.randn(50, 8, requires_grad=True)
    g = h.detach().clone().requires_grad_()
    targets, weight = torch.randint(0, 33, (50,)), torch.rand(50)
    (token_nll(h, head, targets, chunk=7) * weight).sum().backward()
    (nn.functional.cross_entropy(plain_head(g), targets, reduction="none") * weight).sum().backward()
    torch.testing.assert_close(h.grad, g.grad)
    if trains:
        torch.testing.assert_close(head.weight.grad, plain_head.weight.grad)


class Echo:
    """A denoiser whose hidden state at position i is i, to show which output predicts which token."""

    lm_head = nn.Identity()

    def model(self, x_t, attention_mask, position_ids):
        return torch.arange(x_t.shape[1]).expand(x_t.shape)[..., None].float()


def test_the_shift():
    where = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]]).bool()
    rows = features(Echo(), torch.zeros(2, 4, dtype=torch.int64), where)
    assert rows[:, 0].tolist() == [0, 0, 2, 1]
    full = align(torch.arange(4).view(1, 4, 1))
    assert full.flatten().tolist() == [0, 0, 1, 2]


def test_focal_alpha_and_the_micro_batch_normalizer_by_hand():
    nll, weight = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0])
    total = sum(0.25 * (1 - math.exp(-n)) ** 2 * n * w for n, w in ((0.5, 1.0), (2.0, 3.0)))
    terms = reduce_nll(nll, weight, normalizer="micro_batch", focal_alpha=0.25, focal_gamma=2.0)
    assert (terms.sum.item(), terms.count.item()) == (pytest.approx(total / 2), 1)
    empty = reduce_nll(nll[:0], weight[:0], normalizer="micro_batch")
    assert (empty.sum.item(), empty.count.item()) == (0, 1)


def test_the_elbo_weight_is_not_bounded_and_equality_is_no_mask():
    is_masked, t = torch.ones(1, 1, dtype=torch.bool), torch.tensor([1e-3])
    assert diffusion.token_weights(is_masked, t).item() == pytest.approx(1000)
    noise = {"mask_token_id": 9, "t": torch.tensor([0.5]), "u": torch.tensor([[0.5]])}
    assert not diffusion.corrupt(torch.zeros(1, 1, dtype=torch.long), is_masked, **noise).is_masked.any()


def test_final_eos_of_adjacent_documents_are_units_of_their_own():
    x_0, maskable = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    noise = {"t": torch.tensor([0.5]), "u": torch.tensor([[0.9, 0.1, 0.1, 0.9]])}
    noised = diffusion.corrupt(
        x_0, maskable, mask_token_id=9, eos_as_one=0, document_ids=torch.tensor([[0, 0, 1, 1]]), **noise
    )
    assert noised.is_masked.tolist() == [[False, False, True, True]]
