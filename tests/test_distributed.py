"""Two processes equal one: DDP and FSDP2 over gloo on the CPU, full and LoRA, in float32.

A program starts the processes, forks of it, which train all cases of a launch.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from material import Recorder, addition_rows, quiet_trainer, tiny_data, write_jsonl
from meeting import MeetingPoint, Program, end, fork
from torch.distributed.checkpoint import FileSystemReader

from dream_lightning import DreamConfig, DreamModel, DreamModule, SamplingParams, load_tokenizer
from dream_lightning.adapters import LoraParams
from dream_lightning.batch import Batch
from dream_lightning.training.fsdp import local, whole
from dream_lightning.training.sharded_checkpoint import read_rest

pytestmark = pytest.mark.xdist_group("distributed")  # one launch of processes
ENVIRONMENT = {}  # of this process of a launch
LAUNCHES = {"one": 1, "two": 2, "back": 1}  # processes
ROWS, STEPS, SAVED = 8, 3, 2  # rows a step, steps of a run, step of its checkpoint
# The gradient of a key's bias vanishes but for rounding errors, which Adam's own 1e-8 would make full-sized updates of
EPSILON = 1e-4
# 45 and 5 rows do not divide evenly over two processes
SIZES = {"hidden_size": 40, "intermediate_size": 45, "num_hidden_layers": 2, "num_attention_heads": 4}
SUM = "reduce_scatter_single" if hasattr(torch.distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
LORA = LoraParams(rank=5, alpha=10, targets="all-linear")


class AnswerRecorder(Recorder):
    """Also the validation answers of a run, and the share of the weights on this process."""

    answers, part = {}, 1.0

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        parameters = list(pl_module.parameters())
        self.part = sum(local(p).numel() for p in parameters) / sum(p.numel() for p in parameters)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if outputs is not None:
            pairs = zip(outputs.predictions, outputs.counted, strict=True)
            self.answers = self.answers | {p.id: p.prediction for p, counted in pairs if counted}


def module(kind, folder, **options):
    options = {
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1, eps=EPSILON),
        "lr_schedule": "linear",
        "sampling": SamplingParams(max_new_tokens=12, steps=6, forbid_mask=True),
    } | options
    if kind == "new":
        return DreamModule(new_model=SIZES, tokenizer="bytes", **options)
    return DreamModule(str(folder / "base"), lora=LORA if kind == "lora" else None, **options)


def nothing_masked_on_rank_1(model):
    """Mask nothing in the rows of the second of two processes, at two rows a micro-batch."""

    def noise(batch: Batch, **options):
        masked_out = batch.maskable & (batch.document_ids // 2 % 2 == 0)
        return DreamModule.noise(model, replace(batch, maskable=masked_out), **options)

    model.noise = noise


def fit(folder, name, kind, strategy, *, batch_size, resume=None, unmasked=False, precision=None, **options):
    """Train a case; process 0 saves the results as `{name}.pt`, the checkpoint is `{name}.ckpt`.

    The cases whose answers are compared validate, in the middle of training.
    """
    os.environ.update(ENVIRONMENT)  # Lightning removes its variables at the end of a run
    world_size = int(os.environ["WORLD_SIZE"])
    L.seed_everything(0, verbose=False)
    recorder, model = AnswerRecorder(), module(kind, folder, **options)
    if unmasked:
        nothing_masked_on_rank_1(model)
    micro_batches = ROWS // batch_size // world_size
    trainer = quiet_trainer(
        recorder,
        ModelCheckpoint(folder, filename=name, every_n_train_steps=SAVED, enable_version_counter=False),
        **{"devices": world_size, "strategy": strategy, "precision": precision, "max_steps": STEPS, "max_epochs": 5},
        **{"accumulate_grad_batches": micro_batches, "gradient_clip_val": 1.0, "use_distributed_sampler": False},
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if name in {f"{kind}-one", f"{kind}-{strategy}"} else 0,
        val_check_interval=SAVED * micro_batches,
        default_root_dir=folder,
    )
    options = {"tokenizer": model.tokenizer, "batch_size": batch_size, "validation_questions": 5}
    data = tiny_data(folder / "sums.jsonl", folder, **options)
    with mock.patch.object(torch.distributed, SUM, wraps=getattr(torch.distributed, SUM)) as sums:
        trainer.fit(model, data, ckpt_path=resume and folder / f"{resume}.ckpt", weights_only=True)
    if world_size > 1:
        everyone = [None] * world_size
        torch.distributed.all_gather_object(everyone, recorder.answers)
        recorder.answers = {id_: answer for answers in everyone for id_, answer in answers.items()}
    seen = {
        **{"losses": recorder.losses, "norms": recorder.norms, "answers": recorder.answers, "part": recorder.part},
        "sums": sums.call_count,
        "val_nll": trainer.callback_metrics.get("val/nll", torch.tensor(0.0)).item(),
        "weights": {n: whole(p).detach().clone() for n, p in model.named_parameters() if p.requires_grad},
    }
    if trainer.is_global_zero:
        torch.save(seen, folder / f"{name}.pt")


KINDS = ("full", "lora", "new")


def train(launch: str, folder: Path) -> None:
    """The cases of one launch."""
    if launch == "one":
        for kind in KINDS:
            fit(folder, f"{kind}-one", kind, "auto", batch_size=8)
        fit(folder, "full-one-accumulated", "full", "auto", batch_size=1)
        fit(folder, "full-one-unmasked", "full", "auto", batch_size=8, unmasked=True)
        fit(folder, "lora-one-unmasked", "lora", "auto", batch_size=8, unmasked=True)
        fit(folder, "full-fsdp2-from-1", "full", "fsdp2", batch_size=4)
    if launch == "two":
        for kind in KINDS:
            fit(folder, f"{kind}-ddp", kind, "ddp", batch_size=4)
            fit(folder, f"{kind}-fsdp2", kind, "fsdp2", batch_size=2)
            if kind != "new":
                fit(folder, f"{kind}-fsdp2-to-2", kind, "fsdp2", batch_size=2, resume=f"{kind}-fsdp2")
                fit(folder, f"{kind}-fsdp2-unmasked", kind, "fsdp2", batch_size=2, unmasked=True)
        fit(folder, "full-1-to-2", "full", "fsdp2", batch_size=2, resume="full-fsdp2-from-1")
        fit(folder, "full-fsdp2-checkpointing", "full", "fsdp2", batch_size=4, gradient_checkpointing=True)
        fit(folder, "full-fsdp2-mixed", "full", "fsdp2", batch_size=4, precision="bf16-mixed")
        fit(folder, "lora-fsdp2-mixed", "lora", "fsdp2", batch_size=2, precision="bf16-mixed", dtype="bfloat16")
        plain = torch.nn.Module.compile
        torch.nn.Module.compile = lambda layer: plain(layer, backend="eager")  # without a C++ compiler
        fit(folder, "lora-fsdp2-compiled", "lora", "fsdp2", batch_size=4, compile_layers=True)
    if launch == "back":
        for kind in ("full", "lora"):
            fit(folder, f"{kind}-fsdp2-to-1", kind, "fsdp2", batch_size=2, resume=f"{kind}-fsdp2")
            fit(folder, f"{kind}-ddp-to-1", kind, "auto", batch_size=8, resume=f"{kind}-ddp")


def start(launch: str, rank: int, port: str, folder: Path) -> int:
    """Start one process of a launch; returns its id."""

    def work() -> None:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(LAUNCHES[launch])}
        ENVIRONMENT.update(os.environ | ranks | {"MASTER_PORT": port})
        train(launch, folder)

    return fork(work, folder / f"{launch}-{rank}.txt")


def main(folder: Path, ports: list[str]) -> None:
    """All launches in turn; exits with the log of a process that failed."""
    for (launch, processes), port in zip(LAUNCHES.items(), ports, strict=True):
        pids = [start(launch, rank, port, folder) for rank in range(processes)]
        for rank, pid in enumerate(pids):
            if end(pid):
                sys.exit((folder / f"{launch}-{rank}.txt").read_text()[-6000:])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name of a case → its results."""
    folder = tmp_path_factory.mktemp("runs")
    write_jsonl(folder / "sums.jsonl", addition_rows(50))
    tokenizer = load_tokenizer("bytes")
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("mask", "pad", "bos", "eos")}
    torch.manual_seed(0)
    # Weights large enough that no answer depends on rounding
    config = DreamConfig(vocab_size=321, num_key_value_heads=2, initializer_range=0.1, **SIZES, **ids)
    DreamModel(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    meetings = [MeetingPoint() for _ in LAUNCHES]
    ports = [meeting.environment["MASTER_PORT"] for meeting in meetings]
    Program(main, folder, ports, **meetings[0].environment).end()

    def seen(name):
        return torch.load(folder / f"{name}.pt", weights_only=True)

    seen.folder = folder
    return seen


def assert_same(ours, theirs):
    assert len(ours["losses"]) == len(theirs["losses"])
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(ours["norms"]), torch.tensor(theirs["norms"]), rtol=1e-4, atol=1e-6)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(weight, theirs["weights"][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(runs, kind, strategy):
    one, two = runs(f"{kind}-one"), runs(f"{kind}-{strategy}")
    assert_same(two, one)
    assert len(one["losses"]) == STEPS and max(one["norms"]) > 1  # the norm is clipped at 1
    assert len(two["answers"]) == 5 and two["answers"] == one["answers"]
    assert two["val_nll"] == pytest.approx(one["val_nll"], rel=2e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("full-one-accumulated", "full-one"),
        ("full-fsdp2-checkpointing", "full-one"),  # layers recomputed in the backward pass
        ("lora-fsdp2-compiled", "lora-one"),
        ("full-fsdp2-unmasked", "full-one-unmasked"),  # a process with nothing masked stays in step
        ("lora-fsdp2-unmasked", "lora-one-unmasked"),
    ],
)
def test_how_it_is_computed_does_not_matter(runs, ours, theirs):
    assert_same(runs(ours), runs(theirs))
    assert runs("full-one")["losses"] != runs("full-one-unmasked")["losses"]


@pytest.mark.parametrize(
    ("resumed", "first"),
    [
        *((f"{k}-fsdp2-to-{n}", f"{k}-fsdp2") for k in ("full", "lora") for n in (1, 2)),
        *((f"{k}-ddp-to-1", f"{k}-ddp") for k in ("full", "lora")),
        ("full-1-to-2", "full-fsdp2-from-1"),
    ],
)
def test_a_checkpoint_resumes_on_any_number_of_processes(runs, resumed, first):
    """Also where a step of as many rows takes another number of micro-batches."""
    rest = runs(first)
    assert_same(runs(resumed), {**rest, "losses": rest["losses"][SAVED:], "norms": rest["norms"][SAVED:]})


def test_of_an_adapted_model_only_the_adapters_and_their_optimizer_are_saved(runs):
    folder = runs.folder / "lora-fsdp2.ckpt"
    trained = {f"state_dict.{name}" for name in runs("lora-fsdp2")["weights"]}
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {name for name in saved if name.startswith("state_dict.")} == trained
    moments = {name for name in saved if name.endswith(".exp_avg")}
    assert len(moments) == len(trained) == 2 * 2 * 7
    assert {file.name for file in folder.iterdir()} == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"}
    assert read_rest(folder)["base"]["hash"]


def test_weights_are_sharded_and_gradients_of_adapters_summed_once_a_step(runs):
    """Gradients of all weights are summed at every micro-batch, of which a step has two here."""
    assert 0.5 <= runs("full-fsdp2")["part"] < 0.51 and runs("full-ddp")["part"] == 1
    layers = SIZES["num_hidden_layers"]
    assert runs("lora-fsdp2")["sums"] == STEPS * layers
    assert runs("full-fsdp2")["sums"] == STEPS * (layers + 2) * 2


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32(runs, kind):
    exact, mixed = runs(f"{kind}-one"), runs(f"{kind}-fsdp2-mixed")
    assert mixed["losses"] != exact["losses"]
    assert mixed["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    assert {w.dtype for w in mixed["weights"].values()} == {torch.float32}
