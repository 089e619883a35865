"""`trimtab chaos`: faults against a real training run.

Begin with `campaign`: it trains an undisturbed run, strikes a second one, and compares the two. `kinds` has the faults
and what a run promises under each; `plan` draws some of them by a seed. A `trial` is one fault and how the run came
through it; `target` is that run, started and resumed as its user would. Faults: `injections` (from outside), `damage`
(files of a run that is down), `second_writer`, `own_ray` (a driver that started Ray itself). Where it all happens: a
`testbed` of `machines`, which are network `namespaces` joined by a `network`, whose `wire` can delay and lose frames.
Afterwards `record` reads both runs, `sameness` and `weights` compare them, and `leftovers` finds what was not tidied
up. `results` and `chart` tell the user; `command` is the command line.
"""
