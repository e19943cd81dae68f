"""The GPU table: what it reads off a program's HLO, and one row by the real compiler where it is installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from collectives import sent  # noqa: E402
from traffic import (  # noqa: E402
    ATTENTION,
    CONCATENATION,
    COPIED,
    ELEMENTWISE,
    PRODUCTS,
    STREAMS,
    WEIGHTS,
    bytes_by_kind,
    kernels,
    seconds_by_kind,
)

# A stack of three kernels of 1024 × 1024, each copied, multiplied with 8 rows, added to the stream, and so on.
HLO = """
HloModule step

%slice_one (p: bf16[3,1024,1024], i: s32[]) -> bf16[1,1024,1024] {
  %p = bf16[3,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = bf16[1,1024,1024]{2,1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,1024,1024}
}

%add_up (a: bf16[8,1024], b: bf16[8,1024]) -> bf16[8,1024] {
  %a = bf16[8,1024]{1,0} parameter(0)
  %b = bf16[8,1024]{1,0} parameter(1)
  ROOT %s = bf16[8,1024]{1,0} add(%a, %b)
}

%join (a: bf16[8,1024], b: bf16[8,1024]) -> bf16[16,1024] {
  %a = bf16[8,1024]{1,0} parameter(0)
  %b = bf16[8,1024]{1,0} parameter(1)
  ROOT %j = bf16[16,1024]{1,0} concatenate(%a, %b), dimensions={0}
}

%body (t: (s32[], bf16[8,1024], bf16[3,1024,1024])) -> (s32[], bf16[8,1024], bf16[3,1024,1024]) {
  %t = (s32[], bf16[8,1024]{1,0}, bf16[3,1024,1024]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,1024]{1,0} get-tuple-element(%t), index=1
  %w = bf16[3,1024,1024]{2,1,0} get-tuple-element(%t), index=2
  %copied = bf16[1,1024,1024]{2,1,0} fusion(%w, %n), kind=kLoop, calls=%slice_one
  %view = bf16[1024,1024]{1,0} bitcast(%copied)
  %y = (bf16[8,1024]{1,0}, s8[4194304]{0}) custom-call(%x, %view), custom_call_target="__cublas$lt$matmul"
  %z = bf16[8,1024]{1,0} get-tuple-element(%y), index=0
  %r = bf16[8,1024]{1,0} all-reduce(%z), replica_groups={{0,1}}, to_apply=%add_up
  %sum = bf16[8,1024]{1,0} fusion(%x, %r), kind=kLoop, calls=%add_up
  ROOT %out = (s32[], bf16[8,1024]{1,0}, bf16[3,1024,1024]{2,1,0}) tuple(%n, %sum, %w)
}

%unreadable (t: (s32[], bf16[8,1024], bf16[3,1024,1024])) -> pred[] {
  %t = (s32[], bf16[8,1024]{1,0}, bf16[3,1024,1024]{2,1,0}) parameter(0)
}

ENTRY %main (transformer_blocks_kernel.1: bf16[3,1024,1024], x.1: bf16[8,1024]) -> bf16[16,1024] {
  %transformer_blocks_kernel.1 = bf16[3,1024,1024]{2,1,0} parameter(0)
  %x.1 = bf16[8,1024]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,1024]{1,0}, bf16[3,1024,1024]{2,1,0}) tuple(%zero, %x.1, %transformer_blocks_kernel.1)
  %loop = (s32[], bf16[8,1024]{1,0}, bf16[3,1024,1024]{2,1,0}) while(%start), condition=%unreadable, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %end = bf16[8,1024]{1,0} get-tuple-element(%loop), index=1
  %q = bf16[1,8,8,128]{3,2,1,0} bitcast(%end)
  %m = (bf16[1,8,8,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  %mixed = bf16[1,8,8,128]{3,1,2,0} get-tuple-element(%m), index=0
  %flat = bf16[8,1024]{1,0} bitcast(%mixed)
  ROOT %both = bf16[16,1024]{1,0} fusion(%flat, %end), kind=kLoop, calls=%join
}
"""
KERNEL, STREAM = 1024 * 1024 * 2, 8 * 1024 * 2


def test_bytes_are_counted_by_kind_and_loops_as_often_as_they_run():
    found = kernels(HLO)
    assert sum(kernel.times for kernel in found) == 3 * 3 + 2
    assert bytes_by_kind(found) == {
        COPIED: 3 * (2 * KERNEL + 4),  # and its place in the stack
        WEIGHTS: 3 * KERNEL,
        STREAMS: 3 * 2 * STREAM,
        ELEMENTWISE: 3 * 3 * STREAM,
        ATTENTION: 4 * STREAM,
        CONCATENATION: 4 * STREAM,
    }
    assert sent(HLO) == {"all-reduce": 3 * 2 * STREAM / 2}


def test_a_kernel_takes_what_its_products_or_its_bytes_do():
    found = kernels(HLO)
    assert sum(kernel.flops * kernel.times for kernel in found if kernel.kind == PRODUCTS) == 3 * 2 * 8 * 1024**2
    assert sum(kernel.flops * kernel.times for kernel in found if kernel.kind == ATTENTION) == 4 * 8 * 8 * 1024
    slow_products = seconds_by_kind(found, flops=1.0, bandwidth=1e30, speedup=2)
    assert slow_products[PRODUCTS] == pytest.approx(3 * 2 * 8 * 1024**2)
    slow_memory = seconds_by_kind(found, flops=1e30, bandwidth=1.0, speedup=2)
    assert slow_memory[COPIED] == 3 * (2 * KERNEL + 4)


def test_loops_without_a_count_are_refused():
    with pytest.raises(ValueError, match="how often a loop runs"):
        kernels(HLO.replace("known_trip_count", "unknown"))


def test_the_full_size_step_compiles_for_an_h100(tmp_path):
    """FLUX.1-dev at 512²: cuDNN attends in every layer, and only what is sliced is copied, also of int8."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("the GPU compiler is not installed: pip install '.[gpu-aot]'")
    out = tmp_path / "table.json"
    what = (
        "--only h100x1 --model flux-dev --side 512 --work sweep --numbers bf16 --numbers int8 --attention cudnn "
        "--products cublas"
    )
    command = [sys.executable, BENCHMARKS / "gpu_aot.py", *what.split(), "--out", out]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    row, in_eight_bits = json.loads(out.read_text())["rows"]
    assert row["fits"] and row["attention_kernels"] == 19 + 38 and row["temporaries"] < 0.3e9 and not row["sent"]
    # Every weight is read once, modulation (6.5 GB) in place; the others' slices are copied: a read and a write.
    assert row["bytes"][WEIGHTS] == pytest.approx(23.8e9, rel=0.01)
    assert row["bytes"][COPIED] == pytest.approx(2 * (23.8e9 - 6.5e9), rel=0.02)
    # Queries and keys are read twice and written once.
    assert row["bytes"][ELEMENTWISE] + row["bytes"][CONCATENATION] < 17e9
    # Kernels of int8 are widened as they are copied; no pass over the stream is added.
    assert in_eight_bits["bytes"][ELEMENTWISE] == pytest.approx(row["bytes"][ELEMENTWISE], rel=0.01)
    assert sum(in_eight_bits["seconds"].values()) < 1.01 * sum(row["seconds"].values())
    assert "| h100x1 | flux-dev | 512 | sweep |" in out.with_suffix(".md").read_text()
