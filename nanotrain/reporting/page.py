"""The page around the charts: its style, its script, and small pieces of HTML. Whatever comes from a run goes through `escape`."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable

STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--text:#171b22;--muted:#586172;--line:#d8dce3;--grid:#e9ebef;--ok:#17663a;--look:#8f4a00;
--tint:#eef1f5;--band:rgb(23 128 72/.13);--ramp:.5;
--c1:#0b62b8;--c2:#b4460a;--c3:#0a7556;--c4:#9b3f94;--c5:#7a5c00;--c6:#4b4fc4;--c7:#b3275a;--c8:#4d5766}
@media(prefers-color-scheme:dark){:root{--page:#0f1216;--card:#171b21;--text:#e7eaef;--muted:#a0a9b7;--line:#303741;--grid:#242a32;--ok:#6fd39a;
--look:#f2b866;--tint:#20262e;--band:rgb(80 200 130/.13);--ramp:.76;
--c1:#62b0f5;--c2:#ff9a5c;--c3:#3fc99a;--c4:#e58fdd;--c5:#e0b93d;--c6:#a5a8ff;--c7:#ff8fb3;--c8:#aab4c3}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1240px;margin:0 auto;padding:36px 20px 64px}
h1{font-size:clamp(26px,4vw,36px);line-height:1.15;letter-spacing:-.02em;margin:2px 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;letter-spacing:-.01em;margin:40px 0 12px}
h3{font-size:15px;margin:0}
p{margin:0}
a{color:var(--c1)}
.kicker,.note,.missing{color:var(--muted);font-size:13px}
.lead{color:var(--muted);max-width:78ch;overflow-wrap:anywhere}
.badge{display:inline-block;margin-top:12px;padding:3px 12px;border:1px solid currentColor;border-radius:99px;font-size:13px;font-weight:600;
max-width:100%;overflow-wrap:anywhere}
.finished{color:var(--ok)}.running{color:var(--c1)}.failed,.interrupted{color:var(--look)}
.tiles,.health,.charts{display:grid;gap:12px;padding:0;margin:0;list-style:none}
.tiles{grid-template-columns:repeat(4,1fr);margin-top:26px}
.tiles>*,.health>*,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;min-width:0}
.tiles>*{padding:12px 14px}
.tiles dt{color:var(--muted);font-size:13px}
.tiles dd{margin:0;font-size:23px;font-weight:650;letter-spacing:-.015em;line-height:1.3}
.tiles dd+dd{font-size:13px;font-weight:400;letter-spacing:0;color:var(--muted);line-height:1.4}
.health{grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr))}
.health>*{padding:10px 14px;border-left-width:4px;font-size:13px}
.health b{display:flex;justify-content:space-between;gap:8px;font-size:14px}
.health .state{white-space:nowrap}
.health span{display:block}
.health .band-text{color:var(--muted)}
.ok{border-left-color:var(--ok)}.look{border-left-color:var(--look)}
.ok .state,td.ok{color:var(--ok)}.look .state,td.look{color:var(--look)}.none .state,td.none{color:var(--muted);font-weight:400}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
.card{margin:0;padding:16px 16px 12px}
.charts>.card{display:flex;flex-direction:column}
.charts>.card>.plot:not(.lanes){flex:1 0 auto}
.wide{grid-column:1/-1}
figcaption{margin-bottom:6px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:6px 0 0;padding:0;font-size:13px}
.legend li{display:flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}
.legend svg{flex:none}
.legend .swatch{fill:var(--c)}
.sub{font-size:13px;color:var(--muted);margin-top:8px}
.plot{position:relative;margin:14px 24px 30px 56px;outline-offset:6px;touch-action:pan-y;border-radius:2px;cursor:crosshair}
.lanes{margin-left:84px}
.frame{position:absolute;inset:0;width:100%;height:100%;overflow:visible;font-size:12px}
.ink{overflow:visible}
.ink *,.legend path{vector-effect:non-scaling-stroke}
.tick{fill:var(--muted);text-anchor:end}
.mid{text-anchor:middle}
.end{fill:var(--c);font-weight:650;paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.grid{stroke:var(--grid)}.axis{stroke:var(--line)}
.band{fill:var(--band)}
.line,.faint,.dots{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.faint{stroke-width:1;opacity:.36}.dots{stroke-width:1.25;opacity:.75}
.points{fill:none;stroke:var(--c);stroke-width:6;stroke-linecap:round}
.area{fill:var(--c);fill-opacity:.72}
.mark{stroke:var(--c);stroke-width:2;fill:none}
.cross{stroke:var(--text);stroke-opacity:.45;stroke-dasharray:3 3}
.spot{fill:var(--card);stroke:var(--c);stroke-width:2}
.bar{display:block;width:100%;height:20px;border-radius:4px;background:var(--tint);margin:4px 0 10px}
.bar rect{fill:var(--c);fill-opacity:.85}
#tip{position:absolute;z-index:2;pointer-events:none;max-width:min(330px,calc(100vw - 24px));background:var(--card);color:var(--text);
border:1px solid var(--line);border-radius:8px;box-shadow:0 6px 24px rgb(0 0 0/.18);padding:8px 11px;font-size:13px;line-height:1.45}
#tip[hidden]{display:none}
#tip b{display:block}
#tip div{display:flex;gap:14px;justify-content:space-between;align-items:baseline}
#tip div>span:first-child::before{content:"";display:inline-block;width:9px;height:9px;border-radius:2px;background:var(--c);margin-right:7px}
#tip div>span:first-child{overflow-wrap:anywhere}
#tip div>span:last-child{white-space:nowrap;font-weight:600}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:13px;width:100%}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--muted);font-weight:500}
tr:last-child>*{border-bottom:0}
td small,th small{color:var(--muted);font-size:12px;display:block}
.cell{overflow-wrap:anywhere;min-width:7em}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:0 16px;margin-top:10px}
details details,.card details{border:0;padding:0;margin:0}
.legend .faint{opacity:.65;stroke-width:1.5}
summary{padding:11px 0;font-weight:600;cursor:pointer}
summary span{font-weight:400;color:var(--muted)}
details>:last-child{margin-bottom:14px}
details>summary:last-child{margin-bottom:0}
pre{margin:0;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.sample{margin-top:10px}
.sample pre{margin-top:8px;max-height:24em;overflow-y:auto}
.sample mark{background:none;color:var(--c1);font-weight:650}
footer{margin-top:40px;color:var(--muted);font-size:13px}
@media(max-width:560px){main{padding:22px 12px 40px}.card{padding:14px 12px 8px}.plot{margin-left:50px;margin-right:20px}.lanes{margin-left:80px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}.tiles dd{font-size:20px}.health,.charts{gap:8px}}
"""

SCRIPT = """
"use strict";
(() => {
  const {xs, plots} = JSON.parse(document.getElementById("figures").textContent);
  const tip = document.getElementById("tip"), frames = [...document.querySelectorAll("[data-plot]")];
  const grouped = v => v.toLocaleString("en-US", {maximumFractionDigits: 0});
  const number = v => v === 0 ? "0" : Math.abs(v) >= 1e5 ? grouped(v) : Math.abs(v) < 1e-3 ? v.toExponential(3) : String(+v.toPrecision(5));
  const write = {
    number, small: v => v.toExponential(3), percent: v => +v.toPrecision(4) + "%", mark: () => "",
    seconds: v => Math.abs(v) < 1 ? +(1000 * v).toPrecision(4) + " ms" : +v.toPrecision(4) + " s",
    bytes: v => (v / 2 ** 30).toFixed(2) + " GiB",
  };
  const nearest = (list, x) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (list[middle] <= x) low = middle; else high = middle; }
    return Math.abs(list[high] - x) < Math.abs(list[low] - x) ? high : low;
  };
  const share = (range, v, log) => log ? Math.log(v / range[0]) / Math.log(range[1] / range[0]) : (v - range[0]) / (range[1] - range[0]);
  const draw = (frame, kind, attributes) => {
    const mark = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) mark.setAttribute(name, value);
    frame.querySelector(".frame").append(mark);
    return mark;
  };
  const element = (kind, text) => { const made = document.createElement(kind); made.textContent = text; return made; };
  let drawn = [], at = null;

  const hide = () => { drawn.forEach(mark => mark.remove()); drawn = []; tip.hidden = true; at = null; };

  const show = (frame, wanted) => {
    hide();
    const plot = plots[frame.dataset.plot];
    if (!plot.series.length) return;
    const found = plot.series.map(s => { const i = nearest(xs[s.x], wanted); return {s, i, x: xs[s.x][i]}; });
    const x = found.reduce((best, f) => Math.abs(f.x - wanted) < Math.abs(best.x - wanted) ? f : best).x;
    const near = 0.006 * (plot.x[1] - plot.x[0]);
    at = x;
    tip.replaceChildren(element("b", plot.unit + " " + grouped(x)));
    for (const other of frames) {
      const its = plots[other.dataset.plot], left = share(its.x, x);
      if (its.unit === plot.unit && left >= 0 && left <= 1)
        drawn.push(draw(other, "line", {class: "cross", x1: 100 * left + "%", x2: 100 * left + "%", y1: 0, y2: "100%"}));
    }
    for (const {s, i, x: own} of found) {
      const away = Math.abs(own - x) > near;
      if (away && s.mark) continue;
      const row = document.createElement("div");
      row.style.setProperty("--c", s.colour);
      row.append(element("span", s.name), element("span", write[plot.kind](s.y[i]) + (away || s.mark ? " at " + grouped(own) : "")));
      tip.append(row);
      const top = 1 - share(plot.y, s.at ? s.at[i] : s.y[i], plot.log);
      if (!away && !s.mark && top >= 0 && top <= 1) {
        const spot = draw(frame, "circle", {class: "spot", r: 4, cx: 100 * share(plot.x, own) + "%", cy: 100 * top + "%"});
        spot.style.setProperty("--c", s.colour);
        drawn.push(spot);
      }
    }
    tip.hidden = false;
    const box = frame.getBoundingClientRect(), line = box.left + box.width * share(plot.x, x), room = document.documentElement.clientWidth;
    let left = line + 14;
    if (left + tip.offsetWidth > room - 8) left = line - 14 - tip.offsetWidth;
    tip.style.left = Math.max(8, Math.min(left, room - 8 - tip.offsetWidth)) + scrollX + "px";
    tip.style.top = box.top + scrollY + 6 + "px";
  };

  for (const frame of frames) {
    const plot = plots[frame.dataset.plot];
    const point = event => {
      const box = frame.getBoundingClientRect(), along = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
      show(frame, plot.x[0] + along * (plot.x[1] - plot.x[0]));
    };
    frame.addEventListener("pointermove", point);
    frame.addEventListener("pointerdown", point);
    frame.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
    frame.addEventListener("blur", hide);
    frame.addEventListener("keydown", event => {
      if (event.key === "Escape") return hide();
      if (!["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key) || !plot.series.length) return;
      event.preventDefault();
      const list = plot.series.map(s => xs[s.x]).reduce((a, b) => b.length > a.length ? b : a);
      const stride = (event.shiftKey ? Math.ceil(list.length / 20) : 1) * (event.key === "ArrowLeft" ? -1 : 1);
      const next = event.key === "Home" || at === null ? 0 : event.key === "End" ? list.length - 1 : nearest(list, at) + stride;
      show(frame, list[Math.max(0, Math.min(list.length - 1, next))]);
    });
  }
  document.addEventListener("pointerdown", event => { if (!event.target.closest("[data-plot]")) hide(); });
})();
"""

_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def escape(text: object) -> str:
    """As text of HTML: no markup, no control characters (their pictures instead), no lone surrogates."""
    return html.escape(str(text).encode("utf-8", "replace").decode().translate(_CONTROLS))


def shortened(text: str, limit: int) -> str:
    """The text, or its beginning and how much more there is."""
    return text if len(text) <= limit else f"{text[:limit]}\n[{len(text) - limit:,} characters more]"


def card(title: str, note: str, body: str, *, key: str, wide: bool = False) -> str:
    """A figure: escaped title and note, over `body`, which is HTML."""
    return (
        f'<figure class="card{" wide" if wide else ""}" id="{key}"><figcaption><h3>{escape(title)}</h3>'
        f'<p class="note">{escape(note)}</p></figcaption>{body}</figure>'
    )


def section(title: str, body: str, *, key: str) -> str:
    """A heading and what stands under it."""
    return f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>'


def details(title: str, remark: str, body: str, *, is_open: bool = False) -> str:
    """What is shown on demand; `body` is HTML."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)} <span>{escape(remark)}</span></summary>{body}</details>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of HTML cells, scrolling by itself where it is too wide; the first of each row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f'<th scope="row">{cell}</th>' if not n else f'<td class="cell">{cell}</td>' for n, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>{f"<thead><tr>{top}</tr></thead>" if top else ""}<tbody>{body}</tbody></table></div>'


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values."""
    return table((), ((escape(name), escape(value)) for name, value in rows))


def page(title: str, body: str, figures: str) -> str:
    """The whole document. Its policy lets no script but its own run, and nothing be fetched."""
    script = re.sub(r"\n\s+", "\n", SCRIPT)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f'<style>{STYLE}</style></head>\n<body><main>{body}</main><div id="tip" hidden></div>\n{figures}\n<script>{script}</script></body></html>\n'
    )
