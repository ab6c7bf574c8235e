"""The package in other programs: a checkpoint outside a Trainer, the mathematics in a foreign LightningModule."""

import lightning as L
import pytest
import torch
from material import SIZES, short_trainer, tiny_data, tiny_module
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dream_lightning import DreamModule
from dream_lightning.diffusion import corrupt, masked_nll_loss, token_weights

MASK, VOCABULARY, LENGTH = 10, 11, 6


def test_a_checkpoint_outside_of_a_trainer(few_bundled, tmp_path):
    """The weights come back, and a new training may use another optimizer."""
    trained, bundled = tiny_module(), tiny_data("bundled", tmp_path, first_n=8, validation_source="bundled")
    run = short_trainer(tmp_path, max_steps=1)
    run.fit(trained, bundled)
    run.save_checkpoint(tmp_path / "a.ckpt")
    options = {"new_model": SIZES, "tokenizer": "bytes", "optimizer": lambda groups: torch.optim.SGD(groups, lr=1e-3)}
    loaded = DreamModule.load_from_checkpoint(tmp_path / "a.ckpt", **options, weights_only=True)
    for (name, ours), theirs in zip(loaded.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert "test/nll" in short_trainer(tmp_path, limit_test_batches=1).test(loaded, bundled, verbose=False)[0]
    short_trainer(tmp_path, max_steps=1).fit(loaded, bundled)


class Copier(L.LightningModule):
    """A foreign model, whose output at position i predicts token i."""

    def __init__(self, weighting: str):
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, 32), nn.Embedding(2 * LENGTH, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)
        self.weighting, self.generator, self.losses = weighting, torch.Generator().manual_seed(0), []

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.position.weight))

    def training_step(self, batch, batch_idx):
        x_0, maskable = batch
        t = 0.1 + 0.9 * torch.rand(len(x_0), generator=self.generator)
        noised = corrupt(x_0, maskable, mask_token_id=MASK, t=t, generator=self.generator)
        masked = noised.is_masked
        assert torch.equal(noised.x_t == MASK, masked) and not masked[~maskable].any()
        weight = token_weights(masked, noised.t, weighting=self.weighting)[masked]
        terms = masked_nll_loss(self(noised.x_t)[masked], x_0[masked], weight, maskable_count=int(maskable.sum()))
        self.losses.append(terms.mean.item())
        return terms.mean

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


@pytest.mark.parametrize("weighting", ["original", "linear", "cart", "none"])
def test_a_foreign_module_learns_to_copy(tmp_path, weighting):
    """The response repeats the prompt; all other digits are hidden at most."""
    L.seed_everything(0, verbose=False)
    prompt = torch.randint(0, MASK, (1024, LENGTH), generator=torch.Generator().manual_seed(0))
    x_0 = torch.cat([prompt, prompt], dim=1)  # [B, L]
    maskable = (torch.arange(2 * LENGTH) >= LENGTH).expand(x_0.shape)
    module = Copier(weighting)
    short_trainer(tmp_path, max_steps=100).fit(module, DataLoader(TensorDataset(x_0, maskable), batch_size=64))
    first, last = sum(module.losses[:10]), sum(module.losses[-10:])
    assert last < 0.5 * first
