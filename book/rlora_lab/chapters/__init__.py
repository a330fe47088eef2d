"""Code exported from chapters."""
