"""Tests of baton.bench."""
