"""What can be measured. Imports no torch: the options name these."""

PAYLOADS = ("compute", "fp8")
DTYPES = ("float32", "bfloat16")
