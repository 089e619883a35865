"""The live page of runs, which `trimtab watch RUN` serves on loopback. It only reads run directories.

Begin with `watched_run`: a run as the page sees it, kept up to date by polling its files. Its parts are `metrics` (the
curves), `load_file` (heat maps of the load), `event_log` (state, ranks, events), `json_file` (the present activity of
each rank, the text of the run), `sample_file` (generated texts) and `settings_file`. These use `buckets` (the bounded
memory of long curves), `curves` (lines of metrics.jsonl as rows of a table), `load_codes` (loads as codes of colours),
`tail` (lines as they are appended), `spread` (a few lines of a long file, evenly spaced), `regular_file` and `plain`
(safe reading of a directory that may come from anybody).

`answers` turns all of this into the numbers that charts draw; report.html uses them too.

`follower` polls all runs on a thread. `app` answers requests, behind `guard`, which checks the token and the origin of
each; `exposition` is the page for Prometheus. `serve` binds the address and prints the URL; `packages` checks that the
web server is installed. The page itself is in `static/`; it needs no build step and no network: `overview.js` lists the
curves of its first tab, `balance.js` and `cluster.js` those of the others, `chart.js` draws one.
"""
