"""The module's answers during training: several processes, sharded weights, compiled layers."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.distributed.device_mesh import init_device_mesh

from dream_lightning import DreamModule, S1KDataModule, SamplingParams
from dream_lightning.batch import Example, PromptBatch
from dream_lightning.kernels import cuda_graphs
from dream_lightning.model.modeling import DreamDecoderLayer
from dream_lightning.sampling import diffusion_generate, generate
from dream_lightning.training.fsdp import FSDP2Strategy, shard

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "initializer_range": 0.4, "max_position_embeddings": 128}


def module(**options) -> DreamModule:
    torch.manual_seed(0)
    built = DreamModule(new_model=SIZES, tokenizer="bytes", **options)
    built.configure_model()
    return built


def questions(rows: int, length: int, seed: int = 0) -> PromptBatch:
    example = Example("0", ({"role": "user", "content": "?"},), None, "", None, "here")
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return PromptBatch(ids, mask, torch.arange(rows), torch.ones(rows, dtype=torch.bool), [example] * rows)


@pytest.mark.parametrize(("strategy", "forwards"), [(SingleDeviceStrategy, 1), (DDPStrategy, 1), (FSDP2Strategy, 24)])
def test_only_sharded_weights_run_every_step(calls, strategy, forwards):
    """With whole weights a threshold saves as many forwards on several processes as on one."""
    params = SamplingParams(max_new_tokens=24, steps=24, alg="maskgit_plus", threshold=1e-9, forbid_mask=True)
    ours = module(sampling=params)
    ours._trainer = SimpleNamespace(world_size=2, strategy=strategy.__new__(strategy))
    seen = calls(ours.model)
    ours.answer(questions(2, 5))
    assert len(seen) == forwards


@pytest.fixture
def mesh(tmp_path):
    """One process with sharded weights."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_cache_has_the_dtype_in_which_sharded_weights_compute(mesh):
    """float32 weights, gathered as bfloat16: refreshed at every step, a cache gives what none gives."""
    ours, ids = module(), questions(2, 5).input_ids
    ours.generate = lambda **options: diffusion_generate(
        ours.model,
        ids,
        params=SamplingParams(max_new_tokens=16, steps=16, forbid_mask=True, block_length=8, **options),
        run_every_step=True,
    )
    shard(ours.model, ours, mesh=mesh, compute_dtype=torch.bfloat16, steps=("generate",))
    with torch.no_grad():
        plain, cached = ours.generate(), ours.generate(cache="dual", refresh_every=1)
    assert torch.equal(plain.sequences, cached.sequences)


def test_compiled_layers_stay_compiled_whatever_is_answered(monkeypatch):
    """Prompts of many lengths, padded or not, cached or not, between training steps of other lengths."""
    compile_layer = DreamDecoderLayer.compile
    monkeypatch.setattr(DreamDecoderLayer, "compile", lambda self: compile_layer(self, backend="eager"))
    with (
        torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True),
        torch._functorch.config.patch(activation_memory_budget=1.0),
    ):
        ours = module(compile_layers=True)
        for number, options in enumerate(({}, {"cache": "prefix"}, {"cache": "dual", "stop_at_eos": True})):
            ours.train()
            ours.model(questions(4, 40 + number).input_ids).logits.sum().backward()
            blocks = {"block_length": 4} if options else {}
            ours.sampling = SamplingParams(max_new_tokens=8, steps=8, forbid_mask=True, **options, **blocks)
            ours.eval()
            for rows, length in ((5, 7), (2, 30), (1, 12), (1, 9)):
                batch = questions(rows, length)
                with torch.inference_mode():
                    diffusion_generate(ours.model, batch.input_ids, params=ours.sampling)
                    batch.attention_mask[0, 0] = False
                    diffusion_generate(ours.model, batch.input_ids, batch.attention_mask, params=ours.sampling)
    torch._dynamo.reset()


class EagerDenoiser(cuda_graphs.CompiledDenoiser):
    """With the fixed buffers of graphs, on a CPU."""

    def __init__(self, model, **options):
        super().__init__(model, capture=False, **options)


class Heard(L.Callback):
    """The answers of every validation."""

    def __init__(self):
        self.answers = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if outputs is not None:
            self.answers.append([p.prediction for p in outputs.predictions])


def test_compiled_answers_follow_the_weights_and_leave_nothing_behind(sums, tmp_path, monkeypatch):
    """Validation during training with fixed buffers equals validation without."""
    monkeypatch.setattr(cuda_graphs, "CompiledDenoiser", EagerDenoiser)
    heard = {}
    for compile_ in (False, True):
        L.seed_everything(0, verbose=False)
        params = {"max_new_tokens": 16, "steps": 16, "block_length": 8, "cache": "dual", "forbid_mask": True}
        ours = module(
            sampling=SamplingParams(**params, compile=compile_),
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        )
        data = S1KDataModule(
            str(sums), tokenizer=ours.tokenizer, validation_questions=3, batch_size=4, cache_dir=str(tmp_path)
        )
        heard[compile_] = Heard()
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options |= {"accelerator": "cpu", "max_steps": 6, "val_check_interval": 2, "num_sanity_val_steps": 1}
        L.Trainer(callbacks=[heard[compile_]], enable_model_summary=False, **options).fit(ours, data)
        assert ours.model not in generate._COMPILED
    assert heard[True].answers == heard[False].answers
    assert len({str(answers) for answers in heard[True].answers}) > 2
