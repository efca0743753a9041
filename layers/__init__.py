"""Compiled sequence layers."""
