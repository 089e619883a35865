"""The page around a report's figures and charts. Follows the reader's light or dark setting; prints in light."""

from string import Template

from runtime.report.chart_style import DARK_THEME, THEME


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


_STYLE = f"""
:root {{ color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --line: #dfe3e8; {_variables(THEME)} }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --page: #14171b; --card: #1c2026; --line: #2f353d; {_variables(DARK_THEME)} }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 28px 20px 48px; }}
h1 {{ font-size: 26px; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 17px; margin: 34px 0 10px; }}
.state {{ font-size: 13px; font-weight: 600; padding: 2px 10px; border-radius: 10px; margin-left: 10px;
  vertical-align: middle; border: 1px solid var(--line); color: var(--muted); }}
.state.finished {{ color: var(--green); }} .state.failed {{ color: var(--red); }}
.summary {{ color: var(--muted); margin: 4px 0 20px; }}
.grid {{ display: grid; gap: 14px; }}
.cards {{ grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }}
.charts {{ grid-template-columns: repeat(2, minmax(0, 1fr)); grid-auto-flow: dense; }}
.card, figure {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0; }}
.card {{ padding: 13px 16px; }}
.label {{ color: var(--muted); font-size: 13px; }}
.value {{ font-size: 25px; font-weight: 650; font-variant-numeric: tabular-nums; }}
.good .value {{ color: var(--green); }} .bad .value {{ color: var(--red); }}
.good .value::after {{ content: " ✓"; font-size: 18px; }} .bad .value::after {{ content: " ✗"; font-size: 18px; }}
.note {{ color: var(--muted); font-size: 12.5px; }}
figure {{ padding: 14px 16px 12px; break-inside: avoid; }}
figure.wide {{ grid-column: 1 / -1; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figure svg text {{ font-family: inherit !important; }}
figure svg image {{ image-rendering: pixelated; }}
figcaption {{ color: var(--muted); font-size: 12.5px; margin-top: 8px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
td {{ padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }}
td:first-child, .events td:nth-child(2) {{ color: var(--muted); }}
td:first-child, .events td:nth-child(-n+3) {{ white-space: nowrap; }}
.events pre {{ white-space: pre-wrap; font-size: 12px; margin: 6px 0; }}
.config tbody {{ display: block; columns: 2; column-gap: 40px; }}
.config tr {{ display: flex; justify-content: space-between; break-inside: avoid;
  border-bottom: 1px solid var(--line); }}
.config td {{ border: 0; padding-right: 0; }} .config td + td {{ text-align: right; padding-left: 16px; }}
@media (max-width: 800px) {{
  .charts {{ grid-template-columns: minmax(0, 1fr); }} .config tbody {{ columns: 1; }}
}}
"""

PAGE = Template(f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: training report</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>$title<span class="state $state">$state</span></h1>
<p class="summary">$summary</p>
<section class="grid cards">
$headlines
</section>
<h2>Charts</h2>
<section class="grid charts">
$charts
</section>
<h2>Events</h2>
<div class="scroll"><table class="events"><tbody>
$events
</tbody></table></div>
<h2>Configuration</h2>
<div class="scroll"><table class="config"><tbody>
$config
</tbody></table></div>
</main>
</body>
</html>
""")
