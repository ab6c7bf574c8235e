"""The module's answers during training: several processes, sharded weights, compiled layers."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from material import SIZES, quiet_trainer
from torch.distributed.device_mesh import init_device_mesh

from dream_lightning import DreamModule, S1KDataModule, SamplingParams
from dream_lightning.batch import Example, PromptBatch
from dream_lightning.kernels import cuda_graphs
from dream_lightning.model.modeling import DreamDecoderLayer
from dream_lightning.sampling import diffusion_generate, generate
from dream_lightning.training.fsdp import FSDP2Strategy, shard

SIZES = {**SIZES, "initializer_range": 0.4}


def module(**options) -> DreamModule:
    torch.manual_seed(0)
    built = DreamModule(new_model=SIZES, tokenizer="bytes", **options)
    built.configure_model()
    return built


def questions(rows: int, length: int) -> PromptBatch:
    example = Example("0", ({"role": "user", "content": "?"},), None, "", None, "here")
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))
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


def test_a_cache_has_the_dtype_in_which_sharded_weights_compute(tmp_path):
    """float32 weights, gathered as bfloat16: refreshed at every step, a cache gives what none gives."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    ours, ids = module(), questions(2, 5).input_ids
    ours.generate = lambda **options: diffusion_generate(
        ours.model,
        ids,
        params=SamplingParams(max_new_tokens=16, steps=16, forbid_mask=True, block_length=8, **options),
        run_every_step=True,
    )
    mesh = init_device_mesh("cpu", (1,))
    shard(ours.model, ours, mesh=mesh, compute_dtype=torch.bfloat16, steps=("generate",))
    with torch.no_grad():
        plain, cached = ours.generate(), ours.generate(cache="dual", refresh_every=1)
    dist.destroy_process_group()
    assert torch.equal(plain.sequences, cached.sequences)


def test_compiled_layers_stay_compiled_whatever_is_answered(monkeypatch):
    """Prompts of many lengths, padded or not, cached or not, between training steps of other lengths."""
    compile_layer = DreamDecoderLayer.compile
    monkeypatch.setattr(DreamDecoderLayer, "compile", lambda self: compile_layer(self, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
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


def test_compiled_answers_follow_the_weights_and_leave_nothing_behind(sums, tmp_path, monkeypatch):
    """Validation during training with fixed buffers equals validation without."""
    eager = partial(cuda_graphs.CompiledDenoiser, capture=False)  # with the fixed buffers of graphs, on a CPU
    monkeypatch.setattr(cuda_graphs, "CompiledDenoiser", eager)
    heard = {True: [], False: []}
    for compile_, texts in heard.items():
        L.seed_everything(0, verbose=False)
        params = {"max_new_tokens": 16, "steps": 16, "block_length": 8, "cache": "dual", "forbid_mask": True}
        sampling = SamplingParams(**params, compile=compile_)
        ours = module(sampling=sampling, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2))

        def hear(trainer, module, outputs, *_, texts=texts):
            if outputs is not None:
                texts.append([p.prediction for p in outputs.predictions])

        data = {"tokenizer": ours.tokenizer, "validation_questions": 3, "batch_size": 4, "cache_dir": str(tmp_path)}
        options = {"max_steps": 6, "val_check_interval": 2, "num_sanity_val_steps": 1}
        trainer = quiet_trainer(callbacks=[LambdaCallback(on_validation_batch_end=hear)], **options)
        trainer.fit(ours, S1KDataModule(str(sums), **data))
        assert ours.model not in generate._COMPILED
    assert heard[True] == heard[False]
    assert len(set(map(str, heard[True]))) > 2
