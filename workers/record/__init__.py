"""The files of a run directory, as a run writes them and as reports read them (docs/run-directory.md). Needs no torch.

Begin with `run_log`: the one writer of metrics, events and load history, and their readers. `append_file` keeps what a
full disk does not take; `atomic_file` replaces a file as a whole. The formats: `record_lines` (JSON lines),
`record_file` (binary records), `sample_log` (JSON lines too), `score_log` and `statistic_log`. `record_check` finds
missing steps; `run_fence` notices that the directory now belongs to another run.
"""
