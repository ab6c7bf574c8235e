"""What a start does early, so that the first step comes sooner."""

import gc
import runpy
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import async_compile

from dream_lightning import DreamModule, cli, module
from dream_lightning.model_factory import start_compilers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("compiled", [True, False])
def test_compilers_start_before_weights_are_read(monkeypatch, compiled):
    done = []

    def read(*arguments):
        done.append("weights")
        raise InterruptedError

    monkeypatch.setattr(module, "start_compilers", lambda device: done.append(f"compilers for {device}"))
    monkeypatch.setattr(module, "random_model", read)
    ours = DreamModule(new_model=SIZES, tokenizer="bytes", compile_layers=compiled)
    ours._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda:0")))
    with pytest.raises(InterruptedError):
        ours.configure_model()
    assert done == ["compilers for cuda:0"] * compiled + ["weights"]


def test_only_a_gpu_needs_compilers(monkeypatch):
    started = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append("processes"))
    start_compilers(torch.device("cpu"))
    assert not started
    start_compilers(torch.device("cuda", 1))
    assert started == ["processes"]


def test_imports_are_no_garbage_to_look_through(monkeypatch):
    found, usual = [], gc.get_threshold()
    monkeypatch.setattr(cli, "main", lambda: found.append((gc.get_freeze_count(), gc.get_threshold())))
    try:
        runpy.run_module("dream_lightning.__main__", run_name="__main__")
    finally:
        gc.unfreeze()
        gc.set_threshold(*usual)
    assert found[0][0] > 100_000
    assert found[0][1] == (*usual[:2], 1000)
