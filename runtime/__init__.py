"""What the user starts: command line, configuration, the job, the coordinator, metrics, reports."""
