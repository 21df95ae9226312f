"""Batch normalisation, with the addition and the activation that follow it."""
