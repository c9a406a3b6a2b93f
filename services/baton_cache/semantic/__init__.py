"""The semantic cache: the stored answer of a question that asks the same in other words."""
