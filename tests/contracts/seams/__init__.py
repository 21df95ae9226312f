"""Where other systems of PyTorch meet this package: cases (the calls), oracles (the right answers), systems."""
