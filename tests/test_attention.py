"""Every attention kernel agrees with XLA's, in its own numbers, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative

from sflow_jax.catalogue import find_info
from sflow_jax.machine.meshes import batch_sharding, make_mesh
from sflow_jax.models.attention import (
    block_size,
    choose_kernel,
    extended_attention,
    joint_attention,
    self_attention,
    xla_attention,
)
from sflow_jax.models.flux1 import Unturned, injected_and_rotated, normed_and_rotated, rotated_and_normed
from sflow_jax.models.interventions import inject_source, joint_share
from sflow_jax.models.layers import RMSNorm
from sflow_jax.planning.lowering import lower_step
from sflow_jax.settings import Placement


def random(tokens: int, *, batch: int = 2, heads: int = 2, width: int = 128, dtype=jnp.float32) -> list[jax.Array]:
    """Queries, keys and values whose scores spread over several units."""
    drawn = np.random.default_rng(tokens).standard_normal((3, batch, tokens, heads, width), np.float32)
    return list(jnp.asarray(2 * drawn, dtype))


@pytest.mark.parametrize(
    "tokens, width, dtype, most",
    [
        (256, 128, "float32", 2e-6),
        (300, 128, "float32", 2e-6),
        (130, 24, "float32", 2e-6),
        (300, 64, "bfloat16", 8e-3),
    ],
)
def test_splash_attention_agrees_with_xla(tokens, width, dtype, most):
    """Also where tokens or heads must be padded; the kernel is interpreted."""
    given = random(tokens, width=width, dtype=dtype)
    exact = xla_attention(*(x.astype(jnp.float32) for x in given))
    made = joint_attention(*given, kernel="splash")
    assert made.dtype == dtype
    assert relative(made.astype(jnp.float32), exact) <= most


def test_splash_attention_is_split_over_a_mesh():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    given, sharding = random(256, batch=4), batch_sharding(mesh, 4)
    made = jax.jit(lambda *x: joint_attention(*x, kernel="splash", sharding=sharding))(*given)
    assert {shard.data.shape for shard in made.addressable_shards} == {(1, 256, 1, 128)}
    assert relative(made, xla_attention(*given)) <= 2e-6


def test_splash_attention_keeps_to_the_text_and_image_of_its_own_row():
    query, key, value = random(300)
    other = value.at[1].add(100.0)
    ours, theirs = (joint_attention(query, key, x, kernel="splash") for x in (value, other))
    assert np.array_equal(ours[0], theirs[0]) and not np.allclose(ours[1], theirs[1])


@pytest.mark.parametrize(
    "tokens, width, dtype, most",
    [(256, 128, "float32", 2e-6), (521, 24, "float32", 2e-6), (300, 64, "bfloat16", 8e-3)],
)
def test_blocks_agree_with_xla(tokens, width, dtype, most):
    """Also where the last block is not full."""
    drawn = random(tokens, width=width, heads=3, dtype=dtype)
    exact = xla_attention(*(x.astype(jnp.float32) for x in drawn))
    mixed = joint_attention(*drawn, kernel="blocks")
    assert mixed.dtype == dtype
    assert relative(mixed.astype(jnp.float32), exact) <= most


def test_blocks_are_what_cpus_get_and_their_memory_is_linear():
    """Scores of 2 × 2 heads of 2,048 tokens are 64 MiB."""
    drawn = random(2048, width=8)
    plain, blocks = (
        jax.jit(lambda *x, kernel=kernel: joint_attention(*x, kernel=kernel)).lower(*drawn).compile()
        for kernel in ("xla", "auto")
    )
    assert plain.memory_analysis().temp_size_in_bytes >= 2**26 > 8 * blocks.memory_analysis().temp_size_in_bytes
    assert relative(blocks(*drawn), plain(*drawn)) <= 2e-6


def test_blocks_have_the_gradient_of_xla():
    drawn = random(200, width=8, batch=1)
    ours, theirs = (
        jax.grad(lambda *x, kernel=kernel: (joint_attention(*x, kernel=kernel) ** 2).sum(), argnums=(0, 1, 2))(
            *drawn
        )
        for kernel in ("blocks", "xla")
    )
    assert max(relative(*pair) for pair in zip(ours, theirs)) <= 1e-5


def test_blocks_of_a_mesh_stay_on_their_devices():
    drawn, sharding = random(256, batch=4), batch_sharding(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), 4)
    attend = jax.jit(lambda *x: joint_attention(*x, sharding=sharding), in_shardings=sharding)
    mixed = attend(*drawn)
    assert {shard.data.shape for shard in mixed.addressable_shards} == {(1, 256, 1, 128)}
    assert relative(mixed, xla_attention(*drawn)) <= 2e-6


@pytest.mark.parametrize("tokens, bias, scale", [(100, False, None), (197, False, None), (300, True, 1.0)])
def test_other_networks_attend_as_jax_does(tokens, bias, scale):
    """Short sequences and long ones, with T5's bias and without."""
    drawn = [x / 4 for x in random(tokens, width=8)]
    added = (
        jnp.asarray(np.random.default_rng(1).standard_normal((2, tokens, tokens)), jnp.float32) if bias else None
    )
    expected = jax.nn.dot_product_attention(*drawn, bias=None if added is None else added[None], scale=scale)
    assert (
        relative(jax.jit(self_attention, static_argnames="scale")(*drawn, bias=added, scale=scale), expected)
        <= 2e-6
    )


def test_other_networks_gather_nothing_on_a_mesh():
    """Batch and heads may be split, which attention here does not know."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor", None))
    drawn = random(256, width=8)
    attend = jax.jit(self_attention, in_shardings=place, out_shardings=place)
    compiled = attend.lower(*drawn).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    assert relative(compiled(*jax.device_put(drawn, place)), xla_attention(*drawn)) <= 2e-6


@pytest.mark.parametrize(
    "tokens, block", [(4608, 768), (4352, 896), (1536, 768), (1280, 640), (300, 384), (16384 + 512, 896)]
)
def test_blocks_fit_the_sequence(tokens, block):
    assert block_size(tokens) == block and block % 128 == 0


@pytest.mark.parametrize(
    "device, tokens, width, dtype, kernel",
    [
        ("cpu", 4608, 128, "float32", "blocks"),
        ("cpu", 4608, 128, "bfloat16", "blocks"),
        ("cpu", 100, 128, "float32", "xla"),
        ("gpu", 4608, 128, "bfloat16", "cudnn"),
        ("gpu", 4608, 128, "float32", "xla"),
        ("gpu", 4608, 256, "bfloat16", "xla"),
        ("tpu", 4608, 128, "bfloat16", "splash"),
        ("tpu", 4608, 128, "float32", "splash"),
        ("tpu", 100, 128, "bfloat16", "xla"),
    ],
)
def test_the_kernel_follows_the_platform(device, tokens, width, dtype, kernel):
    assert choose_kernel(device, tokens, width, jnp.dtype(dtype)) == kernel


@pytest.fixture
def cudnn(monkeypatch):
    """What jax asks of a machine before it lowers cuDNN's attention."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)


def calls(text: str) -> list[str]:
    return [line for line in text.splitlines() if "cudnn" in line and "custom_call" in line]


def test_cudnn_lowers_for_gpus_on_a_mesh(cudnn):
    """Without a GPU: every device calls cuDNN's flash attention on its own heads and groups."""
    sharding = batch_sharding(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), 4)
    traced = jax.jit(lambda *x: joint_attention(*x, kernel="cudnn", sharding=sharding)).trace(
        *random(512, batch=4, dtype=jnp.bfloat16)
    )
    called = calls(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert len(called) == 1 and "tensor<1x512x1x128xbf16>" in called[0], called


@pytest.mark.parametrize("offload", [False, True])
def test_the_full_size_step_lowers_for_gpus(offload, cudnn):
    """FLUX.1-dev, source and edit at 1024²: cuDNN's attention once in each loop over blocks."""
    info, words = find_info("flux-dev")
    placement = Placement(dtype="bfloat16", attention="cudnn", offload=offload)
    lowered = lower_step(info, placement, info.canvas(), groups=1, members=2, words=words, platforms=("cuda",))
    text = lowered.as_text()
    assert len(calls(text)) == 2 and text.count("stablehlo.while") >= 2
    assert ("pinned_host" in text) == offload


@pytest.mark.parametrize(
    "kernel, dtype, message",
    [
        ("flash", "bfloat16", "unknown attention 'flash'; choose one of auto, xla"),
        ("cudnn", "float32", "16-bit"),
    ],
)
def test_bad_kernels_are_refused(kernel, dtype, message):
    with pytest.raises(ValueError, match=message):
        joint_attention(*random(128, dtype=dtype), kernel=kernel)


def beside(weight: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Extended attention, and softmax over all keys with the weight's logarithm added to the source's scores."""
    query, key, value = random(13, width=24)
    source_key, source_value = (jnp.asarray(x[:, :7]) for x in random(9, width=24)[1:])
    ours = extended_attention(query, key, value, source_key, source_value, jnp.asarray(weight))
    keys, values = (jnp.concatenate(pair, axis=1) for pair in ((key, source_key), (value, source_value)))
    scores = jnp.einsum("blhk,bmhk->bhlm", query, keys) / np.sqrt(24)
    with np.errstate(divide="ignore"):
        added = np.where(np.arange(20) < 13, 0.0, np.log(weight)[..., None])
    weights = jax.nn.softmax(scores + jnp.asarray(added, jnp.float32)[:, None], axis=-1)
    return ours, jnp.einsum("bhlm,bmhk->blhk", weights, values)


@pytest.mark.parametrize("weight", [0.0, np.exp(-2), 1.0, 3.0])
def test_extended_attention_is_a_softmax_over_all_keys(weight):
    ours, theirs = beside(np.full((2, 13), weight, np.float32))
    assert relative(ours, theirs) < 2e-6


def test_extended_attention_has_a_weight_a_query():
    ours, theirs = beside(np.random.default_rng(0).uniform(size=(2, 13)).astype(np.float32))
    assert relative(ours, theirs) < 2e-6


def test_sources_that_do_not_count_are_not_seen_however_large_their_scores():
    query, key, value = random(13, width=24)
    ours = extended_attention(query, key, value, 1e4 * key, value, jnp.zeros((2, 13)))
    assert relative(ours, xla_attention(query, key, value)) < 2e-6


def unturned(dtype: str) -> Unturned:
    """Two groups of three, three text and six image tokens."""
    random = np.random.default_rng(0)
    norm, angles = RMSNorm(8, 1e-6), jnp.asarray(random.uniform(-9, 9, (9, 4)), jnp.float32)
    norm.scale[...] = jnp.asarray(random.uniform(0.5, 2, 8), dtype)
    return Unturned(jnp.asarray(random.standard_normal((6, 9, 3, 8)) * 10, dtype), norm, angles)


@pytest.mark.parametrize("dtype, most", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_gpus_divide_heads_by_their_length_after_the_rotation(dtype, most):
    """The order of NVIDIA GPUs gives the numbers of the other platforms, and is what is lowered for them."""
    heads = unturned(dtype)
    ours, others = rotated_and_normed(heads), jax.jit(normed_and_rotated)(heads)
    assert ours.dtype == others.dtype == dtype
    assert relative(ours.astype(jnp.float32), others.astype(jnp.float32)) <= most
    traced = jax.jit(normed_and_rotated).trace(heads)
    programs = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu", "cpu")}
    assert [name for name, text in programs.items() if text.find("rsqrt") > text.find("concatenate")] == ["cuda"]


@pytest.mark.parametrize("regional", [False, True], ids=["everywhere", "in a region"])
@pytest.mark.parametrize("dtype, most", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_gpus_mix_keys_before_the_rotation(dtype, most, regional):
    """Members take from the source of their own group, image tokens alone, as on the other platforms."""
    random = np.random.default_rng(1)
    strength = jnp.asarray(random.random(6), jnp.float32)
    region = jnp.asarray(random.random((6, 6)), jnp.float32) if regional else None
    heads = unturned(dtype)
    ours = injected_and_rotated(heads, joint_share(strength, region, 3, 6), 3)
    others = inject_source(normed_and_rotated(heads), strength, region, 3, None, 3)
    assert ours.dtype == others.dtype == dtype
    assert relative(ours.astype(jnp.float32), others.astype(jnp.float32)) <= most
