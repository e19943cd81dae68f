"""The report and the comparison: they need only their folder, say what was found, are whole or not there."""

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from etils import epath

from sflow_jax.reports.pages import number, percent
from sflow_jax.vitality.charts import to_inline_svg, to_png, to_svg, vitality_chart, windows_chart
from sflow_jax.vitality.comparison import compare, compare_all, write_comparison
from sflow_jax.vitality.pictures import Comparison, KeptFiles
from sflow_jax.vitality.report import write_report_files
from sflow_jax.vitality.scores import MEASURES, Rule, Variant
from sflow_jax.vitality.summary import Summary, Table, summarise

PROMPTS, LAYERS, DOUBLES, STEPS = 7, 5, 2, 4
EVIL = "<script>alert('x')</script> & \"a cat\""
# Mean distances: layers 0 and 3 stand out.
DISTANCES = (0.6, 0.05, 0.1, 0.4, 0.02)
FILES = {"report.html", "scores.json", "scores.csv", "vitality.png", "vitality.svg"}
AUTO = Rule()
# Tags that have no end.
VOID = {"meta", "img", "input"}


def made(*, extras=True, rule=AUTO, distances=DISTANCES, seed=0, **settings) -> Summary:
    """A sweep of five layers, by default with two windows of steps and a pair."""
    variants, means = [Variant((layer,), 0, STEPS) for layer in range(LAYERS)], [*distances]
    if extras:
        variants += [Variant((layer,), first, first + 2) for layer in range(LAYERS) for first in (0, 2)]
        variants.append(Variant((0, 3), 0, STEPS))
        means += [0.1] * (2 * LAYERS) + [0.9]
    noise = np.random.default_rng(seed).uniform(-0.01, 0.01, (PROMPTS, len(variants)))
    similarities = 1 - np.array([means]).repeat(PROMPTS, axis=0) - noise
    values = {name: similarities * (30 if name == "psnr" else 1) for name in MEASURES}
    told = {
        "model": "a/tiny-dev",
        "layer_kinds": [["double", DOUBLES], ["single", LAYERS - DOUBLES]],
        "steps": STEPS,
        "prompts": [EVIL] * 13,
    } | settings
    return summarise(Table(tuple(variants), values), told, rule)


def kept(size=16, layers=range(LAYERS)) -> Comparison:
    """Grey pictures of one prompt."""
    grey = np.full((size, size + 2, 3), 128, np.uint8)
    return Comparison(EVIL, 3, grey, {layer: grey + np.uint8(layer) for layer in layers})


# The fourth is one too many to be shown.
PICTURES = [kept(), kept(size=200, layers=(0, 4)), kept(), kept()]


class Page(HTMLParser):
    """Tags, attributes and text of a page; tags must nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def kept_file(number: int) -> KeptFiles:
    """As a run's folder names them; layer 2 was not kept."""
    files = {layer: f"pictures/{number}-{layer}.jpg" for layer in (0, 1, 3, 4)}
    return KeptFiles(number, EVIL, number, f"pictures/{number}.jpg", files)


def assert_self_contained(text: str, folder=None) -> None:
    """Nothing is fetched; links lead to files of the folder, if there is one."""
    page = Page(text)
    assert not {"link", "iframe", "object", "base"} & {*page.tags}
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            beside = folder is not None and (folder / value).is_file()
            assert beside or value.startswith(("data:image/", "#")), value[:80]
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert {address for address in re.findall(r"https?://[^\"'\s<]+", text)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report with everything in it: folder, summary, text of the page."""
    folder, summary = tmp_path_factory.mktemp("runs") / "run", made(note=EVIL)
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    costs = {"generations": 41, "seconds": 1.25, "device": EVIL}
    write_report_files(folder, summary, PICTURES, costs)
    return folder, summary, (folder / "report.html").read_text()


def test_the_report_is_one_file_that_needs_nothing_else(full):
    folder, _, text = full
    assert {file.name for file in folder.iterdir()} == FILES | {"manifest.json"}
    assert_self_contained(text, folder)
    assert (folder / "vitality.png").read_bytes().startswith(b"\x89PNG")


def test_strings_are_escaped(full):
    _, _, text = full
    assert text.count("<script>") == 1  # our own
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp;" in text
    # In the pictures' prompts (three are shown), a row a prompt, thirteen times in the settings, a note, the costs.
    assert Page(text).text.count(EVIL) == 3 + PROMPTS + 13 + 1 + 1


def test_the_report_says_what_was_found(full):
    folder, summary, text = full
    page = Page(text)
    assert "Vital layers of tiny-dev" in page.text
    assert "Layers 0, 3 are vital" in page.text
    assert "100 % of 2000 resamples" in page.text
    # Layers twice (the windows' table), prompts, one pair, each with a header.
    assert page.tags.count("tr") == 2 * (1 + LAYERS) + 1 + PROMPTS + 2
    rows = re.findall(r"<tr.*?</tr>", text[text.index("<h2>Layers") : text.index("<h2>Prompts")], re.DOTALL)
    for score in summary.layers:
        (row,) = [x for x in rows if f'<th scope="row" class="number">{score.layers[0]}</th>' in x]
        told = Page(row).text.split()
        assert told[1] == ("double" if score.layers[0] < DOUBLES else "single")
        assert told[3:6] == [f"{value:.3f}" for value in (score.vitality, score.low, score.high)]
        assert ('class="vital"' in row) == (score.layers[0] in (0, 3))
    assert number(summary.pairs[0].interaction, signed=True) in page.text
    assert "seconds 1.25" in page.text
    assert Summary.from_json((folder / "scores.json").read_text()).choice == summary.choice
    assert (folder / "scores.csv").read_text() == summary.to_csv()


def test_the_most_and_the_least_vital_layers_are_shown(full):
    _, _, text = full
    shown = re.findall(r"layer (\d) <span>", text)
    # All five layers of a prompt, most vital first and then least vital first; then the prompt with two pictures.
    assert shown == ["0", "3", "2", "4", "1", "0", "4", "0", "3", "2", "4", "1"]
    assert text.count("data:image/png") == 2 * (1 + LAYERS) and text.count("data:image/jpeg") == 3


def test_the_same_report_has_the_same_bytes(full, tmp_path):
    folder, summary, _ = full
    costs = {"generations": 41, "seconds": 1.25, "device": EVIL}
    write_report_files(tmp_path / "again", summary, PICTURES, costs)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_sweep_without_pictures_windows_or_pairs(tmp_path):
    write_report_files(tmp_path, made(extras=False), [], {})
    text = (tmp_path / "report.html").read_text()
    assert_self_contained(text, tmp_path)
    assert Page(text).tags.count("svg") == 1
    assert not {"img", "Costs", "Pairs"} & {*Page(text).tags, *Page(text).words}


def test_what_is_not_known_is_a_dash(tmp_path):
    summary = made(extras=False)
    unknown = dataclasses.replace(
        summary.layers[1], prompts=0, **dict.fromkeys(("vitality", "low", "high", *MEASURES[1:]), float("nan"))
    )
    summary = dataclasses.replace(summary, layers=(summary.layers[0], unknown, *summary.layers[2:]), halves=None)
    # As it comes back from a file.
    summary = Summary.from_json(summary.to_json())
    write_report_files(tmp_path, summary, [kept()], {})
    text = (tmp_path / "report.html").read_text()
    assert not {"nan", "NaN"} & {*Page(text).words} and 'data-value="nan"' not in text
    assert text.count('data-value="">–<') == 3 + len(MEASURES[1:])
    assert "0 to 7 prompts" in Page(text).text
    assert "layer 1 <span>" not in text
    assert "two halves" not in text


def test_a_measure_that_nobody_took_is_left_out(tmp_path):
    run = made(extras=False)
    layers = tuple(dataclasses.replace(score, clip=float("nan")) for score in run.layers)
    correlations = run.rank_correlations | {"clip": float("nan")}
    write_report_files(tmp_path, dataclasses.replace(run, layers=layers, rank_correlations=correlations), [], {})
    page = Page((tmp_path / "report.html").read_text())
    assert "CLIP" not in page.text and "PSNR (dB) and SSIM compare" in page.text
    # Of layers; then of prompts: text, two vital layers, the others.
    assert page.tags.count("td") == LAYERS * 8 + PROMPTS * 4


def test_no_layer_or_every_layer_may_be_vital(tmp_path):
    for rule, said in (
        (Rule("threshold", 2.0), "No layer is vital"),
        (Rule("threshold", 0.0), "Layers 0, 1, 2, 3, 4 are"),
        (Rule("top", 1), "Layer 0 is vital: chosen by rank, the first 1"),
    ):
        write_report_files(tmp_path, made(rule=rule), [], {})
        text = (tmp_path / "report.html").read_text()
        assert said in Page(text).text
        assert (
            ("dashed line" in text)
            == ("boundary" in (tmp_path / "vitality.svg").read_text())
            == (rule.kind == "top")
        )


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_half_written_when_the_disk_is_full(name, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write_report_files(folder, made(extras=False), [], {})
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    summary = made(seed=1)
    write = epath.Path.write_bytes

    def full_disk(path, data):
        if name in path.name:
            write(path, data[: len(data) // 2])
            raise OSError("no space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(folder)), "write_bytes", full_disk, raising=False)
        with pytest.raises(OSError, match="no space"):
            write_report_files(folder, summary, [kept()], {})
    left = {file.name: file.read_bytes() for file in folder.iterdir()}
    write_report_files(folder, summary, [kept()], {})
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert left.keys() == FILES and left[name] == before[name]
    assert all(left[file] in (before[file], after[file]) for file in FILES)


def test_a_comparison_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def full_disk(path, data):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", full_disk, raising=False)
    with pytest.raises(OSError, match="no space"):
        write_comparison(tmp_path / "made", compare(made(), made()))
    assert not any(tmp_path.iterdir())


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(ValueError, match="is a file"):
        write_report_files(tmp_path / "run", made(), [], {})
    with pytest.raises(ValueError, match="is a file"):
        write_comparison(tmp_path / "run", compare(made(), made()))


def test_charts_are_the_same_every_time_and_keep_text_as_text():
    for chart in (vitality_chart, windows_chart):
        one, other = chart(made()), chart(made())
        assert to_png(one) == to_png(other) and to_svg(one) == to_svg(other)
        assert "layer bypassed</text>" in to_svg(one)
        assert not re.search(r"<dc:date|\b20\d\d-\d\d-\d\d", to_svg(one))
    inline = to_inline_svg(vitality_chart(made()))
    words = f"layer 3: vitality {made().vitality[3]:.3f}, from "
    assert inline.count("<g><title>layer") == LAYERS and f"<g><title>{words}" in inline
    assert inline.startswith("<svg") and "var(--chart-kind-1, " in inline
    cells = re.findall(
        r"<title>layer (\d+): (steps? [\d–]+), (vitality [\d.]+|not measured)</title>",
        to_inline_svg(windows_chart(made())),
    )
    assert (
        len(cells)
        == len(set(cells))
        == len({cell[0] for cell in cells}) * len({cell[1] for cell in cells})
        > LAYERS
    )
    with pytest.raises(ValueError, match="no windows"):
        windows_chart(made(extras=False))


def test_charts_leave_the_settings_of_others_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    to_png(vitality_chart(made()))
    assert dict(matplotlib.rcParams) == before


def test_numbers_are_never_rounded_to_certainty():
    assert [percent(share) for share in (0.0, 0.0005, 0.5, 0.9995, 1.0)] == [
        "0\u00a0%",
        "<\u00a01\u00a0%",
        "50\u00a0%",
        ">\u00a099\u00a0%",
        "100\u00a0%",
    ]
    assert [number(x) for x in (float("nan"), float("inf"), -0.5)] == ["–", "∞", "−0.500"]
    assert number(0.25, 2, signed=True) == "+0.25"


def test_two_runs_compared(tmp_path):
    first = made(steps=STEPS, seeds=(0, 1))
    # Layer 2 instead of 3, and the rest in the same order: one swap of neighbours in rank.
    second = made(distances=(0.6, 0.05, 0.4, 0.1, 0.02), seeds=[0, 1], guidance=2.0, prompts=[EVIL] * 20)
    comparison = compare(first, second, (EVIL, "after"))
    assert comparison.layers == tuple(range(LAYERS))
    # Spearman: 1 − 6 Σ d² / (n (n² − 1)).
    assert comparison.rank_correlation == pytest.approx(1 - 6 * 2 / (LAYERS * (LAYERS**2 - 1)))
    assert comparison.agreement == pytest.approx(1 / 3)
    assert (comparison.both, comparison.only) == ((0,), ((3,), (2,)))
    assert {*comparison.settings} == {"guidance", "prompts"}
    assert comparison.settings["guidance"] == ("not told", 2.0)
    for words in (
        "rank correlation 0.900",
        "agree 0.33",
        f"Vital in {EVIL} only: 3",
        "prompts: 13 entries → 20 entries",
    ):
        assert words in str(comparison)
    write_comparison(tmp_path / "made", comparison)
    text = (tmp_path / "made" / "comparison.html").read_text()
    assert_self_contained(text, tmp_path / "made")
    assert text.count("<script>") == 1 and EVIL in Page(text).text
    assert "Rank correlation 0.900" in Page(text).text and text.count('<tr class="vital">') == 2
    write_comparison(tmp_path / "page.html", comparison)
    assert {file.name for file in tmp_path.iterdir()} == {"made", "page.html", "page.json", "page.png"}
    for suffix in ("json", "png"):
        again, before = tmp_path / f"page.{suffix}", tmp_path / "made" / f"comparison.{suffix}"
        assert again.read_bytes() == before.read_bytes()
    page = (tmp_path / "page.html").read_text()
    assert page.replace("page.json", "comparison.json").replace("page.png", "comparison.png") == text


def test_three_runs_compared(tmp_path):
    runs = [made(), made(distances=(0.6, 0.05, 0.4, 0.1, 0.02)), made(guidance=2.0)]
    comparison = compare_all(runs, ("a", "b", EVIL))
    assert [pair.agreement for pair in comparison.pairs.values()] == pytest.approx([1 / 3, 1, 1 / 3])
    assert comparison.vital_in[3] == ("a", EVIL) and comparison.settings == {
        "guidance": ("not told", "not told", 2.0)
    }
    write_comparison(tmp_path, comparison)
    text = (tmp_path / "comparison.html").read_text()
    assert_self_contained(text, tmp_path)
    assert Page(text).tags.count("tr") == 1 + 3 + 1 + 1 + 1 + LAYERS and text.count('<tr class="vital">') == 2
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert told["runs"] == ["a", "b", EVIL] and len(told["pairs"]) == 3
    assert told["layers"][3] == {
        "layer": 3,
        "vitality": [run.vitality[3] for run in runs],
        "vital_in": ["a", EVIL],
    }
    with pytest.raises(ValueError, match="share 0 measured layers"):
        compare_all([*runs, dataclasses.replace(runs[0], layers=())], "abcd")


def test_the_gallery_shows_every_picture_that_was_kept(tmp_path):
    (tmp_path / "pictures").mkdir()
    kept_files = [kept_file(0), kept_file(6)]
    for files in kept_files:
        for name in (files.reference, *files.bypassed.values()):
            (tmp_path / name).write_bytes(b"")
    summary = made()
    write_report_files(tmp_path, summary, [kept()], {}, kept_files)
    text, report = ((tmp_path / name).read_text() for name in ("pictures.html", "report.html"))
    for page in (text, report):
        assert_self_contained(page, tmp_path)
    assert report.count('href="pictures.html"') == 2
    assert text.count('loading="lazy"') == 2 * 5 and text.count('<li class="vital">') == 2 * 2
    assert f"layer 3 {summary.by_prompt[6].vitality[3]:.2f} ({summary.vitality[3]:.2f})" in Page(text).text
    # Its policy allows the two scripts that it has.
    assert text.count("<script>") == 2 == text.count("'sha256-")


def test_scores_of_every_prompt_are_in_the_csv():
    summary = made()
    rows = list(csv.DictReader(io.StringIO(summary.to_csv())))
    assert len([row for row in rows if not row["prompt"]]) == 3 * LAYERS + 1
    for layer in range(LAYERS):
        own = [row for row in rows if row["prompt"] and row["layers"] == str(layer)]
        assert [row["prompt"] for row in own] == list(map(str, range(PROMPTS)))
        assert np.mean([float(row["vitality"]) for row in own]) == pytest.approx(summary.vitality[layer])
        assert {(row["low"], row["vital"]) for row in own} == {("", str(int(layer in (0, 3))))}


def test_a_set_that_few_resamples_choose_looks_unsure(tmp_path):
    sure = made(extras=False)
    membership = (1.0, 0.0, 0.3, 0.7, 0.0)
    choice = dataclasses.replace(sure.choice, confidence=0.4, membership=membership)
    write_report_files(tmp_path, dataclasses.replace(sure, choice=choice), [], {})
    text = (tmp_path / "report.html").read_text()
    assert "Layers 0, 3 may be vital" in Page(text).text and 'class="unsure"' in text
    assert "hatched ones" in text and to_svg(vitality_chart(sure)).count("<pattern") == 0
    assert (tmp_path / "vitality.svg").read_text().count("<pattern") > 0


def test_a_summary_shows_itself():
    summary = made(extras=False)
    assert repr(summary) == "<vital layers 0, 3 of 5 (auto; the same in 100% of resamples)>"
    assert summary._repr_png_() == to_png(summary.plot())
    again = Summary.from_json(json.dumps(summary.to_dict()))
    assert again == summary and len(again.by_prompt) == PROMPTS


def test_a_run_compared_with_itself_agrees():
    comparison = compare(made(), Summary.from_json(json.dumps(json.loads(made().to_json()))))
    assert comparison.rank_correlation == pytest.approx(1) and comparison.agreement == 1
    assert comparison.settings == {} and "differ" not in str(comparison)


def test_runs_that_share_no_layers_cannot_be_compared():
    run = made(extras=False)
    other = dataclasses.replace(
        run, layers=tuple(dataclasses.replace(s, layers=(s.layers[0] + 4,)) for s in run.layers)
    )
    with pytest.raises(ValueError, match="share 1 measured layers") as error:
        compare(run, other)
    assert "\n" not in str(error.value)


def test_scores_of_the_first_version_are_read():
    """They told FLUX.1's two kinds of layers by the number of double blocks."""
    summary = made(extras=False)
    fields = json.loads(summary.to_json())
    del fields["checksum"], fields["settings"]["layer_kinds"]
    fields["settings"] |= {"double_blocks": DOUBLES, "layers": list(range(LAYERS))}
    again = Summary.from_json(json.dumps(fields))
    assert [again.kind_of(i) for i in range(LAYERS)] == [summary.kind_of(i) for i in range(LAYERS)]
