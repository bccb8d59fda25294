"""Everything that made the bundled tutor: corpus, tokenizer, training and evaluation."""
