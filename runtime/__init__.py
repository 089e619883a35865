"""What the user starts: the command `trimtab`, its settings, the training job, and readers of a run directory.

`cli` runs one of the `commands`. `settings` reads and checks the settings of a run, `job` trains it, `runs` finds and
locks its directory, `report` writes its report, `watch` serves its live page, `loggers` sends its metrics to other
tools, and `terminal` writes for people. The names in `__all__` are public: they keep their meaning.
"""

from typing import TYPE_CHECKING

from dispatch.public import lazy_getattr

if TYPE_CHECKING:
    from runtime.commands.replay.score_trace import read_scores
    from workers.model.hugging_face.streaming import stream_weights
    from workers.record.run_log import read_events, read_load_history, read_metrics

__all__ = ["read_metrics", "read_events", "read_load_history", "read_scores", "stream_weights"]

__getattr__ = lazy_getattr(
    __name__,
    {
        "read_metrics": "workers.record.run_log",
        "read_events": "workers.record.run_log",
        "read_load_history": "workers.record.run_log",
        "read_scores": "runtime.commands.replay.score_trace",
        "stream_weights": "workers.model.hugging_face.streaming",
    },
)
