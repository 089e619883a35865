"""Where ranks run: start or join Ray, place the workers, watch them, and replace those that are lost.

Begin with `gang`: it places the actors, joins them and recovers a run from failures (`gang.supervisor`). `failures`
detects them: it finds out which rank failed first or holds up the others. `ray` starts or joins Ray for a driver,
`nodes` makes machines into a Ray cluster, `machine` has processes, tokens and signals of this machine. `config` has the
settings, without Ray and torch.

What a lost worker triggers: `failures.calls` detects it and names the rank that failed first, `gang.supervisor` records
that and asks `gang.policy` what to do, `gang.gang` replaces the worker or shrinks, and `runtime.job.training_job` gives
the new gang the state of the last saved step.
"""
