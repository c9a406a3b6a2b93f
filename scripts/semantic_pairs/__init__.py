"""Labelled pairs of questions: the same in other words, or something else in nearly the same."""
