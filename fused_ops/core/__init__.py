"""What every op stands on: the library and its ops, the base class of the Functions, checks, and graphs."""
