"""Backpropagation by hand: a names MLP whose every gradient is derived, checked, fused and used to train."""
