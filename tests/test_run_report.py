"""Saved runs: the page, the text and the data agree with `stats()`, and all strings are escaped."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from models import OPTIONS, compiled, denoise, noise, prompt, tiny_wan

import lite_compile
from lite_compile import Schedule, StepErrors
from lite_compile.decisions import GraphReport, Reason, Report, SiteReport
from lite_compile.html_report import render_html
from lite_compile.in_force import InForce, ThresholdRow
from lite_compile.layer_stats import Stats, StreamStats
from lite_compile.run_record import RunRecord, Setting, collect_record, from_json, read_record, to_json
from lite_compile.run_report import render_text

PROMPTS = [prompt(0), prompt(1)]
NASTY = """<script>alert("x")</script>&'"""


class Page(HTMLParser):
    """Tags, attributes and text of a page; unclosed tags are an error."""

    VOID = ("meta", "br", "line", "rect", "circle", "polyline")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta" and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    lite_compile.clear_report()


def step_errors(word: str) -> StepErrors:
    return StepErrors(word, (0.0, 0.5), ((word, (None, 0.25)),), (0.125, 0.5), word)


def invented(word: str = "attn") -> RunRecord:
    """A record whose every string holds `word`."""
    sites = (
        SiteReport(word, True, None, "", (1, 2, word, 32), (1, 2, word, 32), word, word, ((0, word),), word),
        SiteReport(word, False, Reason.MASK, word, (1, 2), (1, 2), word, "dense"),
    )
    streams = (
        StreamStats(word, 0, 0.5, 3, 1, 6, 0, 64, (1.0, None, 0.5)),
        StreamStats(word, 1, 0.25, 2, 1, 6, 0, 64, (0.75, 0.25)),
    )
    return RunRecord(
        title=word, created=word, environment={word: word}, report=Report((GraphReport(sites, word),)),
        settings=((Setting(word, word, True),),), stats=Stats(streams), state_bytes=128, step_seconds=(0.5, 0.25, 0.25),
        in_force=InForce((ThresholdRow(word, (word,) * 5, word),), ((word, word),), step_errors(word)),
    )  # fmt: skip


def test_page_of_a_run(tmp_path: Path) -> None:
    model = tiny_wan()
    denoise(compiled(model, history=True), noise(0), PROMPTS, 5)
    path = lite_compile.save_report(tmp_path / "run.html", model, step_seconds=[0.5, 0.4, 0.4, 0.4, 0.3])
    html = path.read_text(encoding="utf-8")
    text = Page(html).text
    assert "WanTransformer3DModel" in text
    assert "2 of 4" in text  # attention sites rewritten
    (graph,) = lite_compile.report().graphs
    assert f"Clock: {graph.clock}" in text
    cross = next(site for site in graph.sites if site.reason is Reason.CROSS_ATTENTION)
    assert cross.reason is not None
    assert cross.reason.value in text
    for entry in lite_compile.stats(model).streams:
        for step, density in enumerate(entry.history):
            assert f"{entry.layer}, step {step + 1}: {density:.3f}" in text
    assert "seconds per step" in html
    assert "-6.0" in text  # the threshold, which was changed
    assert torch.__version__ in text


def test_what_was_dropped_is_in_the_page_the_text_and_the_data(tmp_path: Path) -> None:
    model = tiny_wan()
    denoise(compiled(model, probe=True, threshold=-1.0), noise(0), PROMPTS, 4)
    html = lite_compile.save_report(tmp_path / "run.html", model).read_text(encoding="utf-8")
    text = Page(html).text
    streams = lite_compile.stats(model).streams
    for stream in streams:
        assert stream.dropped_mass[0] == (0.0, 0.0)
        for step, dropped in enumerate(stream.dropped_mass):
            assert dropped is not None
            assert f"{stream.layer}, step {step + 1}: {dropped[0]:.2e}" in text
            assert f"{dropped[0]:.1e} ({dropped[1]:.1e})" in text
    assert max(most for s in streams for _, most in filter(None, s.dropped_mass)) > 0
    again = read_record(lite_compile.save_report(tmp_path / "run.json", model))
    assert again.stats.streams == streams
    last = lite_compile.stats(model).dropped_mass(1)[3]
    assert last is not None
    lines = lite_compile.save_report(tmp_path / "run.txt", model).read_text()
    assert re.search(rf"^  4 +\S+ \(\S+\) +{last[0]:.2e} \({last[1]:.2e}\)$", lines, re.MULTILINE)


def test_thresholds_ranges_and_errors_are_those_in_force(tmp_path: Path) -> None:
    model = tiny_wan()
    options = {"must_skip": [], "dense_layers": ["blocks.0.*"], "threshold": Schedule.linear(-9.0, -5.0)}
    call = compiled(model, **options)
    denoise(call, noise(0), PROMPTS, 4)
    known = collect_record(model).in_force
    assert [(row.layer, row.values) for row in known.thresholds] == [
        ("blocks.0.attn1", ("-inf",) * 5), ("blocks.1.attn1", ("-9", "-8", "-7", "-6", "-5")),
    ]  # fmt: skip
    assert [row.given for row in known.thresholds] == ["dense_layers", "Schedule.linear(-9.0, -5.0)"]
    assert known.ranges == (("must_skip", "[]"),)
    assert known.errors is None

    found = lite_compile.calibrate(model, lambda: denoise(call, noise(0), PROMPTS, 4), 0.02, out=tmp_path / "wan.toml")
    lite_compile.set_threshold(model, tmp_path / "wan.toml")
    lite_compile.set_ranges(model, must_skip=[(512, 640)])
    denoise(call, noise(0), PROMPTS, 4)
    record = collect_record(model)
    assert record.in_force.ranges == (("must_skip", "[(512, 640)]"),)
    (_, row) = record.in_force.thresholds
    schedule = dict(found.thresholds.layers)["blocks.1.attn1"]
    assert row.values == tuple(f"{schedule.at(fraction):.4g}" for fraction in (0.0, 0.25, 0.5, 0.75, 1.0))
    assert "wan.toml" in row.given
    errors = record.in_force.errors
    assert errors is not None
    assert [layer for layer, _ in errors.layers] == ["blocks.1.attn1"]  # the other one skips nothing
    assert errors.met == found.met == 1
    assert errors.layers[0][1] == pytest.approx(list(found.errors["blocks.1.attn1"].values()), rel=1e-6)
    text = Page(render_html(record)).text
    assert {"Thresholds", "Error per step", "[(512, 640)]", *row.values} <= set(text)
    for step, error in enumerate(errors.layers[0][1]):
        assert f"blocks.1.attn1, step {step + 1}: {error:.2e}" in text
    assert from_json(to_json(record)) == record
    assert str(errors) in render_text(record)
    assert "must_skip in force: [(512, 640)]" in render_text(record)


def test_errors_that_the_user_measured(tmp_path: Path) -> None:
    model = tiny_wan()
    call = compiled(model, threshold=-2.0)
    errors = lite_compile.measure_errors(model, lambda: denoise(call, noise(0), PROMPTS, 4))
    denoise(call, noise(0), PROMPTS, 4)
    saved = lite_compile.save_report(tmp_path / "run.json", model, errors=errors)
    assert read_record(saved).in_force.errors == errors
    assert (
        "measured in 1 generation" in lite_compile.save_report(tmp_path / "run.html", model, errors=errors).read_text()
    )
    with pytest.raises(TypeError, match=r"errors is 0.5 \(float\); allowed: what measure_errors returns"):
        lite_compile.save_report(tmp_path / "run.json", model, errors=0.5)  # type: ignore[arg-type]


def test_text_and_data_say_the_same(tmp_path: Path) -> None:
    model = tiny_wan()
    denoise(compiled(model, history=True), noise(0), PROMPTS, 4)
    saved = lite_compile.save_report(tmp_path / "run.json", model, title="one run", step_seconds=[1, 2, 3, 4])
    again = read_record(saved)
    now = collect_record(model, title="one run", step_seconds=[1, 2, 3, 4])
    assert replace(again, created="") == replace(now, created="")
    assert from_json(to_json(again)) == again
    text = lite_compile.save_report(tmp_path / "run.txt", model).read_text()
    assert str(lite_compile.report()) in text
    assert str(lite_compile.stats(model)) in text
    assert "threshold=-6.0" in text
    first, last = (lite_compile.stats(model).mean_history(1)[step] for step in (0, 3))
    assert re.search(rf"^  1 +\S+ +{first:.3f}$", text, re.MULTILINE)
    assert re.search(rf"^  4 +\S+ +{last:.3f}$", text, re.MULTILINE)


def test_a_run_without_history_and_one_without_anything() -> None:
    nothing = render_html(collect_record())
    assert "Nothing has been compiled with liteattention" in nothing
    Page(nothing)
    model = tiny_wan()
    denoise(compiled(model), noise(0), PROMPTS, 2)
    html = render_html(collect_record(model))
    assert "options={'history': True}" in html
    assert "<svg" not in html
    Page(html)
    assert "density per step" not in render_text(collect_record(model))


def test_every_string_is_escaped_and_nothing_comes_from_elsewhere() -> None:
    html = render_html(invented(NASTY))
    page = Page(html)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 15
    assert set(page.tags).isdisjoint({"script", "link", "img", "iframe", "object", "image", "use"})
    assert {name for name, _ in page.attributes}.isdisjoint({"href", "src", "srcset", "onload", "style"})
    assert not re.search(r"https?:|url\(|@import", html)
    plain = Page(render_html(invented()))
    assert plain.tags == page.tags
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_shown_values_of_an_invented_run() -> None:
    html = render_html(invented())
    text = " ".join(Page(html).text)
    assert "70.0%" in text  # (1 + 1 + 0.5 + 0.75 + 0.25) / 5
    assert "attn, step 2: no state used" in text
    assert "1.0 s" in text
    opacities = re.findall(r'class="c"[^>]*fill-opacity="([\d.]+)"', html)
    assert opacities == ["1.000", "0.500", "0.750", "0.250", "1.000"]  # the last: the only error, which is the largest
    assert "100.0% of them are within their budget" in text


def test_mean_history() -> None:
    record = invented()
    more = Stats((*record.stats.streams, StreamStats("b", 0, 0.5, 4, 1, 6, 0, 64, (0.5, 0.5, 0.25, 0.125))))
    assert more.mean_history(0) == (0.75, 0.5, 0.375, 0.125)
    assert more.mean_history(1) == (0.75, 0.25)
    assert more.mean_history(2) == ()


STREAM = asdict(StreamStats("blocks.0", 0, 0.5, 1, 1, 1, 0, 64, (0.5,)))
WRONG_FILES: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ([1], "whose 'format' is 'lite-compile run'"),
    ({"format": "another"}, "whose 'format' is 'lite-compile run'"),
    ({"format": "lite-compile run", "version": 99}, "version 99 of the format; this lite-compile reads 1"),
    ({"format": "lite-compile run", "version": 1}, "damaged.*KeyError"),
    ({"streams": [{"layer": 1}]}, "damaged"),
    ({"graphs": [{"clock": "x", "settings": [], "sites": [{"reason": "bored"}]}]}, "damaged.*bored"),
    ({"environment": 3}, "damaged"),
    ({"streams": [{**STREAM, "stream": "<b>"}]}, "damaged.*<b>"),
    ({"streams": [{**STREAM, "history": ["x"]}]}, "damaged.*'x'"),
    ({"streams": [{**STREAM, "history": [math.nan]}]}, "damaged.*nan"),
    ({"streams": [{**STREAM, "dropped_mass": [[math.nan, 0]]}]}, "damaged.*nan"),
    ({"streams": [{**STREAM, "dropped_mass": [3]}]}, "damaged"),
    ({"streams": [{**STREAM, "steps": None}]}, "damaged"),
    ({"thresholds": [{"layer": "a"}]}, "damaged.*values"),
    ({"ranges": [["must_skip"]]}, "damaged"),
    ({"errors": {**asdict(step_errors("x")), "fractions": [0.0]}}, "damaged.*another number of steps"),
    ({"errors": {**asdict(step_errors("x")), "budget": [math.inf, 0.5]}}, "damaged.*inf"),
    ({"step_seconds": [math.inf]}, "damaged.*inf"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_FILES)
def test_wrong_files(content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, dict) and "format" not in content:
        content = {**json.loads(to_json(invented())), **content}
    path = tmp_path / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"run\.json: .*{message}.*allowed: a file of lite_compile.save_report"):
        read_record(path)


def test_what_is_no_text_becomes_one() -> None:
    setting = {"name": 1, "value": 2, "changed": True}
    content = {**json.loads(to_json(invented())), "streams": [{**STREAM, "layer": 7}]}
    content["graphs"] = [{"clock": "x", "sites": [], "settings": [setting]}]
    record = from_json(json.dumps(content))
    assert "<code>2</code>" in render_html(record)
    assert record.stats.streams[0].layer == "7"


def test_seconds_may_come_from_an_iterator() -> None:
    assert collect_record(step_seconds=(second for second in (1.0, 2.0))).step_seconds == (1.0, 2.0)  # type: ignore[arg-type]


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'run.pdf'; allowed: a name that ends with .html, .htm, .txt, .json"):
        lite_compile.save_report("run.pdf")
    with pytest.raises(ValueError, match=r"step_seconds is \[nan\]; allowed"):
        lite_compile.save_report(tmp_path / "run.html", step_seconds=[float("nan")])
    with pytest.raises(TypeError, match="pass the denoiser itself"):
        lite_compile.save_report(tmp_path / "run.html", "pipe")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_settings_say_what_differs_from_the_defaults() -> None:
    model = tiny_wan()
    denoise(torch.compile(model, backend="liteattention", options=OPTIONS), noise(0), PROMPTS, 2)
    (settings,) = collect_record(model).settings
    assert {s.name: s.value for s in settings if s.changed} == {
        "threshold": "-6.0",
        "min_seq_len": "64",
        "inner": "'eager'",
    }
