"""What talks to torch.distributed."""
