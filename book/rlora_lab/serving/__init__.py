"""Sealed releases of adapters, and their server."""
