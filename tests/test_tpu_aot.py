"""The TPU table: one small row by the real compiler, and what it reads off a program's HLO."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sflow_jax.catalogue import find_info
from sflow_jax.planning.costs import bytes_sent

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from collectives import sent  # noqa: E402

HLO = """
HloModule m

%body (p: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %all-reduce.1 = bf16[2,8]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %inner = (u32[], bf16[4]) while(%t), condition=%inner_condition, body=%inner_body
  %beside = bf16[2,8] fusion(%x), kind=kOutput, calls=%gathers_on
}

%begins (p: bf16[4,4]) -> (bf16[4,16], u32[]) {
  %g.1 = bf16[4,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %started = (bf16[4,16]{1,0}, u32[]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%gathers_on (p: bf16[4,4]) -> bf16[2,8] {
  %g.2 = bf16[4,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}
}

%inner_body (q: (u32[], bf16[4])) -> (u32[], bf16[4]) {
  %s = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%z), source_target_pairs={{0,1},{1,0}}
}

%inner_condition (q: (u32[], bf16[4])) -> pred[] {
  %c = u32[] constant(3)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%condition (p: (s32[], bf16[2,8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[] compare(%i, %constant.9), direction=LT
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %b = (bf16[4,16]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%begins
  %w = (s32[], bf16[2,8]) while(%t), condition=%condition, body=%body
  %g = bf16[4,16]{1,0} all-gather(%y), replica_groups=[2,4]<=[8], dimensions={1}
  %r = f32[2]{0} reduce-scatter(%v), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
}
"""


def test_loops_and_rings_are_counted():
    # In a ring of four a chip passes on three quarters; a reduction does so twice. One of two gathers goes on in
    # parts while the loop computes: it is the same bytes.
    assert sent(HLO) == {
        "all-reduce": 5 * 2 * (2 * 8 * 2) * 3 / 4,
        "collective-permute": 5 * 3 * 4 * 4,
        "all-gather": 2 * 4 * 16 * 2 * 3 / 4,
        "reduce-scatter": 4 * (2 * 4) * 3 / 4,
    }


def test_loops_of_unknown_length_are_refused():
    with pytest.raises(ValueError, match="how often a loop runs"):
        sent(HLO.replace("constant(5)", "parameter(0)"))


def test_a_pod_takes_meshes_shorter_than_its_sides():
    """Sixteen by sixteen chips, two a model."""
    pytest.importorskip("libtpu", reason="the TPU compiler is only published for Linux on x86")
    program = (
        "from tpu_aot import SLICES, make_mesh, topologies;"
        "chips = topologies.get_topology_desc(platform='tpu', topology_name=SLICES['v6e-256']).devices;"
        "mesh = make_mesh({'data': 128, 'tensor': 2}, chips);"
        "print(len({chip.id for chip in mesh.devices.flat}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True)
    assert ended.stdout.strip() == "256", ended.stderr


def test_the_full_size_step_compiles_for_eight_chips(tmp_path):
    """FLUX.1-dev at 512² on a v5e-8, by the TPU compiler: fits, and sends what the plan says."""
    pytest.importorskip("libtpu", reason="the TPU compiler is only published for Linux on x86")
    out = tmp_path / "table.json"
    what = "--only v5e-8 --model flux-dev --side 512 --work sweep --network transformer --mesh data=2,tensor=4"
    command = [sys.executable, BENCHMARKS / "tpu_aot.py", *what.split(), "--out", out]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["fits"] and row["proposed"] and row["bound"] == "product"
    # Weights of eight chips in two groups of four; temporaries stay small, since splash attention keeps no scores.
    assert row["weights"] == pytest.approx(11.9e9 * 2 / 4, rel=0.03) and row["temporaries"] < 0.2e9
    info, words = find_info("flux-dev")
    assert sum(row["sent"].values()) == pytest.approx(bytes_sent(info, 1024, words, 2, 4), rel=0.01)
    # Products read their kernels in the stack.
    assert row["weights_copied"] == 0
    assert "| v5e-8 | flux-dev | 512 |" in out.with_suffix(".md").read_text()
