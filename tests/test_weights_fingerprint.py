"""Which weights answered: the same whether they lie whole or sharded."""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dream_lightning.predict import _fingerprint


@pytest.fixture
def mesh(tmp_path):
    """Of one process: sharded tensors, no neighbours."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def module_of(weight, **parameters):
    module = L.LightningModule()
    for name, value in {"weight": weight, **parameters}.items():
        module.register_parameter(name, torch.nn.Parameter(value))
    return module


def test_sharded_weights_have_the_fingerprint_of_whole_ones(mesh):
    weight = torch.arange(6000.0).reshape(60, 100)
    assert _fingerprint(module_of(distribute_tensor(weight, mesh, [Shard(0)]))) == _fingerprint(module_of(weight))


def test_values_types_names_and_shapes_count():
    weight = torch.arange(6000.0)
    others = [
        module_of(weight + 1e-3),
        module_of(weight.bfloat16()),
        module_of(weight[:5000]),
        module_of(weight, bias=torch.zeros(1)),
    ]
    assert len({_fingerprint(module) for module in [module_of(weight), module_of(weight.clone()), *others]}) == 5
