"""Text and tokens: tokenizing, chat templates, detokenizing, stop strings. Needs neither torch nor transformers."""
