"""What the user starts: the command `trimtab`, its settings, the training job, and what reads a run directory.

`cli` chooses one of the `commands`; `settings` checks what was asked for; `job` trains; `runs` finds and locks run
directories; `report` reads and reports them; `terminal` talks to the person in front of it. What is listed here keeps
its name and its meaning.
"""

from typing import TYPE_CHECKING

from dispatch.public import lazily

if TYPE_CHECKING:
    from runtime.commands.replay.score_trace import read_scores
    from workers.model.families.streaming import stream_weights
    from workers.record.run_log import read_events, read_load_history, read_metrics

__all__ = ["read_metrics", "read_events", "read_load_history", "read_scores", "stream_weights"]

__getattr__ = lazily(
    __name__,
    {
        "read_metrics": "workers.record.run_log",
        "read_events": "workers.record.run_log",
        "read_load_history": "workers.record.run_log",
        "read_scores": "runtime.commands.replay.score_trace",
        "stream_weights": "workers.model.families.streaming",
    },
)
