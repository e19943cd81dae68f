"""Edits without a row for their source equal those with one; what is kept of it, where, and for how long."""

import numpy as np
import pytest
from commandline import run as run_command
from conftest import relative

from sflow_jax import SourceBank, StableFlow, read_record
from sflow_jax.editing import bank as banks
from sflow_jax.editing.bank import lent_places
from sflow_jax.editing.methods import METHODS
from sflow_jax.errors import SettingError
from sflow_jax.results import Inversion
from sflow_jax.sampling.control import LayerControl

# What float32 leaves where the same numbers are added up in batches of other sizes.
LIMIT = 1e-5
STEPS, EDITS = 3, ["a dog", "a hat", "snow"]
FAST = {"edits_at_once": 1, "progress": False}
REGION = np.eye(4)


@pytest.fixture(scope="module")
def inversion(flow, photo) -> Inversion:
    """Of a square photo, so that it is painted in the model's own size."""
    return flow.invert(photo.crop((8, 0, 56, 48)), "a cat", steps=STEPS, nudge=1.0, progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {"replay": "none", "guidance": [1.0, 2.0, 3.0, 4.0]},
        {"replay": "residual", "method_options": {"keys": 0.4, "values": 0.7, "until": 0.5}},
        {"method_options": {"solver": "midpoint", "inject_from": 0.3, "inside": 0.5}, "region": REGION},
        {"method_options": {"extended": -1.0}},
    ],
    ids=["free", "shares", "midpoint", "extended"],
)
def test_edits_without_the_sources_row_are_the_same(options, flow, inversion):
    asked = FAST | {"inversion": inversion, "method": "reference"} | options
    with_row, without = (flow.edit("a cat", EDITS, **asked, kv_cache=place) for place in ("off", "device"))
    assert relative(without.latents, with_row.latents) < LIMIT
    assert relative(without.latents[1], without.latents[0]) > 1e-3
    # The first of three batches alone has a row for the source.
    assert without.evaluations == with_row.evaluations * 4 // 6


def test_coupled_paths_take_the_sources_velocities(flow, photo):
    asked = FAST | {"image": photo.crop((8, 0, 56, 48)), "method": "coupled", "steps": 4, "region": REGION}
    with_row, without = (flow.edit("a cat", EDITS, **asked, kv_cache=place) for place in ("off", "host"))
    assert relative(without.latents, with_row.latents) < LIMIT
    assert without.evaluations < with_row.evaluations


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_bank_serves_later_calls_and_compiles_nothing_for_them(place, flow, inversion, compilations):
    bank, asked, seen = SourceBank(place), {"inversion": inversion, "progress": False}, []
    with_row = [flow.edit("a cat", [edit], **asked) for edit in EDITS]
    first = flow.edit("a cat", EDITS[:1], **asked, kv_cache=bank)
    np.testing.assert_array_equal(first.latents, with_row[0].latents)
    flow.edit("a cat", EDITS[1:2], **asked, kv_cache=bank, on_step=lambda *_: None)
    before = compilations()
    third = flow.edit(
        "a cat", EDITS[2:], **asked, kv_cache=bank, guidance=[1.0, 5.0], on_step=lambda _, x: seen.append(x)
    )
    assert compilations() == before
    expected = flow.edit("a cat", EDITS[2:], **asked, guidance=[1.0, 5.0])
    assert relative(third.latents, expected.latents) < LIMIT
    assert (third.evaluations, expected.evaluations) == (STEPS, 2 * STEPS)
    # Whoever sees every step sees the source as well.
    assert [x.shape[0] for x in seen] == [2] * STEPS
    assert third.settings.kv_cache == place


def test_what_changes_the_source_fills_a_bank_anew(flow, inversion):
    bank, asked = SourceBank("device"), {"inversion": inversion, "progress": False, "steps": STEPS}
    changes = {}, {"layers": (0, 2)}, {"guidance": [2.0, 3.0]}, {"replay": "residual"}, {"inversion": None}
    for change in changes:
        found = flow.edit("a cat", EDITS[:1], **asked | change, kv_cache=bank)
        # Every step has seen the source, as without a bank.
        assert found.evaluations == 2 * STEPS
        np.testing.assert_array_equal(found.latents, flow.edit("a cat", EDITS[:1], **asked | change).latents)


def test_a_mesh_keeps_its_parts(wide_checkpoint, photo):
    """Of an inversion; those of a first batch are kept by two processes in test_distributed.py."""
    flow = StableFlow.load(wide_checkpoint, mesh="fsdp=2,tensor=4")
    options = {"image": photo, "method": METHODS["directedit"].changed(until=1.0)}
    with_row, without = (
        flow.edit("a cat", EDITS[:2], steps=2, layers=(0, 2), **options, **FAST, kv_cache=place)
        for place in ("off", "host")
    )
    assert relative(without.latents, with_row.latents) < LIMIT
    assert without.evaluations < with_row.evaluations


def test_places_are_those_of_what_is_taken():
    control = LayerControl.none(2, 1, 5)
    assert lent_places(control, 2).shape == (0, 2)
    values = control.injecting([1, 3], keys=0.0)
    # Layer 1 has an attention of the image's own as well.
    np.testing.assert_array_equal(lent_places(values, 2), [[1, 1], [1, 3], [3, 1]])
    np.testing.assert_array_equal(lent_places(control.extending([4], 0.5), 0), [[4, 0], [4, 1]])
    joint = control.injecting([1], attentions="image")
    np.testing.assert_array_equal(lent_places(joint, 2), [[1, 2], [1, 3]])


def test_without_room_there_is_an_error_or_the_row(flow, inversion, monkeypatch):
    monkeypatch.setattr(banks, "free_bytes", lambda place: 10_000)
    asked = FAST | {"inversion": inversion}
    with pytest.raises(SettingError, match=r"kv_cache.? device needs 0.0 GiB"):
        flow.edit("a cat", EDITS, **asked, kv_cache="device")
    automatic, off = (flow.edit("a cat", EDITS, **asked, kv_cache=place) for place in ("auto", "off"))
    np.testing.assert_array_equal(automatic.latents, off.latents)
    assert automatic.evaluations == off.evaluations


@pytest.mark.parametrize("wrong", ["gpu", 3, None])
def test_unknown_places_are_refused(wrong, flow, inversion):
    with pytest.raises(SettingError, match="kv_cache"):
        flow.edit("a cat", EDITS, inversion=inversion, **FAST, kv_cache=wrong)
    with pytest.raises(SettingError, match="kv_cache"):
        SourceBank("off")


def test_the_command_line_records_it(checkpoint, tmp_path):
    prompts = ("-p", "a cat", "-e", "a dog", "-e", "snow", "--steps", 2)
    options = ("--edits-at-once", 1, "--kv-cache", "device", "-o", tmp_path / "out")
    assert run_command("edit", "-m", checkpoint, *prompts, *options) == 0
    record = read_record(tmp_path / "out" / "edit.json")
    assert (record["kv_cache"], record["evaluations"]) == ("device", 6)


EXACT = {"method": "directedit", "steps": STEPS}


@pytest.mark.parametrize(
    "options",
    [{}, {"method_options": {"until": 1.0, "keys": 0.5}, "region": REGION}, {"method": "dnaedit"}],
    ids=["directedit", "shares and a region", "dnaedit"],
)
def test_exact_replay_needs_no_row_for_the_source(options, flow, photo):
    asked = FAST | EXACT | {"image": photo.crop((8, 0, 56, 48)), "edits_at_once": 2} | options
    with_row, without = (flow.edit("a cat", EDITS[:2], **asked, kv_cache=place) for place in ("off", "auto"))
    assert relative(without.latents, with_row.latents) < LIMIT
    assert relative(without.latents[1], without.latents[0]) > 1e-3
    steps = with_row.method.steps - with_row.method.left_out
    assert without.evaluations == with_row.evaluations - steps
    # The record says what was computed, so that it is computed again.
    assert (with_row.settings.kv_cache, without.settings.kv_cache) == ("off", "device")


def test_an_inversion_keeps_its_row_for_edits_by_its_method(flow, photo, tmp_path):
    asked = {"steps": STEPS, "progress": False, "method": METHODS["directedit"].changed(until=1.0)}
    inversion = flow.invert(photo.crop((8, 0, 56, 48)), "a cat", **asked)
    expected, found = (
        flow.edit("a cat", EDITS[:1], **asked, inversion=inversion, kv_cache=k) for k in ("off", "auto")
    )
    assert relative(found.latents, expected.latents) < LIMIT
    assert (found.evaluations, expected.evaluations) == (STEPS, 2 * STEPS)
    # Other edits of it have the row.
    for change in ({"replay": "aligned"}, {"layers": (0,)}, {"guidance": [2.0, 2.0]}):
        other = flow.edit("a cat", EDITS[:1], **asked | change, inversion=inversion)
        assert (other.evaluations, other.settings.kv_cache) == (2 * STEPS, "off")
    # What waits in memory is no part of what is stored, and may be unwanted.
    inversion.save(tmp_path)
    assert Inversion.load(tmp_path).bank is None
    assert flow.invert(photo, "a cat", **asked, kv_cache="off").bank is None
    assert flow.invert(photo, "a cat", steps=STEPS, progress=False).bank is None


def test_three_batches_are_worth_a_bank(flow, inversion):
    asked = FAST | {"inversion": inversion}
    two, three = (flow.edit("a cat", EDITS[:count], **asked) for count in (2, 3))
    assert (two.evaluations, three.evaluations) == (4 * STEPS, 4 * STEPS)
    assert (two.settings.kv_cache, three.settings.kv_cache) == ("off", "device")
