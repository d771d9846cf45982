"""How fast decode is: against the machine's own limits, measured in the same run, and against other libraries.

`make bench` runs it; `python -m benchmarks --help` lists its options. Read run.py first.
"""
