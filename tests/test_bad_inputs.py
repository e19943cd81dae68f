"""A seeded part of `benchmarks/hardness.py`, and what that benchmark calls handled well."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import CACHE

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from hardness.cases import ACCEPT, EITHER, REFUSE, Case  # noqa: E402
from hardness.judge import judge  # noqa: E402
from hardness.profiles import as_srgb, encode_srgb  # noqa: E402
from hardness.runner import Ended  # noqa: E402

SHARE, SEED = "0.03", "1"


def test_a_part_of_all_bad_inputs_is_handled_well(source_folder, checkpoint, tmp_path):
    shutil.copytree(source_folder, tmp_path / "world" / "source")
    shutil.copytree(checkpoint, tmp_path / "world" / "converted")
    command = [sys.executable, str(BENCHMARKS / "hardness.py"), "--quick", "--share", SHARE, "--seed", SEED]
    command += ["--list-failures", "--world", str(tmp_path / "world")]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XDG_CACHE_HOME": str(CACHE)})
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert "| all |" in ended.stdout


def test_there_are_many_cases_of_every_kind_and_a_seed_always_has_the_same():
    command = [sys.executable, str(BENCHMARKS / "hardness.py"), "--list", "--seed", "3"]
    first, again = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == again
    categories = Counter(line.split(": ")[0] for line in first.splitlines())
    assert categories.total() >= 600 and len(categories) > 15 and min(categories.values()) >= 5


def ended(code: int, errors: str = "", changed: tuple[str, ...] = (), stopped: str = "", fault: str | None = None):
    return Ended((code,), "", errors, fault, stopped, changed, 1.0, 0)


WELL = "Error: --steps must be at least 1, found 0\n"


@pytest.mark.parametrize(
    "expects, what, verdict",
    [
        (REFUSE, ended(2, WELL), "handled"),
        (EITHER, ended(2, WELL), "handled"),
        (ACCEPT, ended(2, WELL), "refused"),
        (ACCEPT, ended(0, changed=("+ work/out", "+ work/out/picture-1.png")), "handled"),
        (REFUSE, ended(0), "silent"),
        (EITHER, ended(0, fault="the picture is all 0"), "silent"),
        (REFUSE, ended(1, "Traceback (most recent call last):\n  …\nKeyError: 1\n"), "traceback"),
        (REFUSE, ended(2, "a line\n" + WELL), "unclear"),
        (REFUSE, ended(2, "Error: something is wrong\n"), "unclear"),
        (REFUSE, ended(2, "Error: --steps " + "x" * 400 + "\n"), "unclear"),
        (REFUSE, ended(2, "Error: --steps \x1b[31m\n"), "unclear"),
        (REFUSE, ended(2, "checking:  50%|█████     | 1/2 [00:00<00:00]\r" + WELL), "handled"),
        (REFUSE, ended(2, "converting: 1,024 of 2,048, 31 s\n" + WELL), "handled"),
        (REFUSE, ended(2, WELL, changed=("+ work/out",)), "left over"),
        (ACCEPT, ended(0, changed=("+ work/out", "+ work/out/.x.partial")), "left over"),
        (ACCEPT, ended(0, changed=("~ work/photo.png",)), "left over"),
        (REFUSE, ended(-1, stopped="time"), "endless"),
        (REFUSE, ended(-1, stopped="signal 7"), "traceback"),
    ],
)
def test_what_counts_as_handled_well(expects, what, verdict):
    case = Case("x", "settings", (("sflow",),), expects, names=("steps",))
    assert judge(case, what)[0] == verdict


def test_right_colours_are_computed_without_a_colour_library():
    greys = np.repeat(np.arange(256.0)[:, None, None], 3, axis=-1)
    # Greys are grey in every space of white D65 with sRGB's curve.
    np.testing.assert_allclose(as_srgb(greys, "Display P3"), greys, atol=1)
    # Display P3's pure red lies outside of sRGB, and is cut at its edge.
    assert as_srgb(np.array([[[255.0, 0, 0]]]), "Display P3").tolist() == [[[255, 0, 0]]]
    assert encode_srgb(np.array([0.0, 0.2140, 1.0])).tolist() == [0, 127, 255]
