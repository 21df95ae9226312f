"""Benchmarks of every op against its rivals; ``python -m benchmarks --help`` and benchmarks/README.md say how."""
