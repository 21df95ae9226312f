"""Models over to this package's ops and back: modules, heads, and calls of torch.nn.functional."""
