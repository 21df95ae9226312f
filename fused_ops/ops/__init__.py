"""The ops, a package each; one that is made of others imports them, and never the other way round."""
