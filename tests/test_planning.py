"""Meshes proposed for published chips, and what a step takes at least."""

import dataclasses

import pytest
from commandline import run

from sflow_jax.catalogue import find_info
from sflow_jax.machine.chips import CHIPS, chip_of, find_chip, parse_machine
from sflow_jax.planning.costs import bytes_sent, propose_mesh, roofline
from sflow_jax.planning.lowering import lower_step, weight_bytes
from sflow_jax.planning.meshes import placed
from sflow_jax.settings import Placement


@pytest.mark.parametrize(
    "machine, work, tensor, data",
    [
        ("v5e-8", "edit", 8, 1),
        ("v5e-8", "sweep", 4, 2),
        ("v5e-256", "edit", 8, 32),
        ("v6e-4", "sweep", 2, 2),
        ("v5p-8", "sweep", 1, 4),
        ("h100x1", "edit", 1, 1),
    ],
)
def test_meshes_fit_the_chip(machine, work, tensor, data):
    chip, count = parse_machine(machine)
    sizes, why = propose_mesh(find_info("flux-dev")[0], chip, count, work)
    assert sizes == {"data": data, "tensor": tensor} and f"tensor={tensor}" in why


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="4 v5e cannot hold|2 v5e cannot hold"):
        propose_mesh(find_info("flux-dev")[0], CHIPS["v5e"], 2, "edit")


@dataclasses.dataclass
class Device:
    """As jax describes one that nobody published figures of."""

    device_kind: str = "made up"
    platform: str = "gpu"
    reports: dict | None = dataclasses.field(default_factory=lambda: {"bytes_limit": 40 * 10**9})

    def memory_stats(self) -> dict | None:
        return self.reports


def test_chips_without_published_figures_are_known_by_the_memory_that_they_report():
    assert chip_of(Device(), 1).memory == 40e9
    assert chip_of(Device("NVIDIA H100"), 1) == CHIPS["h100"]
    hosts = [chip_of(Device("cpu", "cpu", None), neighbours).memory for neighbours in (1, 4)]
    assert hosts[0] == 4 * hosts[1] > 2**28
    with pytest.raises(ValueError, match="does not say how much memory it has; name the mesh yourself"):
        chip_of(Device(reports=None), 1)


def test_a_mesh_is_proposed_on_any_devices_and_may_leave_some_over(wide_checkpoint):
    sizes = dict(placed(str(wide_checkpoint), Placement(mesh="auto"), "edit").mesh.shape)
    assert sizes == {"data": 1, "fsdp": 1, "tensor": 8}
    info = find_info(str(wide_checkpoint))[0]
    # Half of it is too small for the whole model, and seven devices have no split of all but into one.
    memory = 1.9 * sum(weight_bytes(info, Placement(dtype="bfloat16")).values())
    sizes, why = propose_mesh(info, dataclasses.replace(CHIPS["v5e"], memory=memory), 7, "edit")
    assert sizes == {"data": 1, "tensor": 4} and "3 of 7 chips are left over" in why


@pytest.mark.parametrize("text", ["v9-8", "v5e", "v5p-7", "h100", ""])
def test_unknown_machines_are_refused(text):
    with pytest.raises(ValueError, match="cannot read machine|counts cores"):
        parse_machine(text)
    with pytest.raises(ValueError, match="no figures"):
        find_chip("cpu")


@pytest.mark.parametrize(
    "kind, name",
    [("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("TPU v5", "v5p"), ("NVIDIA H100 80GB HBM3", "h100")],
)
def test_devices_are_known_by_their_kind(kind, name):
    assert find_chip(kind).name == name


def test_the_operations_of_a_step_are_the_compilers():
    """A two-block model, unrolled by the compiler's own count."""
    info, words = find_info("flux-dev")
    config = dataclasses.replace(info.configs["transformer"], double_blocks=1, single_blocks=1)
    small = dataclasses.replace(info, configs={**info.configs, "transformer": config})
    canvas = small.canvas(512, 512)
    placement = Placement(dtype="float32", attention="xla")
    lowered = lower_step(small, placement, canvas, groups=1, members=1, words=words)
    counted = lowered.cost_analysis()["flops"]
    flops = info.family.step_flops(small.configs, canvas.tokens, words, 1)
    assert flops == pytest.approx(counted, rel=0.03)


def test_what_bounds_a_step():
    (info, _), chip = find_info("flux-dev"), CHIPS["v5e"]
    shape = dict(chips=8, tokens=1024, words=512, batch=4)
    assert roofline(info, chip, **shape, weights=3_000_000_000, sent=1e9)["bound"] == "product"
    assert roofline(info, chip, **shape, weights=3_000_000_000, sent=9e10)["bound"] == "network"


def test_eight_bits_and_host_memory_leave_less_on_the_device():
    info, _ = find_info("flux-dev")
    plain, small, away = (
        weight_bytes(info, Placement(dtype="bfloat16", **changes))
        for changes in ({}, {"quantisation": "int8"}, {"offload": True})
    )
    # Nearly all of both networks are kernels of blocks; T5 also has its vocabulary.
    assert small["transformer"] == pytest.approx(plain["transformer"] / 2, rel=0.01)
    assert small["t5"] == pytest.approx(plain["t5"] / 2, rel=0.03)
    assert away["transformer"] < 0.02 * plain["transformer"] and away["t5"] == plain["t5"]


def test_bytes_sent_vanish_without_a_split():
    info, _ = find_info("flux-dev")
    assert bytes_sent(info, 1024, 512, 4, 1) == 0
    # What the compiler's HLO of this step says: 5.02 GB.
    assert bytes_sent(info, 1024, 512, 4, 8) == pytest.approx(5.02e9, rel=0.01)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("flux-dev", "--plan", "v6e-8"), "tensor=8"),
        (("flux-schnell", "--plan", "h100x1"), "at least"),
        (("flux-dev", "--plan", "v5e-4", "--quantize", "int8"), "int8"),
        (("flux-dev", "--plan", "h100x1"), "by the GPU compiler, batch 4"),
        (("flux-dev", "--plan", "h100x1", "--quantize", "fp8"), "by the GPU compiler, batch 4"),
        (("flux-dev", "--plan", "v6e-8"), "by the TPU compiler, batch 4"),
    ],
)
def test_info_plans_for_a_machine(arguments, said, capsys):
    assert run("info", *arguments) == 0
    told = capsys.readouterr().out
    assert said in told and "picture" in told and "sweep" in told and "estimated" in told


@pytest.mark.parametrize("machine, message", [("v5e-2", "cannot hold"), ("abacus", "cannot read machine")])
def test_machines_that_cannot_are_refused(machine, message, capsys):
    assert run("info", "flux-dev", "--plan", machine) == 2
    assert message in capsys.readouterr().err
