"""The private attributes of Lightning and torch that training/ uses; each fails by name when upstream changes."""

import inspect

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops import _TrainingEpochLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import _dynamo
from torch.nn.parallel import DistributedDataParallel


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (_FitLoop, "_load_combined_loader_states", ["self"]),
        (_TrainingEpochLoop, "_broadcast_sigterm_tensor", ["self"]),
        (_TrainingEpochLoop, "_should_check_val_fx", ["self", "data_fetcher"]),
        (ModelCheckpoint, "_find_last_checkpoints", ["self", "trainer"]),
        (ModelCheckpoint, "_monitor_candidates", ["self", "trainer"]),
        (ModelCheckpoint, "_save_last_checkpoint", ["self", "trainer", "monitor_candidates"]),
        (ModelCheckpoint, "_should_skip_saving_checkpoint", ["self", "trainer"]),
        (DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model", None),
        (_dynamo, "maybe_mark_dynamic", ["t", "index"]),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_a_private_function_is_there(owner, name, parameters):
    function = getattr(owner, name)
    assert parameters is None or list(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        (ModelParallelStrategy.__init__, "_data_parallel_size"),
        (ModelCheckpoint._should_skip_saving_checkpoint, "_last_global_step_saved"),
        (_TrainingEpochLoop.advance, "_broadcast_sigterm_tensor"),
        (_TrainingEpochLoop.advance, "restarted_mid_evaluation"),
        (_FitLoop.advance, "_data_fetcher"),
    ],
)
def test_a_private_attribute_is_used_where_we_expect_it(owner, attribute):
    assert attribute in inspect.getsource(owner)
