"""What trains when: against hand-made expectations and PyTorch's own schedules."""

import pytest
import torch
from torch import nn

from facecls.errors import UserError
from facecls.model.schedule import Schedule, at_epoch, freeze, layer_of, learning_rate_factor, parameter_groups
from facecls.model.trunk import VGGFACE2, create_trunk


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return create_trunk(VGGFACE2).net


def test_layers_are_the_stem_and_the_16_blocks(net: nn.Module) -> None:
    layers = layer_of(net)
    assert layers.keys() == {name for name, _ in net.named_parameters()}
    assert {layers["conv1.weight"], layers["bn1.bias"]} == {0}
    assert [layers[f"layer{stage}.0.conv1.weight"] for stage in (1, 2, 3, 4)] == [1, 4, 8, 14]
    assert layers["layer4.2.bn3.weight"] == 16


@pytest.mark.parametrize(
    ("epoch", "trains"), [(0, []), (1, []), (2, ["layer3.4", "layer3.5", "layer4"]), (5, ["conv1", "layer1", "layer4"])]
)
def test_freezing_is_a_function_of_the_epoch(net: nn.Module, epoch: int, trains: list[str]) -> None:
    schedule = Schedule(frozen={0: -1, 2: 12, 5: 0})
    kept = freeze(net, schedule, epoch)
    open_now = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert all(any(name.startswith(prefix) for name in open_now) for prefix in trains)
    assert (len(open_now) == 0) == (not trains)
    if epoch == 2:
        assert all(name.startswith(("layer3.4", "layer3.5", "layer4")) for name in open_now)
    norms = {module for module in net.modules() if isinstance(module, nn.BatchNorm2d)}
    frozen_norms = {module for module in norms if not module.weight.requires_grad}
    assert set(kept) == frozen_norms
    assert set(freeze(net, Schedule(frozen={0: 0}, batchnorm="frozen"), epoch)) == norms


def test_at_epoch_takes_the_last_change() -> None:
    assert [at_epoch({2: 5, 4: 9}, epoch, 0) for epoch in range(6)] == [0, 0, 5, 5, 9, 9]


def test_warm_up_and_cosine_are_those_of_pytorch() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    wanted = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80)
    schedule, values, cosine = Schedule(warmup=0.2), [], []
    for step in range(100):
        values.append(learning_rate_factor(schedule, step, 100, 0))
        if step >= 20:
            cosine.append(wanted.get_last_lr()[0])
            optimizer.step()
            wanted.step()
    assert values[20:] == pytest.approx(cosine, abs=1e-6)
    assert values[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])


def test_constant_with_milestones() -> None:
    schedule = Schedule(warmup=0.0, decay="constant", lr_milestones={10: 0.1})
    assert [learning_rate_factor(schedule, step, 15, step) for step in (0, 9, 10, 14)] == [1.0, 1.0, 0.1, 0.1]


def test_every_parameter_is_in_one_group_with_its_rate(net: nn.Module) -> None:
    freeze(net, Schedule(frozen={0: -1}), 0)
    heads = nn.ModuleDict({"age": nn.Linear(2048, 117)})
    groups = parameter_groups(net, heads, layer_decay=0.5)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped})
    assert {id(p) for p in grouped} == {id(p) for module in (net, heads) for p in module.parameters()}
    rate = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert rate[id(heads["age"].weight)] == 1
    assert rate[id(net.get_parameter("layer4.2.conv1.weight"))] == 1
    assert rate[id(net.get_parameter("conv1.weight"))] == pytest.approx(0.5**16)
    for group in groups:
        assert {parameter.ndim <= 1 for parameter in group["params"]} == {group.get("weight_decay") == 0}


@pytest.mark.parametrize("wrong", [{"warmup": 2.0}, {"layer_decay": 0.0}, {"frozen": {-1: 3}}, {"frozen": {0: -2}}])
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="Expected schedule"):
        Schedule(**wrong)
