"""One optimizer step of a rank, and the loop around it.

Begin with `step.Trainer.step`: forward and backward over the micro-batches, gradients (`gradients`), update
(`optimizer`, at the rate of `lr_schedule`; `adamw` is the default, `adamw_bf16` keeps less, `muon` makes updates
orthogonal) and the bias of the routers; `offload` keeps the optimizer's state on the host. `training_run` is the loop
from the first step to the last, with evaluations (`evaluation`, and texts that they continue: `samples`) and
checkpoints (`saver` says when); it ends in an `outcome`. `pipeline` runs micro-batches through the stages of several
ranks; `own_part` cuts a batch for ranks that share sequences; `expert_copies` places copies of hot experts.
`rank_state` builds what a rank needs from its `worker_spec`, which is all that the driver tells it; `sharding` divides
the states over the ranks by fully_shard, whose gathers `narrow_gather` makes small. `summed_metrics` declares what is
summed over ranks; `metrics` makes the lines of metrics.jsonl. `aux_losses` are the router losses that are off by
default; `faults` makes ranks fail on purpose, by a `fault_plan`, in tests.
"""
