"""Mutation tests of the numeric core: `python -m tests.mutation`, or `make mutants`."""
