"""Bases, methods and how they are put on: what is trained."""
