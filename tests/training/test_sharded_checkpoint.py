"""Sharded checkpoints, in the layout of Lightning's model-parallel strategy, are exported like files."""

import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from dream_lightning.adapters import LoraParams, adapter_state, add_lora, base_hash
from dream_lightning.export import export_adapter, export_checkpoint, export_model, model_from_checkpoint
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.loading import weight_files
from dream_lightning.training.sharded_checkpoint import read_sharded

CONFIG = DreamConfig(
    vocab_size=97,  # odd sizes, so that the two parts differ
    hidden_size=24,
    intermediate_size=33,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    mask_token_id=90,
    pad_token_id=91,
    bos_token_id=91,
    eos_token_id=91,
)
LORA = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}

# One of two processes, gloo: shards every tensor of every checkpoint by rows and saves as Lightning does.
SAVE = """
import sys, pathlib, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
folder, rank = pathlib.Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for source in sorted(folder.glob("*.pt")):
    checkpoint = torch.load(source, weights_only=True)
    state = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in checkpoint.pop("state_dict").items()}
    adam = {n: {"step": torch.tensor(3.0), "exp_avg": t.clone()} for n, t in state.items()}
    optimizer = {"state": adam, "param_groups": [{"lr": 1e-3, "params": list(state), "betas": (0.9, 0.95)}]}
    target = source.with_suffix(".ckpt")
    dcp.save({"state_dict": state, "optimizer_0": optimizer}, checkpoint_id=target)
    if rank == 0:
        torch.save(checkpoint, target / "meta.pt")
dist.barrier()
"""


def random_dream() -> DreamModel:
    torch.manual_seed(0)
    return DreamModel(CONFIG).to(torch.bfloat16).eval()


def adapted() -> DreamModel:
    model = random_dream()
    add_lora(model, LoraParams(**LORA))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with base/, full.ckpt (float32 masters) and adapters.ckpt, each saved by two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    export_model(random_dream(), folder / "base")
    common = {"dream_config": CONFIG.to_dict(), "global_step": 5, "loops": {"fit_loop": {}}}
    full = {f"model.{name}": tensor for name, tensor in random_dream().float().state_dict().items()}
    torch.save(common | {"state_dict": full}, folder / "full.pt")
    trained = {f"model.{n}": p.detach() for n, p in adapted().named_parameters() if p.requires_grad}
    base = {"name": str(folder / "base"), "hash": base_hash(weight_files(folder / "base"))}
    torch.save(common | {"state_dict": trained, "lora": LORA, "base": base}, folder / "adapters.pt")
    commands = [[sys.executable, "-c", SAVE, str(folder), str(rank)] for rank in (0, 1)]
    processes = [subprocess.Popen(c, env=os.environ | {"OMP_NUM_THREADS": "1"}) for c in commands]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(list((folder / "full.ckpt").glob("*.distcp"))) == 2
    return folder


def test_the_parts_are_joined_bit_for_bit(saved):
    whole = torch.load(saved / "full.pt", weights_only=True)
    joined = read_sharded(saved / "full.ckpt")
    assert joined.keys() == whole.keys()  # the extras too, and no optimiser
    assert joined["state_dict"].keys() == whole["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        assert joined["state_dict"][name].dtype == tensor.dtype and torch.equal(joined["state_dict"][name], tensor)


def test_a_full_checkpoint_becomes_the_official_folder(saved, tmp_path):
    written = export_checkpoint(saved / "full.ckpt", tmp_path / "out", dtype="bfloat16")
    stored, wanted = load_file(written / "model.safetensors"), random_dream().state_dict()
    assert stored.keys() == wanted.keys() and all(torch.equal(stored[n], wanted[n]) for n in wanted)


def test_adapters_are_merged_into_their_base(saved, tmp_path):
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        merged, loose = model_from_checkpoint(saved / "adapters.ckpt")(ids).logits, adapted()(ids).logits
        plain = random_dream()(ids).logits
    torch.testing.assert_close(merged, loose, rtol=2**-6, atol=2**-6 * loose.abs().max().item())
    assert (merged - loose).abs().max() < 0.2 * (plain - loose).abs().max()


@pytest.mark.parametrize("kind", ["sharded", "file"])
def test_a_peft_folder_gives_the_same_logits(saved, tmp_path, kind):
    """On the base as PEFT wraps it, in float32; the base's own files are not needed to write the folder."""
    checkpoint = saved / ("adapters.ckpt" if kind == "sharded" else "adapters.pt")
    written = export_adapter(checkpoint, tmp_path / "peft", pretrained="Dream-org/Dream-v0-Instruct-7B")
    assert sorted(file.name for file in written.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    ours = adapted()
    state = load_file(written / "adapter_model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in adapter_state(ours.state_dict()).items())
    peft = PeftModel.from_pretrained(DreamModel.from_pretrained(saved / "base").eval(), written)
    assert peft.peft_config["default"].base_model_name_or_path == "Dream-org/Dream-v0-Instruct-7B"
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(peft.float()(ids).logits, ours.float()(ids).logits, rtol=1e-5, atol=1e-6)


def test_the_script_writes_either(saved, tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "export.py"))["main"]
    main(str(saved / "adapters.ckpt"), str(tmp_path / "peft"), adapter=True)
    main(str(saved / "full.ckpt"), str(tmp_path / "official"))
    assert "adapter_config.json, adapter_model.safetensors" in capsys.readouterr().out
    assert (tmp_path / "official" / "model.safetensors").exists()


def test_only_adapters_become_a_peft_folder(saved, tmp_path):
    with pytest.raises(ValueError, match="holds no adapters"):
        export_adapter(saved / "full.ckpt", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def copy(saved, tmp_path):
    target = tmp_path / "copy.ckpt"
    target.mkdir()
    for file in (saved / "full.ckpt").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_an_unfinished_checkpoint_is_refused(saved, tmp_path, name):
    folder = copy(saved, tmp_path)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}: it is no sharded checkpoint, or saving was cut short"):
        model_from_checkpoint(folder)


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("damage", ["torn", "absent"])
def test_a_damaged_checkpoint_is_refused(saved, tmp_path, name, damage):
    folder = copy(saved, tmp_path)
    if damage == "torn":
        (folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 10])
    else:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"is damaged|cut short"):
        model_from_checkpoint(folder)


class Runs:
    """What an attacker would put there."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_code_in_a_checkpoint_does_not_run(saved, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = copy(saved, tmp_path)
    if name == "meta.pt":
        torch.save({"a": Runs()}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ValueError, match="mkdir"):
        read_sharded(folder)
    assert not (tmp_path / "attacked").exists()
