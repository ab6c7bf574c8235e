"""Every objective on packed rows: the loss and the gradient of the same documents in rows of their own, to 1e-6."""

import pytest
import torch
from material import tiny_data, tiny_module

from dream_lightning.batch import Batch


def whole_epoch(source, tmp_path, packing: bool) -> Batch:
    options = {"max_length": 256, "eos_fill_to": 60, "extra_weight": {"carry": 2.0}}
    data = tiny_data(source, tmp_path, batch_size=1000, packing=packing, **options)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize(
    "objective",
    [
        {"weighting": "original"},
        {"weighting": "original", "normalizer": "masked"},
        {"weighting": "original", "normalizer": "micro_batch"},
        {"weighting": "linear"},
        {"weighting": "cart"},
        {"weighting": "cart", "cart_p": 0.8, "focal_gamma": 2.0},
        {"weighting": "none", "treat_eos_as_one": True},
        {"weighting": "cart", "treat_eos_as_one": True, "stratified_t": False},
        {"weighting": "original", "complementary_masks": True},
    ],
    ids=str,
)
def test_packed_equals_unpacked(sums, tmp_path, objective):
    module = tiny_module(**objective)
    module.configure_model()
    results = []
    for packing in (False, True):
        batch = whole_epoch(sums, tmp_path, packing)
        documents = int(((batch.position_ids == 0) & (batch.document_ids >= 0)).sum())
        assert (documents > len(batch.input_ids)) == packing
        batch, noised = module.training_noise(batch)
        loss = module.loss(batch, noised, module.masked_nll(batch, noised)).mean
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.model.parameters()))])
        results.append((loss.detach(), gradient, int(noised.is_masked.sum())))
    (loss, gradient, masked), (packed_loss, packed_gradient, packed_masked) = results
    assert masked == packed_masked > 100
    assert abs(packed_loss - loss) <= 1e-6 * loss
    assert (packed_gradient - gradient).norm() <= 1e-6 * gradient.norm()
