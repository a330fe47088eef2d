"""Recorded results: reading them, tables, pictures."""
