"""Energy in the summary of a run. What else it says is tested in test_run_folders.py."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import lightning as L
import pytest
import torch
from material import addition_rows, short_trainer, tiny_data, tiny_module, write_jsonl

from dream_lightning.training import RunSummary, summary


def test_nvml_is_asked_for_the_gpu_of_the_process(monkeypatch):
    nvml = ModuleType("pynvml")
    nvml.NVMLError, nvml.nvmlInit = type("NVMLError", (Exception,), {}), lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-ab": 7_200}[uuid]  # millijoules
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: handle
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = {torch.device("cuda", 1): SimpleNamespace(uuid="ab")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.get)
    assert summary._joules(torch.device("cuda", 1)) == 7.2
    assert summary._joules(torch.device("cpu")) is None

    def unsupported(handle):
        raise nvml.NVMLError

    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", unsupported)
    assert summary._joules(torch.device("cuda", 1)) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert summary._joules(torch.device("cuda", 1)) is None


@pytest.mark.parametrize("counter, said", [([1e6, 1.9e6], ", 0.25 kWh by the 1 GPU(s)"), ([1e6, None], " s\n")])
def test_fit_says_what_the_counter_grew_by(counter, said, tmp_path, monkeypatch, caplog):
    """It is read before Lightning moves the module to the CPU."""
    left, after = iter(counter), L.Trainer._teardown
    monkeypatch.setattr(summary, "_joules", lambda device: next(left))
    monkeypatch.setattr(L.Trainer, "_teardown", lambda self: [next(left, None), after(self)])
    caplog.set_level(logging.INFO, "lightning.pytorch")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    source = write_jsonl(tmp_path / "rows.jsonl", addition_rows(8))
    short_trainer(tmp_path, RunSummary(), max_steps=1).fit(tiny_module(), tiny_data(source, tmp_path))
    assert said in f"{caplog.text}\n".partition("Trained to step 1 in")[2]
