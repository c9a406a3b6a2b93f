"""Tests of baton.cli."""
