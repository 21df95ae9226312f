"""Linear cross-entropy: the loss of a linear head without all of its logits at once; it stands on cross-entropy."""
