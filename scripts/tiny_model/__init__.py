"""The recipe of the bundled tiny model: corpus, tokenizer, network, training, evaluation, model card."""
