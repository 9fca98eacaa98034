"""The product's figures, each beside its peer in the same run."""
