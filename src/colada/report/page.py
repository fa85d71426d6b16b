"""The looks of the report: one page of its own, readable offline, on a phone and in the dark."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}: evaluation</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --page: #f4f6f8; --paper: #ffffff; --ink: #1d2733; --muted: #5a6572; --grid: #e3e7ec;
  --ours: #2468b4; --published: #d2601a; --truth: #b9c3ce; --right: #1a7f4b; --wrong: #b3362b; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12161b; --paper: #1a2027; --ink: #e6ebf0; --muted: #9aa6b3; --grid: #303943;
  --ours: #6cabec; --published: #f2975a; --truth: #56626f; --right: #5cc98f; --wrong: #f08a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--font); }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 4px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 8px; }
p { margin: 0 0 12px; color: var(--muted); max-width: 76ch; }
dl { display: flex; flex-wrap: wrap; gap: 14px 36px; margin: 0; }
dt { font-size: 12px; color: var(--muted); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.big dd { font-size: 22px; font-weight: 600; }
.card, .scroll { background: var(--paper); border: 1px solid var(--grid); border-radius: 8px; }
.card { padding: 14px 18px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px; text-align: right; border-top: 1px solid var(--grid); white-space: nowrap; }
thead th { border-top: 0; font-weight: 600; font-size: 12px; color: var(--muted); }
tbody th { font-weight: 400; }
th:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 12em; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 10px; font-size: 13px;
  color: var(--muted); }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.legend svg { flex: none; }
.plot { display: grid; grid-template-columns: 9em 1fr 7.5em; align-items: center; column-gap: 14px; }
.plot .name { font-weight: 600; font-size: 14px; }
.plot .value { text-align: right; font-size: 14px; font-variant-numeric: tabular-nums; }
.plot .value small { color: var(--muted); }
.plot svg, .bar svg { display: block; width: 100%; overflow: visible; }
.gridline { stroke: var(--grid); }
.axis { fill: var(--muted); font-size: 11px; }
.ours { stroke: var(--ours); } .ours.dot { fill: var(--ours); stroke: none; }
.bar .ours, .plot .fill { fill: var(--ours); stroke: none; }
.truth { fill: var(--truth); }
.published { stroke: var(--published); fill: none; }
.chance { stroke: var(--ink); stroke-dasharray: 3 3; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px; }
.bar { display: grid; grid-template-columns: 1.4em 1fr 7.4em; align-items: center; column-gap: 8px;
  font-size: 13px; font-variant-numeric: tabular-nums; }
.bar .value { text-align: right; color: var(--muted); }
.sample { margin: 0 0 12px; }
.sample pre { margin: 0 0 8px; padding: 8px 12px; background: var(--page); border-radius: 6px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.sample dl { gap: 4px 28px; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
details { margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
@media (max-width: 640px) {
  main { padding: 20px 14px 48px; }
  .card { padding: 12px; }
  .plot { grid-template-columns: 1fr auto; }
  .plot .track { grid-column: 1 / -1; order: 1; margin: 0 8px 8px; }
}
"""
