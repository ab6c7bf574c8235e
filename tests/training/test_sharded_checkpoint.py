"""Sharded checkpoints: atomic, read without pickled code, and exported like files."""

import errno
import io
import os
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path, PurePosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import SingleDeviceStrategy
from meeting import Program, ranks
from peft import PeftModel
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from dream_lightning.adapters import LoraParams, add_lora, base_hash
from dream_lightning.export import export_adapter, export_model, model_from_checkpoint
from dream_lightning.model import DreamConfig, DreamModel
from dream_lightning.model.loading import weight_files
from dream_lightning.training.sharded_checkpoint import _TableUnpickler, read_into, read_rest, read_sharded, write

pytestmark = pytest.mark.xdist_group("sharded_checkpoint")  # one launch of processes
# odd sizes, so that the two shards differ
SIZES = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 33, "num_hidden_layers": 2}
IDS = {"mask_token_id": 90, "pad_token_id": 91, "bos_token_id": 91, "eos_token_id": 91}
CONFIG = DreamConfig(**SIZES, **IDS, num_attention_heads=6, num_key_value_heads=2)
LORA = LoraParams(rank=4, alpha=8.0, targets=["q_proj", "v_proj"])


def save_sharded(folder: Path) -> None:
    """As one of two processes: shard every tensor of every checkpoint by rows and save it."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
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
    torch.distributed.barrier()


def save_on_two(folder: Path) -> None:
    assert ranks(lambda: save_sharded(folder)) == [0, 0]


def random_dream() -> DreamModel:
    torch.manual_seed(0)
    return DreamModel(CONFIG).to(torch.bfloat16).eval()


def adapted() -> DreamModel:
    model = random_dream()
    add_lora(model, LORA)
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
    torch.save(common | {"state_dict": trained, "lora": LORA.config, "base": base}, folder / "adapters.pt")
    Program(save_on_two, folder).end()
    assert len(list((folder / "full.ckpt").glob("*.distcp"))) == 2
    return folder


def test_the_shards_are_joined_bit_for_bit(saved):
    whole, joined = torch.load(saved / "full.pt", weights_only=True), read_sharded(saved / "full.ckpt")
    assert joined.keys() == whole.keys()  # the rest too, and no optimizer
    assert joined["state_dict"].keys() == whole["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        assert joined["state_dict"][name].dtype == tensor.dtype and torch.equal(joined["state_dict"][name], tensor)


@pytest.mark.parametrize("checkpoint", ["adapters.ckpt", "adapters.pt"])
def test_a_peft_folder_gives_the_same_logits(saved, tmp_path, checkpoint):
    """On the base as PEFT wraps it, in float32; the base's own files are not needed to write the folder."""
    written = export_adapter(saved / checkpoint, tmp_path / "peft", pretrained="Dream-org/Dream-v0-Instruct-7B")
    assert sorted(file.name for file in written.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    ours = adapted()
    peft = PeftModel.from_pretrained(DreamModel.from_pretrained(saved / "base").eval(), written)
    assert peft.peft_config["default"].base_model_name_or_path == "Dream-org/Dream-v0-Instruct-7B"
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(peft.float()(ids).logits, ours.float()(ids).logits, rtol=1e-5, atol=1e-6)


def test_only_adapters_become_a_peft_folder(saved, tmp_path):
    with pytest.raises(ValueError, match="holds no adapters"):
        export_adapter(saved / "full.ckpt", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("damage", ["torn", "absent"])
def test_a_damaged_checkpoint_is_refused(saved, tmp_path, name, damage):
    folder = shutil.copytree(saved / "full.ckpt", tmp_path / "copy.ckpt")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "torn":
        (folder / name).write_bytes(content[: len(content) // 10])
    with pytest.raises(ValueError, match=r"is damaged|incomplete"):
        model_from_checkpoint(folder)


def state_of(value: float) -> dict:
    return {"state_dict": {"w": torch.full((3,), value)}, "optimizer_0": {"param_groups": {"lr": value}}}


def save(path: Path, value: float, **rest) -> None:
    """As one process."""
    write(state_of(value), {"step": value, **rest}, path, SingleDeviceStrategy())


def load(path: Path) -> float:
    state = state_of(0.0)
    read_into(state, path)
    assert read_rest(path)["step"] == state["optimizer_0"]["param_groups"]["lr"]
    return state["state_dict"]["w"][0].item()


@pytest.mark.parametrize("where", ["tensors", "rest", None])
def test_a_new_one_replaces_the_old_one_unless_the_disk_is_full(tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path / "last.ckpt", 1.0)
    with monkeypatch.context() as patch:
        if where == "tensors":
            patch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", full)
        if where == "rest":
            patch.setattr(torch, "save", full)
        words = r"last.ckpt was not written: .*No space left.*is unchanged"
        with pytest.raises(ValueError, match=words) if where else nullcontext():
            save(tmp_path / "last.ckpt", 2.0)
    assert load(tmp_path / "last.ckpt") == (1.0 if where else 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


class Attack:
    """Code that unpickling would run."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.ckpt", 1.0)
    (tmp_path / "a.ckpt" / ".metadata").write_bytes(pickle.dumps(Attack()))
    for reader in (load, read_sharded):
        with pytest.raises(ValueError, match="mkdir"):
            reader(tmp_path / "a.ckpt")
    torch.distributed.checkpoint.save({"optimizer_0": {"lr": Attack()}}, checkpoint_id=tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"[Ww]eights.only"):
        read_into({"optimizer_0": {"lr": 0.0}}, tmp_path / "b.ckpt")
    save(tmp_path / "c.ckpt", 1.0, attack=Attack())
    with pytest.raises(ValueError, match="mkdir"):
        read_rest(tmp_path / "c.ckpt")
    assert not (tmp_path / "attacked").exists()


def test_a_table_of_contents_of_python_3_13_is_read():
    assert _TableUnpickler(io.BytesIO(b"cpathlib._local\nPurePosixPath\n.")).load() is PurePosixPath


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no sharded checkpoint"):
        read_rest(tmp_path)
    save(tmp_path / "a.ckpt", 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        read_into({"state_dict": {"w": torch.zeros(4)}}, tmp_path / "a.ckpt")
