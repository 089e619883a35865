"""Where ranks run: start or join Ray, place the workers, watch them, and replace those that are lost.

Begin with `gang`: it places the actors, joins them and recovers a run from failures (`gang.supervisor`). `failures`
detects them: it finds out which rank failed first or holds up the others. `ray` starts or joins Ray for a driver,
`nodes` makes machines into a Ray cluster, `machine` has processes, tokens and signals of this machine. `config` has the
settings, without Ray and torch.

What a lost worker triggers: `failures.calls.call_all` detects it and raises GangFailed, the rank that failed first in
front. `gang.supervisor.Supervisor._plan_recovery` asks `gang.policy.decide` whether to go on. If so, `gang.gang.Gang`
replaces processes (`form_again`; with GPUs all of them) or goes on with fewer (`shrink`).
`runtime.job.training_job.TrainingJob.prepare_attempt` chooses the newest saved state, in memory or on disk, and each
rank loads it in `workers.worker.Worker.train`.
"""
