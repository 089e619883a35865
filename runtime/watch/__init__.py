"""The live page of runs: `trimtab watch RUN` serves it on loopback. It reads run directories alone and writes nothing.

Begin with `watched_run`: a run as the page sees it, kept up to date by polling its files. It puts together `metrics`
(the curves), `load_file` (heat maps of the load), `event_log` (state, ranks, events), `json_file` (what each rank is
in, and what text the run reads), `sample_file` (texts that it continues) and `settings_file`. Below them: `buckets` is
the bounded memory of long curves, `curves` makes rows of lines, `load_codes` colours of loads; `tail` reads lines as
they are appended, `spread` a few lines of all of a long file at once, and `regular_file` opens files of a directory
that may be anybody's; `plain` makes values of theirs fit to be sent.

`answers` makes of them the numbers that charts draw; report.html has the same ones.

`follower` polls all runs on a thread. `app` answers requests with what they hold, behind `guard`, which decides who may
ask; `exposition` tells Prometheus. `serve` binds the address and tells the URL; `packages` says what it needs. The page
itself is in `static/`; it needs no build step and no network.
"""
