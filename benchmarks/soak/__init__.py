"""A long run under random ragged loads, watched for leaks: `python -m benchmarks.soak`."""
