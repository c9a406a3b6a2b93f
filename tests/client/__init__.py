"""Tests of baton.client."""
