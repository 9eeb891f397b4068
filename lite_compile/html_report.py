"""A recorded run as one HTML page that needs nothing else: no scripts, fonts, pictures or addresses from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .decisions import SiteReport
from .in_force import FRACTIONS
from .layer_stats import StreamStats
from .run_record import RunRecord, Setting
from .svg_charts import bar_chart, heat_map, line_chart

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--muted:#59636f;--paper:#fff;--card:#f4f6f9;--rule:#dde2e8;
--computed:#20466b;--skipped:#eceff3;--s0:#20466b;--s1:#c8642b;--s2:#3f8f5f;--s3:#8a5a9e;--good:#1d7a46;--warn:#a2560f}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ee;--muted:#9aa5b1;--paper:#14181d;--card:#1d232a;--rule:#323a44;
--computed:#8fc1f0;--skipped:#232a32;--s0:#8fc1f0;--s1:#f0945a;--s2:#6cc692;--s3:#c59adb;--good:#6cc692;--warn:#f0b072}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem 1rem 3rem;max-width:68rem;color:var(--ink);background:var(--paper);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2rem 0 .5rem;padding-top:.7rem;border-top:1px solid var(--rule)}
h3{font-size:.95rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0 .8rem}.m,p.m{color:var(--muted)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:1.1rem 0}
.cards div{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
.cards b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
.cards span{color:var(--muted);font-size:.85rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;margin:.4rem 0 1rem}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.28rem .7rem .28rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--muted);font-weight:600;white-space:nowrap}
td{white-space:nowrap}td.w{white-space:normal;min-width:14rem;overflow-wrap:anywhere}
.yes{color:var(--good)}.no{color:var(--warn)}code{font-size:.92em;overflow-wrap:anywhere}
svg{display:block;font:11px system-ui,sans-serif}
svg text{fill:var(--ink)}svg text.m{fill:var(--muted)}
.z{fill:var(--skipped)}.c{fill:var(--computed)}.u{fill:var(--paper);stroke:var(--rule)}.b{fill:var(--s0)}
.g{stroke:var(--rule)}.l{fill:none;stroke-width:2}
.fit svg{max-width:100%;height:auto}polyline.s1,polyline.s3{stroke-dasharray:7 4}
polyline.s0{stroke:var(--s0)}polyline.s1{stroke:var(--s1)}polyline.s2{stroke:var(--s2)}polyline.s3{stroke:var(--s3)}
circle.s0{fill:var(--s0)}circle.s1{fill:var(--s1)}circle.s2{fill:var(--s2)}circle.s3{fill:var(--s3)}
.key{display:inline-block;width:6rem;height:.7rem;border-radius:.2rem;vertical-align:middle;margin:0 .4rem;
background:linear-gradient(to right,var(--skipped),var(--computed))}
summary{cursor:pointer;color:var(--muted)}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_html(record: RunRecord) -> str:
    """The whole page."""
    title = escape(record.title)
    body = (
        f'<h1>{title}</h1><p class="m">liteattention, {escape(record.created)}</p>{_cards(record)}{_density(record)}'
        f"{_dropped(record)}{_thresholds(record)}{_errors(record)}{_time(record)}"
        f"{_sites(record)}{_settings(record)}{_environment(record)}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _cards(record: RunRecord) -> str:
    streams, report = record.stats.streams, record.report
    cards = [(f"{len(report.rewritten)} of {len(report.sites)}", "attention sites rewritten")]
    if streams:
        cards.append((f"{record.stats.density:.1%}", "of the tiles computed by the last calls"))
        if any(stream.history for stream in streams):
            cards.append((f"{_overall(streams):.1%}", "computed in the whole generation"))
        cards.append((str(record.steps), "steps of this generation"))
        cards.append((str(len({stream.stream for stream in streams})), "guidance streams"))
        cards.append((f"{record.state_bytes / 2**20:.1f} MiB", "of skip states"))
    if record.step_seconds:
        cards.append((f"{sum(record.step_seconds):.1f} s", "for all steps"))
    return '<div class="cards">' + "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in cards) + "</div>"


def _overall(streams: Sequence[StreamStats]) -> float:
    """Mean density over layers, streams and steps; a step that used no state counts as 1."""
    values = [1.0 if density is None else density for stream in streams for density in stream.history]
    return sum(values) / len(values)


def _density(record: RunRecord) -> str:
    streams = record.stats.streams
    if not streams:
        return _section("Density", "<p>No compiled model has run, or nothing was rewritten; see the sites below.</p>")
    numbers = sorted({stream.stream for stream in streams})
    if not any(stream.history for stream in streams):
        hint = "<p>Only the last call of each layer is known: compile with <code>options={'history': True}</code>.</p>"
        rows = [[escape(s.layer), str(s.stream), f"{s.density:.3f}", str(s.steps)] for s in streams]
        return _section("Density", hint + _table(["layer", "stream", "density", "steps"], rows))
    content = (
        "<p>Share of the tiles of QK<sup>T</sup> that each layer computed at each step of this generation: skipped "
        '<span class="key"></span> computed. Hollow cells used no state, and were dense.</p>'
    )
    means = [(number, record.stats.mean_history(number)) for number in numbers]
    content += "<h3>Mean over the layers</h3>" + _fit(line_chart(means, "mean density of each stream per step"))
    for number in numbers:
        shown = [(stream.layer, stream.history) for stream in streams if stream.stream == number and stream.history]
        if shown:
            content += f"<h3>Stream {number}</h3>" + _scroll(heat_map(shown, f"density of stream {number}"))
    steps = max(len(stream.history) for stream in streams)
    header = ["layer", "stream", *(str(step + 1) for step in range(steps))]
    numbers_of = [
        [escape(s.layer), str(s.stream), *("" if d is None else f"{d:.3f}" for d in s.history)] for s in streams
    ]
    return _section(
        "Density", content + f"<details><summary>As numbers</summary>{_table(header, numbers_of)}</details>"
    )


def _dropped(record: RunRecord) -> str:
    streams = [stream for stream in record.stats.streams if stream.dropped_mass]
    if not streams:
        return ""
    highest = max((entry[0] for stream in streams for entry in stream.dropped_mass if entry is not None), default=0.0)
    content = (
        "<p>Share of the softmax that each layer skipped at each step, mean over sampled queries: nothing "
        f'<span class="key"></span> {highest:.2e}. Hollow cells used no state, and dropped nothing.</p>'
    )
    for number in sorted({stream.stream for stream in streams}):
        shown = [
            (s.layer, [None if e is None else e[0] for e in s.dropped_mass]) for s in streams if s.stream == number
        ]
        chart = heat_map(shown, f"dropped softmax mass of stream {number}", highest or 1.0, ".2e")
        content += f"<h3>Stream {number}</h3>{_scroll(chart)}"
    steps = max(len(stream.dropped_mass) for stream in streams)
    header = ["layer", "stream", *(str(step + 1) for step in range(steps))]
    numbers = [
        [escape(s.layer), str(s.stream), *("" if e is None else f"{e[0]:.1e} ({e[1]:.1e})" for e in s.dropped_mass)]
        for s in streams
    ]
    summary = "<summary>As numbers, with the query that loses most</summary>"
    return _section("Dropped mass", f"{content}<details>{summary}{_table(header, numbers)}</details>")


def _thresholds(record: RunRecord) -> str:
    known = record.in_force
    if not known.thresholds and not known.ranges:
        return ""
    content = ""
    if known.thresholds:
        content += (
            "<p>In log2 units along the trajectory, as the last call of each layer followed them, whether the options "
            "or <code>set_threshold</code> said so.</p>"
        )
        header = ["layer", *(f"at {fraction:.0%}" for fraction in FRACTIONS), "given by"]
        rows = [
            [*map(escape, (row.layer, *row.values)), f"<code>{escape(row.given)}</code>"] for row in known.thresholds
        ]
        content += _table(header, rows, wide=(len(header) - 1,))
    if known.ranges:
        rows = [[escape(name), f"<code>{escape(value)}</code>"] for name, value in known.ranges]
        content += "<p>Ranges of keys that were followed:</p>" + _table(["", ""], rows, wide=(1,))
    return _section("Thresholds" if known.thresholds else "Ranges of keys", content)


def _errors(record: RunRecord) -> str:
    errors = record.in_force.errors
    if errors is None or not errors.layers:
        return ""
    highest = max((error for error in errors.worst if error is not None), default=0.0)
    met = "" if errors.met is None else f" {errors.met:.1%} of them are within their budget."
    content = (
        f"<p>{escape(errors.metric)} error of each layer's attention output against dense attention of the same q, k "
        f'and v, the worst of all streams and prompts ({escape(errors.source)}): nothing <span class="key"></span> '
        f"{highest:.2e}.{met} Hollow cells used no state.</p>"
    )
    chart = heat_map(errors.layers, f"{errors.metric} error per step", highest or 1.0, ".2e")
    header, *rows = ([escape(cell) for cell in row] for row in errors.rows())
    summary = "<summary>As numbers, by fraction of the trajectory</summary>"
    return _section("Error per step", f"{content}{_scroll(chart)}<details>{summary}{_table(header, rows)}</details>")


def _time(record: RunRecord) -> str:
    if not record.step_seconds:
        return ""
    return _section("Time per step", _fit(bar_chart(record.step_seconds, "seconds", "seconds per step")))


def _sites(record: RunRecord) -> str:
    if not record.report.graphs:
        return _section("Attention sites", "<p>Nothing has been compiled with liteattention in this process.</p>")
    content = ""
    for number, graph in enumerate(record.report.graphs):
        done = sum(site.rewritten for site in graph.sites)
        content += f"<h3>Graph {number}: {done} of {len(graph.sites)} rewritten</h3><p>Clock: {escape(graph.clock)}</p>"
        if graph.sites:
            header = ["layer", "decision", "q", "k", "dtype", "kernel", "always computed", "reason"]
            content += _table(header, list(map(_site, graph.sites)), wide=(7,))
    return _section("Attention sites", content)


def _site(site: SiteReport) -> list[str]:
    reason = "" if site.reason is None else site.reason.value
    shapes = ["x".join(map(str, shape)) for shape in (site.q_shape, site.k_shape)]
    ranges = ", ".join(f"{start}:{end}" for start, end in site.protected)
    cells = [*shapes, site.dtype, site.kernel, ranges, f"{reason}: {site.detail}" if site.detail else reason]
    decision = f'<span class="{"yes" if site.rewritten else "no"}">{site.decision}</span>'
    return [escape(site.layer), decision, *map(escape, cells)]


def _settings(record: RunRecord) -> str:
    known = [settings for settings in record.settings if settings]
    if not known:
        return ""
    content = ""
    for number, settings in enumerate(record.settings):
        if not settings or (number and settings in record.settings[:number]):
            continue
        graphs = [str(other) for other, same in enumerate(record.settings) if same == settings]
        content += f"<h3>Graph{'s' if len(graphs) > 1 else ''} {', '.join(graphs)}</h3>"
        content += _table(["option", "value", ""], list(map(_setting, settings)), wide=(1,))
    return _section("Settings", content)


def _setting(setting: Setting) -> list[str]:
    return [escape(setting.name), f"<code>{escape(setting.value)}</code>", "changed" if setting.changed else ""]


def _environment(record: RunRecord) -> str:
    rows = [[escape(name), escape(value)] for name, value in record.environment.items()]
    return _section("Machine and versions", _table(["", ""], rows, wide=(1,)))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _fit(content: str) -> str:
    return f'<div class="fit">{content}</div>'


def _scroll(content: str) -> str:
    return f'<div class="scroll">{content}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], wide: Sequence[int] = ()) -> str:
    """Cells are HTML already; `wide` columns wrap."""
    head = "".join(f"<th>{cell}</th>" for cell in header) if any(header) else ""
    lines = [
        "<tr>"
        + "".join(f'<td class="w">{c}</td>' if i in wide else f"<td>{c}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    return _scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>")
