"""Plain-PyTorch references of the ops: what the kernels are compared with, and what runs where there is no kernel."""
